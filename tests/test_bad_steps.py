"""Bad steps: counted in a row, told late where the device decides, never forgotten."""

import pytest

from cjepa_fast import bad_steps


class Late(bad_steps.Verdict):
    """As if the verdict came from a device."""

    def __init__(self, applied):
        self.late, self.applied = True, applied

    def read(self):
        return self.applied


def told(flags: str, most: int) -> tuple[list[tuple[int, int]], bad_steps.BadSteps, int]:
    """Steps from 1, "." good and "x" bad: what was told (step, in a row), and the last step."""
    bad, found = bad_steps.BadSteps(most), []
    for step, flag in enumerate(flags, 1):
        rows = bad.after(step, f"batch {step}", flag == ".", last=step == len(flags))
        for at, batches, in_row in rows:
            assert batches == f"batch {at}"
            found.append((at, in_row))
        if bad.too_many:
            break
    return found, bad, step


@pytest.mark.parametrize("late", [False, True])
def test_each_is_told_once_with_its_count_in_a_row(monkeypatch, late):
    if late:
        monkeypatch.setattr(bad_steps, "Verdict", Late)
    found, bad, step = told(".xx.x.xx", 9)
    assert found == [(2, 1), (3, 2), (5, 1), (7, 1), (8, 2)]
    assert (bad.count, bad.in_row, step) == (5, 2, 8)


def test_too_many_are_known_at_once():
    found, bad, step = told("..xxx...", 3)
    assert found[-1] == (5, 3) and bad.too_many and step == 5


def test_from_a_device_a_step_later(monkeypatch):
    """The step that ran meanwhile is judged too: it may have been bad, or have ended the row."""
    monkeypatch.setattr(bad_steps, "Verdict", Late)
    found, bad, step = told("..xxxx..", 3)
    assert found[-1] == (6, 4) and bad.too_many and step == 6
    found, bad, step = told("..xxx.x.", 3)
    assert found == [(3, 1), (4, 2), (5, 3), (7, 1)] and step == 8 and bad.count == 4


def test_nothing_is_read_before_the_next_step(monkeypatch):
    monkeypatch.setattr(bad_steps, "Verdict", Late)
    bad = bad_steps.BadSteps(3)
    assert list(bad.after(1, "", False)) == []
    assert list(bad.after(2, "", True)) == [(1, "", 1)]
