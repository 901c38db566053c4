"""Pretrain: `deepspeed cjepa_fast/train.py --config vit_h.json --set data.path=/my/images`.

Also `python cjepa_fast/train.py ...` for one process, and torchrun. This file reads the command
line, puts the parts together and loops; the maths are in the parts.
"""

import sys
from pathlib import Path

if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # run as a script: this folder must not hide other packages' modules

import argparse
import contextlib
import copy
import itertools
import json
import os
import resource
import shlex
import time
from collections import deque
from collections.abc import Iterator

import torch
import torch.distributed as dist

from cjepa_fast import checkpoint, optim
from cjepa_fast import config as configuration
from cjepa_fast import engine as engines
from cjepa_fast.bad_steps import BadSteps
from cjepa_fast.build import (
    build_engine,
    build_loader,
    build_masks,
    build_networks,
    check_target_precision,
    choose_attention,
    compile_networks,
    gflop_of,
    initialise,
)
from cjepa_fast.config import Config, ConfigError
from cjepa_fast.data.batches import ImagesGone
from cjepa_fast.data.loader import Batch, Loader
from cjepa_fast.graph import Graphed
from cjepa_fast.interrupt import StopRequest
from cjepa_fast.kernels.ema import Number
from cjepa_fast.local import LocalEngine
from cjepa_fast.masks import Masks
from cjepa_fast.streams import TargetStream
from cjepa_fast.telemetry import Telemetry, representation_stats
from cjepa_fast.vit import count_parameters

BAD_STEPS = "bad_steps.jsonl"
FEATURE_ROWS = 1024  # pooled target features that RankMe and the per-dimension std are taken over


