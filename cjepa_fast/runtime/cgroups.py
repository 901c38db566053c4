"""The control groups that this process lies in, each of which may hold its memory and CPU time to
a limit: a container's, a SLURM job's, a systemd service's."""

import contextlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def folders(controller: str) -> Iterator[Path]:
    """The process's own group and those around it, of version 2 and of version 1's controller
    ("memory", "cpu"). Where a container hides the way there, its outermost group alone is seen."""
    within = {"": "/", controller: "/"}
    with contextlib.suppress(OSError, ValueError):
        for line in OWN.read_text(encoding="utf-8").splitlines():
            _, names, path = line.split(":", 2)
            within |= dict.fromkeys(within.keys() & set(names.split(",")), path)
    for mount, path in ((ROOT, within[""]), (ROOT / controller, within[controller])):
        own = PurePosixPath(path.lstrip("/"))
        for group in (own, *own.parents):
            if (mount / group).is_dir():
                yield mount / group


def cpu_quota() -> float | None:
    """Cores' worth of time that the tightest of the groups allows, None without a limit."""
    found = [quota for folder in folders("cpu") if (quota := _quota_of(folder)) is not None]
    return min(found, default=None)


def _quota_of(folder: Path) -> float | None:
    """By cgroup version 2, else 1."""
    with contextlib.suppress(OSError, ValueError):  # another version, or "max"
        quota_us, period_us = (folder / "cpu.max").read_text("utf-8").split()
        return int(quota_us) / int(period_us)
    with contextlib.suppress(OSError, ValueError):
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        quota_us, period_us = (int((folder / name).read_text("utf-8")) for name in names)
        return quota_us / period_us if quota_us > 0 else None
    return None
