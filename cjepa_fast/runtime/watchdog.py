"""Notices a rank that is gone or stuck, says which one it is, and ends the run.

The main thread of every rank sets marks ("waiting for data", step 12); threads beside it publish
them as heartbeats, in the store at which the ranks met. Rank 0 reads all heartbeats and
decides; the others read its own, with its verdict in it, and watch it alone. A heartbeat is a sign
of life if it has changed. How long ago that was is told by a clock that each rank advances for
itself, and that stands still while the process is stopped: nobody's time of day is read.

A main thread that waits for NCCL or for the GPU leaves the interpreter to these threads; torch's
own watchdog of NCCL is left as it is. Not yet measured on a GPU.
"""

import contextlib
import faulthandler
import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from cjepa_fast.runtime.printable import say
from cjepa_fast.runtime.reads_in_progress import longest, reads

BEAT_S = 1.0  # between two heartbeats, and between two looks at them
HEARD_S = 5 * BEAT_S  # by then a rank's mark has come to all
GONE_S = 60.0  # without a sign of life (or half the timeout): a rank is gone, not stuck; never less
# than HEARD_S, which a healthy rank's heartbeats may take
HASTE_S = 10.0  # the same once one has failed or lost a connection: launchers then wait for 30 s
START, STARTING_STEPS = 3, 3  # times the timeout, until these have been done: kernels are compiled
LAST_WORDS_S = 3.0  # for what may hang too: a disk, a store
NAMED = 4  # ranks of a group; the others are counted

INDEXING = "indexing the images"  # a phase in which each file that is read is a sign of progress
RUNS, STUCK, CUT_OFF, FAILED, DONE = "runs", "is stuck", "lost a connection", "failed", "is done"


class Heartbeat(NamedTuple):
    """What a rank tells of itself. All set the same marks in the same order: who has set fewer
    than the others is behind them."""

    rank: int
    host: str = "not heard of"
    pid: int = 0
    count: int = 0  # of its heartbeats
    marks: int = 0
    step: int = 0
    phase: str = "starting"
    for_s: float = 0.0  # since its last mark
    state: str = RUNS
    error: str = ""
    verdict: str = ""  # by rank 0, for all


def find_gone(beats: Iterable[Heartbeat], still_s: dict[int, float], gone_s: float) -> str:
    """Who has given no sign of life for gone_s, as text, or "". still_s: that time, by rank."""
    gone = [beat for beat in beats if beat.state != DONE and still_s[beat.rank] > gone_s]
    if not gone:
        return ""
    since_s = min(still_s[beat.rank] for beat in gone)
    return (
        f"no sign of life from {names(gone)} for {since_s:.0f} s: it has failed, was killed or "
        "stopped, or its machine or the network is gone"
    )


def find_stuck(beats: Iterable[Heartbeat]) -> str:
    """Who holds up the others once one of them is stuck, as text, or "". While one of those at the
    last line still indexes its images the others wait for it, however long; and when it is done
    what they last said of themselves is older than that."""
    there = [beat for beat in beats if beat.state != DONE]
    if all(beat.state != STUCK for beat in there):
        return ""
    fewest = min(beat.marks for beat in there)
    behind = [beat for beat in there if beat.marks == fewest]
    just_left = any(beat.for_s < HEARD_S for beat in there if beat.marks > fewest)
    if any(beat.phase == INDEXING and (just_left or beat.state == RUNS) for beat in behind):
        return ""
    if len(behind) < len(there):
        others = " and the others wait"
    else:
        others = ", all at the same line" * (len(there) > 1)
    return f"{names(behind)} got stuck{others} (if it is only slow: a larger run.timeout_s)"


def names(beats: list[Heartbeat]) -> str:
    known = [f"rank {beat.rank} (host {beat.host}, pid {beat.pid})" for beat in beats[:NAMED]]
    return ", ".join(known) + (f" and {len(beats) - NAMED} more" if len(beats) > NAMED else "")


