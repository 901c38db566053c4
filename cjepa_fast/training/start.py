"""The start of a training: what to resume from, everything built, the run's folder taken."""

import contextlib
import dataclasses
import errno
import functools
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from cjepa_fast import checkpoint
from cjepa_fast import config as configuration
from cjepa_fast.checkpoint import encoders
from cjepa_fast.config import Config, ConfigError
from cjepa_fast.data import left_out as left_out_images
from cjepa_fast.data.loader import Loader
from cjepa_fast.kernels.common import launch
from cjepa_fast.kernels.common.dependent_launch import OLDEST
from cjepa_fast.kernels.norm import WIDEST
from cjepa_fast.model import fused_mlp
from cjepa_fast.model.cpu_linear import LinearBackends
from cjepa_fast.runtime import distributed, files, hardware, run_lock, watchdog
from cjepa_fast.runtime.printable import printable, say
from cjepa_fast.runtime.provenance import machine
from cjepa_fast.runtime.signals import StopRequest
from cjepa_fast.runtime.watchdog import Watchdog
from cjepa_fast.telemetry import Telemetry
from cjepa_fast.telemetry.log import Lines
from cjepa_fast.telemetry.progress import shown_clock
from cjepa_fast.training import cpu_micro_batch
from cjepa_fast.training.build import (
    build_loader,
    build_masks,
    compute_dtype,
    with_precision,
)
from cjepa_fast.training.trainer import Trainer

UNWATCHED = (
    "ranks that met in a file have no store to watch each other by, so that none is watched; set "
    "MASTER_ADDR and MASTER_PORT, or meet by tcp://"
)
TRIAL_BYTES = 8192  # so many are written: a file without any has room on a full disk


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is asked of a training beside its configuration."""

    resume: str | None = None  # "auto", or the path of a checkpoint or of another run
    accept_changes: bool = False  # resume although the configuration makes it another training
    dry_run: bool = False
    masks: Path | None = None  # a picture of the first ones, of a dry run
    quiet: bool = False  # messages alone, no progress line
    command_line: tuple[str, ...] = ()  # --config and --set, as they were given
    resume_with: str = ""  # the command, or the call, that resumes this training


@dataclasses.dataclass
class Session:
    """How far a training has come, for whoever has to tell of its end."""

    config: Config  # as asked, then with what was resolved and cut for this machine
    options: Options
    asked_micro_batch: int | None = None  # data.micro_batch_size before it was cut
    watchdog: Watchdog | None = None  # knows the step, and with what the rank is busy
    stop: StopRequest | None = None  # once the run's folder is taken

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(configuration.expand_path(self.config.run.dir))


@contextlib.contextmanager
def input_errors() -> Iterator[None]:
    """What is wrong with the user's input becomes a ConfigError: said, without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error


def how_to_resume(session: Session) -> str:
    """For the end of a training that failed: the checkpoint, if any, and the command."""
    last = checkpoint.latest(session.folder)
    if last is None:
        return "no checkpoint is there yet"
    return f"resume from {last} with: {session.options.resume_with}"


def watchdog_of(session: Session) -> Watchdog:
    rank, world_size = distributed.rank(), distributed.world_size()
    stacks = session.folder / "stacks_rank_*.txt"
    timeout_s = session.config.run.timeout_s
    address = watchdog.meeting_address() if world_size > 1 else None
    if world_size > 1 and address is None:
        if timeout_s and rank == 0:
            say(f"WARNING: run.timeout_s = {timeout_s:g}: {UNWATCHED}", sys.stderr)
        timeout_s = 0
    return Watchdog(
        timeout_s,
        advice=lambda: f"stacks of all threads: {stacks}; {how_to_resume(session)}",
        stacks=session.folder / f"stacks_rank_{rank}.txt",
        rank=rank,
        world_size=world_size,
        connect=functools.partial(watchdog.meeting_point, *address) if address else None,
    )


def begin(
    session: Session, ending: contextlib.ExitStack
) -> tuple[Trainer, Loader, dict | None, list[str]]:
    """Join the other ranks, build everything, restore the checkpoint to resume from, if any.

    Returns also that checkpoint's state.json, and what the user must know of the start, a line
    each. ending: takes what is to be undone, whatever happens. Raises ConfigError.
    """
    asked = session.config
    configuration.check_paths_set(asked)
    ending.callback(distributed.leave_group)
    with input_errors():
        device = distributed.start(asked.run.seed, watchdog.START * asked.run.timeout_s)
        session.watchdog = ending.enter_context(watchdog_of(session))
        ending.callback(run_lock.release)
        trainer, loader, state = _built(session, device)
        ending.callback(loader.close)
        begun = state["config"]["data"]["micro_batch_size"] if state else None
        told = trainer.started_from + cpu_micro_batch.messages(asked, session.config, begun)
        told += _resolved_messages(asked, session.config, loader.steps_per_epoch)
        return trainer, loader, state, told


