"""Who is gone or stuck is found, named and ends the run; and nobody else."""

import errno
import io
import json
import os
import re
import signal
import sys
import time
from datetime import timedelta

import pytest
import tiny
import torch.distributed as dist
from launched import TRAIN, Launched, started

from cjepa_fast import checkpoint
from cjepa_fast.config import validate
from cjepa_fast.runtime import distributed, reads_in_progress, watchdog
from cjepa_fast.runtime.watchdog import (
    CUT_OFF,
    DONE,
    FAILED,
    GONE_S,
    HASTE_S,
    INDEXING,
    START,
    Heartbeat,
    Watchdog,
)
from cjepa_fast.training import session


class FakeStore(dict):
    """As torch's: values are read back as bytes."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self[key] for key in keys]


TIMEOUT_S = 600


class World:
    """Watchdogs of several ranks over one store, without threads; a tick is a second."""

    def __init__(self, size: int, timeout_s: float = TIMEOUT_S):
        self.store = FakeStore()
        self.dogs = [
            Watchdog(timeout_s, rank=r, world_size=size, connect=lambda: self.store)
            for r in range(size)
        ]

    def mark(self, phase: str, step: int, but: tuple = ()) -> None:
        for dog in self.dogs:
            if dog.rank not in but:
                dog.mark(phase, step)

    def warm_up(self) -> None:
        for step in range(1, watchdog.STARTING_STEPS + 2):
            self.mark("waiting for data", step)
            self.mark("in the step", step)

    def go_on(self, seconds: float, silent: tuple = ()) -> dict[int, str]:
        """The first verdict of each rank that has one, once any has and it has spread."""
        for _ in range(int(seconds)):
            verdicts = self._tick(silent)
            if verdicts:
                return self._tick(silent) | verdicts
        return {}

    def _tick(self, silent: tuple) -> dict[int, str]:
        heard = [dog for dog in self.dogs if dog.rank not in silent]
        for dog in heard:
            if 0 not in silent:
                dog.exchange(self.store)
        return {dog.rank: verdict for dog in heard if (verdict := dog.tick(1.0))}


def test_a_run_that_gets_on_is_left_alone():
    world = World(3)
    for step in range(1, 50):
        world.mark("waiting for data", step)
        assert not world.go_on(TIMEOUT_S / 2)
        world.mark("in the step", step)
        assert not world.go_on(TIMEOUT_S / 2)


def test_a_rank_without_heartbeats_is_named_by_all_others():
    world = World(3)
    world.warm_up()
    assert not world.go_on(5)
    assert not world.go_on(GONE_S - 2, silent=(2,))
    verdicts = world.go_on(4, silent=(2,))
    assert verdicts.keys() == {0, 1} and verdicts[0] == verdicts[1]
    first, *lines = verdicts[0].splitlines()
    assert f"no sign of life from rank 2 (host {world.dogs[2].host}, pid {os.getpid()})" in first
    assert "rank 2" in lines[0] and "last heard of" in lines[0] and "step 4" in lines[0]
    assert "rank 0" in lines[1] and "rank 1" in lines[1] and "last heard" not in lines[1]


def test_a_short_timeout_takes_the_silent_for_gone_before_the_waiting_for_stuck():
    world = World(2, timeout_s=20)
    world.warm_up()
    world.mark("waiting for data", 9)  # the last thing that either does
    assert not world.go_on(2)
    assert "no sign of life from rank 1" in world.go_on(25, silent=(1,))[0].splitlines()[0]


def test_a_timeout_of_a_few_seconds_leaves_heartbeats_their_time():
    """They come once a second, and a busy machine is late with some."""
    world = World(2, timeout_s=1)
    for step in range(1, 30):
        world.mark("in the step", step)
        assert not world.go_on(1, silent=(1,) if step % 4 else ())
    silent = [world.mark("in the step", step) or world.go_on(1, (1,)) for step in range(30, 40)]
    assert "no sign of life from rank 1" in next(filter(None, silent))[0]


@pytest.mark.parametrize("by", ["tcp", "file"])
def test_ranks_that_met_without_the_launcher_s_variables(tmp_path, monkeypatch, capsys, by):
    """The group is a caller's own: by its store where that has an address, else not at all."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    port = tiny.free_port()
    where = {"tcp": f"tcp://127.0.0.1:{port}", "file": f"file://{tmp_path}/met"}[by]
    dist.init_process_group("gloo", init_method=where, rank=0, world_size=1)
    try:
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        run = {"dir": str(tmp_path / "run"), "timeout_s": 60}
        dog = session.watchdog_of(session.Session(validate({"run": run}), session.Options()))
        said = capsys.readouterr().err
        if by == "file":
            assert (dog.timeout_s, dog.connect) == (0, None)
            assert said.count("WARNING: run.timeout_s = 60: ranks that met in a file") == 1
            return
        dog.exchange(dog.connect())
        dog.exchange(dog.connect())
        assert dog.timeout_s == 60 and not said
        assert dog.connect().get("watchdog/0")
    finally:
        dist.destroy_process_group()


