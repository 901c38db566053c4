"""Which state of the code this is, and what it runs on."""

import os
import subprocess
from pathlib import Path

import torch

from cjepa_fast.runtime import hardware
from cjepa_fast.runtime.distributed import world_size


def own_commit() -> str | None:
    """The commit of the code, where it lies in its own git tree; "+changes" where files differ.

    CJEPA_COMMIT names that of a copy without git.
    """
    if given := os.environ.get("CJEPA_COMMIT"):
        return given
    root = Path(__file__).resolve().parents[2]
    if not (root / "setup.py").is_file():  # installed, perhaps within another project's tree
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, encoding="utf-8", errors="replace"
        )
        changes = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, encoding="utf-8", errors="replace"
        )
    except FileNotFoundError:  # no git here
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def machine(device: torch.device) -> str:
    """Ranks and hardware, in words."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        name = f"{hardware.processor_name()} ({hardware.tier()}, {threads} threads)"
    return f"{world_size()} x {name}"
