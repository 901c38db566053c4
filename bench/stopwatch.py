"""The time and the memory of single calls on a device."""

import time
from collections.abc import Callable
from typing import Any

import torch

from cjepa_fast.runtime.memory import peak_bytes
from cjepa_fast.runtime.rates import synchronize

FLUSH_BYTES = 2**30  # more than any cache; written in 0.2 ms, in which the host gets ahead
FLUSHES = 4  # a call of hundreds of launches takes the host longer than one


class Stopwatch:
    """Microseconds of calls on one device; on a GPU of the device's own time, caches cold."""

    def __init__(self, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"
        if self.cuda:
            self.flushed = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def once(self, call: Callable[[], Any]) -> Callable[[], float]:
        """Run a call; the function returned gives its time, once the device has done it."""
        if not self.cuda:
            began = time.perf_counter()
            call()
            took = 1e6 * (time.perf_counter() - began)
            return lambda: took
        for _ in range(FLUSHES):
            self.flushed.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        return lambda: 1e3 * begin.elapsed_time(end)

    def turns(self, calls: dict[str, Callable], seconds: float) -> dict[str, list[float]]:
        """Times in microseconds, by variant: at least five turns, and about `seconds` in all."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        began, turn = time.perf_counter(), 0
        while turn < 5 or time.perf_counter() - began < seconds:
            pending = {name: self.once(call) for name, call in calls.items()}
            synchronize(self.device)
            for name, read in pending.items():
                times[name].append(read())
            turn += 1
        return times

    def peak_mib(self, call: Callable[[], Any]) -> float | None:
        """The most memory a call holds beyond what was held before; None on the CPU."""
        return peak_bytes(call, self.device) / 2**20 if self.cuda else None
