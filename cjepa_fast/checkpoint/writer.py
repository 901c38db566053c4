"""Checkpoints written while the training continues.

    begin     the step after it starts at once; meanwhile a thread copies the state, which a forward
              and a backward only read, and writes it; the next update waits for the copy alone
    settle    after each step: once every rank has written, the first one adds the manifest and
              gives the folder its name, in that thread
    finish    the same, waited for

What cannot be written (a full disk, no memory for the copy, a value that is not finite) is said and
taken away: the training continues, and the checkpoints there stay.
"""

import contextlib
import json
import queue
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import torch

from cjepa_fast.checkpoint import format as stored
from cjepa_fast.checkpoint.format import Receipt
from cjepa_fast.checkpoint.owned import SavedEngine
from cjepa_fast.runtime import files
from cjepa_fast.runtime.distributed import all_gather_objects, rank, world_size
from cjepa_fast.runtime.one_thread import compute_on_one_thread


class Worker:
    """A thread that does jobs, one at a time, and ends with this object.

    One for all saves: the C library gives each new thread memory of its own, and keeps it.
    """

    def __init__(self, name: str):
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        serve = threading.Thread(
            target=_serve, args=(self._jobs, self._idle), name=name, daemon=True
        )
        serve.start()
        weakref.finalize(self, self._jobs.put, None)

    @property
    def busy(self) -> bool:
        return not self._idle.is_set()

    def start(self, job: Callable[..., None], *args) -> None:
        self._idle.clear()
        self._jobs.put((job, args))

    def wait(self) -> None:
        self._idle.wait()


def _serve(jobs: queue.SimpleQueue, idle: threading.Event) -> None:
    """The thread's body. It holds no reference to the Worker, so that one can be collected."""
    compute_on_one_thread()
    while (task := jobs.get()) is not None:
        job, args = task
        job(*args)
        del task, job, args  # or they would stay until the next
        idle.set()


