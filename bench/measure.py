"""What bench/throughput.py measures: steps, their phases, decoding alone, two steps taking turns.

Times are the device's own on a GPU, so that the host may run ahead of it.
"""

import functools
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import timeline
import torch
import torch.distributed as dist
from hardware import peak_tflops
from masks import calls_ms
from phases import Phases
from power import PowerMeter, power_figures
from reference import ReferenceTrainer

from cjepa_fast.config import Config
from cjepa_fast.data.loader import Batch, Loader
from cjepa_fast.runtime import distributed
from cjepa_fast.runtime import hardware as machine
from cjepa_fast.runtime.image_size import height_width
from cjepa_fast.runtime.memory import SavedActivations, peak_bytes
from cjepa_fast.runtime.rates import measured_tflops, synchronize
from cjepa_fast.training import build, dry_run, loop
from cjepa_fast.training import trainer as trainer_module
from cjepa_fast.training.sizes import gflop_of
from cjepa_fast.training.trainer import Trainer

WARM_REFERENCE = 3  # of the reference's steps, each some times as long as ours
RING = 8  # synthetic batches, each with masks of its own, used in turn
EPOCH_STEPS = 1000  # of synthetic data: only the schedules see it
PHASE_STEPS = 5  # timed by parts, after the others, since that holds a GPU up
AHEAD_BATCHES, MASK_CALLS = 5, 20  # timed of what is made ahead of the step
PROFILED_STEPS = 3
TOP = 15  # lines of a profile's table


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
    B = config.data.micro_batch_size
    shape = B, config.data.channels, *height_width(config.data.image_size)
    ring = []
    for step in range(RING):
        images = torch.randn(shape, device=device, dtype=build.compute_dtype(config))
        index_B = torch.arange(B) + step * B
        ring.append(
            [Batch(images, masks(0, step, index_B).to(device), torch.arange(B), 0, step, 0)]
        )
    return itertools.cycle(ring)


def built(config: Config, device: torch.device, steps_per_epoch: int) -> Trainer:
    """A Trainer, its weights drawn on its device: the times hang on no particular ones, and on a
    CPU ViT-H's take ten seconds."""

    def on_device(*args):
        with device:
            return build.build_networks(*args)

    with mock.patch.object(trainer_module, "build_networks", on_device):
        return Trainer(config, device, steps_per_epoch)


def run_steps(trainer: Trainer, batches, first: int, count: int) -> dict:
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
        sizes += [(b.masks.context_k, *b.masks.target_idx_BMP.shape[1:]) for b in step]
    step_ms = clock.step_ms()
    total_s = time.perf_counter() - began
    k, m, p = (statistics.fmean(column) for column in zip(*sizes, strict=True))
    return {
        "step_ms": step_ms, "total_s": total_s, "waited_s": waited_s,
        "context_k": k, "targets_m": round(m), "targets_p": p,
    }  # fmt: skip


def measure(
    config: Config,
    data: str,
    device: torch.device,
    steps: int,
    warmup: int,
    profile_to: Path | None = None,
) -> dict:
    """One row: `steps` timed steps of a configuration after `warmup` others, then its phases.

    data: "synthetic" or "jpeg". profile_to: a file for a trace, as Perfetto reads it.
    """
    forget(device)
    began = time.perf_counter()
    masks = build.build_masks(config)
    loader = build.build_loader(config, device, masks) if data == "jpeg" else None
    meter = PowerMeter()
    try:
        trainer = built(config, device, loader.steps_per_epoch if loader else EPOCH_STEPS)
        if loader:
            batches = (group for group, _ in loop.steps_of(loader, 0))
        else:
            batches = synthetic_batches(config, device, masks)
        synchronize(device)
        build_s = time.perf_counter() - began
        warm = run_steps(trainer, batches, 0, warmup)
        with meter.running():
            timed = run_steps(trainer, batches, warmup, steps)
        peak_gib = dry_run.peak_gib(device)
        parts = Phases(trainer)
        if config.run.compile != "whole" and not config.run.cuda_graph:  # parts not called apart
            with parts.timed():
                run_steps(trainer, batches, warmup + steps, PHASE_STEPS)
        if profile_to:
            profile(trainer, batches, warmup + steps + PHASE_STEPS, profile_to)
        ahead_ms = made_ahead_ms(config, device, masks, loader)
    finally:
        if loader:
            loader.close()
    most = zip(*on_all_ranks((timed["total_s"], peak_gib)), strict=True)
    timed["total_s"], peak_gib = map(max, most)
    images = steps * trainer.micro_batch * distributed.world_size()
    return row_of(config, data, trainer, timed) | {
        **power_figures(on_all_ranks(meter.found), images),
        "phases_ms": parts.median_ms(),
        "ahead_ms": ahead_ms,
        "build_s": build_s,
        "warmup_s": warm["total_s"],
        "first_step_s": warm["step_ms"][0] / 1e3,
        "warmup_steps": warmup,
        "peak_gib": peak_gib,
    }


