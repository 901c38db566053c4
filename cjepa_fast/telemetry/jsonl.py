"""JSONL files: rows added whatever the disk refuses, and read back whatever a crash did to some."""

import errno
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from cjepa_fast.runtime import json_text
from cjepa_fast.runtime.files import write_text
from cjepa_fast.runtime.printable import printable_lines, say


def warn(text: str) -> None:
    say(f"WARNING: {printable_lines(text)}", sys.stderr)


def read_log(path: Path | str, say: Callable[[str], None] = warn) -> list[dict]:
    """The rows of a log.jsonl (or of the run folder that holds one), in order.

    A last line torn by a crash is left out; so is a broken line before it, and say is told. Raises
    FileNotFoundError where there is no log.
    """
    path = Path(path)
    path = path / "log.jsonl" if path.is_dir() else path
    rows, broken = _parsed(path)
    if broken:
        say(f"{path}: {_counted(broken)} left out")
    return rows


def _parsed(path: Path) -> tuple[list[dict], dict[int, str]]:
    """(rows, the broken lines by their number, but for the last one, torn by a crash)."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows, broken = [], {}
    for number, line in enumerate(lines, 1):
        try:
            row = json_text.parse(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step", 0), (int, float)):
            rows.append(row)
        elif number < len(lines):
            broken[number] = line
    return rows, broken


def _counted(broken: dict[int, str]) -> str:
    lines = "1 broken line" if len(broken) == 1 else f"{len(broken)} broken lines"
    return f"{lines} (the first is line {min(broken)})"


def drop_rows_after(path: Path, step: int, say: Callable[[str], None]) -> list[dict]:
    """Cut a log back to the rows up to `step` (-1: none), and those of spikes that a run went back
    from; returns them. The others and broken lines are set aside in files beside it; say is told.
    """
    if not path.exists():
        return []
    rows, broken = _parsed(path)
    kept = [row for row in rows if row.get("step", 0) <= step or row.get("rewound")]
    dropped = (row for row in rows if row.get("step", 0) > step and not row.get("rewound"))
    later = [json.dumps(row) for row in dropped]
    if broken:
        aside = _add(broken.values(), path.with_name(f"{path.name}.broken"))
        say(f"WARNING: {path}: {_counted(broken)} set aside in {aside}")
    if later:
        aside = _add(later, path.with_name(f"{path.name}.abandoned"))
        rows_later = "1 row" if len(later) == 1 else f"{len(later)} rows"
        which = f"after step {step}" if step >= 0 else "of an earlier start"
        say(f"{path}: {rows_later} {which} moved to {aside}")
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept


def _add(lines: Iterable[str], path: Path) -> str:
    """Lines to a file's end; returns its name."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
    return path.name


class JsonlWriter:
    """A JSONL file that is added to. What a full disk refuses is said, kept, and written later, at
    the latest by close()."""

    def __init__(self, say: Callable[[str], None], path: Path):
        self._say, self._path = say, path
        self._waiting: list[str] = []
        self._lock = threading.Lock()  # the loader's thread writes some of them

    def write(self, row: dict) -> None:
        with self._lock:
            self._add(json.dumps(row, allow_nan=False) + "\n")

    def _add(self, line: str) -> None:
        self._waiting.append(line)
        try:
            _append(self._path, "".join(self._waiting).encode())
        except OSError as error:
            if len(self._waiting) == 1:
                self._say(f"WARNING: {self._path} cannot be written ({error}); trying again later")
        else:
            self._waiting.clear()

    def close(self) -> None:
        """Try once more what is still kept; what is refused again is lost, and counted."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        try:
            if waiting:
                _append(self._path, "".join(waiting).encode())
        except OSError as error:
            rows = f"{len(waiting)} row{'s' * (len(waiting) > 1)}"
            self._say(
                f"WARNING: {rows} of {self._path} could not be written, and are lost: {error}"
            )


def _append(path: Path, data: bytes) -> None:
    """All of it or nothing. Unbuffered: what a buffer still holds is written when it is closed."""
    with open(path, "ab", buffering=0) as file:
        whole = file.tell()
        if file.write(data) < len(data):
            file.truncate(whole)  # no torn line stays
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
