"""Errors of the machine, which say nothing about a file: too many handles, no memory, a lost disk.

They are tried again, and then end the work with their cause. A file is never left out for them.
"""

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from cjepa_fast.runtime.printable import printable

T = TypeVar("T")
PAUSES_S = (0.2, 1.0, 4.0)  # before each further try
OF_THE_MACHINE = {
    getattr(errno, name)
    for name in (
        "EMFILE", "ENFILE", "ENOMEM", "ENOBUFS", "EIO", "ESTALE", "EAGAIN", "EINTR", "ETIMEDOUT",
        "EREMOTEIO", "ENODEV", "ENXIO", "ENOTCONN", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH",
        "ENETDOWN", "ENETUNREACH", "ENETRESET", "ECONNABORTED", "ECONNREFUSED",
        "ESHUTDOWN",  # of a Lustre client that was evicted
    )
    if hasattr(errno, name)
}  # fmt: skip


class MachineFailed(OSError):
    """A file cannot be read, and that is not the file's fault."""


def of_the_machine(error: OSError) -> bool:
    return error.errno in OF_THE_MACHINE


def patiently(read: Callable[[], T], name: object) -> T:
    """read(), tried again after an error of the machine. Raises MachineFailed if that stays, and
    every other OSError at once."""
    for pause_s in (*PAUSES_S, None):
        try:
            return read()
        except OSError as error:
            if not of_the_machine(error):
                raise
            if pause_s is None:
                raise MachineFailed(error.errno, _told(error, name)) from error
            time.sleep(pause_s)
    raise AssertionError("the last try returns or raises")


def _told(error: OSError, name: object) -> str:
    ways = {errno.EMFILE: "raise ulimit -n", errno.ENFILE: "close other programs' files"}
    ways[errno.ENOMEM] = "free some memory"
    way = ways.get(error.errno, "check the disk or the network it lies on")
    return f"{printable(name)} cannot be read ({error.strerror}), nor after a few seconds: {way}"
