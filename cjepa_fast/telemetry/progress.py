"""How far it is, for whoever waits.

Rank 0 alone shows it, of what takes long: on a terminal a line that redraws itself and is wiped off
at the end, in files and pipes a plain line a minute.
"""

import contextlib
import shutil
import sys
import threading
from collections.abc import Iterator
from typing import TextIO

from tqdm import tqdm

from cjepa_fast.runtime.distributed import rank
from cjepa_fast.runtime.printable import is_open, is_terminal, say

QUIET_S = 2.0  # seconds before anything appears on a terminal
TICK_S = 1.0  # between two drawings, whether or not a part is done
PLAIN_S = 60.0  # before the first plain line, and between two
NEVER_S = 1e9


def shown_bar(
    total: int | None, title: str, unit: str = "image"
) -> contextlib.AbstractContextManager[tqdm]:
    """A bar of so many parts (None: nobody knows), to be updated as they are done."""
    of = "" if total is None else "/{total_fmt}"
    plain = f"{{desc}}: {{n_fmt}}{of} {unit}s in {{elapsed}}, {{rate_fmt}}{{postfix}}"
    return _shown(plain, total=total, desc=title, unit=f" {unit}")


def shown_clock(title: str) -> contextlib.AbstractContextManager[tqdm]:
    """The time that what has no parts is taking."""
    return _shown("{desc}: {elapsed}", desc=title, bar_format="{desc}: {elapsed}")


@contextlib.contextmanager
def _shown(plain: str, **options) -> Iterator[tqdm]:
    """plain: the format where there is no terminal."""
    live, done = is_terminal(sys.stderr), threading.Event()
    unseen = rank() != 0 or not is_open(sys.stderr)
    if live:  # some terminals say that they have no columns, and tqdm would show nothing
        size = shutil.get_terminal_size()
        options |= {"ncols": size.columns - 1, "nrows": size.lines}
    else:
        options |= {"bar_format": plain, "file": _PlainLines(sys.stderr)}
    wait_s, every_s = (QUIET_S, TICK_S) if live else (PLAIN_S, PLAIN_S)
    with tqdm(**options, delay=NEVER_S, mininterval=NEVER_S, leave=False, disable=unseen) as bar:

        def draw() -> None:  # in a thread: a part may take long
            if done.wait(wait_s):
                return
            bar.delay = 0  # what has been drawn is wiped off
            bar.refresh()
            while not done.wait(every_s):
                bar.refresh()

        drawing = threading.Thread(target=draw, daemon=True)
        if not bar.disable:
            drawing.start()
        try:
            yield bar
        finally:
            done.set()
            if not bar.disable:
                drawing.join()


class _PlainLines:
    """A file for tqdm, which moves about in its line: each drawing becomes a line of its own."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> None:
        if text := text.strip("\r\n ").replace("\r", ""):
            say(text, self._stream)

    def flush(self) -> None:
        pass
