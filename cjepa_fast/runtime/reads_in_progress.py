"""What is being read at the moment, so that the watchdog can name a file that never comes."""

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from cjepa_fast.runtime.printable import printable

T = TypeVar("T")
NAMED_S = 5.0  # a read that takes longer is named

_reading: dict[int, tuple[float, object]] = {}  # by thread: since when, and what
_count = [0]  # of what has been read; threads may lose some, and still change it


@contextlib.contextmanager
def watched(name: object) -> Iterator[None]:
    """Within it, this thread reads what has that name."""
    thread = threading.get_ident()
    _reading[thread] = time.monotonic(), name
    try:
        yield
    finally:
        _reading.pop(thread, None)
        progressed()


def progressed() -> None:
    """Something has been read."""
    _count[0] += 1


def progressing(items: Iterable[T]) -> Iterator[T]:
    """Yield the items; each means that something has been read."""
    for item in items:
        progressed()
        yield item


def reads() -> int:
    """Changes with each read that ends: a sign that reading gets on."""
    return _count[0]


def longest() -> str:
    """In words, the read that has taken longest; "" where none has taken long."""
    now_s = time.monotonic()
    since_s, name = min(list(_reading.values()), key=lambda read: read[0], default=(now_s, ""))
    for_s = now_s - since_s
    return f"{printable(name)} has been read for {for_s:.0f} s" if for_s > NAMED_S else ""