def table(beats: Iterable[Heartbeat], still_s: dict[int, float]) -> list[str]:
    """A line for those at the same line; the odd ones out come first."""
    groups: dict[tuple, list[Heartbeat]] = {}
    for beat in beats:
        silent = still_s[beat.rank] > 3 * BEAT_S
        groups.setdefault((silent, beat.state, beat.marks), []).append(beat)
    lines = []
    for (silent, state, _), group in sorted(groups.items(), key=lambda item: len(item[1])):
        one, for_s = group[0], max(beat.for_s for beat in group)
        line = f"  {names(group)}: step {one.step}, {one.phase} for {for_s:.0f} s"
        line += f", {state} {one.error}".rstrip() * (state != RUNS)
        line += f"; last heard of {still_s[one.rank]:.0f} s ago" * silent
        lines.append(line)
    return lines


class Watchdog:
    """with Watchdog(600) as watchdog: ... watchdog.mark("waiting for data", step) ...

    A rank that sets no mark for timeout_s (START times that for its first STARTING_STEPS steps)
    is stuck; 0: nothing is watched. advice() is the last line of the message. stacks: a file for
    the stacks of all threads, which also go to stderr. connect() opens the store of several
    ranks. An error that leaves the `with` is told to the others.
    """

    def __init__(
        self,
        timeout_s: float,
        advice: Callable[[], str] = str,
        stacks: Path | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
        connect: Callable[[], dist.Store] | None = None,
    ):
        self.timeout_s, self.advice, self.stacks = timeout_s, advice, stacks
        self.rank, self.connect = rank, connect
        self.host, self.pid, self._counter = socket.gethostname(), os.getpid(), itertools.count(1)
        self.watched = range(world_size) if rank == 0 else range(1)
        self.beats = {r: Heartbeat(r) for r in (*self.watched, rank)}
        self.clock_s = 0.0
        self._changed_s = dict.fromkeys(self.beats, 0.0)
        self._marks, self._marked_s, self._steps = (0, 0, "starting"), 0.0, 0
        self._read = reads()
        self.alone, self._paused = world_size == 1, False
        self._ending: tuple[str, str] | None = None  # state and error once the main thread leaves
        self.verdict = ""
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._talker = threading.Thread(target=self._talk, daemon=True)

    def mark(self, phase: str, step: int | None = None) -> None:
        """The main thread gets on: with what, and in which step (from 1), if in another one."""
        marks, before, _ = self._marks
        step = before if step is None else step
        self._steps += step != before
        self._marked_s = self.clock_s
        self._marks = (marks + 1, step, phase)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time within it is the user's code's. On one rank it does not count: a debugger may
        wait there. On several it does, since the others wait."""
        self._paused = self.alone
        try:
            yield
        finally:
            self._paused = False

    def where(self) -> str:
        """In words: the step, and with what the main thread is busy."""
        _, step, phase = self._marks
        return f"step {step}, {phase}" if step else phase

    def beat(self) -> Heartbeat:
        """The next heartbeat of this rank."""
        for_s = self.clock_s - self._marked_s
        limit_s = self.timeout_s * (START if self._steps <= STARTING_STEPS else 1)
        state, error = self._ending or (STUCK if for_s > limit_s else RUNS, "")
        who, count = (self.rank, self.host, self.pid), next(self._counter)
        return Heartbeat(*who, count, *self._marks, for_s, state, error, self.verdict)

    def hear(self, beat: Heartbeat) -> None:
        if beat.count != self.beats[beat.rank].count:
            self._changed_s[beat.rank] = self.clock_s
        self.beats[beat.rank] = beat

    def exchange(self, store: dist.Store) -> None:
        """Publish this rank's heartbeat, and read those that it watches."""
        store.set(f"watchdog/{self.rank}", json.dumps(self.beat()))
        for_others = {r: f"watchdog/{r}" for r in self.watched if r != self.rank}
        keys = [k for r, k in for_others.items() if self.beats[r].count or store.check([k])]
        for text in store.multi_get(keys) if keys else []:
            self.hear(Heartbeat(*json.loads(text)))

    def tick(self, elapsed_s: float) -> str:
        """Advance the clock, and decide: what is wrong, or "". A rank that was itself stopped
        has seen next to no time go by, and blames nobody."""
        self.clock_s += min(elapsed_s, 2 * BEAT_S)
        if self._marks[2] == INDEXING and reads() != self._read:
            self._read, self._marked_s = reads(), self.clock_s
        if self._paused:
            self._marked_s = self.clock_s
        self.hear(self.beat())
        if self.beats[0].verdict:
            return self.beats[0].verdict  # rank 0 has decided
        hasty = any(beat.state in (CUT_OFF, FAILED) for beat in self.beats.values())
        gone_s = max(HEARD_S, min(self.timeout_s / 2, HASTE_S if hasty else GONE_S))
        still_s = {r: self.clock_s - changed_s for r, changed_s in self._changed_s.items()}
        watched = [self.beats[r] for r in self.watched]
        found = find_gone(watched, still_s, gone_s) or (self.rank == 0 and find_stuck(watched))
        if found:
            self.verdict = "\n".join([found, *table(self.beats.values(), still_s)])
        return self.verdict

    def _watch(self) -> None:
        before_s = time.monotonic()
        while not self._closed.wait(BEAT_S):
            now_s = time.monotonic()
            verdict = self.tick(now_s - before_s)
            before_s = now_s
            if verdict:
                self._end(verdict)

    def _talk(self) -> None:
        """In a thread of its own: a store whose process is stopped never answers."""
        store, last = None, False
        while not last:
            last = self._closed.wait(BEAT_S)
            try:
                store = store or self.connect()
                self.exchange(store)
            except RuntimeError:  # torch's DistError and what is below it
                store = None  # the next heartbeat tries a new connection

    def _end(self, verdict: str) -> None:
        try:
            # sys.stderr may be another's, without a descriptor; and a process may have none
            with contextlib.suppress(RuntimeError, ValueError, OSError):
                faulthandler.dump_traceback(sys.__stderr__)
            say(f"error: {verdict}", sys.stderr)
            if reading := longest():
                say(f"on this process, {reading}", sys.stderr)
            epilogue = threading.Thread(target=self._write_down, args=(verdict,), daemon=True)
            epilogue.start()
            epilogue.join(LAST_WORDS_S)
            if self.rank == 0 and self.connect:
                time.sleep(LAST_WORDS_S)  # the others read the verdict
        finally:
            os._exit(1)

    def _write_down(self, verdict: str) -> None:
        say(self.advice(), sys.stderr)
        if self.stacks is not None:
            self.stacks.parent.mkdir(parents=True, exist_ok=True)
            with self.stacks.open("w", encoding="utf-8") as file:
                print(verdict, file=file, flush=True)
                faulthandler.dump_traceback(file)

    def __enter__(self) -> "Watchdog":
        if self.timeout_s:
            self._watcher.start()
            if self.connect:
                self._talker.start()
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        if error is None:
            self._ending = DONE, ""
        else:
            text = f"({type(error).__name__}: {str(error)[:160]})"
            if self.connect and is_of_a_collective(error):
                # Whose fault it is, the heartbeats tell soon, and _end() ends this process.
                self._ending = CUT_OFF, text
                say("".join(traceback.format_exception(error)), sys.stderr, end="")
                time.sleep(HASTE_S + 2 * LAST_WORDS_S)
            self._ending = FAILED, text
        self._closed.set()
        for thread in (self._watcher, self._talker):
            if thread.is_alive():
                thread.join(LAST_WORDS_S)


def is_of_a_collective(error: BaseException) -> bool:
    """Whether it came from NCCL, from gloo (which names its source file) or from the store."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo/" in str(error)
    )


def meeting_address() -> tuple[str, int] | None:
    """Host and port of the store at which torch's ranks met: of the launcher's variables, else of
    a caller's own group. None where they met in a file or in memory."""
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return (store.host, store.port) if isinstance(store, dist.TCPStore) else None


def meeting_point(host: str, port: int) -> dist.Store:
    """A connection of its own to the store at which torch's ranks met."""
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