def test_a_rank_that_never_came_is_named():
    verdicts = World(2).go_on(GONE_S + 3, silent=(1,))
    assert "no sign of life from rank 1" in verdicts[0]


def test_without_rank_0_each_other_names_it():
    world = World(3)
    world.warm_up()
    world.go_on(5)
    assert not world.go_on(GONE_S - 2, silent=(0,))
    verdicts = world.go_on(4, silent=(0,))
    assert verdicts.keys() == {1, 2}
    assert all("no sign of life from rank 0 " in text.splitlines()[0] for text in verdicts.values())


@pytest.mark.parametrize("state", [CUT_OFF, FAILED])
def test_after_an_error_the_missing_are_named_sooner(state):
    world = World(3)
    world.warm_up()
    world.go_on(5)
    world.dogs[1]._ending = state, "(RuntimeError: Connection closed by peer)"
    world.go_on(1)
    silent = (2,) if state == CUT_OFF else (1,)
    verdicts = world.go_on(HASTE_S + 3, silent=silent)
    assert f"no sign of life from rank {silent[0]} " in verdicts[0].splitlines()[0]
    if state == CUT_OFF:
        assert "rank 1" in verdicts[0] and f"{CUT_OFF} (RuntimeError: Conn" in verdicts[0]


def test_the_one_behind_is_stuck_and_not_those_that_wait_for_it():
    world = World(3)
    world.warm_up()
    world.mark("waiting for data", 9)
    assert not world.go_on(3)
    world.mark("in the step", 9, but=(1,))
    assert not world.go_on(TIMEOUT_S - 5)
    verdicts = world.go_on(9)
    first, *lines = verdicts[0].splitlines()
    assert first.startswith("rank 1 (host") and "got stuck and the others wait (if" in first
    assert "rank 1" in lines[0] and "step 9, waiting for data for 6" in lines[0]
    assert "rank 0" in lines[1] and "rank 2" in lines[1] and "in the step" in lines[1]
    assert verdicts[1] == verdicts[2] == verdicts[0]


def test_all_at_the_same_line_are_not_told_apart():
    world = World(2)
    world.warm_up()
    verdicts = world.go_on(TIMEOUT_S + 2)
    assert "rank 0" in verdicts[0] and "all at the same line" in verdicts[0].splitlines()[0]


def test_the_first_steps_may_take_longer():
    dog = Watchdog(TIMEOUT_S)
    dog.mark("in the step", 1)
    ticks = [bool(dog.tick(1.0)) for _ in range(START * TIMEOUT_S + 2)]
    assert ticks.index(True) in range(START * TIMEOUT_S - 1, START * TIMEOUT_S + 2)


def test_who_still_indexes_is_waited_for_and_who_no_longer_reads_is_stuck():
    world = World(3, timeout_s=60)
    world.mark(INDEXING, 0)
    for _ in range(12):
        reads_in_progress.progressed()
        for dog in world.dogs[:2]:  # in this one process: that they have read nothing
            dog._read = reads_in_progress.reads()
        assert not world.go_on(60)
    verdict = world.go_on(START * 60 + 3)[0]
    assert "all at the same line" in verdict and INDEXING in verdict
    world.mark("in the step", 1, but=(1,))
    assert "rank 1 (host" in world.go_on(START * 60 + 3)[0].splitlines()[0]