class Trainer:
    """One training: the networks under DeepSpeed, the target encoder, and the step."""

    def __init__(
        self,
        config: Config,
        device: torch.device,
        steps_per_epoch: int,
        *,
        images: str = "",
        restoring: bool = False,
    ):
        """images: the image set's fingerprint; restoring: a checkpoint will give the weights."""
        self.config, self.device = config, device
        check_target_precision(config, device)
        self.steps_per_epoch, self.images = steps_per_epoch, images
        self.total_steps = config.run.epochs * steps_per_epoch
        self.micro_batch, self.accumulation = configuration.micro_batches(
            config.data.batch_size, engines.world_size(), config.data.micro_batch_size
        )
        if self.micro_batch * engines.world_size() < 2 and config.loss.vicreg.beta > 0:
            raise ConfigError(
                "data.batch_size or data.micro_batch_size = 1: VICReg's variance needs at least 2 "
                "images at a time; or set loss.vicreg.beta=0"
            )
        networks = build_networks(config, dist.group.WORLD if engines.world_size() > 1 else None)
        target = copy.deepcopy(networks.encoder)
        if config.run.init_from and not restoring:
            initialise(networks, target, config)
        self.encoder_json = json.dumps(
            {**target.architecture, "mean": config.data.mean, "std": config.data.std}, indent=2
        )
        self.parameters = {name: count_parameters(part) for name, part in networks.named_children()}
        networks.to(device)
        target.to(device)
        self.attention = choose_attention(networks, target, config, device, self.micro_batch)
        self.engine = build_engine(networks, target, config, self.micro_batch, self.accumulation)
        self.ema = self.engine.ema
        compile_networks(networks, target, config.run.compile)
        self.target = target
        if config.run.target_stream and device.type == "cuda":
            self.target = TargetStream(target, networks.predictor, device)
        self.features: deque[torch.Tensor] = deque(maxlen=-(-FEATURE_ROWS // self.micro_batch))
        self._run = self.micro_step
        if config.run.cuda_graph:
            self._check_graph()
            self._run = Graphed(self.micro_step, device)

    def _check_graph(self) -> None:
        """Raises ConfigError where the step cannot be recorded."""
        refused = {
            f"the device is {self.device}": self.device.type != "cuda",
            f"a step is {self.accumulation} micro-batches: raise data.micro_batch_size": (
                self.accumulation > 1
            ),
            "DeepSpeed steps cannot be recorded: that takes one process": (
                not isinstance(self.engine, LocalEngine)
            ),
        }
        for reason in (text for text, holds in refused.items() if holds):
            raise ConfigError(f"run.cuda_graph = true: {reason}; or leave it out")

    def step(
        self, batches: list[Batch], index: int
    ) -> tuple[dict[str, torch.Tensor], bool | torch.Tensor]:
        """Optimiser step number `index` (from 0) over the step's micro-batches.

        Returns the terms' means over the step's images, of all processes (0-d tensors by name), and
        whether the update was applied, perhaps as a tensor that nobody has waited for.
        """
        schedules = self.schedules(index)
        sums: dict[str, torch.Tensor] = {}
        for batch in batches:
            terms, features_BD, applied = self._run(batch.images_B3HW, batch.masks, *schedules)
            self.features.append(features_BD.clone())
            sums = {name: sums.get(name, 0) + term for name, term in terms.items()}
        means = {name: total / self.accumulation for name, total in sums.items()}
        return engines.mean_over_ranks(means), applied

    def micro_step(
        self,
        images_B3HW: torch.Tensor,
        masks: Masks,
        lr: Number,
        weight_decay: Number,
        momentum: Number,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, bool | torch.Tensor]:
        """One micro-batch, and the update after a step's last.

        Returns the terms, the target's mean tokens (B, D), and what the engine's step returns.
        """
        with torch.no_grad():
            target_BND = self.target(images_B3HW)
        terms = self.engine(images_B3HW, masks.context, masks.target_idx_BMP, target_BND)
        self.engine.backward(terms["loss"])
        applied = self.engine.step(lr, weight_decay, momentum)
        return {name: t.detach() for name, t in terms.items()}, target_BND.mean(1), applied

    def schedules(self, index: int) -> tuple[float, float, float]:
        """Learning rate, weight decay and EMA momentum of step `index` (from 0)."""
        o, total = self.config.optim, self.total_steps
        warmup = int(o.warmup_epochs * self.steps_per_epoch)
        return (
            optim.learning_rate(index + 1, total, warmup, o.start_lr, o.lr, o.final_lr),
            optim.weight_decay(index + 1, total, o.weight_decay, o.final_weight_decay),
            optim.ema_momentum(index, total, o.momentum, o.final_momentum),
        )

    def scalars(self, terms: dict, batches: list[Batch]) -> dict:
        """What is averaged over a telemetry interval, without waiting for the device."""
        masks = [batch.masks for batch in batches]
        return {
            **terms,
            "grad_norm": self.engine.grad_norm,
            "context_k": sum(m.context_k for m in masks) / len(masks),
            "targets_p": sum(m.target_idx_BMP.shape[2] for m in masks) / len(masks),
        }

    def details(self, index: int, skipped_steps: int, skipped_images: int) -> dict:
        """What is logged of a single step, at the end of a telemetry interval.

        skipped_images: by this process; every process must call this.
        """
        lr, weight_decay, momentum = self.schedules(index)
        return {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "skipped_steps": skipped_steps,
            "skipped_images": engines.sum_over_ranks(skipped_images, self.device),
            **representation_stats(torch.cat(list(self.features))),
        }

    def facts(self) -> dict:
        """What a run that goes on from here must share, or its order of images is another."""
        return {"config": self.config.model_dump(mode="json"), "images": self.images}

    def save(self, run: Path, step: int) -> Path:
        return checkpoint.save(
            run / "checkpoints",
            step,
            self.engine,
            self.facts() | {"epoch": step / self.steps_per_epoch},
            self.encoder_json,
            self.config.checkpoint.keep,
        )


def steps_of(loader: Loader, start: int) -> Iterator[tuple[list[Batch], float]]:
    """For each optimiser step from `start`: its micro-batches and the seconds waited for them."""
    batches = loader.iterate(start)
    while True:
        began = time.perf_counter()
        group = list(itertools.islice(batches, loader.accumulation))
        yield group, time.perf_counter() - began


def fit(trainer: Trainer, loader: Loader, telemetry: Telemetry, run: Path, start: int) -> int:
    """Train from step `start` to the end, or until asked to stop. Returns the exit status."""
    config, total = trainer.config, trainer.total_steps
    stop, bad = StopRequest(), BadSteps(config.run.max_bad_steps)
    for index, (batches, wait_s) in zip(range(start, total), steps_of(loader, start), strict=False):
        terms, applied = trainer.step(batches, index)
        done, stopping = index + 1, stop.agreed()
        last = done == total or stopping
        for step, its_batches, in_row in bad.after(done, batches, applied, last):
            report_bad_step(telemetry, loader, its_batches, run, step, in_row)
        if bad.too_many:
            good = done - bad.in_row
            if engines.rank() == 0:
                checkpoint.set_aside_later_than(run, good)
            trainer.save(run, good)
            telemetry.message(
                f"stopped: {bad.in_row} steps in a row were not finite. The last good state is "
                f"saved as step {good}; the images are named in {run / BAD_STEPS}"
            )
            return 1
        telemetry.step(done, trainer.scalars(terms, batches), wait_s)
        if telemetry.due(done) or stopping:
            telemetry.log_row(trainer.details(index, bad.count, loader.skipped.count))
        every = config.checkpoint.every_steps
        if last or (every and done % every == 0):
            with telemetry.pause():
                trainer.save(run, done)
        if stopping and done < total:
            telemetry.message(f"stopped after step {done}; go on with: {resume_command()}")
            return 0
    finish(run)
    telemetry.message(f"done: {run / 'encoder.safetensors'}")
    return 0


def report_bad_step(
    telemetry: Telemetry, loader: Loader, batches: list[Batch], run: Path, step: int, in_row: int
) -> None:
    """Count, tell and write down, with the images of every process, a step that was not finite."""
    names = [loader.images.name(int(i)) for batch in batches for i in batch.index_B]
    gathered = [names]
    if engines.world_size() > 1:
        gathered = [None] * engines.world_size()
        dist.all_gather_object(gathered, names)
    if engines.rank() == 0:
        with open(run / BAD_STEPS, "a") as file:
            row = {"step": step, "images": list(itertools.chain(*gathered))}
            file.write(json.dumps(row) + "\n")
    telemetry.message(f"step {step} was not finite: update and average skipped ({in_row} in a row)")


def finish(run: Path) -> None:
    """Write the final encoders beside the checkpoints."""
    if engines.rank() == 0:
        final = checkpoint.latest(run)
        checkpoint.write_encoder(run / "encoder.safetensors", "target", final)
        checkpoint.write_encoder(run / "context_encoder.safetensors", "context", final)


def launcher() -> list[str]:
    """The command that started this process and its like."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"]
    if "LOCAL_SIZE" in os.environ:
        return ["deepspeed", "--num_gpus", os.environ["LOCAL_SIZE"]]
    return ["python"]


def resume_command() -> str:
    """The command line of this process, by the launcher that started it, with --resume auto."""
    kept = [arg for arg in sys.argv[1:] if not arg.startswith("--local_rank")]
    if "--resume" in kept:
        at = kept.index("--resume")
        del kept[at : at + 2]
    return shlex.join([*launcher(), "cjepa_fast/train.py", *kept, "--resume", "auto"])


def dry_run(trainer: Trainer, loader: Loader) -> None:
    """Two steps, then what a run of this configuration is made of."""
    for index, (batches, _) in zip(range(2), steps_of(loader, 0), strict=False):
        began = time.perf_counter()
        terms, _ = trainer.step(batches, index)
        loss = float(terms["loss"])  # waits for the device
        step_s = time.perf_counter() - began
    if engines.rank() != 0:
        return
    encoder, masks = trainer.ema.module, batches[-1].masks
    K, (M, P) = masks.context_k, masks.target_idx_BMP.shape[1:]
    gflop = gflop_of(trainer.config, K, M, P)
    rows, cols = encoder.grid
    parameters = trainer.parameters
    print(f"parameters   encoder {parameters['encoder']:,}, predictor {parameters['predictor']:,}")
    print(f"tokens       {rows} x {cols} patches, context {K:g}, targets {M} x {P}")
    print("GFLOP/image  " + ", ".join(f"{name} {value:.1f}" for name, value in gflop.items()))
    print(f"memory       {peak_gib(trainer.device):.2f} GiB at the peak, {trainer.device}")
    print(
        f"step         {trainer.micro_batch} images x {loader.accumulation} x "
        f"{engines.world_size()} processes, loss {loss:.4f}, {step_s:.2f} s (not warmed up)"
    )


def peak_gib(device: torch.device) -> float:
    """The most memory this process has held: on the GPU what torch reserved, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def starting_point(run: Path, resume: str | None) -> Path | None:
    """The checkpoint to go on from. A run that is there already is never overwritten.

    Raises ConfigError for such a run, and for a folder that cannot be made.
    """
    if resume is None and (run / "config.json").exists():
        raise ConfigError(
            f"run.dir = {run}: already holds a run: go on with --resume auto, or choose another "
            "with --set run.dir=FOLDER"
        )
    nearest = next(path for path in (run, *run.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"run.dir = {run}: {nearest} is no folder that can be written to")
    return checkpoint.find(run, resume)


def begin(config: Config, checkpointed: Path | None) -> tuple[Trainer, Loader, int]:
    """Build everything, restore a checkpoint if one is given. Returns also the step to start at."""
    masks = build_masks(config)
    device = engines.start(config.run.seed)
    loader = build_loader(config, device, masks)
    trainer = Trainer(
        config,
        device,
        loader.steps_per_epoch,
        images=loader.images.fingerprint,
        restoring=checkpointed is not None,
    )
    if checkpointed is None:
        return trainer, loader, 0
    return trainer, loader, checkpoint.restore(checkpointed, trainer.engine)


def open_telemetry(trainer: Trainer, run: Path, start: int, checkpointed: Path | None) -> Telemetry:
    """The run's folder made ready: log, configuration, nothing from beyond `start`."""
    config, first = trainer.config, engines.rank() == 0
    telemetry = Telemetry(
        run if first else None,
        total_steps=trainer.total_steps,
        steps_per_epoch=trainer.steps_per_epoch,
        images_per_step=config.data.batch_size,
        interval=config.telemetry.every_steps,
        start_step=start,
        tensorboard=config.telemetry.tensorboard,
        wandb=config.telemetry.wandb,
    )
    if first:
        checkpoint.write_text(run / "config.json", config.to_json())
        if trainer.device.type == "cuda" and trainer.attention:
            chosen = ", ".join(f"{part} {name}" for part, name in trainer.attention.items())
            telemetry.message(f"attention: {chosen} (the fastest of those here)")
        if trainer.device.type == "cpu" and config.model.target_precision == "fp8":
            telemetry.message("model.target_precision fp8: right on a CPU, but slower than bf16")
        for path in checkpoint.set_aside_later_than(run, start):
            telemetry.message(f"going on from step {start}; set aside: {path}")
        checkpoint.set_aside_encoders(run)
        if checkpointed is not None:
            for line in checkpoint.differences(checkpointed, trainer.facts()):
                telemetry.message(f"resumed with another {line}")
    return telemetry


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, metavar="FILE", help="here or in configs/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--resume", metavar="auto|PATH", help="go on from a checkpoint")
    parser.add_argument("--print-config", action="store_true", help="print the resolved one, exit")
    parser.add_argument("--dry-run", action="store_true", help="build all, run 2 steps, exit")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        config = configuration.load(args.config, args.overrides)
        if args.print_config:
            print(config.to_json(), end="")
            return 0
        run = Path(configuration.expanded(config.run.dir))
        checkpointed = None if args.dry_run else starting_point(run, args.resume)
        trainer, loader, start = begin(config, checkpointed)
        if not args.dry_run:
            telemetry = open_telemetry(trainer, run, start, checkpointed)
    except (ValueError, OSError) as error:  # the user's input: said, without a traceback
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        engines.part()
        return 2
    with contextlib.ExitStack() as ending:
        ending.callback(engines.part)
        ending.callback(loader.close)
        if args.dry_run:
            dry_run(trainer, loader)
            return 0
        ending.callback(telemetry.close)
        try:
            return fit(trainer, loader, telemetry, run, start)
        except ImagesGone as error:
            back = f"Once they are back, go on with: {resume_command()}"
            print(f"error: {error}. {back}", file=sys.stderr, flush=True)
            return 1


if __name__ == "__main__":
    engines.leave(main())
