"""Start a training, strike it at chosen moments, resume it, and hold it against a whole one.

    whole = drive(folder / "whole", images, [])
    struck = drive(folder / "struck", images, [Moment("disk", after=4, nth=3)])
    assert_same(struck, whole)

Everything is seen from outside: the files of the run, its exit status, and what recorder.py wrote.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import corrupt_images
import forks
import psutil
import tiny
import torch
from safetensors.torch import load_file

RECORDER = Path(__file__).with_name("recorder.py")
STEPS, EVERY = 16, 2  # of a run, and between its checkpoints


def kill_all(launcher: subprocess.Popen, pid: int) -> None:
    """As a power cut does."""
    tree = psutil.Process(launcher.pid)
    for process in [tree, *tree.children(recursive=True)]:
        process.kill()


def kill_one(launcher: subprocess.Popen, pid: int) -> None:
    """As the kernel does where memory is short; the launcher must end the others."""
    os.kill(pid, signal.SIGKILL)


def ask_to_stop(launcher: subprocess.Popen, pid: int) -> None:
    os.kill(pid, signal.SIGTERM)


@dataclass(frozen=True)
class Moment:
    """When to strike (see recorder.py), and how. act is given the launcher and the process's id."""

    event: str
    after: int
    nth: int = 1
    rank: int = 0
    act: Callable[[subprocess.Popen, int], None] = kill_all

    def __str__(self) -> str:
        return f"{self.event}:{self.after}:{self.nth}:{self.rank}"


@dataclass(frozen=True)
class Start:
    """One start of the run that came to its end. rows: a rank's, by step."""

    moment: Moment | None
    status: int
    said: str
    rows: list[dict[int, dict]]

    @property
    def steps(self) -> list[int]:
        return list(self.rows[0])


@dataclass(frozen=True)
class Driven:
    run: Path
    starts: list[Start]


def write_images(folder: Path) -> Path:
    """40 images, and one that only the decoder finds to be corrupt: 2 steps of 16 an epoch."""
    tiny.write_images(folder)
    corrupt = corrupt_images.SEEN_WHEN_DECODED["tables.jpg"](7)
    corrupt_images.write(folder / "class_0" / "tables.jpg", corrupt)
    return folder


