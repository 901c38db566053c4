"""Pretrain: `deepspeed cjepa_fast/train.py --config vit_h.json --set data.path=/my/images`.

Also `python cjepa_fast/train.py ...` for one process, and torchrun. This file reads the command
line, finds where to go on from, and says what is wrong; trainer.py has the step, run.py the loop.
"""

import sys
from pathlib import Path

if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # run as a script: this folder must not hide other packages' modules

import argparse
import contextlib
import dataclasses
import itertools
import os
import shlex
import time
from collections.abc import Iterator

import torch

from cjepa_fast import checkpoint
from cjepa_fast import config as configuration
from cjepa_fast.checkpoint import encoders
from cjepa_fast.config import Config, ConfigError
from cjepa_fast.data.batches import ImagesGone
from cjepa_fast.data.loader import Loader
from cjepa_fast.model.cpu_linear import Ways
from cjepa_fast.runtime import distributed, error_report, files, hardware, oom, run_lock, watchdog
from cjepa_fast.runtime.launchers import resume_command
from cjepa_fast.runtime.memory import peak_resident_gib
from cjepa_fast.runtime.provenance import machine, own_commit
from cjepa_fast.runtime.version import VERSION
from cjepa_fast.runtime.watchdog import Watchdog
from cjepa_fast.telemetry import Telemetry
from cjepa_fast.training import cpu_micro_batch
from cjepa_fast.training.build import (
    build_album,
    build_loader,
    build_masks,
    build_online,
    gflop_of,
    with_precision,
)
from cjepa_fast.training.loop import Run, steps_of
from cjepa_fast.training.trainer import Trainer

TIME_TO_SPEAK_S = 30  # at most: the launcher ends this wait as the first process exits


@dataclasses.dataclass
class Attempt:
    """How far a training has come, for whoever has to tell of its end."""

    config: Config  # as asked, then with what was resolved and cut for this machine
    run: Path
    args: argparse.Namespace
    watchdog: Watchdog | None = None  # knows the step, and with what the process is busy


def how_to_go_on(run: Path) -> str:
    """For the end of a run that failed: the checkpoint, if any, and the command."""
    last = checkpoint.latest(run)
    return f"go on from {last} with: {resume_command()}" if last else "no checkpoint is there yet"


def watchdog_of(config: Config, run: Path) -> Watchdog:
    rank, world_size = distributed.rank(), distributed.world_size()
    return Watchdog(
        config.run.timeout_s,
        advice=lambda: f"stacks of all threads: {run / 'stacks_rank_*.txt'}; {how_to_go_on(run)}",
        stacks=run / f"stacks_rank_{rank}.txt",
        rank=rank,
        world_size=world_size,
        connect=watchdog.meeting_point if world_size > 1 else None,
    )


def memory_advice(error: Exception, attempt: Attempt) -> str:
    """What was too large, and the ways out."""
    config, run, args = attempt.config, attempt.run, attempt.args
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # their group has been left
    micro_batch, _ = configuration.micro_batches(
        config.data.batch_size, processes, config.data.micro_batch_size
    )
    advice = oom.advice(
        error,
        rank=int(os.environ.get("RANK", "0")),
        processes=processes,
        micro_batch=micro_batch,
        smallest=2 if config.loss.vicreg.beta > 0 and processes == 1 else 1,
        checkpointing=config.model.checkpointing,
        stage=config.deepspeed.get("zero_optimization", {}).get("stage", 0),
        command_line=["--config", args.config, *(f"--set={o}" for o in args.overrides)],
    )
    if args.dry_run or checkpoint.latest(run) is None:
        return advice
    return f"{advice}\n{how_to_go_on(run)}"


def dry_run(trainer: Trainer, loader: Loader) -> None:
    """Two steps, then what a run of this configuration is made of."""
    for index, (batches, _) in zip(range(2), steps_of(loader, 0), strict=False):
        began = time.perf_counter()
        terms, _ = trainer.step(batches, index)
        loss = float(terms["loss"])  # waits for the device
        step_s = time.perf_counter() - began
    if distributed.rank() != 0:
        return
    encoder, masks = trainer.ema.module, batches[-1].masks
    K, (M, P) = masks.context_k, masks.target_idx_BMP.shape[1:]
    gflop = gflop_of(trainer.config, K, M, P)
    rows, cols = encoder.grid
    parameters = trainer.parameters
    print(hardware.told_precision(trainer.config.run.precision, trainer.device, False))
    print(f"parameters   encoder {parameters['encoder']:,}, predictor {parameters['predictor']:,}")
    print(f"tokens       {rows} x {cols} patches, context {K:g}, targets {M} x {P}")
    print("GFLOP/image  " + ", ".join(f"{name} {value:.1f}" for name, value in gflop.items()))
    print(f"memory       {peak_gib(trainer.device):.2f} GiB at the peak, {trainer.device}")
    print(
        f"step         {trainer.micro_batch} images x {loader.accumulation} x "
        f"{distributed.world_size()} processes, loss {loss:.4f}, {step_s:.2f} s (not warmed up)"
    )


