"""How far it is, for whoever waits at a terminal.

Rank 0 alone shows it, of what takes long, and not in files and pipes.
"""

import contextlib
import threading
from collections.abc import Iterator

from tqdm import tqdm

from cjepa_fast.runtime.distributed import rank

QUIET_S = 5.0  # seconds before anything appears
TICK_S = 1.0


def shown_bar(total: int, title: str, unit: str = "image") -> tqdm:
    """A bar of so many parts, to be updated as they are done."""
    return tqdm(total=total, desc=title, unit=unit, delay=QUIET_S, leave=False, disable=_hidden())


@contextlib.contextmanager
def shown_clock(title: str) -> Iterator[None]:
    """The time that what has no parts is taking."""
    done = threading.Event()
    with tqdm(
        desc=title, bar_format="{desc}: {elapsed}", mininterval=0, miniters=0, delay=QUIET_S,
        leave=False, disable=_hidden(),
    ) as clock:  # fmt: skip

        def tick() -> None:
            while not done.wait(TICK_S):
                clock.update(0)

        ticking = threading.Thread(target=tick, daemon=True)
        ticking.start()
        try:
            yield
        finally:
            done.set()
            ticking.join()


def _hidden() -> bool | None:
    return True if rank() else None  # None: in files and pipes