def test_when_a_long_indexing_ends_nobody_is_stuck():
    """The others have read nothing all the while, and say so until their next heartbeat."""
    world = World(3, timeout_s=60)
    world.mark(INDEXING, 0)
    for _ in range(12):
        reads_in_progress.progressed()
        for dog in world.dogs[1:]:
            dog._read = reads_in_progress.reads()
        assert not world.go_on(60)
    world.mark("building the networks", 0)
    assert not world.go_on(60)


def test_the_ranks_of_a_node_wait_for_its_first_longer_than_for_a_collective(monkeypatch):
    """Whether that gets on is for the watchdog to see; without one the time is torch's own."""
    made = []
    monkeypatch.setattr(distributed.dist, "new_group", lambda **how: made.append(how) or "a group")
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(
        distributed, "all_gather_objects", lambda mine, group: made.append(group) or [mine]
    )
    for options, group in (({}, None), ({"timeout": timedelta(seconds=60)}, "a group")):
        monkeypatch.setattr(distributed, "_group_options", options)
        distributed._long_timeout_group.cache_clear()
        made.clear()
        assert distributed.local_rank_0_first(lambda: "the index") == "the index"
        assert made[-2:] == [group, group]
    distributed._long_timeout_group.cache_clear()
    assert made[0] == {"backend": "gloo", "timeout": distributed.LONG_WAIT}
    assert distributed.LONG_WAIT.days >= 1


def test_what_the_loader_reads_is_no_progress_of_a_step():
    dog = Watchdog(60)
    dog.mark("in the step", 1)
    found = []
    for _ in range(START * 60 + 2):
        reads_in_progress.progressed()
        found.append(dog.tick(1.0))
    assert "got stuck" in found[-1]


def test_the_time_of_the_users_code_counts_on_several_ranks_alone():
    one, two = World(1), World(2)
    for world in (one, two):
        world.warm_up()
    with one.dogs[0].paused():
        assert not one.go_on(2 * TIMEOUT_S)
    assert not one.go_on(TIMEOUT_S - 2)
    assert "got stuck" in one.go_on(4)[0]
    with two.dogs[0].paused(), two.dogs[1].paused():
        assert "all at the same line" in two.go_on(TIMEOUT_S + 2)[0].splitlines()[0]


def test_a_rank_that_was_stopped_blames_nobody_and_is_not_stuck():
    world = World(2)
    world.warm_up()
    world.go_on(3)
    for dog in world.dogs:
        assert not dog.tick(10 * 3600.0)
    world.mark("in the step", 30)
    assert not world.go_on(30)


def test_a_rank_that_is_done_is_not_missed():
    world = World(2)
    world.warm_up()
    world.dogs[1]._ending = DONE, ""
    world.go_on(1)
    assert not world.go_on(2 * GONE_S, silent=(1,))


def test_a_thousand_ranks_take_a_few_lines():
    beats = [Heartbeat(r, f"host-{r // 8}", r, 1, 7, 3, "in the step") for r in range(1000)]
    beats[507] = beats[507]._replace(marks=6, phase="waiting for data", state=watchdog.STUCK)
    assert watchdog.find_stuck(beats).startswith("rank 507 (host host-63, pid 507) got stuck")
    odd, rest = watchdog.table(beats, dict.fromkeys(range(1000), 0.0))
    assert "rank 507" in odd and "waiting for data" in odd
    assert rest.count("rank ") == watchdog.NAMED and "995 more" in rest


def test_nothing_is_watched_with_a_timeout_of_0():
    with Watchdog(0) as dog:
        assert not dog._watcher.is_alive()


# --- whole runs


def interrupt(launcher: str, number: int, rank: int, folder, timeout_s: float) -> tuple:
    """A run of two whose rank got a signal: its status, stderr, and the pids of both."""
    config = tiny.write_config(folder, run={"epochs": 10000, "timeout_s": timeout_s})
    with Launched(launcher, 2, TRAIN, ["--config", config], folder) as run:
        run.wait_for_step(6)
        time.sleep(3 * watchdog.BEAT_S)  # the ranks have heard of each other
        pids = [run.pid_of(0), run.pid_of(1)]
        os.kill(pids[rank], number)
        return run.wait(), run.err.read_text(), pids


