"""The start of a training: everything built, the checkpoint restored, the run's folder taken."""

import contextlib
import errno
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
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
from cjepa_fast.telemetry import Telemetry
from cjepa_fast.telemetry.jsonl import JsonlWriter
from cjepa_fast.telemetry.progress import shown_clock
from cjepa_fast.training import cpu_micro_batch
from cjepa_fast.training.build import (
    build_loader,
    build_masks,
    compute_dtype,
    with_precision,
)
from cjepa_fast.training.resume import (
    check_changes,
    first_whole,
    refuse_to_overwrite,
    starting_points,
)
from cjepa_fast.training.session import Session, input_errors, watchdog_of
from cjepa_fast.training.trainer import DataFacts, Trainer

TRIAL_BYTES = 8192  # so many are written: a file without any has room on a full disk


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
            data=DataFacts(
                loader.images.fingerprint,
                loader.images.usable_fingerprint,
                len(loader.images),
                loader.decoder,
            ),
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
        _tell_of_skipped(loader, telemetry, run, ending)
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
    refuse_to_overwrite(run, resume)  # another may have begun, and ended, while this one started
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


def _tell_of_skipped(
    loader: Loader, telemetry: Telemetry, run: Path, ending: contextlib.ExitStack
) -> None:
    """Images that fail while training are told, and named in the run's folder."""
    rank = distributed.rank()
    log, note = telemetry.message if rank == 0 else say, _noting(telemetry, run)
    failed = JsonlWriter(log, left_out_images.of_rank(run / left_out_images.FILE, rank))
    ending.callback(failed.close)
    loader.skipped.attach(
        log,
        record=lambda row: failed.write(row | left_out_images.WHILE_TRAINING),
        note=note,
        warn=None if rank == 0 else note,
    )


def _noting(telemetry: Telemetry, run: Path) -> Callable[[str], None]:
    """What the decoder says of a file goes to events.jsonl, once for all ranks and resumes."""
    rank = distributed.rank()
    lines = JsonlWriter(say, left_out_images.of_rank(run / "events.jsonl", rank))
    write = telemetry.note if rank == 0 else lambda text: lines.write({"text": text})

    def note(text: str) -> None:
        if not _is_noted(text, run):
            write(text)

    return note


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
