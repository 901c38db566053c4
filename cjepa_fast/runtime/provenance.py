"""Which state of the code this is, and what it runs on."""

import os
import subprocess
from pathlib import Path

import torch

from cjepa_fast.runtime import hardware
from cjepa_fast.runtime.distributed import world_size

RESULTS = "bench/results"
GIT_S = 10  # it looks at every file, perhaps on a network disk


def own_commit() -> str | None:
    """The commit of the code, where it lies in its own git tree; "+changes" where files differ,
    but for recorded results, which a measurement itself adds to.

    CJEPA_COMMIT names that of a copy without git.
    """
    if given := os.environ.get("CJEPA_COMMIT"):
        return given
    root = Path(__file__).resolve().parents[2]
    if not (root / "setup.py").is_file():  # installed, perhaps within another project's tree
        return None
    head = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--", ".", f":(exclude){RESULTS}")
    if not head:
        return None
    return head + ("" if changes == "" else "+changes")


def _git(root: Path, *words: str) -> str | None:
    """What git says, None where there is none, or a disk does not answer. It takes no lock, which a
    commit of the user's would meet."""
    command = ["git", "--no-optional-locks", "-C", str(root), *words]
    how = {"encoding": "utf-8", "errors": "replace", "timeout": GIT_S}
    try:
        return subprocess.run(command, capture_output=True, check=True, **how).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def machine(device: torch.device) -> str:
    """Ranks and hardware, in words."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        name = f"{hardware.processor_name()} ({hardware.tier()}, {threads} threads)"
    return f"{world_size()} x {name}"
