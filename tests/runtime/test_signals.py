"""Signals that ask a run to stop, and who has them afterwards."""

import os
import signal
import threading

import pytest

from cjepa_fast.runtime.signals import StopRequest


@pytest.fixture
def heard():
    """What the program itself hears of SIGTERM."""
    found = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: found.append(number))
    yield found
    signal.signal(signal.SIGTERM, before)


def test_the_program_has_its_signals_back_after_a_training(heard):
    before = signal.getsignal(signal.SIGINT)
    stop = StopRequest()
    assert signal.getsignal(signal.SIGINT) is not before
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.asked and not heard
    stop.give_back()
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_of_each_is_said_and_a_second_changes_nothing(heard_hangup, number, capfd):
    stop = StopRequest()
    try:
        for _ in range(2):
            os.kill(os.getpid(), number)
        assert stop.asked
    finally:
        stop.give_back()
    assert capfd.readouterr().err == f"{number.name}: stopping after this step\n"


def test_a_terminal_that_closes_stops_no_training_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopRequest()
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.asked
        stop.give_back()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_another_has_taken_since_stays(heard):
    stop = StopRequest()
    other = lambda number, frame: None  # noqa: E731
    signal.signal(signal.SIGTERM, other)
    stop.give_back()
    assert signal.getsignal(signal.SIGTERM) is other


def test_outside_the_main_thread_no_signal_is_taken(heard):
    made = []
    thread = threading.Thread(target=lambda: made.append(StopRequest()))
    thread.start()
    thread.join()
    assert not made[0].asked and signal.getsignal(signal.SIGTERM) != made[0]._ask
    made[0].give_back()
