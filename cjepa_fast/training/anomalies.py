"""Whether each step was applied, and its loss: read one step late where the device decides, so that
it is never idle."""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

MIN_HISTORY, MAX_HISTORY = 32, 128  # steps that a spike is held against
MIN_RELATIVE_STD = 0.01  # of the mean: a standard deviation below it is taken for it


class StepOutcome(NamedTuple):
    """Whether the update of step `step` was applied, its loss and its gradient's norm."""

    step: int
    batches: Any
    applied: bool
    loss: float
    grad_norm: float


class DeferredScalars:
    """0-d tensors and numbers. CUDA tensors are copied to the host and not waited for."""

    def __init__(self, *values: bool | float | torch.Tensor):
        self._values = list(values)
        self._there = [i for i, v in enumerate(values) if isinstance(v, torch.Tensor) and v.is_cuda]
        if self._there:
            stacked = torch.stack([values[i].detach().double() for i in self._there])
            self._arriving = torch.empty_like(stacked, device="cpu", pin_memory=True)
            self._arriving.copy_(stacked, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    @property
    def on_device(self) -> bool:
        return bool(self._there)

    def read(self) -> list[float]:
        if self._there:
            self._arrived.synchronize()
            for i, value in zip(self._there, self._arriving.tolist(), strict=True):
                self._values[i] = value
        return [float(value) for value in self._values]


class PendingOutcomes:
    """PendingOutcomes on their way from the device."""

    def __init__(self):
        self._waiting: deque[tuple[int, Any, DeferredScalars]] = deque()

    def push(
        self,
        step: int,
        batches: Any,
        applied: bool | torch.Tensor,
        loss: float | torch.Tensor = 0.0,
        grad_norm: float | torch.Tensor = 0.0,
    ) -> Iterator[StepOutcome]:
        """Take note of a step, and yield what has come to be known, in order: what is on its way
        from the device is left until after the next step."""
        values = DeferredScalars(applied, loss, grad_norm)
        self._waiting.append((step, batches, values))
        yield from self.drain(keep=values.on_device)

    def drain(self, keep: int = 0) -> Iterator[StepOutcome]:
        """Those not known yet, waited for, but for the last `keep`."""
        while len(self._waiting) > keep:
            step, batches, values = self._waiting.popleft()
            applied, loss, grad_norm = values.read()
            yield StepOutcome(step, batches, bool(applied), loss, grad_norm)


class BadSteps:
    """Steps that were not applied. count: of the run so far; in_row: the latest ones."""

    def __init__(self, most_in_row: int, count: int = 0, in_row: int = 0):
        self.most_in_row, self.count, self.in_row = most_in_row, count, in_row

    @property
    def too_many(self) -> bool:
        return self.in_row >= self.most_in_row

    def record(self, applied: bool) -> None:
        self.in_row = 0 if applied else self.in_row + 1
        self.count += not applied


class SpikeDetector:
    """Steps whose loss or gradient norm stands out from the latest ones before it, upwards.

    z: how many standard deviations above the mean of the last MAX_HISTORY values make a spike.
    """

    def __init__(self, z: float, history: dict[str, list[float]] | None = None):
        self.z = z
        history = history or {}
        self._seen = {
            name: deque(history.get(name, ()), maxlen=MAX_HISTORY) for name in ("loss", "grad_norm")
        }

    @property
    def history(self) -> dict[str, list[float]]:
        """What a resumed run needs."""
        return {name: list(values) for name, values in self._seen.items()}

    def limits(self) -> tuple[float, float]:
        """The largest loss and gradient norm that are no spike; infinite while little is known."""
        return tuple(self._limit(values) for values in self._seen.values())

    def _limit(self, values: deque[float]) -> float:
        if len(values) < MIN_HISTORY:
            return math.inf
        mean, std = _mean_and_std(values)
        return mean + self.z * std

    def check(self, outcome: StepOutcome) -> str | None:
        """Take note of an outcome; what stood out, in words, if anything did."""
        found = []
        for name, limit in zip(self._seen, self.limits(), strict=True):
            value, values = getattr(outcome, name), self._seen[name]
            if limit < value < math.inf:
                mean, std = _mean_and_std(values)
                found.append(
                    f"{name} {value:.4g} is {(value - mean) / std:.1f} standard deviations above "
                    f"the last {len(values)} steps' {mean:.4g}"
                )
            if math.isfinite(value):  # a spike too: where they are the rule, none stands out
                values.append(value)
        return " and ".join(found) or None


def _mean_and_std(values: Iterable[float]) -> tuple[float, float]:
    values = list(values)
    mean = math.fsum(values) / len(values)
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
    return mean, max(std, MIN_RELATIVE_STD * abs(mean), 1e-12)
