"""One training as it was asked for: its options, how far it has come, how it is resumed."""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

from cjepa_fast import checkpoint
from cjepa_fast import config as configuration
from cjepa_fast.config import Config, ConfigError
from cjepa_fast.runtime import distributed, watchdog
from cjepa_fast.runtime.printable import say
from cjepa_fast.runtime.signals import StopRequest
from cjepa_fast.runtime.watchdog import Watchdog

UNWATCHED = (
    "ranks that met in a file have no store to watch each other by, so that none is watched; set "
    "MASTER_ADDR and MASTER_PORT, or meet by tcp://"
)


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
        """The run's folder."""
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
