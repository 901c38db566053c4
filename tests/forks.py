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
from multiprocessing import connection
from pathlib import Path

import torch.distributed as dist

GRACE_S = 30.0  # as torchrun gives the others, from SIGTERM to SIGKILL
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["torch.distributed", "torch._inductor.compile_fx", "deepspeed", "cjepa_fast.train"]
)


def run(
    script: Path, args: list[str], processes: int, environment: dict[str, str], timeout_s: float
) -> subprocess.CompletedProcess:
    """`python script args`, or as many processes as torchrun starts them: one that fails ends all.

    Raises subprocess.TimeoutExpired, once it has ended them.
    """
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "stdout"), Path(folder, "stderr")
        started = []
        for rank in range(processes):
            place = _place(rank, processes, store.port) if processes > 1 else {}
            given = (str(script), args, environment | place, out, err)
            started.append(_FORKS.Process(target=_main, args=given))
            started[-1].start()
        in_time = _wait(started, timeout_s)
        said = out.read_text(), err.read_text()
    if not in_time:
        raise subprocess.TimeoutExpired(str(script), timeout_s, *said)
    codes = [process.exitcode for process in started]
    code = codes[0] if processes == 1 else int(any(codes))
    return subprocess.CompletedProcess([script, *args], code, *said)


def _place(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torchrun tells a process of itself; the store at `port` is already there."""
    kinds = ("", "LOCAL_", "ROLE_")
    elastic = {"RUN_ID": "none", "USE_AGENT_STORE": "True", "RESTART_COUNT": "0"}
    return {
        **{f"{kind}RANK": str(rank) for kind in kinds},
        **{f"{kind}WORLD_SIZE": str(processes) for kind in kinds},
        **{f"TORCHELASTIC_{name}": value for name, value in elastic.items()},
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }


def _wait(started: list, timeout_s: float) -> bool:
    """Until all have ended; one that fails has the others ended. False where it took too long."""
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
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [script, *args]
    sys.path[:0] = [str(Path(script).parent), *environment["PYTHONPATH"].split(os.pathsep)]
    runpy.run_path(script, run_name="__main__")
