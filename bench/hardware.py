"""What a measurement ran on: hardware, versions, commit, and the ceilings of its arithmetic."""

import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch

from cjepa_fast.launchers import launcher
from cjepa_fast.provenance import own_commit
from cjepa_fast.runtime.hardware import has_gpu, processor_name, tier

ROOT = Path(__file__).resolve().parents[1]

# Dense bf16 TFLOP/s of the vendors' data sheets, by a part of the device's name; first match wins.
PEAK_TFLOPS = {
    "H200": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H100": 989,
    "B200": 2250,
    "A100": 312,
    "L40S": 362,
}
# GB/s of device memory, from the same sheets.
PEAK_GB_PER_S = {"H200": 4800, "H100 NVL": 3900, "H100 PCIe": 2000, "H100": 3350, "B200": 8000}
PEAK_GB_PER_S |= {"A100": 2039, "L40S": 864}
PACKAGES = ("cjepa_fast", "torch", "triton", "deepspeed", "nvidia-dali-cuda130", "numpy")


def here() -> torch.device:
    """The device that a measurement of one process runs on."""
    return torch.device("cuda" if has_gpu() else "cpu")


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the cores this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {len(os.sched_getaffinity(0))} cores"


def peak_tflops(name: str) -> float | None:
    """The data sheet's dense bf16 rate of a GPU, None where it is not known here."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def measured_tflops(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """TFLOP/s of a large square product of random data: the median over about `seconds`."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=dtype)
    b = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / _median_s(lambda: a @ b, device, seconds) / 1e12


def measured_gb_per_s(device: torch.device, seconds: float = 1.0) -> float:
    """GB/s, read and written, of a large copy within the device's memory."""
    source = torch.zeros(2**32 if device.type == "cuda" else 2**28, device=device, dtype=torch.int8)
    target = torch.empty_like(source)
    copy_s = _median_s(lambda: target.copy_(source), device, seconds)
    return 2 * source.numel() / copy_s / 1e9


def _median_s(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds that `work` takes: the median over about `seconds`."""
    durations_s: list[float] = []
    for _ in range(3):
        work()
    while sum(durations_s) < seconds or len(durations_s) < 5:
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        durations_s.append(time.perf_counter() - began)
    return statistics.median(durations_s)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found | {"torch": torch.__version__}


def own_command() -> str:
    kept = [arg for arg in sys.argv if not arg.startswith("--local_rank")]
    return shlex.join([*launcher(), *kept])


def provenance(device: torch.device) -> dict:
    """What must stand beside a figure for another to repeat it."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": own_command(),
        "commit": own_commit(),
        "hardware": {
            "device": device_name(device),
            "kind": device.type,
            "processor": processor_name(),
            "tier": tier(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(pages / 2**30, 1),
            "torch_threads": torch.get_num_threads(),
        },
        "versions": versions(),
    }


if __name__ == "__main__":
    device = here()
    rate = round(measured_tflops(device, torch.bfloat16), 3)
    print(json.dumps(provenance(device) | {"bf16_matmul_tflops": rate}, indent=1))
