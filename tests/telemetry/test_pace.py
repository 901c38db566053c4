"""The time that is left, told once and only where it is long."""

from cjepa_fast.telemetry import pace
from cjepa_fast.telemetry.pace import Pace


def said(seconds: float, micro_batches: int, ticks: int = 20) -> list[str]:
    """What is told over the first micro-batches, of so many seconds each; the first takes 100."""
    now = [0.0]
    pace = Pace(micro_batches, 8, clock=lambda: now[0])
    lines = []
    for tick in range(ticks):
        now[0] += 100.0 if tick == 0 else seconds
        lines.append(pace.tick())
    return lines


def test_weeks_are_told_once_without_the_first_slow_micro_batch():
    lines = said(seconds=10.0, micro_batches=864_002)
    assert lines[0] == "" and lines[2:] == [""] * 18
    assert lines[1].startswith("about 100 days at this rate (0.8 images/s)")
    assert "run.epochs" in lines[1]


def test_short_micro_batches_are_timed_for_some_seconds():
    lines = said(seconds=1.0, micro_batches=10**7)
    assert [bool(line) for line in lines].index(True) == 5


def test_a_week_is_not_long():
    assert said(seconds=10.0, micro_batches=60_000) == [""] * 20


def test_a_rate_has_two_digits():
    told = [pace.rate(images_per_s) for images_per_s in (12345.6, 64.4, 9.94, 1.0, 0.432)]
    assert told == [f"{text} images/s" for text in ("12,346", "64", "9.9", "1", "0.43")]