def forget(device: torch.device) -> None:
    """Give back the memory of what was measured before, so that the peak is the next one's own."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def on_all_ranks(value) -> list:
    """What every rank gives, in their order."""
    values = [value] * distributed.world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def made_ahead_ms(
    config: Config, device: torch.device, masks, loader: Loader | None
) -> dict[str, float]:
    """Median milliseconds a batch of what the loader's thread makes beside the step, each alone."""
    found = {}
    if loader:
        loader.close()  # its iteration so far; a new one begins
        full = config.data.prefetch + 1  # batches that lie ready at the start
        found["decode"] = decoding_row(loader, device, AHEAD_BATCHES, full)["step_ms"]
    found["masks"] = statistics.median(calls_ms(masks, config.data.micro_batch_size, MASK_CALLS))
    return found


def profile(trainer: Trainer, batches, first: int, path: Path) -> None:
    """Write the trace of some steps and print the operations that take longest."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    order = "self_cpu_time_total"
    if trainer.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        order = "self_cuda_time_total"
    with torch.profiler.profile(activities=activities) as profiler:
        run_steps(trainer, batches, first, PROFILED_STEPS)
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    print(profiler.key_averages().table(sort_by=order, row_limit=TOP, max_name_column_width=50))
    if found := timeline.summary(path, PROFILED_STEPS):
        path.with_suffix(".txt").write_text(found, encoding="utf-8")
        print(found)
    print(f"trace of {PROFILED_STEPS} steps: {path} (opens in ui.perfetto.dev)")


def measure_decoding(config: Config, device: torch.device, steps: int, warmup: int) -> dict:
    """One row: the batches of a run as fast as they come, no step taken."""
    masks = build.build_masks(config)
    loader = build.build_loader(config, device, masks)
    try:
        return {"data": "decode-only", **decoding_row(loader, device, steps, warmup)}
    finally:
        loader.close()


def decoding_row(loader: Loader, device: torch.device, steps: int, warmup: int) -> dict:
    batches = loader.iterate(0)
    for _ in range(warmup):
        next(batches)
    clock = StepClock(device)
    clock.mark()
    images, began = 0, time.perf_counter()
    for _ in range(steps):
        images += len(next(batches).images_BCHW)
        clock.mark()
    step_ms = clock.step_ms()
    took_s = time.perf_counter() - began
    found = on_all_ranks((images, took_s))
    return {
        "batch": sum(images for images, _ in found) // steps,
        "steps": steps,
        "images_per_s": sum(images / took_s for images, took_s in found),
        **spread(step_ms),
    }


def check_comparable(config: Config) -> None:
    """Raises ValueError for what the plain step does not do: times of other maths say nothing."""
    for key, value, own in (
        ("predictor.mode", config.predictor.mode, "per_target"),
        ("model.target_precision", config.model.target_precision, "bf16"),
        ("model.context_precision", config.model.context_precision, "bf16"),
    ):
        if value != own:
            raise ValueError(
                f'{key} = "{value}": the reference\'s step is that of "{own}"; compare with that'
            )
    if config.mask.context == "packed":
        raise ValueError('mask.context = "packed": the reference cuts contexts; compare "fixed"')


def measure_against(config: Config, device: torch.device, steps: int, warmup: int) -> list[dict]:
    """A row for our step and for each way of the reference's, which take turns."""
    forget(device)
    check_comparable(config)
    masks = build.build_masks(config)
    trainer = built(config, device, EPOCH_STEPS)
    trainers = {
        "ours": trainer,
        "reference, fp32": ReferenceTrainer(trainer, autocast=False),
        "reference, bf16 autocast": ReferenceTrainer(trainer, autocast=True),
    }
    best = machine.best_precision(device)
    if best.precision != "bf16":
        print(f"left out: the reference in bf16, since {best.reason}", file=sys.stderr)
        del trainers["reference, bf16 autocast"]
    batches = synthetic_batches(config, device, masks)
    for index in range(warmup):
        batch = next(batches)
        for name, each in trainers.items():
            if name == "ours" or index >= warmup - WARM_REFERENCE:
                each.step(batch, index)
    clock = StepClock(device)
    synchronize(device)
    clock.mark()
    for index in range(warmup, warmup + steps):
        batch = next(batches)
        for each in trainers.values():
            each.step(batch, index)
            clock.mark()
    step_ms = clock.step_ms()
    turns = {name: step_ms[i :: len(trainers)] for i, name in enumerate(trainers)}
    rows = [against_row(name, turns[name], turns["ours"], trainer) for name in trainers]
    for row in rows:  # told now: the steps below may find no memory
        print("{step}: {step_ms:.2f} ms, {ours_times:.2f} times ours".format_map(row))
    return [row | step_memory(trainers[row["step"]], batch, warmup + steps) for row in rows]


