"""An error that nobody expected: one plain line for the user, all that is known in a file."""

import datetime
import platform
import sys
import tempfile
import traceback
from pathlib import Path

import torch

from cjepa_fast.runtime.printable import say

PACKAGE = Path(__file__).resolve().parents[1]


def summary(error: BaseException) -> str:
    """Its type, its first line, and the line of our code that it came through last."""
    text = str(error).strip().split("\n")[0]
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    ours = [
        f for f in traceback.extract_tb(error.__traceback__) if PACKAGE in Path(f.filename).parents
    ]
    if not ours:
        return what
    file = Path(ours[-1].filename).relative_to(PACKAGE.parent)
    return f"{what} (in {ours[-1].name}, {file} line {ours[-1].lineno})"


def write(
    error: BaseException, folders: list[Path], rank: int, facts: dict[str, str]
) -> Path | None:
    """error_rank_N.txt in the first folder that can be written to, the system's temporary one at
    last: the facts, versions, and the whole traceback. None where there is none: stderr has it."""
    facts = {
        "error": summary(error),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "system": platform.platform(),
        **facts,
    }
    text = "\n".join(f"{name}: {value}" for name, value in facts.items())
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    for folder in (*folders, None):
        try:  # tempfile looks for a folder that can be written to, and may find none
            path = (folder or Path(tempfile.gettempdir())) / f"error_rank_{rank}.txt"
            path.write_text(f"{text}\n\n{trace}", encoding="utf-8")
            return path
        except OSError:
            continue
    say(trace, sys.stderr)
    return None
