"""How fast a device multiplies and copies, measured."""

import statistics
import time
from collections.abc import Callable

import torch


def measured_tflops(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """TFLOP/s of a large square matmul of random data: the median over about `seconds`."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=dtype)
    b = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / _median_s(lambda: a @ b, device, seconds) / 1e12


def measured_gb_per_s(device: torch.device, seconds: float = 1.0) -> float:
    """GB/s, read and written, of a large copy within the device's memory."""
    source = torch.zeros(_copied_bytes(device), device=device, dtype=torch.int8)
    target = torch.empty_like(source)
    copy_s = _median_s(lambda: target.copy_(source), device, seconds)
    return 2 * source.numel() / copy_s / 1e9


def _copied_bytes(device: torch.device) -> int:
    """Much more than any cache holds; of a GPU no more than an eighth of what is free, since the
    copy is there too, and others may want the rest."""
    if device.type != "cuda":
        return 2**28
    free, _ = torch.cuda.mem_get_info(device)
    return min(2**32, free // 8)


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