def against_row(name: str, step_ms: list[float], ours_ms: list[float], trainer) -> dict:
    median = statistics.median(step_ms)
    return {
        "step": name,
        "attention": trainer.attention if name == "ours" else {},
        "batch": trainer.micro_batch,
        "steps": len(step_ms),
        **spread(step_ms),
        "images_per_s": 1e3 * trainer.micro_batch / median,
        "ours_times": median / statistics.median(ours_ms),
    }


def step_memory(trainer: Trainer | ReferenceTrainer, batches: list[Batch], index: int) -> dict:
    """GiB that a step's forward keeps for its backward beside the weights, and that a step holds
    at its peak beyond what is held between steps."""
    saved = SavedActivations(
        trainer.engine.module if isinstance(trainer, Trainer) else trainer.networks
    )
    with saved.counting():
        trainer.step(batches, index)
    peak = peak_bytes(lambda: trainer.step(batches, index + 1), trainer.device)
    return {"kept_gib": saved.bytes / 2**30, "step_gib": peak / 2**30}


def spread(step_ms: list[float]) -> dict:
    deciles = statistics.quantiles(step_ms, n=10, method="inclusive")
    median = statistics.median(step_ms)
    return {"step_ms": median, "step_ms_p10": deciles[0], "step_ms_p90": deciles[-1]}


def row_of(config: Config, data: str, trainer: Trainer, timed: dict) -> dict:
    """The figures of the timed steps."""
    step_ms, images = timed["step_ms"], trainer.micro_batch * distributed.world_size()
    images_per_s = images * len(step_ms) / timed["total_s"]
    sizes = (timed[name] for name in ("context_k", "targets_m", "targets_p"))
    gflop = gflop_of(config, *sizes)
    return {
        "data": data,
        "attention": trainer.attention,
        "batch": images,
        "steps": len(step_ms),
        "images_per_s": images_per_s,
        **spread(step_ms),
        "data_wait_pct": 100 * timed["waited_s"] / timed["total_s"],
        "context_k": timed["context_k"],
        "targets_p": timed["targets_p"],
        "gflop_per_image": gflop["total"],
        "gflop_parts": gflop,
        "tflops": gflop["total"] * images_per_s / 1e3 / distributed.world_size(),
    }


@functools.cache
def _matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Once a process: it takes a second, and heats the device before the next row."""
    return measured_tflops(device, dtype)


def add_mfu(row: dict, precision: str, device: torch.device, device_name: str) -> None:
    """Model-flop utilisation of one device, in per cent: of its data sheet, of a plain matmul."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    row["matmul_tflops"] = _matmul_tflops(device, dtype)
    row["mfu_matmul_pct"] = 100 * row["tflops"] / row["matmul_tflops"]
    peak = peak_tflops(device_name) if precision == "bf16" else None
    row["peak_tflops"] = peak
    row["mfu_sheet_pct"] = 100 * row["tflops"] / peak if peak else None
