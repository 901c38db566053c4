"""What a measurement ran on: hardware, versions, commit, and the ceilings of its arithmetic."""

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path

import cjepa_fast  # noqa: F401  before torch, whose threads it tells how to wait

# isort: split
import torch

from cjepa_fast.runtime.hardware import cores, has_gpu, processor_name, tier
from cjepa_fast.runtime.launchers import launcher
from cjepa_fast.runtime.provenance import own_commit
from cjepa_fast.runtime.rates import measured_tflops

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
    return f"{processor_name()}, {cores()} cores"


def peak_tflops(name: str) -> float | None:
    """The data sheet's dense bf16 rate of a GPU, None where it is not known here."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


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
            "cores": cores(),
            "memory_gib": round(pages / 2**30, 1),
            "torch_threads": torch.get_num_threads(),
        },
        "versions": versions(),
    }


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    device = here()
    rate = round(measured_tflops(device, torch.bfloat16), 3)
    print(json.dumps(provenance(device) | {"bf16_matmul_tflops": rate}, indent=1))
