"""How far it is, for whoever waits: the line of a training, and bars and clocks of what takes long.

On a terminal a line that redraws itself, in files and pipes a plain line a minute. Bars and clocks
are shown by rank 0 alone, and wiped off a terminal at the end.
"""

import contextlib
import math
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from tqdm import tqdm

from cjepa_fast.runtime.distributed import rank
from cjepa_fast.runtime.printable import is_open, is_terminal, printable, printable_lines, say

QUIET_S = 2.0  # seconds before anything appears on a terminal
TICK_S = 1.0  # between two drawings, whether or not a part is done
PLAIN_S = 60.0  # between two plain lines; of a bar or a clock also before the first
REFRESH_S = 0.5  # between two drawings of a training's line, at least
NEVER_S = 1e9


class ProgressLine:
    """A line that redraws itself on a terminal; elsewhere (files, pipes) a plain line a minute, the
    first and the last."""

    def __init__(self, stream: TextIO, quiet: bool = False):
        self._stream, self._quiet = stream, quiet
        self._live = is_terminal(stream)
        self._drawn = ""
        self._drawn_s = -math.inf

    def show(self, text: str, last: bool = False) -> None:
        now_s = time.perf_counter()
        if self._quiet or (not self._live and not last and now_s - self._drawn_s < PLAIN_S):
            return
        self._drawn_s = now_s
        if not self._live:
            say(printable(text), self._stream)
        else:
            # a line that wraps cannot be returned to; \x1b[K wipes what a longer one left
            self._drawn = text[: max(shutil.get_terminal_size().columns - 1, 20)]
            say(f"\r{self._drawn}\x1b[K", self._stream, end="")

    def refresh(self, text: Callable[[], str], plain: bool = False) -> None:
        """Show text() if what was shown last is old enough. plain: not on a terminal alone."""
        old_s = REFRESH_S if self._live else PLAIN_S
        if (self._live or plain) and time.perf_counter() - self._drawn_s >= old_s:
            self.show(text())

    def message(self, text: str) -> None:
        text = printable_lines(text)
        if self._live:  # over what a bar may have drawn there
            say(f"\r\x1b[K{text}\n{self._drawn}", self._stream, end="")
        else:
            say(text, self._stream)

    def end(self) -> None:
        if self._drawn:
            say("", self._stream)
            self._drawn = ""


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
