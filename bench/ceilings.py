"""What this device reaches at most: a large copy, a large bf16 matmul, and its power under both.

    python bench/ceilings.py --seconds 8 --json ceilings.json

All other figures of a GPU are held against these. A card at its power limit lowers its clock, so
the matmul's rate is that of `seconds`, not of a burst.
"""

import argparse
import json
import sys
from pathlib import Path

import files
import torch
from hardware import here, provenance
from power import PowerMeter, power_figures

from cjepa_fast.runtime.rates import measured_gb_per_s, measured_tflops


def under_power(rate, device: torch.device, *args) -> tuple[float, dict]:
    """A rate, and NVML's figures of the GPU meanwhile."""
    meter = PowerMeter()
    with meter.running():
        found = rate(device, *args)
    figures = power_figures([meter.found], 1)
    figures.pop("joules_per_image", None)
    return found, figures


def measure(device: torch.device, seconds: float) -> dict:
    tflops, matmul = under_power(measured_tflops, device, torch.bfloat16, seconds)
    gb_per_s, copy = under_power(measured_gb_per_s, device, seconds)
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return {
        "bf16_matmul_tflops": tflops, "copy_gb_per_s": gb_per_s, "seconds": seconds,
        "device_memory_gib": memory / 2**30, "during_matmul": matmul, "during_copy": copy,
    }  # fmt: skip


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each, about")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if not args.seconds >= 0:
        parser.error(f"--seconds {args.seconds}: must be at least 0")
    device = here()
    row = measure(device, args.seconds)
    print(json.dumps(row, indent=1))
    if args.json:
        files.write(provenance(device) | row, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