def _resolved_messages(asked: Config, config: Config, steps_per_epoch: int) -> Iterator[str]:
    """What followed from the batch and the number of images."""
    if line := configuration.lr_message(config):
        yield line
    if line := configuration.warmup_message(config):
        yield line
    if line := configuration.micro_batch_message(config, distributed.world_size()):
        yield line
    if asked.run.epochs == "auto":
        yield configuration.epochs_message(config.run.epochs, steps_per_epoch)


def _built(session: Session, device: torch.device) -> tuple[Trainer, Loader, dict | None]:
    config, run, options = session.config, session.folder, session.options

    def found() -> list[Path]:
        if options.dry_run:
            return []
        if run.is_dir():  # nobody else writes there from here on
            run_lock.take(run)
        return starting_points(run, options.resume)

    checkpointed = first_whole(distributed.broadcast_from_rank_0(found), options.resume)
    state = checkpoint.state_of(checkpointed) if checkpointed else {}
    if state:
        state["config"] = configuration.with_saved_defaults(state["config"])
        state.setdefault("linear", LinearBackends()._asdict())
        state.setdefault("decoder", "dali")
        config = configuration.keep_saved_values(config, state["config"])
    config = with_precision(config, device)
    saved = configuration.validate(state["config"]) if state else None
    session.asked_micro_batch = config.data.micro_batch_size
    config = session.config = cpu_micro_batch.fitted(
        config, device, saved, options.accept_changes, state.get("asked_micro_batch")
    )
    # A resume may still be refused: until then the run's own file stays as it is.
    left_out = None if options.dry_run or state else run / left_out_images.FILE
    session.watchdog.mark(watchdog.INDEXING)
    loader = build_loader(config, device, build_masks(config), left_out)
    session.watchdog.mark("building the networks")
    config = session.config = configuration.with_epochs(config, loader.steps_per_epoch)
    with shown_clock("building the networks"):
        trainer = Trainer(
            config,
            device,
            loader.steps_per_epoch,
            images=loader.images.fingerprint,
            usable_images=loader.images.usable_fingerprint,
            image_count=len(loader.images),
            decoder=loader.decoder,
            restoring=bool(state),
            linear=state.get("linear"),
            attention=state.get("attention"),
        )
    if not state:
        return trainer, loader, None
    state.setdefault("attention", trainer.attention)  # timed at each start, before it was saved
    check_changes(state, trainer.facts(), options.accept_changes)
    with shown_clock(f"reading {checkpointed.name}"):
        checkpoint.restore(checkpointed, trainer.engine)
    return trainer, loader, state


