"""Energy, power, clocks and throttling of this process's GPU while something runs, by NVML."""

import contextlib
import functools
import operator
import statistics
import threading
import time
from collections.abc import Iterator

from cjepa_fast.telemetry.nvml import COUNTERS, GpuCounters

PERIOD_S = 0.05  # between samples: NVML renews its figures no oftener
SAMPLED = {
    "power_w": COUNTERS["gpu_power_w"],
    "sm_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
    "memory_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
    "reasons": lambda nvml, gpu: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu),
}
# since the driver was loaded, from mJ; GPUs before Volta have none
ENERGY = {"energy_j": lambda nvml, gpu: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1000}
# Bits of nvml.h's nvmlClocksThrottleReasons that slow a GPU down. Left out: idle, and clocks that
# an application or a display asked for.
REASONS = {
    0x04: "power cap", 0x08: "hardware", 0x10: "sync boost", 0x20: "heat (software)",
    0x40: "heat (hardware)", 0x80: "power brake",
}  # fmt: skip


class PowerMeter:
    """One GPU's figures, in `found` after `running()`: what NVML does not give is left out.

    energy_j; means of power_w, sm_mhz and memory_mhz; reasons: the bits of all samples.
    """

    def __init__(self):
        self._gpu = GpuCounters()
        self.found: dict[str, float] = {}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Samples within the block, from a thread of its own."""
        samples = [self._gpu.read(SAMPLED)]
        if not samples[0]:
            yield
            return
        done = threading.Event()

        def sample() -> None:
            while not done.wait(PERIOD_S):
                samples.append(self._gpu.read(SAMPLED))

        thread = threading.Thread(target=sample, name="power", daemon=True)
        before, began = self._gpu.read(ENERGY), time.perf_counter()
        thread.start()
        try:
            yield
        finally:
            after, took_s = self._gpu.read(ENERGY), time.perf_counter() - began
            done.set()
            thread.join()
        self.found = {
            name: (_any_bit if name == "reasons" else statistics.fmean)(values)
            for name, values in _by_name(samples).items()
        }
        if before and after:
            self.found["energy_j"] = after["energy_j"] - before["energy_j"]
            self.found["power_w"] = self.found["energy_j"] / took_s
        elif "power_w" in self.found:
            self.found["energy_j"] = self.found["power_w"] * took_s


def _by_name(found: list[dict]) -> dict[str, list]:
    """The values of each name that has any."""
    names = dict.fromkeys(name for one in found for name in one)
    return {name: [one[name] for one in found if name in one] for name in names}


def _any_bit(masks: list[int]) -> int:
    return functools.reduce(operator.or_, masks)


def _named(masks: list[int]) -> str:
    return ", ".join(why for bit, why in REASONS.items() if _any_bit(masks) & bit) or "no"


def power_figures(gpus: list[dict[str, float]], images: int) -> dict:
    """A row's columns, of the meters of all ranks and the images they took together.

    Power is the mean over the GPUs, a clock that of the slowest.
    """
    columns = {
        "joules_per_image": ("energy_j", lambda joules: sum(joules) / images),
        "power_w": ("power_w", statistics.fmean),
        "sm_mhz": ("sm_mhz", min),
        "memory_mhz": ("memory_mhz", min),
        "throttled": ("reasons", _named),
    }
    found = _by_name(gpus)
    return {column: join(found[name]) for column, (name, join) in columns.items() if name in found}
