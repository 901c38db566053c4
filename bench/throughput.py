"""Images/s of the training step, on synthetic data and end to end from JPEG files.

    python bench/throughput.py                                  # the demo's model, on what is here
    python bench/throughput.py --config vit_b vit_h --data both --data-path /my/images --save
    python bench/throughput.py --config vit_b --against reference

The step is train.py's own: forward, backward, update and average. Warm-up is timed apart. MFU is
the counted work (cjepa_fast/flops.py) over the device's data-sheet bf16 rate where that is known,
and over the rate of a large matrix product measured in the same run. --against takes turns with the
plain step of bench/reference.py, in fp32 and under bf16 autocast, on the same batches.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from hardware import (
    ROOT,
    measured_tflops,
    own_command,
    peak_tflops,
    provenance,
    synchronize,
)
from reference import ReferenceTrainer

from cjepa_fast import build, train
from cjepa_fast import config as configuration
from cjepa_fast import engine as engines
from cjepa_fast.config import Config
from cjepa_fast.data.loader import Batch
from cjepa_fast.flops import step_gflop

RESULTS = ROOT / "bench" / "results" / "throughput.json"
RING = 8  # synthetic batches, each with masks of its own, used in turn
EPOCH_STEPS = 1000  # of synthetic data: only the schedules see it
COLUMNS = {  # heading: (key of a row, format)
    "config": ("config", "{}"),
    "data": ("data", "{}"),
    "batch": ("batch", "{}"),
    "images/s": ("images_per_s", "{:.1f}"),
    "step ms": ("step_ms", "{:.1f}"),
    "p10": ("step_ms_p10", "{:.1f}"),
    "p90": ("step_ms_p90", "{:.1f}"),
    "wait %": ("data_wait_pct", "{:.1f}"),
    "GFLOP/image": ("gflop_per_image", "{:.2f}"),
    "TFLOP/s": ("tflops", "{:.2f}"),
    "MFU % sheet": ("mfu_sheet_pct", "{:.1f}"),
    "% of matmul": ("mfu_matmul_pct", "{:.1f}"),
    "peak GiB": ("peak_gib", "{:.2f}"),
    "build s": ("build_s", "{:.1f}"),
    "warm-up s": ("warmup_s", "{:.1f}"),
}

AGAINST_COLUMNS = {
    "config": ("config", "{}"),
    "step": ("step", "{}"),
    "batch": ("batch", "{}"),
    "step ms": ("step_ms", "{:.1f}"),
    "p10": ("step_ms_p10", "{:.1f}"),
    "p90": ("step_ms_p90", "{:.1f}"),
    "images/s": ("images_per_s", "{:.1f}"),
    "ours is faster, times": ("ours_times", "{:.2f}"),
}


class StepClock:
    """The time of each step, by CUDA events so that the host may run ahead of the device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list = []

    def mark(self) -> None:
        if self.device.type != "cuda":
            self.marks.append(time.perf_counter())
            return
        self.marks.append(torch.cuda.Event(enable_timing=True))
        self.marks[-1].record()

    def step_ms(self) -> list[float]:
        synchronize(self.device)
        pairs = itertools.pairwise(self.marks)
        if self.device.type == "cuda":
            return [begin.elapsed_time(end) for begin, end in pairs]
        return [1e3 * (end - begin) for begin, end in pairs]


def synthetic_batches(config: Config, device: torch.device, masks) -> Iterator[list[Batch]]:
    """Endless steps of one batch of noise each, with masks as a run would draw them."""
    B, side = config.data.micro_batch_size, config.data.image_size
    ring = []
    for step in range(RING):
        images = torch.randn(B, 3, side, side, device=device, dtype=build.compute_dtype(config))
        places_B = torch.arange(B) + step * B
        ring.append(
            [Batch(images, masks(0, step, places_B).to(device), torch.arange(B), 0, step, 0)]
        )
    return itertools.cycle(ring)


def run_steps(trainer: train.Trainer, batches, first: int, count: int) -> dict:
    """`count` steps: their times, the seconds waited for data, and the masks' mean sizes."""
    clock, waited_s, sizes = StepClock(trainer.device), 0.0, []
    synchronize(trainer.device)
    began = time.perf_counter()
    clock.mark()
    for index in range(first, first + count):
        asked = time.perf_counter()
        step = next(batches)
        waited_s += time.perf_counter() - asked
        trainer.step(step, index)
        clock.mark()
        sizes += [
            (b.masks.context_idx_BK.shape[1], *b.masks.target_idx_BMP.shape[1:]) for b in step
        ]
    step_ms = clock.step_ms()
    total_s = time.perf_counter() - began
    k, m, p = (statistics.fmean(column) for column in zip(*sizes, strict=True))
    return {
        "step_ms": step_ms, "total_s": total_s, "waited_s": waited_s,
        "context_k": k, "targets_m": round(m), "targets_p": p,
    }  # fmt: skip


