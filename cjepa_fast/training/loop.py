"""The loop: step after step, saved, evaluated, stopped or rewound, until the training is done."""

import contextlib
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from cjepa_fast import checkpoint
from cjepa_fast.checkpoint import encoders
from cjepa_fast.checkpoint.writer import Saver
from cjepa_fast.data import decoder_warnings
from cjepa_fast.data.loader import Batch, Loader
from cjepa_fast.runtime import distributed
from cjepa_fast.runtime.provenance import machine
from cjepa_fast.runtime.signals import StopRequest
from cjepa_fast.telemetry import Telemetry, read_log
from cjepa_fast.telemetry.log import BAD_STEPS
from cjepa_fast.telemetry.pace import Pace
from cjepa_fast.telemetry.progress import shown_clock
from cjepa_fast.training.anomalies import BadSteps, PendingOutcomes, SpikeDetector, StepOutcome
from cjepa_fast.training.best import BestCheckpoint
from cjepa_fast.training.callbacks import Callbacks
from cjepa_fast.training.collapse_monitor import CollapseMonitor
from cjepa_fast.training.diagnosis import end_messages
from cjepa_fast.training.session import Session
from cjepa_fast.training.trainer import Trainer

MOST_REWINDS = 3  # to one checkpoint


def steps_of(loader: Loader, start: int) -> Iterator[tuple[list[Batch], float]]:
    """For each optimiser step from `start`: its micro-batches and the seconds waited for them."""
    with contextlib.closing(loader.iterate(start)) as batches:
        while True:
            began = time.perf_counter()
            group = list(itertools.islice(batches, loader.accumulation))
            yield group, time.perf_counter() - began


class Evaluation(Protocol):
    """What evaluates the target encoder now and then (eval/online.py)."""

    owed: bool  # one is due that has not been made

    def attach(
        self,
        say: Callable[[str], None],
        stopped: Callable[[], bool],
        paused: Callable[[], contextlib.AbstractContextManager],
        owed: bool = False,
    ) -> None:
        """To a training, before its first evaluation. say: takes a line for the user; stopped: is
        asked between batches, by all ranks alike; paused: what the user's probes run within
        (Watchdog.paused); owed: whether a checkpoint owes one."""

    def due(self, step: int) -> bool:
        """Whether to evaluate after this step; on rank 0 alone the answer counts."""

    def counted(self) -> contextlib.AbstractContextManager[None]:
        """The time within it is that of evaluations."""

    def evaluate(self, encoder: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float] | None:
        """Percent right by name, on rank 0; called by all ranks."""


class Snapshots(Protocol):
    """What draws the encoders of the moment (eval/online.py)."""

    def draw(self, target: nn.Module, context: nn.Module) -> dict[str, np.ndarray]:
        """By name, each (height, width, 3) uint8."""


