"""A few steps of a configuration, and what a run of it is: `train.py --dry-run`."""

import math
import sys
import time

import torch

from cjepa_fast.config import Config
from cjepa_fast.data.loader import Loader
from cjepa_fast.model import waves
from cjepa_fast.runtime import distributed, hardware
from cjepa_fast.runtime.memory import peak_resident_gib
from cjepa_fast.runtime.printable import say
from cjepa_fast.telemetry.pace import duration
from cjepa_fast.telemetry.progress import shown_bar
from cjepa_fast.training.engines.cuda_graph import WARM
from cjepa_fast.training.loop import steps_of
from cjepa_fast.training.sizes import counted_sizes, gflop_of
from cjepa_fast.training.trainer import Trainer

STEPS = 3
BROKEN = (
    "error: a step's loss or gradient is not finite: try --set run.precision=fp32, a lower "
    "optim.lr, and data.mean and data.std of your images"
)


def steps_to_take(config: Config) -> int:
    """The last of them is a replay where the step is recorded as a CUDA graph."""
    return STEPS + WARM * config.run.cuda_graph


def dry_run(trainer: Trainer, loader: Loader, told: list[str]) -> int:
    """A few steps, then what a run of this configuration is made of. Returns the exit status: 1
    where a step's loss or gradient is not finite."""
    finite, count = True, steps_to_take(trainer.config)
    with shown_bar(count, "dry run", "step") as bar:
        for index, (batches, _) in zip(range(count), steps_of(loader, 0), strict=False):
            began = time.perf_counter()
            terms, applied = trainer.step(batches, index)
            loss = float(terms["loss"])  # waits for the device
            finite &= bool(applied) and math.isfinite(loss)
            step_s = time.perf_counter() - began
            bar.update()
    (broken,) = distributed.any_rank(not finite)
    if distributed.rank() != 0:
        return int(broken)
    print(*told, sep="\n", end="\n" * bool(told))
    encoder, masks = trainer.ema.module, batches[-1].masks
    K, (M, P) = masks.context_k, masks.target_idx_BMP.shape[1:]
    gflop = gflop_of(trainer.config, K, M, P)
    rows, cols = encoder.grid
    parameters = trainer.parameters
    config, images = trainer.config, loader.images
    classes = f" in {len(images.classes)} classes" if images.classes else ""
    print(f"images       {len(images):,}{classes}, {config.data.batch_size} a step")
    print(
        f"steps        {trainer.steps_per_epoch:,} an epoch, {trainer.total_steps:,} in "
        f"{config.run.epochs} epochs: {duration(step_s * trainer.total_steps)} at this rate"
    )
    optim = config.optim
    print(
        f"learning rate from {optim.start_lr:g} to {optim.lr:g} in {optim.warmup_epochs:g} epochs, "
        f"to {optim.final_lr:g} at the end"
    )
    print(hardware.precision_message(trainer.config.run.precision, trainer.device, False))
    print(f"parameters   encoder {parameters['encoder']:,}, predictor {parameters['predictor']:,}")
    print(f"tokens       {rows} x {cols} patches, context {K:g}, targets {M} x {P}")
    if config.mask.context == "fixed" and trainer.device.type == "cuda":
        count = torch.cuda.get_device_properties(trainer.device).multi_processor_count
        sizes, fewest = counted_sizes(config, int(K), M, P), config.mask.min_keep
        print("waves        " + waves.describe(trainer.micro_batch, sizes, count, fewest))
    print("GFLOP/image  " + ", ".join(f"{name} {value:.1f}" for name, value in gflop.items()))
    print(f"memory       {peak_gib(trainer.device):.2f} GiB at the peak, {trainer.device}")
    print(
        f"step         {trainer.micro_batch} images x {loader.accumulation} x "
        f"{distributed.world_size()} ranks, loss {loss:.4f}, {step_s:.2f} s (step {count})"
    )
    if broken:
        say(BROKEN, sys.stderr)
    return int(broken)


def peak_gib(device: torch.device) -> float:
    """The most memory this process has held: on the GPU what torch reserved, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    return peak_resident_gib()