def write_config(folder: Path, images: Path) -> list:
    """The arguments that train there."""
    config = tiny.write_config(
        folder,
        run={"epochs": STEPS // 2},
        data={"path": str(images)},
        checkpoint={"every_steps": EVERY, "keep": 2},
    )
    return ["--config", config]


def drive(folder: Path, images: Path, moments: list[Moment], ranks: int = 1) -> Driven:
    """A run struck at each of the moments, one a start, and then left alone until it is done."""
    folder.mkdir()
    config = write_config(folder, images)
    starts = []
    for number, moment in enumerate([*moments, None]):
        resume = ["--resume", "auto"] if number else []
        starts.append(start(folder, number, moment, [*config, *resume], ranks))
        if moment is None:
            assert starts[-1].status == 0, starts[-1].said
    return Driven(folder / "run", starts)


def start(
    folder: Path, number: int, moment: Moment | None, arguments: list, ranks: int = 1
) -> Start:
    command = [RECORDER, folder, number, moment or "-", *arguments]
    if moment is None and not torch.cuda.is_available():
        done = tiny.run(*command, ranks=ranks)  # forked: that is quicker
        status, said = done.returncode, done.stdout + done.stderr
    else:
        status, said = launched(command, ranks, folder, number, moment)
    rows = [rows_of(folder / f"rows.{number}.{rank}") for rank in range(ranks)]
    return Start(moment, status, said, rows)


def launched(
    command: list, ranks: int, folder: Path, number: int, moment: Moment | None
) -> tuple[int, str]:
    """The launcher's exit status and what was printed, once it has been struck and has ended."""
    said = folder / f"said.{number}"
    launcher = launch(command, ranks, said)
    try:
        if moment is not None:
            strike(moment, launcher, folder / f"halted.{number}", said)
        launcher.wait(tiny.HANG_S)
    finally:
        if launcher.poll() is None:
            kill_all(launcher, launcher.pid)
    return launcher.poll(), said.read_text()


def launch(command: list, ranks: int, said: Path) -> forks.Forked | subprocess.Popen:
    """A script with its arguments on so many ranks; both its outputs go to the file `said`."""
    launcher = [Path(sys.prefix, "bin", "torchrun"), "--standalone", f"--nproc-per-node={ranks}"]
    words = [sys.executable, *(launcher if ranks > 1 else []), *command]
    said.touch()
    # bit for bit holds on the CPU
    return forks.begin(words, tiny.environment() | {"CUDA_VISIBLE_DEVICES": ""}, said, said)


def strike(moment: Moment, launcher: subprocess.Popen, halted: Path, said: Path) -> None:
    """Wait until a process halts at the moment, act, and let it go on if it still can."""
    deadline = time.monotonic() + tiny.HANG_S
    while not (halted.exists() and halted.read_text().endswith("\n")):
        assert launcher.poll() is None, f"{moment} was not met before the end:\n{said.read_text()}"
        assert time.monotonic() < deadline, f"{moment}: nothing for {tiny.HANG_S} s"
        time.sleep(0.005)
    moment.act(launcher, int(halted.read_text()))
    halted.unlink()


def rows_of(file: Path) -> dict[int, dict]:
    """By step; none where the process never came so far. A kill may have torn the last line."""
    if not file.exists():
        return {}
    lines = file.read_text().split("\n")[:-1]
    return {row["step"]: row for row in map(json.loads, lines)}


def some_moments(seed: int, count: int, ranks: int) -> list[Moment]:
    """Kills in saves, between them, in the loader and at start-up, in the order of their steps."""
    draw = random.Random(seed)
    afters = sorted(draw.sample(range(2, STEPS - 2 * EVERY, 1), count))
    return [kill_after(after, draw, ranks) for after in afters]


def kill_after(step: int, draw: random.Random, ranks: int) -> Moment:
    rank = draw.randrange(ranks)
    event, after, nth = draw.choice(
        [
            # rank 0 syncs and renames several files a save, the others one
            ("disk", step - step % EVERY, draw.randint(1, 1 if rank else 8)),
            ("forward", step, draw.randint(1, 4)),
            ("read", step, draw.randint(1, 12)),
            ("read", 0, draw.randint(1, 12)),
        ]
    )
    return Moment(event, after, nth, rank, draw.choice([kill_all, kill_one]))


def assert_same(struck: Driven, whole: Driven) -> None:
    """Every step that any start took was the whole run's; so are the steps in all, and the end."""
    (undisturbed,) = whole.starts
    assert undisturbed.steps == list(range(1, STEPS + 1))
    assert_each_image_once(undisturbed)
    lasting = [{} for _ in undisturbed.rows]
    for number, one in enumerate(struck.starts):
        for rank, rows in enumerate(one.rows):
            for step, row in rows.items():
                assert row == undisturbed.rows[rank][step], f"start {number}, rank {rank}"
            lasting[rank] |= rows
    assert lasting == undisturbed.rows
    for before, after in zip(struck.starts, struck.starts[1:], strict=False):
        assert_little_is_lost(before, after)
    assert_same_tensors(struck.run, whole.run)


def assert_each_image_once(one: Start) -> None:
    """In every epoch, over all ranks."""
    for first in range(1, STEPS, 2):
        names = [
            name
            for rows in one.rows
            for step in (first, first + 1)
            for batch in rows[step]["images"]
            for name in batch
        ]
        assert len(names) == 32 == len(set(names))


def assert_little_is_lost(before: Start, after: Start) -> None:
    """A resume resumes from the last save, or the one before where that was being written."""
    if before.steps and after.steps:
        lost = before.steps[-1] + 1 - after.steps[0]
        assert 0 <= lost <= 2 * EVERY, f"{before.moment}: {lost} steps"
        if before.status == 0:  # asked to stop
            assert lost == 0


def assert_same_tensors(run: Path, other: Path) -> None:
    """The last checkpoint and the encoders, bit for bit."""
    files, theirs = final_files(run), final_files(other)
    assert len(files) >= 3 and files.keys() == theirs.keys()
    for name, file in files.items():
        ours, whole = load_file(file), load_file(theirs[name])
        assert ours.keys() == whole.keys()
        for key in ours:
            assert torch.equal(ours[key], whole[key]), f"{name}: {key}"


def final_files(run: Path) -> dict[str, Path]:
    last = max((run / "checkpoints").glob("step_*"))
    files = [*last.glob("*.safetensors"), *run.glob("*.safetensors")]
    return {str(file.relative_to(run)): file for file in files}
