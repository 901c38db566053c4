"""Which parameters of a test are `make test`'s, and which `make test-long`'s."""

from collections.abc import Iterable

import pytest


def crossed(rows: dict[str, object], columns: Iterable) -> list:
    """Parameters (row, column) of every pair, the rows by name.

    Of each row and of each column `make test` takes one pair at least, in turn; `make test-long`
    takes the others.
    """
    columns = [*columns]
    pairs = {(k % len(rows), k % len(columns)) for k in range(max(len(rows), len(columns)))}
    return [
        pytest.param(
            row, column, id=f"{name}-{column}",
            marks=() if (index, at) in pairs else pytest.mark.long,
        )
        for index, (name, row) in enumerate(rows.items())
        for at, column in enumerate(columns)
    ]  # fmt: skip