def peak_gib(device: torch.device) -> float:
    """The most memory this process has held: on the GPU what torch reserved, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    return peak_resident_gib()


def starting_points(run: Path, resume: str | None) -> list[Path]:
    """The checkpoints to go on from, the first that is whole.

    A run that is there already is never overwritten. Raises ConfigError for such a run,
    and for a folder that cannot be made.
    """
    if resume is None and (run / "config.json").exists():
        raise ConfigError(
            f"run.dir = {run}: already holds a run: go on with --resume auto, or choose another "
            "with --set run.dir=FOLDER"
        )
    nearest = next(path for path in (run, *run.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"run.dir = {run}: {nearest} is no folder that can be written to")
    return checkpoint.candidates(run, resume)


def first_whole(found: list[Path], resume: str | None) -> Path | None:
    """The first of the checkpoints that its manifest bears out; each process reads its share.

    What is damaged is named. Raises ValueError where that is all there is, or what was asked for.
    """
    damaged = []
    for path in found:
        shares = distributed.from_all(
            checkpoint.damage(path, distributed.rank(), distributed.world_size())
        )
        damaged += dict.fromkeys(line for share in shares for line in share)
        if not any(shares):
            if damaged and distributed.rank() == 0:
                lines = "\n".join(damaged)
                print(f"WARNING: going on from the earlier {path}, since\n{lines}", file=sys.stderr)
            return path
    if damaged:
        raise ValueError(
            "\n".join(damaged) + f"\n--resume {resume}: nothing else is left to go on from there; "
            "name another checkpoint or run with --resume PATH, or begin anew in another run.dir"
        )
    return None


def begin(attempt: Attempt, device: torch.device) -> tuple[Trainer, Loader, dict | None]:
    """Build everything, restore the checkpoint to go on from, if any. Returns also its state."""
    config, run, args = attempt.config, attempt.run, attempt.args

    def found() -> list[Path]:
        if args.dry_run:
            return []
        if run.is_dir():  # nobody else writes there from here on
            run_lock.take(run)
        return starting_points(run, args.resume)

    checkpointed = first_whole(distributed.from_first_process(found), args.resume)
    state = checkpoint.state_of(checkpointed) if checkpointed else {}
    if state:
        state["config"] = configuration.completed(state["config"])
        state.setdefault("linear", Ways()._asdict())
        state.setdefault("decoder", "dali")
        config = configuration.as_begun(config, state["config"])
    config = with_precision(config, device)
    saved = configuration.validate(state["config"]) if state else None
    config = attempt.config = cpu_micro_batch.fitted(config, device, saved)
    loader = build_loader(config, device, build_masks(config))
    trainer = Trainer(
        config,
        device,
        loader.steps_per_epoch,
        images=loader.images.fingerprint,
        decoder=loader.decoder,
        restoring=bool(state),
        linear=state.get("linear"),
    )
    if not state:
        return trainer, loader, None
    check_changes(state, trainer.facts(), args.accept_changes)
    checkpoint.restore(checkpointed, trainer.engine)
    return trainer, loader, state


def check_changes(state: dict, facts: dict, accepted: bool) -> None:
    """Raises ConfigError listing what would make it another training, unless that is accepted."""
    _, changes = checkpoint.differences(state, facts)
    if changes and not accepted:
        raise ConfigError(
            "this would be another training than the one that was saved:\n  "
            + "\n  ".join(changes)
            + "\nset them back, or go on all the same with --accept-changes"
        )


def open_telemetry(
    trainer: Trainer, run: Path, state: dict | None, resume: str | None
) -> Telemetry:
    """The run's folder taken and made ready: log, configuration, nothing beyond the state's step.

    Raises ValueError where another run holds it.
    """
    config, first = trainer.config, distributed.rank() == 0
    distributed.from_first_process(lambda: run_lock.take(run))
    start = state["step"] if state else 0
    begun = (run / "log.jsonl").exists()
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
        files.write_text(run / "config.json", config.to_json())
        if trainer.device.type == "cuda" and trainer.attention:
            chosen = ", ".join(f"{part} {name}" for part, name in trainer.attention.items())
            telemetry.message(f"attention: {chosen} (the fastest of those here)")
        if trainer.device.type == "cpu" and config.model.target_precision == "fp8":
            telemetry.message("model.target_precision fp8: right on a CPU, but slower than bf16")
        if resume and begun and not state:
            telemetry.message(f"WARNING: {run} holds no checkpoint: beginning at step 0")
        for path in checkpoint.set_aside_later_than(run, start):
            telemetry.message(f"going on from step {start}; set aside: {path}")
        encoders.set_aside(run)
        for line in itertools.chain(
            *checkpoint.differences(state, trainer.facts()) if state else ()
        ):
            telemetry.message(f"resumed with another {line}")
    return telemetry


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, metavar="FILE", help="here or in configs/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--resume", metavar="auto|PATH", help="go on from a checkpoint")
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="go on although the configuration makes it another training",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved one, exit")
    parser.add_argument("--dry-run", action="store_true", help="build all, run 2 steps, exit")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


@contextlib.contextmanager
def input_errors() -> Iterator[None]:
    """What is wrong with the user's input becomes a ConfigError: said, without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error


