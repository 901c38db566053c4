"""The time that the masks of one batch take, of every sampler, context and usual grid.

    OMP_NUM_THREADS=1 python bench/masks.py [--batch 128] [--json FILE]

They are drawn on the CPU, in the loader's own thread.
"""

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

import files
import hardware
import torch

from cjepa_fast.data.masks import MaskSampler

GRIDS = (14, 16)  # of B/16 and of H/14 at 224 pixels
SAMPLERS, CONTEXTS = ("uniform", "ijepa"), ("random", "prefix", "fixed", "packed")
WARMUP = 3


def calls_ms(sampler: MaskSampler, images: int, calls: int) -> list[float]:
    """Milliseconds of each of `calls` batches, after a few others."""
    times_ms = []
    for step in range(WARMUP + calls):
        index_B = torch.arange(images) + step * images
        began = time.perf_counter()
        sampler(0, step, index_B)
        times_ms.append(1e3 * (time.perf_counter() - began))
    return times_ms[WARMUP:]


def measure(images: int, calls: int) -> list[dict]:
    rows = []
    for side in GRIDS:
        for sampler, context in itertools.product(SAMPLERS, CONTEXTS):
            times_ms = calls_ms(MaskSampler((side, side), sampler, context), images, calls)
            low, *_, high = statistics.quantiles(times_ms, n=10, method="inclusive")
            rows.append({
                "grid": side, "sampler": sampler, "context": context, "batch": images,
                "ms": statistics.median(times_ms), "ms_p10": low, "ms_p90": high,
            })  # fmt: skip
    return rows


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch-size", dest="batch", type=int, default=128, help="images")
    parser.add_argument("--calls", type=int, default=200, help="timed calls of each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    args = parser.parse_args(argv)
    for name, least in (("batch", 1), ("calls", 2)):
        if (value := getattr(args, name)) < least:
            parser.error(f"--{name} {value}: must be at least {least}")
    rows = measure(args.batch, args.calls)
    for row in rows:
        print(
            f"{row['grid']} x {row['grid']}, {row['sampler']}, {row['context']}: {row['batch']} "
            f"images in {row['ms']:.2f} ms ({row['ms_p10']:.2f}-{row['ms_p90']:.2f})"
        )
    if args.json:
        files.write({**hardware.provenance(torch.device("cpu")), "rows": rows}, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
