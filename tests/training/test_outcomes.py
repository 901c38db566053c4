"""Outcomes of steps: told late where the device decides, never forgotten; spikes stand out."""

import itertools
import math

import pytest
import torch

from cjepa_fast.training import anomalies
from cjepa_fast.training.anomalies import (
    MAX_HISTORY,
    MIN_HISTORY,
    BadSteps,
    PendingOutcomes,
    SpikeDetector,
    StepOutcome,
)


class Late(anomalies.DeferredScalars):
    """As if the values came from a device."""

    on_device = True


def told(flags: str, most: int) -> tuple[list[tuple[int, int]], BadSteps, int]:
    """Steps from 1, "." good and "x" bad: what was told (step, in a row), and the last step."""
    waiting, bad, found = PendingOutcomes(), BadSteps(most), []
    for step, flag in enumerate(flags, 1):
        rest = waiting.drain() if step == len(flags) else ()
        new = waiting.push(step, f"batch {step}", flag == ".", 1.0, 2.0)
        for outcome in itertools.chain(new, rest):
            assert outcome.batches == f"batch {outcome.step}"
            assert (outcome.loss, outcome.grad_norm) == (1.0, 2.0)
            bad.record(outcome.applied)
            if not outcome.applied:
                found.append((outcome.step, bad.in_row))
        if bad.too_many:
            break
    return found, bad, step


@pytest.mark.parametrize("late", [False, True])
def test_each_is_told_once_with_its_count_in_a_row(monkeypatch, late):
    if late:
        monkeypatch.setattr(anomalies, "DeferredScalars", Late)
    found, bad, step = told(".xx.x.xx", 9)
    assert found == [(2, 1), (3, 2), (5, 1), (7, 1), (8, 2)]
    assert (bad.count, bad.in_row, step) == (5, 2, 8)


def test_too_many_are_known_at_once():
    found, bad, step = told("..xxx...", 3)
    assert found[-1] == (5, 3) and bad.too_many and step == 5


def test_from_a_device_a_step_later(monkeypatch):
    monkeypatch.setattr(anomalies, "DeferredScalars", Late)
    found, bad, step = told("..xxxx..", 3)
    assert found[-1] == (5, 3) and bad.too_many and step == 6
    found, bad, step = told("..xx.x.", 3)
    assert found == [(3, 1), (4, 2), (6, 1)] and step == 7 and bad.count == 3


def test_nothing_is_read_before_the_next_step(monkeypatch):
    monkeypatch.setattr(anomalies, "DeferredScalars", Late)
    waiting = PendingOutcomes()
    assert list(waiting.push(1, "", False)) == []
    assert [o.step for o in waiting.push(2, "", True)] == [1]


def test_tensors_and_numbers_are_read_alike():
    applied, loss = torch.tensor(True), torch.tensor(1.5, dtype=torch.float64)
    (outcome,) = PendingOutcomes().push(1, "", applied, loss, 2.5)
    assert outcome == StepOutcome(1, "", True, 1.5, 2.5)


def spikes_in(values: list[float], z: float = 6.0, history=None) -> tuple[list[int], SpikeDetector]:
    """Which of the losses, from 1, stood out."""
    spikes = SpikeDetector(z, history)
    found = [spikes.check(StepOutcome(i, "", True, v, 1.0)) for i, v in enumerate(values, 1)]
    return [i for i, text in enumerate(found, 1) if text], spikes


def test_a_spike_stands_out_upwards_and_only_among_enough_steps():
    calm = [1.0 + 0.1 * math.sin(i) for i in range(MIN_HISTORY)]
    assert spikes_in([*calm[:-1], 9.0])[0] == []
    assert spikes_in([*calm, 9.0])[0] == [MIN_HISTORY + 1]
    assert spikes_in([*calm, -9.0])[0] == []
    # What is not finite is none, and leaves no trace.
    assert spikes_in([*calm, math.nan, math.inf, 9.0])[0] == [MIN_HISTORY + 3]


def test_a_spike_is_told_with_its_numbers():
    calm = [1.0, 2.0] * MIN_HISTORY
    spikes = spikes_in(calm)[1]
    text = spikes.check(StepOutcome(99, "", True, 11.5, 1.0))
    assert text == "loss 11.5 is 20.0 standard deviations above the last 64 steps' 1.5"
    assert "grad_norm 3" in spikes.check(StepOutcome(100, "", True, 1.0, 3.0))


def test_a_new_level_is_no_spike_for_long():
    found, _ = spikes_in([1.0, 1.1] * MIN_HISTORY + [2.0] * MAX_HISTORY)
    assert 0 < len(found) < MAX_HISTORY // 4


def test_the_history_carries_over():
    values = [1.0 + 0.1 * math.sin(3 * i) for i in range(100)]
    whole = spikes_in(values)[1]
    _, half = spikes_in(values[:60])
    resumed = spikes_in(values[60:], history=half.history)[1]
    assert resumed.limits() == whole.limits() and resumed.limits()[0] < 2
