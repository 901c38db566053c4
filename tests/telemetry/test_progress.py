"""What is shown at a terminal of what takes long."""

import io
import sys
import time

import pytest
import tiny

from cjepa_fast.telemetry import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def bar(terminal: Terminal, shown: bool) -> None:
    with progress.shown_bar(14, "features") as bar:
        for _ in range(14):
            bar.update()


def clock(terminal: Terminal, shown: bool) -> None:
    with progress.shown_clock("features"):
        if shown:
            tiny.wait_for(terminal.getvalue, "a line of the clock")
        else:
            time.sleep(0.1)  # in which one would come


@pytest.mark.parametrize("work", [bar, clock])
@pytest.mark.parametrize(
    ("quiet_s", "first", "shown"), [(0.0, True, True), (60.0, True, False), (0.0, False, False)]
)
def test_what_takes_long_is_shown_by_the_first_process_and_wiped_off(
    work, quiet_s, first, shown, monkeypatch
):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "QUIET_S", quiet_s)
    monkeypatch.setattr(progress, "TICK_S", 0.01)
    monkeypatch.setattr(progress, "rank", lambda: int(not first))
    work(terminal, shown)
    said = terminal.getvalue()
    assert ("features: " in said) == shown
    assert not said or not said.rpartition("\r")[2].strip()
