"""JSON from files and command lines: whatever is wrong with it is a ValueError."""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:]', re.DOTALL)  # of valid JSON, but for values


def parse(text: str | bytes) -> Any:
    """Raises ValueError for what is no JSON, nested too deeply, or a number of too many digits."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


class Repeated(NamedTuple):
    """A key that stands twice in one object, and the lines where."""

    key: str
    first_line: int
    line: int


def repeated_keys(text: str) -> Iterator[Repeated]:
    """The keys that stand twice in valid JSON, of which `parse` keeps the last value alone."""
    open_objects: list[dict[str, int] | None] = []  # the line of each key; None: an array
    word = ""
    for token in TOKENS.finditer(text):
        match token[0]:
            case "{":
                open_objects.append({})
            case "[":
                open_objects.append(None)
            case "}" | "]":
                open_objects.pop()
            case ":":
                key, line = json.loads(word), text.count("\n", 0, token.start()) + 1
                if key in (lines := open_objects[-1]):
                    yield Repeated(key, lines[key], line)
                lines[key] = line
            case word:
                pass
