"""Steps whose gradient was not finite: counted, told a step late where the device decides."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch


class Verdict:
    """Whether a step was applied. A 0-d CUDA tensor is copied to the host and not waited for."""

    def __init__(self, applied: bool | torch.Tensor):
        self.late = isinstance(applied, torch.Tensor) and applied.is_cuda
        self.applied = applied
        if self.late:
            self.applied = torch.empty((), dtype=torch.bool, pin_memory=True)
            self.applied.copy_(applied, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> bool:
        if self.late:
            self.arrived.synchronize()
        return bool(self.applied)


class BadSteps:
    """count: of the run so far; in_row: the latest ones; too_many: as many in a row as allowed."""

    def __init__(self, most_in_row: int):
        self.most_in_row = most_in_row
        self.count = self.in_row = 0
        self._waiting: deque[tuple[int, Any, Verdict]] = deque()

    @property
    def too_many(self) -> bool:
        return self.in_row >= self.most_in_row

    def after(
        self, step: int, batches: Any, applied: bool | torch.Tensor, last: bool = False
    ) -> Iterator[tuple[int, Any, int]]:
        """Take note of a step, and yield (step, its batches, how many in a row) of each bad one.

        A verdict that is on its way from the device is read after the next step, so that the device
        is never idle; at once after the last, and where there may be too many.
        """
        verdict = Verdict(applied)
        self._waiting.append((step, batches, verdict))
        while len(self._waiting) > (verdict.late and not last and not self.too_many):
            step, batches, verdict_of_step = self._waiting.popleft()
            good = verdict_of_step.read()
            self.in_row = 0 if good else self.in_row + 1
            if not good:
                self.count += 1
                yield step, batches, self.in_row