def assert_named(stderr: str, rank: int, pid: int, folder) -> None:
    """By the other rank, with its stacks and the command that resumes."""
    (said,) = [line for line in stderr.splitlines() if line.startswith("error: no sign of life")]
    assert f"from rank {rank} (host {os.uname().nodename}, pid {pid})" in said
    last = checkpoint.latest(folder / "run")
    assert f"resume from {last} with: " in stderr and "--resume auto" in stderr
    stacks = (folder / "run" / f"stacks_rank_{1 - rank}.txt").read_text()
    assert said.removeprefix("error: ") in stacks and "train.py" in stacks
    assert not (folder / "run" / f"stacks_rank_{rank}.txt").exists()


@pytest.mark.long
@pytest.mark.multiprocess
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_rank_that_is_killed_ends_the_run_with_its_name(tmp_path, launcher, rank):
    # The timeout is not waited for: the broken connection is noticed.
    status, stderr, pids = interrupt(launcher, signal.SIGKILL, rank, tmp_path, timeout_s=3600)
    assert status != 0
    assert_named(stderr, rank, pids[rank], tmp_path)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(("launcher", "rank"), [("torchrun", 1), ("deepspeed", 0)])
def test_a_rank_that_is_stopped_ends_the_run_with_its_name(tmp_path, launcher, rank):
    """With the deepspeed command, rank 0 takes the store with it: nobody may wait for that."""
    status, stderr, pids = interrupt(
        launcher, signal.SIGSTOP, rank, tmp_path, timeout_s=tiny.patience(10)
    )
    assert status != 0
    assert_named(stderr, rank, pids[rank], tmp_path)


STUCK_WITH = """
import io, sys, time
from cjepa_fast.runtime import watchdog

sys.stderr = {stream}
watchdog.BEAT_S = watchdog.LAST_WORDS_S = 0.05
with watchdog.Watchdog(0.01, advice={advice}):
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("stream", "advice"),
    [("sys.__stderr__ = None", "str"), ("io.StringIO()", "str"), ("sys.stderr", "None")],
)
def test_a_stuck_run_ends_whatever_its_stderr_is_and_its_last_words_do(tmp_path, stream, advice):
    script = tmp_path / "stuck.py"
    script.write_text(STUCK_WITH.format(stream=stream, advice=advice))
    assert tiny.run(script, timeout_s=tiny.patience(20)).returncode == 1


def test_an_error_that_stderr_does_not_take_is_told_to_the_others(monkeypatch):
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "the disk is full")

    monkeypatch.setattr(watchdog.time, "sleep", lambda _: None)
    monkeypatch.setattr(sys, "stderr", Full())
    one = watchdog.Watchdog(0, connect=lambda: None)
    with pytest.raises(dist.DistError), one:
        raise dist.DistError("lost")
    assert one.beat().state == watchdog.FAILED


HANG = """
import itertools, os, sys, threading, time
from cjepa_fast import train
from cjepa_fast.runtime import distributed
from cjepa_fast.training import loop

def where_the_loader_hangs():
    time.sleep(3600)

whole = loop.steps_of
def hanging(loader, start):
    for step, group in enumerate(whole(loader, start), 1):
        if step == 6 and os.environ.get("RANK", "0") == sys.argv[1]:
            where_the_loader_hangs()
        yield group

