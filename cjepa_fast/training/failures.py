"""The end of a training that failed, in words: what happened, and the ways out."""

import contextlib
import dataclasses
import os
import shlex
import sys
import time
from collections.abc import Iterator

import torch

from cjepa_fast import checkpoint
from cjepa_fast.config import ConfigError
from cjepa_fast.data.decode_pipeline import ImagesGone
from cjepa_fast.runtime import error_report, hardware, oom
from cjepa_fast.runtime.printable import printable, printable_lines, say
from cjepa_fast.runtime.provenance import machine, own_commit
from cjepa_fast.runtime.version import VERSION
from cjepa_fast.training.session import Options, Session, how_to_resume

TIME_TO_SPEAK_S = 30  # at most: the launcher ends this wait as rank 0 exits


@dataclasses.dataclass
class ExitStatus:
    """What became of a command."""

    status: int = 0
    session: Session | None = None  # once the configuration is read


@contextlib.contextmanager
def report_failures(options: Options) -> Iterator[ExitStatus]:
    """Within it, whatever goes wrong is told on stderr, and decides the exit status."""
    outcome = ExitStatus()
    try:
        yield outcome
    except ConfigError as error:
        outcome.status = 2
        rank = os.environ.get("RANK", "0")
        if rank != "0":  # a launcher ends all ranks when one exits: the first is to speak before
            time.sleep(TIME_TO_SPEAK_S)
        of = "" if rank == "0" else f" rank {printable(rank)}:"
        say(f"error:{of} {printable_lines(error)}", sys.stderr)
    except ImagesGone as error:
        outcome.status = 1
        back = f"Once they are back, resume with: {options.resume_with}"
        say(f"error: {printable(error)}. {back}", sys.stderr)
    except KeyboardInterrupt:
        outcome.status = 130
        say("\nstopped before the first step: nothing was to be saved", sys.stderr)
    except Exception as error:
        if outcome.session is None:
            raise
        if oom.is_out_of_memory(error):
            outcome.status = 2
            say(f"error: {_memory_advice(error, outcome.session)}", sys.stderr)
        else:
            outcome.status = 1
            _unexpected(error, outcome.session)


def _memory_advice(error: Exception, session: Session) -> str:
    """What was too large, and the ways out."""
    config, options = session.config, session.options
    ranks = int(os.environ.get("WORLD_SIZE", "1"))  # their group has been left
    micro_batch, _ = config.data.micro_batches(ranks)
    resumed = not options.dry_run and checkpoint.latest(session.folder) is not None
    smallest = config.loss.smallest_micro_batch(ranks)
    if resumed and config.loss.active_regulariser.beta > 0:
        smallest = micro_batch  # of fewer the statistics are others: another training
    advice = oom.advice(
        error,
        rank=int(os.environ.get("RANK", "0")),
        ranks=ranks,
        micro_batch=micro_batch,
        smallest=smallest,
        checkpointing=config.model.checkpointing,
        stage=config.deepspeed.get("zero_optimization", {}).get("stage", 0),
        command_line=list(options.command_line),
    )
    return f"{advice}\n{how_to_resume(session)}" if resumed else advice


def _unexpected(error: Exception, session: Session) -> None:
    """Tell of an error that has no words of its own, and write the rest down."""
    config, run, options = session.config, session.folder, session.options
    where = session.watchdog.where() if session.watchdog else "starting"
    rank = int(os.environ.get("RANK", "0"))  # its group has been left
    facts = {
        "where": where,
        "command": shlex.join(sys.argv),
        "code": f"cjepa_fast {VERSION}, commit {own_commit()}",
        "machine": machine(torch.device("cuda" if hardware.has_gpu() else "cpu")),
        "configuration": config.to_json(),
    }
    folders = [run] if run.is_dir() and not options.dry_run else []
    report = error_report.write(error, folders, rank, facts)
    plain = "--set model.attention=plain --set model.fused=false --set run.compile=none"
    lines = [
        f"error: rank {rank}, {where}: {error_report.summary(error)}",
        f"traceback, machine and configuration: {report or 'above'}",
        "what works on this machine: python -m cjepa_fast.tools.doctor",
        f"the simplest settings to try: {plain} --set run.precision=fp32",
    ]
    if not options.dry_run:
        lines.append(how_to_resume(session))
    say("\n".join(lines), sys.stderr)
