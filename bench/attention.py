"""Every kernel for attention at the lengths of every configuration, where "auto" takes the fastest.

    python bench/attention.py                    # all of configs/, at their own micro-batches
    python bench/attention.py --config vit_h --batch 64 --json attention.json

Medians in milliseconds of at most 1,024 sequences: of the target encoder the forward, of the
context encoder and the predictor forward and backward. A kernel that cannot do a shape has no
figure.
"""

import argparse
import sys
from pathlib import Path
from unittest import mock

import files
import torch
from hardware import ROOT, here, provenance

from cjepa_fast import config as configuration
from cjepa_fast.model import attention, attention_trial
from cjepa_fast.training import backends, build

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.json"))


def measure(name: str, batch: int | None, overrides: list[str], device: torch.device) -> list[dict]:
    """A row for each network of a configuration: its shape, the medians, the fastest."""
    config = configuration.load(name, [*overrides, "model.attention=auto"])
    config = build.with_precision(config, device)
    images = batch or config.data.micro_batch_size
    with torch.device("meta"):
        networks = build.build_networks(config)
    tried = []

    def trial(shape: attention_trial.Shape, device: torch.device, dtype: torch.dtype):
        tried.append((shape, *attention_trial.fastest(shape, device, dtype)))
        return tried[-1][1:]

    with (
        mock.patch.object(backends, "fastest", trial),
        mock.patch.object(
            attention_trial, "candidates", lambda device: attention_trial.installed()
        ),
    ):
        parts = backends.choose_attention(networks, networks.encoder, config, device, images)
    return [
        {
            "config": Path(name).stem, "part": part, "images": images, **shape._asdict(),
            "ms": medians, "fastest": fastest,
        }
        for part, (shape, fastest, medians) in zip(parts, tried, strict=True)
    ]  # fmt: skip


def table(rows: list[dict]) -> str:
    kernels = [name for name in attention.BACKENDS if any(name in row["ms"] for row in rows)]
    titles = "".join(f"{name:>12s}" for name in kernels)
    shape = "sequences x heads x tokens x width"
    lines = [f"{'config':20s}{'part':10s}{shape:>36s}{titles}  fastest"]
    for row in rows:
        sizes = f"{row['sequences']} x {row['heads']} x {row['keys']} x {row['width']}"
        cells = (f"{row['ms'][name]:.3f}" if name in row["ms"] else "-" for name in kernels)
        times = "".join(f"{cell:>12s}" for cell in cells)
        lines.append(f"{row['config']:20s}{row['part']:10s}{sizes:>36s}{times}  {row['fastest']}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", nargs="+", default=CONFIGS, metavar="NAME")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument(
        "--batch-size", dest="batch", type=int, help="images; default: each config's micro-batch"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    args = parser.parse_args(argv)
    if args.batch is not None and args.batch < 1:
        parser.error(f"--batch-size {args.batch}: must be at least 1")
    device = here()
    about = {**provenance(device), "batch": args.batch, "overrides": args.overrides}
    rows = []
    try:
        for name in args.config:
            rows += measure(name, args.batch, args.overrides, device)
            if args.json:
                files.write({**about, "rows": rows}, args.json)
    except ValueError as error:  # the user's input
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
