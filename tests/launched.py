"""A run of several ranks by a launcher, to be disturbed from outside while it goes on."""

import contextlib
import os
import re
import signal
import sys
import time
import uuid
from pathlib import Path

import forks
import tiny
import torch

TRAIN = tiny.ROOT / "cjepa_fast" / "train.py"
LAUNCHERS = {
    "torchrun": [sys.executable, Path(sys.prefix, "bin", "torchrun"), "--standalone"],
    "deepspeed": [sys.executable, Path(sys.prefix, "bin", "deepspeed")],
}
NUMBER = {"torchrun": "--nproc_per_node", "deepspeed": "--num_gpus"}


class Launched:
    """with Launched("torchrun", 2, script, args, folder) as run: its processes end with the block.

    stdout and stderr go to files in `folder`. On the CPU, with gloo, everywhere: how soon NCCL
    itself ends a process whose peer is gone is not yet measured on a GPU.
    """

    def __init__(self, launcher: str, ranks: int, script: Path, args: list, folder: Path):
        self.mark = f"LAUNCHED={uuid.uuid4().hex}"
        name, _, value = self.mark.partition("=")
        own = {name: value, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        self.deadline = time.monotonic() + tiny.HANG_S
        self.out, self.err = folder / "stdout", folder / "stderr"
        self.log = folder / "run" / "log.jsonl"
        command = [*LAUNCHERS[launcher], NUMBER[launcher], str(ranks)]
        if launcher == "deepspeed":  # else of all one port
            command += ["--master_port", str(tiny.free_port())]
        command += [script, *args]
        for file in (self.out, self.err):
            file.touch()
        self.launcher = forks.begin(command, tiny.environment() | own, self.out, self.err)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.launcher.wait(tiny.HANG_S)

    def alive(self, *more: str) -> list[int]:
        """The launcher and what it started; or those that have `more` ("RANK=1") set."""
        found = [pid for pid in _numbers() if {self.mark, *more} <= _environment(pid)]
        forked = not more and self.launcher.pid not in found and self.launcher.poll() is None
        return found + [self.launcher.pid] * forked

    def pid_of(self, rank: int) -> int:
        found = [pid for pid in self.alive(f"RANK={rank}") if _parent(pid) in self.alive()]
        return min(found)  # what it started itself is younger

    def wait_for_step(self, step: int) -> None:
        """Until the run in `folder`/run has logged it."""
        row = re.compile(rf'^{{"step": {step},', re.MULTILINE)
        while not (self.log.is_file() and row.search(self.log.read_text())):
            assert self.launcher.poll() is None, self.err.read_text()[-5000:]
            self._pause()

    def wait(self) -> int:
        """The launcher's exit status, once all has ended."""
        while self.launcher.poll() is None or self.alive():
            self._pause()
        return self.launcher.poll()

    def _pause(self) -> None:
        assert time.monotonic() < self.deadline, self.err.read_text()[-5000:]
        time.sleep(0.1)


def _numbers() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _environment(pid: int) -> set[str]:
    """Empty for a process that is gone, is another user's or waits for its parent to take note."""
    with contextlib.suppress(OSError):
        return set(Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0"))
    return set()


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


class Forked(Launched):
    """The same without a launcher: forks of a process that has imported torch already."""

    def __init__(self, ranks: int, script: Path, args: list, folder: Path):
        self.deadline = time.monotonic() + tiny.HANG_S
        self.out, self.err = folder / "stdout", folder / "stderr"
        self.log = folder / "run" / "log.jsonl"
        for file in (self.out, self.err):
            file.touch()
        environment = tiny.environment() | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        words = [str(arg) for arg in args]
        self.launcher = forks.Forked(script, words, ranks, environment, self.out, self.err)

    def alive(self, *more: str) -> list[int]:
        return self.launcher.alive()

    def pid_of(self, rank: int) -> int:
        return self.launcher.pids[rank]

    def wait(self) -> int:
        assert self.launcher.wait(tiny.HANG_S), self.err.read_text()[-5000:]
        return self.launcher.poll()


def started(ranks: int, script: Path, args: list, folder: Path) -> Launched:
    """A run whose launcher is not looked at: forked, but by torchrun where there is a GPU."""
    if torch.cuda.is_available():
        return Launched("torchrun", ranks, script, args, folder)
    return Forked(ranks, script, args, folder)