def unexpected(error: Exception, attempt: Attempt) -> int:
    """Tell of an error that has no words of its own, and write the rest down. Returns 1."""
    config, run, args = attempt.config, attempt.run, attempt.args
    where = attempt.watchdog.where() if attempt.watchdog else "starting"
    rank = int(os.environ.get("RANK", "0"))  # its group has been left
    facts = {
        "where": where,
        "command": shlex.join(sys.argv),
        "code": f"cjepa_fast {VERSION}, commit {own_commit()}",
        "machine": machine(torch.device("cuda" if hardware.has_gpu() else "cpu")),
        "configuration": config.to_json(),
    }
    folders = [run] if run.is_dir() and not args.dry_run else []
    report = error_report.write(error, folders, rank, facts)
    plain = "--set model.attention=plain --set model.fused=false --set run.compile=none"
    lines = [
        f"error: rank {rank}, {where}: {error_report.summary(error)}",
        f"traceback, machine and configuration: {report or 'above'}",
        "what works on this machine: python -m cjepa_fast.tools.doctor",
        f"the plainest way through a step: {plain} --set run.precision=fp32",
    ]
    if not args.dry_run:
        lines.append(how_to_go_on(run))
    print("\n".join(lines), file=sys.stderr)
    return 1


def pretrain(config: Config, run: Path, args: argparse.Namespace) -> int:
    """All of a run, or of a dry one. Returns the exit status."""
    attempt = Attempt(config, run, args)
    try:
        return _pretrain(attempt)
    except (ConfigError, ImagesGone):
        raise  # main() has words for these
    except Exception as error:
        if oom.is_meant(error):
            print(f"error: {memory_advice(error, attempt)}", file=sys.stderr)
            return 2
        return unexpected(error, attempt)


def _pretrain(attempt: Attempt) -> int:
    config, run, args = attempt.config, attempt.run, attempt.args
    with contextlib.ExitStack() as ending:
        ending.callback(distributed.part)
        with input_errors():
            device = distributed.start(config.run.seed, watchdog.START * config.run.timeout_s)
            watch = ending.enter_context(watchdog_of(config, run))
            attempt.watchdog = watch
            ending.callback(run_lock.release)
            trainer, loader, state = begin(attempt, device)
            ending.callback(loader.close)
            told = cpu_micro_batch.told(config, attempt.config)
            config = attempt.config
            online = build_online(config, device, loader.steps_per_epoch)
            album = build_album(config, loader, build_masks(config))
            if not args.dry_run:
                telemetry = open_telemetry(trainer, run, state, args.resume)
        if args.dry_run:
            if distributed.rank() == 0:
                print(*told, sep="\n", end="\n" * bool(told))
            dry_run(trainer, loader)
            return 0
        ending.callback(telemetry.close)
        training = Run(
            trainer, loader, telemetry, watch, run, state, resume_command(), online, album
        )
        telemetry.message(f"on {machine(device)}; torch {torch.__version__}")
        for line in (hardware.told_precision(config.run.precision, device, bool(state)), *told):
            telemetry.message(line)
        if onednn := [kind for kind, library in trainer.linear.items() if library == "onednn"]:
            telemetry.message(f"linear layers: {', '.join(onednn)} by oneDNN (faster here)")
        return training.go()


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        with input_errors():
            config = configuration.load(args.config, args.overrides)
            run = Path(configuration.expanded(config.run.dir))
        if args.print_config:
            print(config.to_json(), end="")
            return 0
        return pretrain(config, run, args)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:  # a launcher ends all processes when one exits: the first is to speak before
            time.sleep(TIME_TO_SPEAK_S)
    except ImagesGone as error:
        back = f"Once they are back, go on with: {resume_command()}"
        print(f"error: {error}. {back}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("\nstopped before the first step: nothing was to be saved", file=sys.stderr)
        return 130
    return 2


if __name__ == "__main__":
    distributed.leave(main())