loop.steps_of = hanging
distributed.leave(train.main(sys.argv[2:]))
"""


def assert_stack_of_the_loader(folder, rank: int) -> None:
    stacks = (folder / "run" / f"stacks_rank_{rank}.txt").read_text()
    assert "where_the_loader_hangs" in stacks and "_produce" in stacks  # the main thread, another


@pytest.mark.slow
def test_a_loader_that_hangs_ends_a_run_of_one_process(tmp_path):
    script = tmp_path / "hang.py"
    script.write_text(HANG)
    config = tiny.write_config(tmp_path, run={"epochs": 10000, "timeout_s": tiny.patience(5)})
    result = tiny.run(script, 0, "--config", config)
    assert result.returncode == 1
    assert "error: rank 0 (host" in result.stderr and "got stuck (if" in result.stderr
    assert "step 6, waiting for data" in result.stderr
    assert f"resume from {checkpoint.latest(tmp_path / 'run')} with: python" in result.stderr
    assert_stack_of_the_loader(tmp_path, 0)


@pytest.mark.long
@pytest.mark.multiprocess
def test_a_loader_that_hangs_on_one_of_two_is_told_from_who_waits(tmp_path):
    script = tmp_path / "hang.py"
    script.write_text(HANG)
    config = tiny.write_config(tmp_path, run={"epochs": 10000, "timeout_s": tiny.patience(10)})
    with started(2, script, [1, "--config", config], tmp_path) as run:
        run.wait_for_step(5)
        pids = [run.pid_of(0), run.pid_of(1)]
        assert run.wait() != 0
    said = run.err.read_text()
    assert f"error: rank 1 (host {os.uname().nodename}, pid {pids[1]}) got stuck and" in said
    assert f"pid {pids[1]}): step 6, waiting for data" in said
    assert f"pid {pids[0]}): step 6, in the step" in said
    assert_stack_of_the_loader(tmp_path, 1)
    assert "distributed_c10d.py" in (tmp_path / "run" / "stacks_rank_0.txt").read_text()


JUMPS = """
import sys, time
from cjepa_fast import train
from cjepa_fast.runtime import distributed

real, calls = time.time, []
def jumping():
    calls.append(1)
    return real() + (-1) ** len(calls) * 3 * 3600

time.time = jumping
status = train.main(sys.argv[1:])
print("read the clock", len(calls), "times")
distributed.leave(status)
"""


@pytest.mark.multiprocess
@pytest.mark.long
def test_a_clock_that_jumps_changes_nothing(tmp_path):
    script = tmp_path / "jumps.py"
    script.write_text(JUMPS)
    config = tiny.write_config(
        tmp_path, run={"epochs": 3, "timeout_s": 600}, checkpoint={"every_steps": 1, "keep": 2},
        telemetry={"every_steps": 1, "tensorboard": True},
    )  # fmt: skip
    results = {}
    for name, path in (("plain", TRAIN), ("jumps", script)):
        run = tmp_path / name
        result = tiny.run(path, "--config", config, "--set", f"run.dir={run}", ranks=2)
        assert result.returncode == 0, result.stderr
        results[name] = result
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        times = [row["time_s"] for row in rows]
        assert times == sorted(times) and times[0] > 0 and times[-1] < 3600
        assert all(0 < row["images_per_s"] < 1e6 and 0 <= row["data_wait"] <= 1 for row in rows)
        saved = sorted(path.name for path in (run / "checkpoints").glob("step_*"))
        assert saved == ["step_00000005", "step_00000006"]
        assert checkpoint.latest(run).name == saved[-1]
    reads = re.findall(r"read the clock (\d+) times", results["jumps"].stdout)
    assert len(reads) == 2 and max(map(int, reads)) > 0  # of the second rank nothing reads it
    assert tiny.losses(tmp_path / "plain") == tiny.losses(tmp_path / "jumps")
    assert "no sign of life" not in results["jumps"].stderr


@pytest.mark.long
@pytest.mark.multiprocess
def test_an_error_on_one_of_two_is_told_by_the_other(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(
        HANG.replace("time.sleep(3600)", "raise RuntimeError('the disk of rank 1 is gone')")
    )
    config = tiny.write_config(tmp_path, run={"epochs": 10000, "timeout_s": 3600})
    with started(2, script, [1, "--config", config], tmp_path) as run:
        assert run.wait() != 0
    said = run.err.read_text()
    assert "error: no sign of life from rank 1" in said
    assert "failed (RuntimeError: the disk of rank 1 is gone)" in said


@pytest.mark.parametrize(
    "module",
    ["runtime/watchdog", "telemetry/log", "telemetry/progress", "training/loop", "runtime/signals"],
)
def test_what_measures_and_decides_never_asks_for_the_time_of_day(module):
    source = (tiny.ROOT / "cjepa_fast" / f"{module}.py").read_text()
    assert "time.time" not in source and "datetime.now" not in source