def starting_points(run: Path, resume: str | None) -> list[Path]:
    """The checkpoints to resume from, the first that is complete.

    A run that is there already is never overwritten. Raises ConfigError for such a run,
    and for a folder that cannot be made.
    """
    _refuse_to_overwrite(run, resume)
    nearest = next(path for path in (run, *run.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"run.dir = {run}: {nearest} is no folder that can be written to")
    return checkpoint.resume_candidates(run, resume)


def _refuse_to_overwrite(run: Path, resume: str | None) -> None:
    if resume is None and (run / "config.json").exists():
        raise ConfigError(
            f"run.dir = {run}: already holds a run: resume with --resume auto, or choose another "
            'with --set run.dir=FOLDER (from Python: resume="auto", overrides={"run.dir": FOLDER})'
        )


def first_whole(found: list[Path], resume: str | None) -> Path | None:
    """The first of the checkpoints that its manifest bears out; each rank reads its share.

    What is damaged is named. Raises ValueError where that is all there is, or what was asked for,
    and OSError on all ranks where one of them cannot read its share.
    """
    damaged, own = [], (distributed.rank(), distributed.world_size())
    for path in found:
        with shown_clock(f"checking {path.name}"):
            shares = distributed.all_gather_results(
                functools.partial(checkpoint.damage, path, *own)
            )
        damaged += dict.fromkeys(line for share in shares for line in share)
        if not any(shares):
            if damaged and distributed.rank() == 0:
                lines = "\n".join(damaged)
                say(f"WARNING: resuming from the earlier {path}, since\n{lines}", sys.stderr)
            return path
    if damaged:
        raise ValueError(
            "\n".join(damaged) + f"\n--resume {resume}: nothing else is left to resume from there; "
            "name another checkpoint or run with --resume PATH, or begin anew in another run.dir"
        )
    return None


def check_changes(state: dict, facts: dict, accepted: bool) -> None:
    """Raises ConfigError listing what would make it another training, unless that is accepted."""
    _, changes = checkpoint.differences(state, facts)
    if changes and not accepted:
        raise ConfigError(
            "this would be another training than the one that was saved:\n  "
            + "\n  ".join(changes)
            + "\nset them back, or resume all the same with --accept-changes (from Python: "
            "accept_changes=True)"
        )


def open_telemetry(
    session: Session,
    trainer: Trainer,
    loader: Loader,
    state: dict | None,
    told: list[str],
    ending: contextlib.ExitStack,
) -> Telemetry:
    """The run's folder taken and made ready: log, configuration, nothing beyond the state's step.

    state, told, ending: as in `begin`. Raises ConfigError where another run holds the folder.
    """
    config, run, rank = session.config, session.folder, distributed.rank()
    session.stop = StopRequest()  # from here on a signal ends the run after a step, saved
    with input_errors():
        not_written = distributed.broadcast_from_rank_0(
            lambda: _taken(run, loader, session.options.resume, resumed=bool(state))
        )
        begun = (run / "log.jsonl").exists()
        telemetry = Telemetry(
            run if rank == 0 else None,
            total_steps=trainer.total_steps,
            steps_per_epoch=trainer.steps_per_epoch,
            images_per_step=config.data.batch_size,
            interval=config.telemetry.every_steps,
            start_step=state["step"] if state else 0,
            tensorboard=config.telemetry.tensorboard,
            wandb=config.telemetry.wandb,
            mlflow=config.telemetry.mlflow,
            quiet=session.options.quiet,
        )
        ending.callback(telemetry.close)
        loader.skipped.log = telemetry.message if rank == 0 else say
        failed = left_out_images.of_rank(run / left_out_images.FILE, rank)
        lines = Lines(loader.skipped.log, failed)
        ending.callback(lines.close)
        loader.skipped.record = lambda row: lines.write(row | left_out_images.WHILE_TRAINING)
        _note_warnings(loader, telemetry, run)
        if rank == 0:
            if skipped := loader.images.skipped:
                told_before = left_out_images.counted(skipped)
                telemetry.note(f"{len(skipped)} images are left out ({told_before})")
            if not_written:
                telemetry.message(f"of the images that are left out: {not_written}")
        if rank == 0:
            files.write_text(run / "config.json", config.to_json())
            if session.options.resume and begun and not state:
                told = [f"WARNING: {run} holds no checkpoint: beginning at step 0", *told]
            for line in (*_choices(trainer), *_left_behind(run, trainer, state), *told):
                telemetry.message(line)
    return telemetry


def _taken(run: Path, loader: Loader, resume: str | None, resumed: bool) -> str:
    """Take the folder, before any rank writes there. Returns why the images that are left out are
    not named there, or ""."""
    run_lock.take(run)
    _refuse_to_overwrite(run, resume)  # another may have begun, and ended, while this one started
    _try_renaming(run)
    if not resumed:
        return ""  # they were, when the images were opened
    return left_out_images.write(loader.images.skipped, run / left_out_images.FILE)


def _try_renaming(run: Path) -> None:
    """Raises ConfigError where a folder cannot be given its final name, as a checkpoint is."""
    trial, final = run / ".trial.partial", run / ".trial"
    _remove(trial, final)  # of a start that was killed
    try:
        trial.mkdir(exist_ok=True)
        files.write_text(trial / "a file", "." * TRIAL_BYTES)
        files.sync_file(trial)
        trial.rename(final)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        way = "make room there" if full else "choose a folder of another file system"
        raise ConfigError(
            f"run.dir = {run}: a folder with a file in it cannot be made, synced and renamed there "
            f"({error}), and every checkpoint is: {way}"
        ) from error
    finally:
        _remove(trial, final)


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _note_warnings(loader: Loader, telemetry: Telemetry, run: Path) -> None:
    """What the decoder says of a file goes to events.jsonl, once for all ranks and resumes."""
    rank, warnings = distributed.rank(), loader.skipped.warnings
    lines = Lines(say, left_out_images.of_rank(run / "events.jsonl", rank))
    write = telemetry.note if rank == 0 else lambda text: lines.write({"text": text})

    def note(text: str) -> None:
        if not _is_noted(text, run):
            write(text)

    warnings.note = note
    if rank != 0:
        warnings.say = note


def _is_noted(text: str, run: Path) -> bool:
    """By any rank. What cannot be read may be noted twice: that ends no training."""
    with contextlib.suppress(OSError):
        texts = (p.read_text(encoding="utf-8", errors="replace") for p in run.glob("events*.jsonl"))
        return any(json.dumps(text) in noted for noted in texts)
    return False


def _choices(trainer: Trainer) -> Iterator[str]:
    """What was chosen for this machine."""
    config, device = trainer.config, trainer.device
    yield f"on {machine(device)}; torch {torch.__version__}"
    yield hardware.precision_message(config.run.precision, device, trainer.restoring)
    asked = config.model.attention
    kernels = set(trainer.attention.values())
    another = asked != "auto" and kernels != {asked}
    if kernels and (device.type == "cuda" or another):
        chosen = ", ".join(f"{part} {name}" for part, name in trainer.attention.items())
        fastest = "the checkpoint's, or " * trainer.restoring + "the fastest of those here"
        why = fastest if asked == "auto" else f"of model.attention {asked}"
        yield f"attention: {chosen} ({why})"
    dtype = compute_dtype(config)
    kernels_serve = device.type == "cuda" and dtype.itemsize == 2
    fused = trainer.context_encoder.fused and kernels_serve
    widths = {"encoder": trainer.context_encoder.width, "predictor": config.predictor.width}
    for network, width in widths.items() if kernels_serve and config.model.fused else ():
        if width > WIDEST:
            yield f"the {network}'s blocks are not fused: {width} is wider than {WIDEST}"
    if config.model.gelu == "tanh" and fused:
        yield fused_mlp.describe_gelu(device, dtype)
    for key in ("target_precision", "context_precision") if device.type == "cpu" else ():
        if getattr(config.model, key) == "fp8":
            yield f"model.{key} fp8: right on a CPU, but slower than bf16"
    yield from _idle(config, device)
    if onednn := [kind for kind, library in trainer.linear.items() if library == "onednn"]:
        yield f"linear layers: {', '.join(onednn)} by oneDNN (faster here)"


def _idle(config: Config, device: torch.device) -> Iterator[str]:
    """The keys that are set and change nothing on this machine."""
    for key, oldest in {"weight_stream": 0, "dependent_launch": OLDEST}.items():
        if not getattr(config.run, key):
            continue
        on_gpu = device.type == "cuda" and launch.runs_on(device)
        if not (on_gpu and launch.at_least(oldest, device)):
            needs = f" of sm_{oldest} or newer" if oldest else ""
            yield f"run.{key} changes nothing here: it is for our kernels on a GPU{needs}"


def _machine_message(state: dict, device: torch.device) -> Iterator[str]:
    """Where the promise of the same bits does not hold: the same kernels are needed for it."""
    saved = state.get("machine"), state.get("versions", {}).get("torch")
    if None not in saved and saved != (machine(device), torch.__version__):
        yield (
            f"the checkpoint was saved on {printable(saved[0])}; torch {printable(saved[1])}: the "
            "bits that follow may differ from those of a run that was never stopped"
        )


def _has_its_encoders(run: Path, trainer: Trainer, step: int) -> bool:
    """Whether this training is done, and what its end writes is there already."""
    last = checkpoint.latest(run)
    is_done = step >= trainer.total_steps and last and checkpoint.step_of(last) == step
    return bool(is_done) and encoders.are_of(last, run)


def _left_behind(run: Path, trainer: Trainer, state: dict | None) -> Iterator[str]:
    """Sets aside what is later than the state, and tells of it and of what has changed since."""
    step = state["step"] if state else 0
    for path in checkpoint.set_aside_later_than(run, step):
        yield f"resuming from step {step}; set aside: {path}"
    if not _has_its_encoders(run, trainer, step):
        encoders.set_aside(run)
    if state:
        yield from _machine_message(state, trainer.device)
        for line in itertools.chain(*checkpoint.differences(state, trainer.facts())):
            yield f"resumed with another {line}"
