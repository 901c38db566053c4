"""What a set holds and is not used: a count by reason on the terminal, and every name in a file."""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from cjepa_fast.runtime.files import write_text
from cjepa_fast.runtime.printable import printable

FILE = "unusable.jsonl"  # in a run's folder
NAMED = 20  # files, each on a line of its own; of more the terminal has the counts alone
REASONS = 8  # counted apart


def tell(
    left_out: list[tuple[str, str]], found: int, report: Path, log: Callable[[str], None]
) -> None:
    """Write all (name, reason) to `report`, and log the counts and a few names.

    Where nothing is left out there is no such file. One that cannot be written costs a line.
    """
    if not left_out:
        with contextlib.suppress(OSError):
            report.unlink()
        return
    rows = (json.dumps({"name": name, "why": why}) + "\n" for name, why in left_out)
    try:
        report.parent.mkdir(parents=True, exist_ok=True)
        write_text(report, "".join(rows))
        where = f"all are named in {report}"
    except OSError as error:
        where = f"they could not be written down: {error}"
    log(f"{len(left_out)} of {found} images are left out ({counted(left_out)}); {where}")
    for name, why in left_out if len(left_out) <= NAMED else ():
        log(f"unusable image left out: {printable(name)}: {printable(why)}")


def counted(left_out: list[tuple[str, str]]) -> str:
    """The reasons, without what is of one file alone, the most frequent first."""
    count = Counter(_kind(why) for _, why in left_out)
    said = [f"{kind}: {number:,}" for kind, number in count.most_common(REASONS)]
    rest = count.total() - sum(number for _, number in count.most_common(REASONS))
    return ", ".join([*said, f"others: {rest:,}"] if rest else said)


def _kind(why: str) -> str:
    """A reason up to its details: in brackets, after a colon, or with numbers."""
    return re.split(r" \(|: | \d", printable(why), maxsplit=1)[0]