class Saver:
    """Saves an engine's state below `folder`; every rank makes one and calls it alike.

    keep: of the newest checkpoints; besides, each that is saved at a multiple of `keep_period`
    steps (0: none) stays for good, also where a later Saver has another period. say: called on
    rank 0 with what the user should know; saved: with the step and the folder of each checkpoint
    that came through, by the thread that calls this object.
    """

    def __init__(
        self,
        folder: Path,
        engine: SavedEngine,
        encoder_json: str,
        *,
        keep: int,
        keep_period: int = 0,
        say: Callable[[str], None] = print,
        saved: Callable[[int, Path], None] = lambda step, folder: None,
    ):
        self.folder, self.keep, self.keep_period = folder, keep, keep_period
        self._engine, self._encoder_json = engine, encoder_json
        self._say, self._came_through = say, saved
        self._worker = Worker("checkpoint")
        self._writing = self._naming = False  # what was begun and is not settled
        self._failure: str | None = None  # of the naming
        self._beside = ""  # what failed of what follows it
        self._told: set[str] = set()
        self._step: int | None = None
        self._again = False
        self._saved: int | None = None  # self._step, on rank 0, once it came through
        self.best: int | None = None  # a step whose checkpoint is kept, and named RUN/best
        self.best_saved: int | None = None  # on rank 0: the last best whose checkpoint is there

    @property
    def pending(self) -> bool:
        """Whether a save has been begun that is not settled, on all ranks alike."""
        return self._writing

    @property
    def busy(self) -> bool:
        """Whether this rank's thread is still writing."""
        return self._writing and self._worker.busy

    def begin(self, step: int, facts: dict, again: bool = False) -> None:
        """Save the state of optimiser step `step` (updates done so far).

        facts: what else state.json is to hold ("config", "epoch", "images", ...). again: the
        same state with other facts, whose earlier checkpoint is removed then.
        """
        self.finish()
        self._step, self._again, self._saved = step, again, None
        self._state = stored.describe(step, self._engine) | facts
        self._state["for_good"] = bool(self.keep_period) and step % self.keep_period == 0
        self._partial = self.folder / f".step_{step:08d}.partial"
        self._outcome: Receipt | str = ""
        tensors, generators = stored.owned_tensors(self._engine), stored.generator_states()
        self._writing = True
        try:
            self._engine.snapshot.begin(tensors)
        except Exception as error:  # as in _write; settle() tells it, once the other ranks are done
            self._outcome = f"rank {rank()}: {error}"
            return
        self._worker.start(self._write, generators)

    def settle(self) -> None:
        """Once no rank is busy: name what all have written, or say why it failed."""
        if self._naming and not self._worker.busy:
            self._named()
        if not self._writing:
            return
        self._worker.wait()
        self._writing = False
        outcomes = all_gather_objects(self._outcome)
        if rank() != 0:
            return
        failures = [outcome for outcome in outcomes if isinstance(outcome, str)]
        if failures:
            self._fail(failures[0])
            return
        self._naming = True
        self._worker.start(self._name, outcomes)

    def finish(self) -> bool:
        """Wait until what was begun is settled and named. Returns, on rank 0, whether
        the last save came through."""
        self.settle()
        if self._naming:
            self._named()
        return self._saved == self._step

    def point_at_best(self, step: int | None) -> bool:
        """From now on this step's checkpoint is the best, and named so. False where it is not in
        this folder (any more): then none is. The first rank's answer counts."""
        self.best = self.best_saved = None
        if rank() != 0:
            return False
        name, there = self.folder.parent / "best", self.folder / f"step_{step or 0:08d}"
        if step is not None and there.is_dir():
            self.best = self.best_saved = step
            try:
                files.point(name, there)
            except OSError as error:  # the file system has no links
                self._tell_once(f"WARNING: {name} cannot be made: {error}")
        elif name.is_symlink() and not name.exists():
            name.unlink()
        return self.best is not None

    def leave(self) -> None:
        """Finish what takes no other rank, of a run that fails."""
        if world_size() == 1:
            self.finish()
        elif self._naming:
            self._named()

    def _named(self) -> None:
        self._worker.wait()
        self._naming = False
        if self._failure:
            self._fail(self._failure)
        else:
            self._came_through(self._saved, self.folder / f"step_{self._saved:08d}")
            self._tell_once(self._beside)

    def _tell_once(self, text: str) -> None:
        if text and text not in self._told:
            self._told.add(text)
            self._say(text)

    def _write(self, generators: dict[str, torch.Tensor]) -> None:
        """In a thread: this rank's shard."""
        try:
            tensors = self._engine.snapshot.copy()
            _check_finite(tensors)
            self._partial.mkdir(parents=True, exist_ok=True)
            shard = self._partial / f"shard_{rank():05d}_of_{world_size():05d}.safetensors"
            files.write_tensors(tensors | generators, shard)
            self._outcome = stored.receipt(shard)
        except Exception as error:  # whatever it is, it is said, and the training continues
            self._outcome = f"rank {rank()}: {error}"

    def _name(self, receipts: list[Receipt]) -> None:
        """In a thread of rank 0: the rest of the files, the manifest, the final name."""
        final = self.folder / f"step_{self._step:08d}"
        self._failure = None
        try:
            self._check_all_are_here(receipts)
            self._drop_what_another_start_left(receipts)
            files.write_text(self._partial / "encoder.json", self._encoder_json)
            files.write_text(self._partial / "state.json", json.dumps(self._state))
            stored.write_manifest(self._partial, receipts)
            files.sync_file(self._partial)
            before = stored.set_aside(final) if final.exists() else None
            self._partial.rename(final)
            files.sync_file(self.folder)
            self._saved = self._step
            if before and self._again:
                shutil.rmtree(before, ignore_errors=True)
        except Exception as error:  # said by the main thread
            self._failure = str(error)
            return
        try:
            if self._step == self.best:
                self.best_saved = self._step
                files.point(self.folder.parent / "best", final)
            self._prune()
        except OSError as error:
            self._beside = (
                f"WARNING: checkpoints are saved, but {self.folder.parent / 'best'} or an older "
                f"one could not be changed: {error}"
            )

    def _check_all_are_here(self, receipts: list[Receipt]) -> None:
        """Raises OSError where the ranks do not write into one folder."""
        for name, size, _ in receipts:
            path = self._partial / name
            if not path.is_file() or path.stat().st_size != size:
                raise OSError(
                    f"{path}, written by another rank, cannot be seen here: run.dir must be "
                    "a folder that all nodes share"
                )

    def _drop_what_another_start_left(self, receipts: list[Receipt]) -> None:
        """One that was killed in a save of this step, perhaps on another number of ranks, or of
        an earlier one."""
        for path in self._partial.iterdir():
            if path.name not in {receipt.name for receipt in receipts}:
                path.unlink()
        for left in self.folder.glob(".step_*.partial"):
            number = left.name.removeprefix(".step_").removesuffix(".partial")
            if number.isdecimal() and int(number) < self._step:
                shutil.rmtree(left, ignore_errors=True)  # on NFS what is open elsewhere stays

    def _prune(self) -> None:
        for old in stored.newest_first(self.folder.parent)[self.keep :]:
            best = stored.step_of(old) in (self.best, self.best_saved)
            if not best and not stored.is_for_good(old):
                # No longer a checkpoint, whatever comes between: the next save clears it away.
                gone = old.rename(self.folder / f".{old.name}.partial")
                shutil.rmtree(gone, ignore_errors=True)

    def _fail(self, reason: str) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)
        good = None
        with contextlib.suppress(OSError):  # of the same disk
            good = stored.latest(self.folder.parent)
        self._say(
            f"WARNING: the checkpoint of step {self._step} could not be saved: {reason}. The last "
            f"good one is {good or 'none'}"
        )


def _check_finite(tensors: dict[str, torch.Tensor]) -> None:
    """Raises ValueError naming the first tensor with a value that is not finite."""
    for key, values in tensors.items():
        if not torch.isfinite(values).all():
            raise ValueError(f"{key.partition('@')[0]} holds values that are not finite")
