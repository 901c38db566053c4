"""Processes that are started here end with this one, however it ends: none trains on unseen.

A child learns its parent's number from its environment, and looks at times whether it still has
that parent. What torchrun and the deepspeed launcher start does the same.
"""

import functools
import os
import signal
import threading
import time

from cjepa_fast.runtime import launchers

PARENT = "CJEPA_PARENT"  # the process that starts others
LOOK_S = 1.0


def environment(**own: str) -> dict[str, str]:
    """For a process to be started: this one's, with `own` laid over it."""
    return {**os.environ, **own, PARENT: str(os.getpid())}


@functools.cache  # one watcher is enough
def end_with_parent() -> None:
    """From now on, once the parent is gone this process gets a SIGTERM, which a training takes as
    a request to save and stop. Of no effect where a shell or a batch system is the parent."""
    parent, told = os.getppid(), os.environ.get(PARENT, "")
    if told.isdecimal() and not _runs(int(told)):
        parent = int(told)  # it ended while this process imported its modules
    elif told != str(parent) and not (launchers.by_torchrun() or launchers.by_deepspeed()):
        return
    threading.Thread(target=_watch, args=(parent,), name="parent", daemon=True).start()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os.kill(os.getpid(), signal.SIGTERM)