def measure(config: Config, data: str, device: torch.device, steps: int, warmup: int) -> dict:
    """One row: `steps` timed steps of a configuration after `warmup` others."""
    began = time.perf_counter()
    masks = build.build_masks(config)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    loader = build.build_loader(config, device, masks) if data == "jpeg" else None
    try:
        trainer = train.Trainer(config, device, loader.steps_per_epoch if loader else EPOCH_STEPS)
        if loader:
            batches = (group for group, _ in train.steps_of(loader, 0))
        else:
            batches = synthetic_batches(config, device, masks)
        synchronize(device)
        build_s = time.perf_counter() - began
        warm = run_steps(trainer, batches, 0, warmup)
        timed = run_steps(trainer, batches, warmup, steps)
    finally:
        if loader:
            loader.close()
    return row_of(config, data, trainer, timed) | {
        "build_s": build_s,
        "warmup_s": warm["total_s"],
        "first_step_s": warm["step_ms"][0] / 1e3,
        "warmup_steps": warmup,
        "peak_gib": train.peak_gib(device),
    }


def measure_against(config: Config, device: torch.device, steps: int, warmup: int) -> list[dict]:
    """A row for our step and for each way of the reference's, which take turns."""
    masks = build.build_masks(config)
    trainer = train.Trainer(config, device, EPOCH_STEPS)
    sides = {
        "ours": trainer,
        "reference, fp32": ReferenceTrainer(trainer, autocast=False),
        "reference, bf16 autocast": ReferenceTrainer(trainer, autocast=True),
    }
    batches = synthetic_batches(config, device, masks)
    for index in range(warmup):
        batch = next(batches)
        for side in sides.values():
            side.step(batch, index)
    clock = StepClock(device)
    synchronize(device)
    clock.mark()
    for index in range(warmup, warmup + steps):
        batch = next(batches)
        for side in sides.values():
            side.step(batch, index)
            clock.mark()
    step_ms = clock.step_ms()
    turns = {name: step_ms[i :: len(sides)] for i, name in enumerate(sides)}
    return [against_row(name, times, turns["ours"], trainer) for name, times in turns.items()]


def against_row(name: str, step_ms: list[float], ours_ms: list[float], trainer) -> dict:
    median, deciles = statistics.median(step_ms), statistics.quantiles(step_ms, n=10)
    return {
        "step": name,
        "batch": trainer.micro_batch,
        "steps": len(step_ms),
        "step_ms": median,
        "step_ms_p10": deciles[0],
        "step_ms_p90": deciles[-1],
        "images_per_s": 1e3 * trainer.micro_batch / median,
        "ours_times": median / statistics.median(ours_ms),
    }


def row_of(config: Config, data: str, trainer: train.Trainer, timed: dict) -> dict:
    """The figures of the timed steps."""
    step_ms, images = timed["step_ms"], trainer.micro_batch * engines.world_size()
    deciles = statistics.quantiles(step_ms, n=10, method="inclusive")
    images_per_s = images * len(step_ms) / timed["total_s"]
    part = config.predictor
    gflop = step_gflop(
        **trainer.ema.module.architecture,
        predictor_width=part.width,
        predictor_depth=part.depth,
        predictor_mlp_ratio=part.mlp_ratio,
        context_k=timed["context_k"],
        targets_m=timed["targets_m"],
        targets_p=timed["targets_p"],
    )
    return {
        "data": data,
        "batch": images,
        "steps": len(step_ms),
        "images_per_s": images_per_s,
        "step_ms": statistics.median(step_ms),
        "step_ms_p10": deciles[0],
        "step_ms_p90": deciles[-1],
        "data_wait_pct": 100 * timed["waited_s"] / timed["total_s"],
        "context_k": timed["context_k"],
        "targets_p": timed["targets_p"],
        "gflop_per_image": gflop["total"],
        "gflop_parts": gflop,
        "tflops": gflop["total"] * images_per_s / 1e3 / engines.world_size(),
    }


