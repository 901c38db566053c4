"""One run a folder: held by a lock that ends with the process, however that ends."""

import contextlib
import errno
import fcntl
import json
import os
import socket
from pathlib import Path

from cjepa_fast.runtime import json_text

MOST_BYTES = 4096  # of what a run writes into its lock
_held: list = []  # open files: a lock lasts as long as its file


def take(run: Path) -> None:
    """Make the folder and hold it, if it is not yet held, until release() or the process's end.

    Raises ValueError naming the process that holds it. A file system without locks lets all in.
    """
    if _held:
        return
    run.mkdir(parents=True, exist_ok=True)
    file = open(run / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (it stays open)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return  # no locks there
        file.seek(0)
        holder = {"pid": "unknown", "host": "unknown"}
        with contextlib.suppress(ValueError, TypeError):
            holder |= json_text.parse(file.read(MOST_BYTES))
        raise ValueError(
            f"run.dir = {run}: a run is writing there, process {holder['pid']} on "
            f"{holder['host']}: wait for it, stop it, or choose another folder (if that host is "
            f"gone: remove {run / '.lock'})"
        ) from None
    file.truncate(0)
    file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    file.flush()
    _held.append(file)


def release() -> None:
    while _held:
        _held.pop().close()
