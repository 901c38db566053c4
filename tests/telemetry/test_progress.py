"""What is shown at a terminal of what takes long."""

import io
import os
import pty
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
        for _ in range(7):
            bar.update()
        if shown:
            tiny.wait_for(lambda: " 7/14 " in terminal.getvalue(), "the bar")
        else:
            time.sleep(0.1)  # in which it would come


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


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (lambda: progress.shown_bar(14, "features"), "features: 7/14 images in 00:0"),
        (lambda: progress.shown_bar(None, "looking", "file"), "looking: 7 files in 00:0"),
        (lambda: progress.shown_clock("features"), "features: 00:0"),
    ],
)
def test_in_files_and_pipes_it_is_plain_lines(shown, wanted, monkeypatch):
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    monkeypatch.setattr(progress, "PLAIN_S", 0.02)
    with shown() as bar:
        bar.update(7)
        tiny.wait_for(lambda: pipe.getvalue().count(wanted) > 1, "two lines")
    lines = pipe.getvalue().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(wanted))
    assert all(line.startswith(wanted) for line in lines[first:])
    assert all(line.startswith(wanted.partition(":")[0]) for line in lines)
    assert not {"\r", "\x1b"} & set(pipe.getvalue()) and all(lines)


def test_what_is_short_is_silent_in_files_and_pipes(monkeypatch):
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    with progress.shown_bar(2, "features") as bar:
        bar.update(2)
    assert pipe.getvalue() == ""


def test_a_terminal_that_says_it_has_no_columns_shows_it_too(monkeypatch):
    """As terminals without a window do: a size of 0 x 0."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(progress, "QUIET_S", 0.0)
        monkeypatch.delenv("COLUMNS", raising=False)
        with progress.shown_clock("features"):
            assert b"features" in os.read(ours, 1000)
    os.close(ours)


@pytest.mark.parametrize("stream", [None, "closed"])
def test_a_process_without_a_stderr_shows_nothing(stream, monkeypatch, capsys):
    if stream == "closed":
        stream = Terminal()
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    for name in ("PLAIN_S", "QUIET_S"):
        monkeypatch.setattr(progress, name, 0.0)
    with progress.shown_bar(2, "features") as bar:
        bar.update(2)
    assert capsys.readouterr() == ("", "")