def add_mfu(row: dict, precision: str, device: torch.device, device_name: str) -> None:
    """Model-flop utilisation of one device, in per cent: of its data sheet, of a plain product."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    row["matmul_tflops"] = measured_tflops(device, dtype)
    row["mfu_matmul_pct"] = 100 * row["tflops"] / row["matmul_tflops"]
    peak = peak_tflops(device_name) if precision == "bf16" else None
    row["peak_tflops"] = peak
    row["mfu_sheet_pct"] = 100 * row["tflops"] / peak if peak else None


def configured(name: str, args: argparse.Namespace, world_size: int) -> Config:
    """The configuration with the bench's batch: one micro-batch a process, no accumulation."""
    config = configuration.load(name, args.overrides)
    batch = args.batch or min(
        config.data.micro_batch_size, max(1, config.data.batch_size // world_size)
    )
    sizes = [f"data.micro_batch_size={batch}", f"data.batch_size={batch * world_size}"]
    path = [f"data.path={json.dumps(args.data_path)}"]
    return configuration.load(name, [*args.overrides, *sizes, *path])


def measure_one(name: str, args: argparse.Namespace) -> list[dict]:
    """Rows of one configuration, in this process."""
    config = configured(name, args, int(os.environ.get("WORLD_SIZE", "1")))
    device = engines.start(config.run.seed)
    about = provenance(device)
    rows = []
    if args.against:
        found = measure_against(config, device, args.steps, args.warmup)
        return [{"config": Path(name).stem} | row | about for row in found]
    for data in ("synthetic", "jpeg") if args.data == "both" else (args.data,):
        row = {"config": Path(name).stem} | measure(config, data, device, args.steps, args.warmup)
        add_mfu(row, config.run.precision, device, about["hardware"]["device"])
        rows.append(row | {"precision": config.run.precision, "processes": engines.world_size()})
    return [row | about for row in rows]


def measure_apart(name: str, args: argparse.Namespace) -> list[dict]:
    """Rows of one of several configurations, in a process of its own: memory is then its own, and
    one that does not fit leaves the others be."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--config", name, "--json", str(out), "--quiet"]
        for option in ("batch", "steps", "warmup", "data", "data_path", "against"):
            if (value := getattr(args, option)) is not None:
                command += [f"--{option.replace('_', '-')}", str(value)]
        command += [part for override in args.overrides for part in ("--set", override)]
        done = subprocess.run(command)
        if done.returncode == 0:
            return [row | {"command": own_command()} for row in json.loads(out.read_text())]
    return [{"config": name, "failed": f"exit status {done.returncode}"}]


def table(rows: list[dict], columns: dict[str, tuple[str, str]] = COLUMNS) -> str:
    lines = [list(columns)]
    for row in rows:
        if "failed" in row:
            lines.append([row["config"], row["failed"], *[""] * (len(columns) - 2)])
            continue
        cells = [(row[key], text) for key, text in columns.values()]
        lines.append(["-" if value is None else text.format(value) for value, text in cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines
    )


def save(rows: list[dict], path: Path) -> None:
    """Append to a JSON list, which is whole at any time."""
    kept = json.loads(path.read_text()) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(kept + rows, indent=1) + "\n")
    partial.replace(path)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", nargs="+", default=["demo"], metavar="NAME")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--batch", type=int, help="images a process; default: the config's")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them")
    parser.add_argument("--data", choices=("synthetic", "jpeg", "both"), default="both")
    parser.add_argument("--against", choices=("reference",), help="take turns with that step")
    parser.add_argument("--data-path", default="shapes", metavar="SET", help="images of 'jpeg'")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--save", action="store_true", help=f"append them to {RESULTS.name}")
    parser.add_argument("--quiet", action="store_true", help="print no table")
    args = parser.parse_args(argv)
    for name in ("batch", "steps", "warmup"):
        least = 2 if name == "steps" else 1
        if (value := getattr(args, name)) is not None and value < least:
            parser.error(f"--{name} {value}: must be at least {least}")
    return args


def measure_all(args: argparse.Namespace) -> list[dict]:
    """Rows of every configuration; the JSON file is written anew after each."""
    rows: list[dict] = []
    for name in args.config:
        alone = len(args.config) == 1
        rows += measure_one(name, args) if alone else measure_apart(name, args)
        if args.json and engines.rank() == 0:
            Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
        if not alone:
            print(f"measured {name}", file=sys.stderr, flush=True)
    return rows


def main(argv: list[str]) -> int:
    args = parse(argv)
    try:
        rows = measure_all(args)
    except (ValueError, FileNotFoundError) as error:  # the user's input
        print(f"error: {error}", file=sys.stderr)
        return 2
    if engines.rank() == 0:
        report(rows, args)
    return int(any("failed" in row for row in rows))


def report(rows: list[dict], args: argparse.Namespace) -> None:
    measured = [row for row in rows if "failed" not in row]
    if args.save and measured:
        save(measured, RESULTS)
    if args.quiet:
        return
    if args.against:
        print(table(rows, AGAINST_COLUMNS))
        return
    if measured:
        row = measured[0]
        sheet = f"{row['peak_tflops']:.0f}" if row["peak_tflops"] else "not known"
        print(f"{row['hardware']['device']}; torch {row['versions']['torch']}")
        print(f"bf16 TFLOP/s: {sheet} by data sheet, {row['matmul_tflops']:.3g} in a large product")
    print(table(rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
