"""What a fused step costs the host: is a small model bound by Python and not by the GPU?

    python bench/host.py --config vit_t vit_s --json bench/results/host.json

The step of one process runs on the CPU with its whole depth and hardly any width, with the launches
of our kernels stubbed (stand_in.py: Triton's own Python runs, up to the driver's call) and its
matmuls answered with unwritten memory: what is left is what the host does. torch's own operations
compute something here, of two images; the call of the driver, some 3 us a launch, is left out.
Beside it stands the least time that an H200 needs for the step at the configuration's micro-batch:
its matmuls at the rate and its other bytes at the bandwidth that were measured there. A host slower
than that leaves the GPU idle, unless the step is recorded (run.cuda_graph).

Times are of the processor named, of its time in this process, and it is shared with others: the
counts are exact, the times are not.
"""

import argparse
import os
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import files
import stand_in
import torch
from hardware import provenance
from measure import EPOCH_STEPS, RING, synthetic_batches
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cjepa_fast import config as configuration
from cjepa_fast.config import Config
from cjepa_fast.training import build
from cjepa_fast.training.sizes import gflop_of, model_sizes
from cjepa_fast.training.trainer import Trainer

CPU = torch.device("cpu")
# bench/results/h200/README.md: ViT-H's matmuls and a copy, on one H200 under load
MATMUL_TFLOPS, COPY_GB_PER_S = 705, 4198
# Bytes that must move: a token and unit of width in a block (tests/model/test_bytes.py), forward
# and trained, and a parameter in AdamW with the EMA (kernels/ema/adamw.py).
FORWARD_BYTES, TRAINED_BYTES, PARAMETER_BYTES = 40, 96, 40
HEAD = 16  # values of a head, instead of the configuration's


class Counted(TorchDispatchMode):
    """Operations of torch that a GPU would launch a kernel for: not views, nor fresh memory."""

    def __init__(self):
        super().__init__()
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        memory = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        fresh = any(t.untyped_storage().data_ptr() not in memory for t in tensors(out))
        name = function.overloadpacket.__name__
        own = function.namespace == "cjepa_fast"  # what these launch is counted by kernel
        if (fresh or function._schema.is_mutable) and "empty" not in name and not own:
            self.by_name[name] += 1
        return out


def tensors(found) -> list[torch.Tensor]:
    return [t for t in tree_leaves(found) if isinstance(t, torch.Tensor)]


def narrow(name: str, overrides: list[str]) -> Config:
    """The configuration with all its layers, two images, and heads of HEAD values."""
    fixed = ["mask.context=fixed", "model.attention=triton", "run.precision=bf16", *overrides]
    heads = model_sizes(configuration.load(name, fixed))["heads"]
    widths = [f"{part}.width={HEAD * heads}" for part in ("model", "predictor")]
    batch = ["data.batch_size=2", "data.micro_batch_size=2"]
    return configuration.load(name, [*fixed, *widths, *batch])


def least_device_ms(config: Config) -> float:
    """The least time of a step at the configuration's micro-batch on an H200, in ms."""
    B, masks = config.data.micro_batch_size, build.build_masks(config)
    drawn = masks(0, 0, torch.arange(64))
    K, (M, P) = drawn.context_k, drawn.target_idx_BMP.shape[1:]
    with torch.device("meta"):
        networks = build.build_networks(config)
    encoder, predictor = networks.encoder, config.predictor
    N = encoder.grid[0] * encoder.grid[1]
    moved = encoder.depth * encoder.width * (FORWARD_BYTES * N + TRAINED_BYTES * K)
    moved += predictor.depth * predictor.width * TRAINED_BYTES * M * (K + P)
    parameters = sum(p.numel() for p in networks.parameters() if p.requires_grad)
    matmuls_s = B * gflop_of(config, K, M, P)["total"] / MATMUL_TFLOPS / 1e3
    return 1e3 * matmuls_s + (B * moved + PARAMETER_BYTES * parameters) / COPY_GB_PER_S / 1e6


def measure(name: str, overrides: list[str], steps: int) -> dict:
    config, launches = narrow(name, overrides), []
    with stand_in.no_matmuls():
        with stand_in.compiling(lambda launch: launches.append(launch.name) or True):
            trainer = Trainer(config, CPU, EPOCH_STEPS)
            batches = synthetic_batches(config, CPU, build.build_masks(config))
            for index in range(RING + 1):  # of each ring's masks: kernels compiled, tables made
                trainer.step(next(batches), index)
            launches.clear()
            with Counted() as torch_s:
                trainer.step(next(batches), RING + 1)
        with stand_in.compiling():
            times_ms = [timed_ms(trainer, next(batches), index) for index in range(steps)]
        with stand_in.launches(None):
            stubbed_ms = [timed_ms(trainer, next(batches), index) for index in range(steps)]
    operations = torch_s.by_name.total()
    count, median = len(launches) + operations, statistics.median(times_ms)
    own = configuration.load(name, [*overrides, "mask.context=fixed"])
    return {
        "config": name, "depth": trainer.context_encoder.depth,
        "micro_batch": own.data.micro_batch_size,
        "kernels": len(launches), "torch_operations": operations, "launches": count,
        "host_ms": median, "host_ms_least": min(times_ms), "us_a_launch": 1e3 * median / count,
        "without_triton_ms": statistics.median(stubbed_ms),
        "least_device_ms": least_device_ms(own),
        "kernels_by_name": dict(Counter(launches).most_common()),
        "torch_by_name": dict(torch_s.by_name.most_common()),
    }  # fmt: skip


def timed_ms(trainer: Trainer, batch: list, index: int) -> float:
    began = time.process_time()
    trainer.step(batch, index)
    return 1e3 * (time.process_time() - began)


def table(rows: list[dict]) -> str:
    lines = [
        "| | our kernels | torch's operations | host, ms a step (least) | us a launch "
        "| without Triton, ms | images | an H200 at least, ms | us a launch at which it waits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        host = f"{row['host_ms']:.1f} ({row['host_ms_least']:.1f})"
        cells = [row["config"], row["kernels"], row["torch_operations"], host]
        cells += [f"{row['us_a_launch']:.1f}", f"{row['without_triton_ms']:.1f}"]
        waits_us = 1e3 * row["least_device_ms"] / row["launches"]
        cells += [row["micro_batch"], f"{row['least_device_ms']:.1f}", f"{waits_us:.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", nargs="+", default=["vit_t", "vit_s"], metavar="NAME")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: must be at least 1")
    torch.set_num_threads(1)
    try:
        rows = [measure(name, args.overrides, args.steps) for name in args.config]
    except (ValueError, FileNotFoundError) as error:  # the user's input
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    if args.json:
        files.write({**provenance(CPU), "rows": rows}, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
