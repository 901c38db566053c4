"""What a training resumes from: which checkpoint, whether it is whole, and whether it may."""

import functools
import os
import sys
from pathlib import Path

from cjepa_fast import checkpoint
from cjepa_fast.config import ConfigError
from cjepa_fast.runtime import distributed
from cjepa_fast.runtime.printable import say
from cjepa_fast.telemetry.progress import shown_clock


def starting_points(run: Path, resume: str | None) -> list[Path]:
    """The checkpoints to resume from, the first that is complete.

    A run that is there already is never overwritten. Raises ConfigError for such a run,
    and for a folder that cannot be made.
    """
    refuse_to_overwrite(run, resume)
    nearest = next(path for path in (run, *run.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"run.dir = {run}: {nearest} is not a writable folder")
    return checkpoint.resume_candidates(run, resume)


def refuse_to_overwrite(run: Path, resume: str | None) -> None:
    if resume == "auto" or not (run / "config.json").exists():
        return
    if resume is None:
        raise ConfigError(
            f"run.dir = {run}: already holds a run: resume with --resume auto, or choose another "
            'with --set run.dir=FOLDER (from Python: resume="auto", overrides={"run.dir": FOLDER})'
        )
    if not checkpoint.lies_in(Path(resume), run):
        raise ConfigError(
            f"run.dir = {run}: already holds a run, and --resume {resume} lies outside it: choose "
            "another with --set run.dir=FOLDER, or remove that run (from Python: "
            'overrides={"run.dir": FOLDER}); --resume auto resumes the run that is there'
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
            "these settings would make it another training than the one that was saved:\n  "
            + "\n  ".join(changes)
            + "\nrestore them, or resume anyway with --accept-changes (from Python: "
            "accept_changes=True)"
        )
