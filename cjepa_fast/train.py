"""Pretrain: `cjepa-train --config vit_h.json --set data.path=/my/images`.

Also under deepspeed and torchrun. training/start.py builds, loop.py loops, trainer.py steps.
"""

import sys
from pathlib import Path

if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # run as a script: this folder must not hide other packages' modules

import argparse
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cjepa_fast import config as configuration
from cjepa_fast.config import Config
from cjepa_fast.config.describe import HelpConfig
from cjepa_fast.eval.online import build_online, build_snapshots
from cjepa_fast.runtime import distributed
from cjepa_fast.runtime.command_line import Parser
from cjepa_fast.runtime.launchers import resume_command
from cjepa_fast.runtime.watchdog import INDEXING
from cjepa_fast.training import failures, start
from cjepa_fast.training.build import build_masks, compute_dtype
from cjepa_fast.training.callbacks import Callback, Callbacks
from cjepa_fast.training.dry_run import dry_run
from cjepa_fast.training.loop import Loop
from cjepa_fast.training.run import Run
from cjepa_fast.training.session import Options, Session, input_errors


def pretrain(
    config: str | Path | dict | Config,
    data: str | Path | None = None,
    epochs: int | str | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    resume: str | None = None,
    accept_changes: bool = False,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Train, in this process or in those that torchrun or deepspeed started.

    config: a file, here or shipped ("vit_s"), or its values; data and epochs: short for data.path
    and run.epochs (a number, or "auto"); overrides: values laid over the file's, {"optim.lr":
    3e-4}; resume: "auto", or the path of a checkpoint; callbacks: see Callback. Writes and prints
    what `cjepa-train` does. A process group that is there stays, and torch's generators are at the
    end as they were.
    Raises ConfigError for what is wrong with the configuration, and passes on what a step raises.
    """
    over = dict(overrides or {})
    over |= {"data.path": str(data)} if data is not None else {}
    over |= {"run.epochs": epochs} if epochs is not None else {}
    call = 'cjepa_fast.pretrain(..., resume="auto")'
    options = Options(resume=resume, accept_changes=accept_changes, resume_with=call)
    session = Session(configuration.from_values(config, over), options)
    try:
        with _generators_kept():
            return Run(session.folder, train(session, callbacks))
    finally:
        if session.stop:  # the signals are the program's again
            session.stop.give_back()


def _generators_kept() -> contextlib.AbstractContextManager[None]:
    """torch's generators are at its end as they were; those of GPUs where CUDA was in use."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return torch.random.fork_rng(gpus, device_type="cuda")


def train(session: Session, callbacks: Sequence[Callback] = ()) -> int:
    """All of a training, or of a dry run. Returns the exit status."""
    with contextlib.ExitStack() as ending:
        trainer, loader, state, told = start.begin(session, ending)
        config, dtype = session.config, compute_dtype(session.config)
        with input_errors():
            session.watchdog.mark(INDEXING)
            online = build_online(config, trainer.device, dtype, loader.steps_per_epoch)
            snapshots = build_snapshots(
                config, loader.images, build_masks(config), trainer.engine.stage, told.append
            )
        if session.options.dry_run:
            status = dry_run(trainer, loader, told)
            if (out := session.options.masks) and distributed.rank() == 0:
                from cjepa_fast.eval.figures import masks  # matplotlib, for this alone

                print(f"masks        {masks.draw(config, loader.images, out)}")
            return status
        telemetry = start.open_telemetry(session, trainer, loader, state, told, ending)
        parts = trainer, loader, telemetry, state, online, snapshots, Callbacks(callbacks)
        return Loop(session, *parts).run()


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="cjepa-train", description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, metavar="FILE", help="here or in configs/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--resume", metavar="auto|PATH", help="resume from a checkpoint")
    parser.add_argument("--accept-changes", action="store_true", help="resume as another training")
    parser.add_argument("--print-config", action="store_true", help="print the resolved one, exit")
    parser.add_argument("--help-config", action=HelpConfig, help="explain a key or section, exit")
    parser.add_argument("--dry-run", action="store_true", help="build all, run a few steps, exit")
    parser.add_argument("--masks", type=Path, metavar="FILE", help="with --dry-run: draw the first")
    parser.add_argument("--quiet", action="store_true", help="messages alone, no progress line")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.masks and not args.dry_run:
        parser.error("--masks FILE is drawn by --dry-run")
    return args


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status; whatever goes wrong is told on stderr."""
    args = parse(sys.argv[1:] if argv is None else argv)
    given = ("--config", args.config, *(f"--set={override}" for override in args.overrides))
    options = Options(
        resume=args.resume, accept_changes=args.accept_changes, dry_run=args.dry_run,
        masks=args.masks, quiet=args.quiet, command_line=given, resume_with=resume_command(),
    )  # fmt: skip
    with failures.report_failures(options) as told:
        with input_errors():
            told.session = Session(configuration.load(args.config, args.overrides), options)
        if args.print_config:
            print(told.session.config.to_json(), end="")
        else:
            told.status = train(told.session)
    return told.status


if __name__ == "__main__":
    distributed.leave(main())