class Loop:
    """A training, from where a checkpoint's `state` (its state.json) left it, or from the start."""

    def __init__(
        self,
        session: Session,
        trainer: Trainer,
        loader: Loader,
        telemetry: Telemetry,
        state: dict | None = None,
        online: Evaluation | None = None,
        snapshots: Snapshots | None = None,
        callbacks: Callbacks | None = None,
    ):
        self.trainer, self.loader, self.telemetry = trainer, loader, telemetry
        self.watch, self.online, self.snapshots = session.watchdog, online, snapshots
        self.callbacks = callbacks or Callbacks()
        self.callbacks.paused = self.watch.paused
        if online:
            owed = (state or {}).get("progress", {}).get("evaluation_owed", False)
            online.attach(telemetry.message, self._stop_is_asked, self.watch.paused, owed)
        self.folder, self.resume_with = session.folder, session.options.resume_with
        self.config, self.asked_micro_batch = trainer.config, session.asked_micro_batch
        own = self.config.checkpoint
        self.period = own.keep_every_epochs * trainer.steps_per_epoch  # of what is kept for good
        self.saver = Saver(
            self.folder / "checkpoints",
            trainer.engine,
            trainer.encoder_json,
            keep=own.keep,
            keep_period=self.period,
            say=telemetry.message,
            saved=self.callbacks.on_save,
        )
        self.micro_batches = 0  # of the step under way
        self.waited_s = 0.0  # for data, since the last row of the log
        self.first_step_clock = contextlib.ExitStack()  # left once the first step is made
        self.stop = session.stop or StopRequest()
        self.saved_s = time.monotonic()
        self.rewinds: Counter[int] = Counter()  # by step
        progress = (state or {}).get("progress", {})
        self.data_offset = progress.get("data_offset", 0)  # steps whose images were passed over
        self._load_progress(state or {"step": 0})
        width, total = trainer.context_encoder.width, trainer.total_steps
        self.collapse = CollapseMonitor(self.config, self.folder, width, total, self.done)
        left = trainer.total_steps - self.done
        self.pace = Pace(left * loader.accumulation, trainer.micro_batch * distributed.world_size())
        self.skipped_before: int = progress.get("skipped_images", 0)  # images, by all ranks
        self.skipped_here = 0  # by this rank, since this start

    def _load_progress(self, state: dict) -> None:
        self.done = state["step"]
        self.outcomes = PendingOutcomes()
        progress = state.get("progress", {})
        self.bad = BadSteps(
            self.config.run.max_bad_steps,
            progress.get("skipped_steps", 0),
            progress.get("skipped_in_row", 0),
        )
        self.spikes = SpikeDetector(self.config.run.spike_z, progress.get("spikes"))
        self.best = BestCheckpoint(self.saver, progress.get("best"))
        self.limits: list[float] = []  # of the next step's loss and gradient norm, where they count
        self._limit(progress.get("limits"))

    def run(self) -> int:
        """Train to the end, or until asked to stop. Returns the exit status."""
        finished = self.done >= self.trainer.total_steps
        if self.online and (not self.done or (finished and self.online.owed)):
            found = self._evaluate()
            if found is not None:
                self.telemetry.write_row(self.done, found)
                self.best.link()
                if finished:
                    self._save(again=True)
            elif not finished:
                self.telemetry.message("stopped in an evaluation, which is made after a resume")
                return 0
        if finished:
            return self._end()
        compiling = ", and its compilation" * (self.config.run.compile != "none")
        self.first_step_clock.enter_context(shown_clock(f"first step{compiling}"))
        status = None
        try:
            while status is None:
                steps = steps_of(self.loader, self.done + self.data_offset)
                with contextlib.closing(steps):
                    status = self._train_until_rewind(steps)
        except Exception:
            self.saver.leave()
            raise
        finally:
            self.first_step_clock.close()
        return status

    def _train_until_rewind(self, steps: Iterator[tuple[list[Batch], float]]) -> int | None:
        """Steps up to the end of the run, or until it has gone back: then None."""
        trainer, telemetry = self.trainer, self.telemetry
        self.watch.mark("waiting for data", self.done + 1)
        for batches, wait_s in steps:
            self.watch.mark("in the step")
            self.micro_batches = 0
            terms, applied = trainer.step(batches, self.done, self._after_micro_batch)
            self.done += 1
            self.skipped_here += sum(batch.holes for batch in batches)
            self.first_step_clock.close()
            asked = self.callbacks.on_step(self.done, terms) or self.stop.asked
            stopping, writing, minutes_up, evaluating = distributed.any_rank(
                asked, self.saver.busy, self._minutes_are_up(), self._evaluation_is_due()
            )
            if not writing:
                self.saver.settle()
            last = self.done == trainer.total_steps or stopping
            saving = last or minutes_up or self._save_is_due() or evaluating
            new = self.outcomes.push(
                self.done, batches, applied, terms["loss"], trainer.engine.grad_norm
            )
            if self._handle_outcomes(new):
                return None
            self._limit()  # by what is known now: a save knows more, and must change no step
            if self._handle_outcomes(self._rest(saving)):
                return None
            if self.bad.too_many:
                return self._give_up()
            telemetry.step(self.done, trainer.scalars(terms, batches), wait_s)
            self.waited_s += wait_s
            if evaluating and stopping:
                self.online.owed = True
            found = self._evaluate() if evaluating and not stopping else {}
            if found is None:  # made after a resume
                found, last = {}, True
            if telemetry.due(self.done) or stopping or evaluating:
                longest_wait_s = max(distributed.all_gather_objects(self.waited_s))
                row = telemetry.log_row({**self._details(), **found}, longest_wait_s)
                self.waited_s = 0.0
                for line in self.collapse.warnings(row, sum(map(len, trainer.features))):
                    telemetry.message(line)
            if saving:
                self._save()
            if last:
                return self._end()
            self.watch.mark("waiting for data", self.done + 1)
        raise AssertionError("the loader is endless")

    def _after_micro_batch(self) -> None:
        """A step may be longer than run.timeout_s where its micro-batches are not."""
        self.watch.mark("in the step")
        self.micro_batches += 1
        count = self.loader.accumulation
        if count > 1:
            self.telemetry.show_progress(f"micro-batch {self.micro_batches}/{count}")
        if line := self.pace.tick():
            self.telemetry.message(line)

    def _rest(self, wanted: bool) -> Iterator[StepOutcome]:
        """The outcomes still on their way, where they are wanted: in a save, or for an end."""
        if wanted or self.bad.too_many:
            yield from self.outcomes.drain()

    def _details(self) -> dict:
        return self.trainer.details(self.done - 1, self.bad.count, self._all_skipped_images())

    def _all_skipped_images(self) -> int:
        return self.skipped_before + sum(distributed.all_gather_objects(self.skipped_here))

    def _evaluation_is_due(self) -> bool:
        if self.online is None:
            return False
        return self.online.due(self.done) or self.done == self.trainer.total_steps

    def _stop_is_asked(self) -> bool:
        """Asked again and again within an evaluation, by all ranks alike."""
        self.watch.mark("evaluating")
        return distributed.any_rank(self.stop.asked)[0]

    def _evaluate(self) -> dict[str, float] | None:
        """The target encoder's scores, on rank 0, {} where there are none; None where it was left.
        The best by kNN is remembered."""
        self.watch.mark("evaluating")
        if not self.done:
            self.telemetry.message(
                "evaluating the encoder before the first step on eval.online.data"
            )
        with self.telemetry.pause(), self.online.counted():
            found = self.online.evaluate(self.trainer.ema.module)
            if found is None:
                return None
            self._draw()
        if found:
            scores = ", ".join(f"{name} {value:.2f} %" for name, value in found.items())
            self.telemetry.message(f"target encoder after step {self.done}: {scores}")
            self.callbacks.on_evaluate(self.done, found)
        if self.done:
            with self.telemetry.pause():
                self.watch.mark("saving")
                self.best.settle(self.done)
            self.best.offer(self.done, found)
        return found

    def _draw(self) -> None:
        """Masks, attention and patch features to TensorBoard: worth a message, never a run."""
        if self.snapshots is None:
            return
        try:
            figures = self.snapshots.draw(self.trainer.ema.module, self.trainer.context_encoder)
            self.telemetry.figures(figures, self.done)
        except Exception as error:
            self.snapshots = None
            self.telemetry.message(f"no more figures of this run: {error!r}")

    def _handle_outcomes(self, outcomes: Iterator[StepOutcome]) -> bool:
        """Whether one of them was a spike that the run has gone back from."""
        for one in outcomes:
            if good := self._record_anomaly(one):
                self._rewind(good)
                return True
        return False

    def _record_anomaly(self, outcome: StepOutcome) -> Path | None:
        """Tell and write down, with its images, a step that was not applied or stands out.

        Returns the checkpoint to go back to, where it is a spike to go back from.
        """
        spike = self.spikes.check(outcome)
        self.bad.record(outcome.applied)
        if outcome.applied and not spike:
            return None
        if spike:
            text = f"step {outcome.step} is a spike: {spike}"
        elif math.isfinite(outcome.loss) and math.isfinite(outcome.grad_norm):
            text = f"step {outcome.step} was above the limit of spikes"
        else:
            text = f"step {outcome.step} was not finite"
        if not outcome.applied:
            text += f": update and EMA skipped ({self.bad.in_row} in a row)"
        names = [self.loader.images.name(int(i)) for b in outcome.batches for i in b.index_B]
        row = {
            "step": outcome.step,
            "applied": outcome.applied,
            "images": list(itertools.chain(*distributed.all_gather_objects(names))),
        }
        rewinding = spike is not None and self.config.run.on_spike == "rewind"
        good = self._newest_before(outcome.step) if rewinding else None
        if good:
            row["rewound"] = True  # its images are passed over: no later step tells of them
        self.telemetry.event(BAD_STEPS, row, text)
        if rewinding and not good:
            self.telemetry.message(
                f"no checkpoint before step {outcome.step} that has not been gone back to "
                f"{MOST_REWINDS} times: resuming"
            )
        return good

    def _limit(self, saved: list[float | None] | None = None) -> None:
        """saved: a checkpoint's, null for infinity."""
        if self.config.run.on_spike == "skip":
            own = [math.inf if one is None else one for one in saved or ()]
            self.limits = own or list(self.spikes.limits())
            self.trainer.engine.limit(*self.limits)

    def _rewind(self, good: Path) -> None:
        """Go back to a checkpoint; the images of the steps after it are passed over."""
        step = checkpoint.step_of(good)
        self.rewinds[step] += 1
        if distributed.rank() == 0:
            checkpoint.set_aside_later_than(self.folder, step)
        passed_over = self.done - step
        state = checkpoint.restore(good, self.trainer.engine)
        self.trainer.features.clear()  # of weights that are gone
        self.waited_s = 0.0
        self.data_offset += passed_over
        self._load_progress(state)
        self.telemetry.rewind_to(step)
        self.telemetry.message(
            f"rewound to step {step}; the images of the {passed_over} steps after it are passed "
            "over"
        )

    def _newest_before(self, step: int) -> Path | None:
        """The newest checkpoint before `step`, None where it has been gone back to often enough."""
        self.watch.mark("rewinding")
        self.saver.finish()
        return distributed.broadcast_from_rank_0(lambda: self._newest_undamaged_before(step))

    def _newest_undamaged_before(self, step: int) -> Path | None:
        for path in checkpoint.newest_first(self.folder):
            if checkpoint.step_of(path) < step and not checkpoint.damage(path):
                return path if self.rewinds[checkpoint.step_of(path)] < MOST_REWINDS else None
        return None

    def _save_is_due(self) -> bool:
        periods = (self.config.checkpoint.every_steps, self.period)
        return any(period and self.done % period == 0 for period in periods)

    def _minutes_are_up(self) -> bool:
        minutes = self.config.checkpoint.every_minutes
        return 0 < minutes * 60 <= time.monotonic() - self.saved_s

    def _save(self, again: bool = False) -> None:
        with self.telemetry.pause():
            self.saved_s = time.monotonic()
            self.watch.mark("saving")
            self.best.settle(self.done)
            self.saver.begin(self.done, self._facts(), again)

    def _is_saved(self) -> bool:
        """Whether this state is, as rank 0 sees it."""
        last = checkpoint.latest(self.folder) if distributed.rank() == 0 else None
        return last is not None and checkpoint.step_of(last) == self.done

    def _facts(self) -> dict:
        return self.trainer.facts() | {
            "epoch": self.done / self.trainer.steps_per_epoch,
            "machine": machine(self.trainer.device),
            "asked_micro_batch": self.asked_micro_batch,
            "progress": {
                "skipped_steps": self.bad.count,
                "skipped_in_row": self.bad.in_row,
                "skipped_images": self._all_skipped_images(),
                "data_offset": self.data_offset,
                "spikes": self.spikes.history,
                "limits": [one if math.isfinite(one) else None for one in self.limits],
                "best": self.best.score,
                "evaluation_owed": self.online is not None and self.online.owed,
            },
        }

    def _give_up(self) -> int:
        """After too many bad steps: nothing has changed since the last good one."""
        in_row, self.bad.in_row = self.bad.in_row, 0
        self.done -= in_row
        self.saver.finish()
        if distributed.rank() == 0:
            checkpoint.set_aside_later_than(self.folder, self.done)
        saved = self._is_saved()
        if not distributed.any_rank(saved)[0]:
            self._save()
            saved = self.saver.finish()
        state = f"The last good state is saved as step {self.done}" if saved else "See above"
        self.telemetry.message(
            f"stopped: {in_row} steps in a row could not be applied. {state}; the images "
            f"are named in {self.folder / BAD_STEPS}"
        )
        return 1

    def _end(self) -> int:
        """End a run that is done, or was asked to stop: the last save, the encoders, the
        messages."""
        self.watch.mark("writing the last checkpoint and the encoders")
        if not distributed.any_rank(self.saver.pending or self._is_saved())[0]:
            self._save()  # a finished run's checkpoint, in another folder
        with shown_clock("the last checkpoint"):
            saved = self.saver.finish()
        counts = distributed.all_gather_objects(dict(self.loader.skipped.warnings.count))
        if line := decoder_warnings.summary(sum(map(Counter, counts), Counter())):
            self.telemetry.message(line)
        if self.done < self.trainer.total_steps:
            self.telemetry.message(
                f"stopped after step {self.done}; resume with: {self.resume_with}"
            )
        elif saved and distributed.rank() == 0:
            if self.online and self.online.owed:
                self.telemetry.message(
                    f"the final evaluation was stopped; run it with: {self.resume_with}"
                )
            final = checkpoint.latest(self.folder)
            encoders.write_encoder(self.folder / "encoder.safetensors", "target", final)
            self.watch.mark("writing the second encoder")
            encoders.write_encoder(self.folder / "context_encoder.safetensors", "context", final)
            log = self.folder / "log.jsonl"  # none of a finished training taken to another folder
            for line in end_messages(
                read_log(log) if log.is_file() else [], self.folder, self.config
            ):
                self.telemetry.message(line)
        return 0 if saved or distributed.rank() else 1
