"""What NVML counts of this process's GPU."""

import contextlib
from collections.abc import Callable

import torch

from cjepa_fast.runtime import hardware

COUNTERS = {
    "gpu_power_w": lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,  # from mW
    "gpu_util": lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
    "gpu_mem_gib": lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used / 2**30,
}


class GpuCounters:
    """Power (W), utilisation (share 0..1) and memory in use (GiB) of this process's GPU, by NVML.

    Without CUDA, the NVML library or one of its counters, what is missing is left out.
    """

    def __init__(self):
        self._nvml = None
        if not hardware.has_gpu():
            return
        try:
            import pynvml
        except ImportError:
            return
        try:
            pynvml.nvmlInit()
            # by UUID: NVML's numbers do not follow CUDA_VISIBLE_DEVICES
            uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
        except pynvml.NVMLError:
            return
        self._nvml = pynvml

    def read(self, counters: dict[str, Callable] | None = None) -> dict[str, float]:
        """By name, what each counter gives, called with (NVML, the GPU's handle)."""
        values: dict[str, float] = {}
        if self._nvml is None:
            return values
        for name, counter in (counters or COUNTERS).items():
            with contextlib.suppress(self._nvml.NVMLError):
                values[name] = counter(self._nvml, self._handle)
        return values
