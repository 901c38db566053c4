"""Which state of the code this is, and what it runs on."""

import platform
import subprocess
from pathlib import Path

import torch

from cjepa_fast.processes import world_size


def own_commit() -> str | None:
    """The commit of the code, where it lies in its own git tree; "+changes" where files differ."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "setup.py").is_file():  # installed, perhaps within another project's tree
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except FileNotFoundError:  # no git here
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def machine(device: torch.device) -> str:
    """Processes and hardware, in words."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{processor_name()} ({torch.get_num_threads()} threads)"
    return f"{world_size()} x {hardware}"


def processor_name() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()
