"""One run or one packing a folder: a lock that ends with the process, however that ends."""

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from cjepa_fast.runtime import json_text

MOST_BYTES = 4096  # of what a run writes into its lock
_held: dict[str, TextIO] = {}  # by the folder's path; a lock lasts as long as its file is open


@contextlib.contextmanager
def held(folder: Path, said: str) -> Iterator[None]:
    """Within it the folder is held, as by `take`."""
    take(folder, said)
    try:
        yield
    finally:
        _held.pop(os.path.realpath(folder)).close()


def take(run: Path, said: str = "run.dir = {}: a run is writing there") -> None:
    """Make the folder and hold it, if it is not yet held, until release() or the process's end.

    Raises ValueError naming the process that holds it; said: its beginning. A file system without
    locks lets all in.
    """
    if (key := os.path.realpath(run)) in _held:
        return
    run.mkdir(parents=True, exist_ok=True)
    file = open(run / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (it stays open)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            _held[key] = file  # no locks there
            return
        file.seek(0)
        holder = {"pid": "unknown", "host": "unknown"}
        with contextlib.suppress(ValueError, TypeError):
            holder |= json_text.parse(file.read(MOST_BYTES))
        raise ValueError(
            f"{said.format(run)}, process {holder['pid']} on {holder['host']}: wait for it, stop "
            f"it, or choose another folder (if that host is gone: remove {run / '.lock'})"
        ) from None
    _held[key] = file
    _write_holder(file.fileno())


def _write_holder(descriptor: int) -> None:
    """For the message to whoever else wants the folder. On a full disk it names nobody: the lock
    holds all the same, and what needs room there says so."""
    holder = {"pid": os.getpid(), "host": socket.gethostname()}
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(holder).encode())


def release() -> None:
    while _held:
        _held.popitem()[1].close()
