"""Python files run in processes forked from one that has imported torch and DeepSpeed already.

Those imports are most of the time of a short training. The processes share the seed of Python's
hashes and what was read from the environment at those imports; where that could hide something,
tiny.run(fresh=True) starts real ones, as it does where there is a GPU, which bears no fork.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

GRACE_S = 30.0  # as torchrun gives the others, from SIGTERM to SIGKILL
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["torch.distributed", "torch._inductor.compile_fx", "deepspeed", "cjepa_fast.train"]
)


def run(
    script: Path, args: list[str], ranks: int, environment: dict[str, str], timeout_s: float
) -> subprocess.CompletedProcess:
    """`python script args`, or as many ranks as torchrun starts them: one that fails ends all.

    Raises subprocess.TimeoutExpired, once it has ended them.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "stdout"), Path(folder, "stderr")
        started = Forked(script, args, ranks, environment, out, err)
        in_time = started.wait(timeout_s)
        said = out.read_text(), err.read_text()
    if not in_time:
        raise subprocess.TimeoutExpired(str(script), timeout_s, *said)
    return subprocess.CompletedProcess([script, *args], started.poll(), *said)


def spawn(function: Callable, args: tuple, count: int) -> None:
    """torch.multiprocessing.spawn: function(number, *args) in so many processes, forked too."""
    how = "spawn" if torch.cuda.is_available() else "forkserver"
    torch.multiprocessing.start_processes(function, args, count, start_method=how)


def begin(command: list, environment: dict[str, str], out: Path, err: Path):
    """The command, begun, with pid, poll() and wait(). A Python script is forked, but for a GPU."""
    words = [str(word) for word in command]
    if words[0] == sys.executable and not torch.cuda.is_available():
        return Forked(Path(words[1]), words[2:], 1, environment, out, err)
    with out.open("a") as to, err.open("a") as told:
        return subprocess.Popen(words, stdout=to, stderr=told, env=environment)


class Forked:
    """Those processes, begun: where torchrun would be. stdout and stderr go to the files."""

    def __init__(
        self, script: Path, args: list[str], ranks: int, environment: dict, out: Path, err: Path
    ):
        self._store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self._processes = []
        for rank in range(ranks):
            variables = _rank_variables(rank, ranks, self._store.port) if ranks > 1 else {}
            given = (str(script), args, environment | variables, out, err)
            self._processes.append(_FORKS.Process(target=_main, args=given))
            self._processes[-1].start()
        self.pids = [process.pid for process in self._processes]
        self.pid = self.pids[0]

    def wait(self, timeout_s: float) -> bool:
        """Until all have ended; one that fails has the others ended. False if it took too long."""
        return _wait(self._processes, timeout_s)

    def poll(self) -> int | None:
        """Once all have ended, the exit status: one's own, of several 1 where any failed."""
        codes = [process.exitcode for process in self._processes]
        if None in codes:
            return None
        return codes[0] if len(codes) == 1 else int(any(codes))

    def alive(self) -> list[int]:
        return [process.pid for process in self._processes if process.exitcode is None]


def _rank_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells a process of itself; the store at `port` is already there."""
    kinds = ("", "LOCAL_", "ROLE_")
    elastic = {"RUN_ID": "none", "USE_AGENT_STORE": "True", "RESTART_COUNT": "0"}
    return {
        **{f"{kind}RANK": str(rank) for kind in kinds},
        **{f"{kind}WORLD_SIZE": str(ranks) for kind in kinds},
        **{f"TORCHELASTIC_{name}": value for name, value in elastic.items()},
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }


def _wait(started: list, timeout_s: float) -> bool:
    end, failed = time.monotonic() + timeout_s, False
    while running := [process for process in started if process.exitcode is None]:
        if time.monotonic() > end:
            for process in running:
                process.kill()
                process.join()
            return failed
        if not failed and any(process.exitcode for process in started):
            failed, end = True, time.monotonic() + GRACE_S
            for process in running:
                process.terminate()
        connection.wait([process.sentinel for process in running], timeout=1)
    return True


def _main(script: str, args: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
    """In the new process: be what `python script args` would be."""
    for path, number in ((out, 1), (err, 2)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [script, *args]
    sys.path[:0] = [str(Path(script).parent), *environment["PYTHONPATH"].split(os.pathsep)]
    runpy.run_path(script, run_name="__main__")
