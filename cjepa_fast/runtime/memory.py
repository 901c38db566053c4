"""Memory: what a step's forward saves for its backward, its peak, and what is free here."""

import contextlib
import itertools
import platform
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cjepa_fast.runtime.cgroups import folders

# In a cgroup's folder, of version 2 and of 1: limit, use, its parts and how their names begin.
CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", ""),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_"),
)


class SavedActivations:
    """Bytes that forwards keep for their backward beside the weights, each storage once."""

    def __init__(self, *networks: nn.Module):
        tensors = itertools.chain(
            *(n.parameters() for n in networks), *(n.buffers() for n in networks)
        )
        self._weights = {tensor.untyped_storage()._cdata for tensor in tensors}
        self.bytes = 0

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Counts the forwards within it."""
        found: dict[int, tuple[int, torch.Tensor]] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._weights:
                # the tensor is held, so that no storage's number comes twice
                found[storage._cdata] = storage.nbytes(), tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield
        self.bytes = sum(size for size, _ in found.values())


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The most that a call holds at once beyond what was held before it, by torch's account."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate((size for _, size in changes), initial=0))


def peak_resident_gib() -> float:
    """The most memory that this process has held."""
    unit = 1 if platform.system() == "Darwin" else 1024  # bytes of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def free_bytes() -> int | None:
    """What a process may still take without swapping: of the machine, or of its container's limit
    where that leaves less. None where the system does not say."""
    found = [size for size in (_free_of_machine(), _free_of_container()) if size is not None]
    return min(found) if found else None


def _free_of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    kib = fields.get("MemAvailable", "").split()
    return int(kib[0]) * 1024 if kib else None


def _file_cache(stat: Path, prefix: str) -> int:
    """Bytes of files that a cgroup's memory.stat counts, 0 where it does not say."""
    try:
        sizes = dict(line.split() for line in stat.read_text("utf-8").splitlines())
        return sum(int(sizes[f"{prefix}{name}"]) for name in ("inactive_file", "active_file"))
    except (OSError, ValueError, KeyError):
        return 0


def _free_of_container() -> int | None:
    """What the tightest of this process's cgroups leaves; None without a limit."""
    found = [_free_in(folder, *names) for folder in folders("memory") for names in CGROUP_FILES]
    return min((size for size in found if size is not None), default=None)


def _free_in(folder: Path, limit: str, used: str, stat: str, prefix: str) -> int | None:
    """What files have been read into memory counts as used there, and is given up where it is
    wanted."""
    try:
        most, now = (int((folder / name).read_text("utf-8")) for name in (limit, used))
    except (OSError, ValueError):  # of another version, or "max"
        return None
    return min(most, max(0, most - now + _file_cache(folder / stat, prefix)))
