"""What a run tells: a progress line, log.jsonl, TensorBoard or W&B scalars, GPU counters.

Between intervals nothing here waits for the device: scalars are added up where they lie, and
only `log_row`, once an interval, reads them. A step is counted from 1: "step 100" is the state
after 100 optimiser steps, as in the names of checkpoints.
"""

import contextlib
import math
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np
import torch

from cjepa_fast.telemetry.jsonl import JsonlWriter, drop_rows_after
from cjepa_fast.telemetry.means import DeviceMeans, to_number, to_scalar
from cjepa_fast.telemetry.nvml import GpuCounters
from cjepa_fast.telemetry.pace import duration, rate
from cjepa_fast.telemetry.progress import ProgressLine
from cjepa_fast.telemetry.sinks import (
    AsyncSink,
    MLflowSink,
    Sink,
    TensorBoardSink,
    WandbSink,
    is_number,
    service_id,
)

BAD_STEPS = "bad_steps.jsonl"  # in a run's folder: steps that were skipped or stood out
RATE_MEMORY = 0.7  # weight of the past in the EMA of the step time behind the ETA


class Telemetry:
    """One run's telemetry; a rank without a folder stays silent and costs nothing.

    folder: RUN, made if missing; log.jsonl and tensorboard/ go there. None: silent.
    total_steps: steps of the whole run; steps_per_epoch, images_per_step: global figures.
    interval: steps between rows. start_step: steps done before (resume): rows beyond it are
    dropped from log.jsonl and bad_steps.jsonl, which so have each step once. wandb, mlflow: a
    project and an experiment there. quiet: messages alone, without the progress line.
    Raises ValueError for an interval below one.
    """

    def __init__(
        self,
        folder: Path | str | None,
        *,
        total_steps: int,
        steps_per_epoch: int,
        images_per_step: int,
        interval: int,
        start_step: int = 0,
        tensorboard: bool = True,
        wandb: str | None = None,
        mlflow: str | None = None,
        stream: TextIO | None = None,
        quiet: bool = False,
    ):
        if interval < 1:
            raise ValueError(f"interval {interval}: telemetry needs at least one step between rows")
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self.images_per_step, self.interval = images_per_step, interval
        self.silent = folder is None
        if self.silent:
            return
        self._line = ProgressLine(stream or sys.stdout, quiet)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._step = folder, start_step
        self._said = JsonlWriter(self._line.message, folder / "events.jsonl")
        self._before_s, self._start_s = 0.0, time.perf_counter()
        fresh = not (folder / "log.jsonl").exists()
        last_kept = start_step or -1  # a start at step 0 evaluates that step again
        kept = drop_rows_after(folder / "log.jsonl", last_kept, self.message)
        drop_rows_after(folder / BAD_STEPS, start_step, self.message)
        self._before_s = kept[-1].get("time_s", 0.0) if kept else 0.0
        self._log = JsonlWriter(self.message, folder / "log.jsonl")
        self._events: dict[str, JsonlWriter] = {}
        self._sinks: list[Sink | AsyncSink] = []
        if tensorboard:
            self._sinks.append(TensorBoardSink(self.message, folder / "tensorboard", last_kept))
        services = [(kind, of) for kind, of in ((WandbSink, wandb), (MLflowSink, mlflow)) if of]
        own = self._service_id(fresh or start_step == 0)
        for kind, of in services:
            self._sinks.append(AsyncSink(kind, self.message, folder, own, of))
        self._gpu = GpuCounters()
        self._shown: dict = {}
        self._knn: float | None = None  # of the last evaluation
        self._step_s: float | None = None
        self._new_interval(start_step)

    def _service_id(self, fresh: bool) -> str:
        try:
            return service_id(self._folder, fresh)
        except OSError as error:
            self.message(f"WARNING: {error}: the services take what comes for another training")
            return secrets.token_hex(8)

    def _new_interval(self, step: int) -> None:
        self._means = DeviceMeans()
        self._wait_s = self._pause_s = 0.0
        self._interval_start_s = time.perf_counter()
        self._interval_step = self._step = step

    def due(self, step: int) -> bool:
        """Whether `log_row` is to be called after this step: each interval, and the last."""
        return step % self.interval == 0 or step >= self.total_steps

    def step(
        self, step: int, scalars: dict[str, torch.Tensor | float], data_wait_s: float = 0.0
    ) -> None:
        """Note a finished step (counted from 1).

        scalars: 0-d tensors or numbers, logged as means over the interval's finite values.
        data_wait_s: seconds this step waited for its data. Forces no host sync, but for the first
        step, of which a line tells that it is done.
        """
        if self.silent:
            return
        self._step = step
        self._wait_s += data_wait_s
        self._means.add(scalars)
        if self._shown:
            self._line.refresh(lambda: self._text({**self._shown, "step": step}))
        else:
            loss = to_number(to_scalar(scalars.get("loss", math.nan)))
            self._shown = {"step": step, "loss": loss}
            self._line.show(self._text(self._shown))

    def show_progress(self, text: str) -> None:
        """How far the step under way is, for whoever waits for it."""
        if not self.silent and self._shown:
            row = {**self._shown, "step": self._step, "within": text}
            self._line.refresh(lambda: self._text(row), plain=True)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside (a checkpoint, an evaluation) does not count as training."""
        start_s = time.perf_counter()
        try:
            yield
        finally:
            if not self.silent:
                self._pause_s += time.perf_counter() - start_s

    def log_row(
        self, extra: dict[str, torch.Tensor | float] | None = None, longest_wait_s: float = 0.0
    ) -> dict | None:
        """Write the interval's row and start the next; returns the row (None on a silent rank).

        extra: values of this step as they are (lr, momentum, feature_std, skipped_steps ...).
        longest_wait_s: for data, of the rank that waited longest; the others wait for that rank.
        A value that is not finite is written as null. This waits for the device.
        """
        if self.silent:
            return None
        means = self._means.read()  # waits for the device, so the clock below sees its work
        now_s = time.perf_counter()
        wall_s = max(now_s - self._interval_start_s - self._pause_s, 1e-9)
        steps = max(self._step - self._interval_step, 1)
        self._step_s = _ema(self._step_s, wall_s / steps)
        row = {
            "step": self._step,
            "epoch": self._step / self.steps_per_epoch,
            "time_s": self._before_s + now_s - self._start_s,
            "images_per_s": steps * self.images_per_step / wall_s,
            **means,
            "data_wait": min(max(self._wait_s, longest_wait_s) / wall_s, 1.0),
            **{name: to_number(value) for name, value in (extra or {}).items()},
            **self._gpu.read(),
        }
        self._knn = row.get("knn") or self._knn
        self._write(row)
        self._shown = row
        self._line.show(self._text(row), last=self._step >= self.total_steps)
        self._new_interval(self._step)
        return row

    def write_row(self, step: int, values: dict[str, float]) -> None:
        """What was measured apart from the steps: before the first, or after the last."""
        if not self.silent:
            self._knn = values.get("knn") or self._knn
            epoch = step / self.steps_per_epoch
            known = {name: to_number(value) for name, value in values.items()}
            self._write({"step": step, "epoch": epoch, "time_s": self._before_s, **known})

    def _write(self, row: dict) -> None:
        self._log.write(row)
        for sink in self._sinks:
            sink.write(row)

    def figures(self, figures: dict[str, np.ndarray], step: int) -> None:
        """Figures by name, (height, width, 3) uint8, to TensorBoard."""
        for sink in () if self.silent else self._sinks:
            if isinstance(sink, TensorBoardSink):
                sink.figures(figures, step)

    def _text(self, row: dict) -> str:
        """What matters first: a narrow terminal cuts the end off. All terms are in log.jsonl."""
        row = row | {"knn": self._knn}
        parts = [
            f"step {row['step']}/{self.total_steps}",
            f"epoch {row['step'] / self.steps_per_epoch:.2f}",
        ]
        parts[1:1] = filter(None, [row.get("within")])
        shown = (("loss", "loss {:.4f}"), ("rankme", "RankMe {:.1f}"), ("knn", "kNN {:.1f} %"))
        parts += [text.format(row[name]) for name, text in shown if is_number(row, name)]
        if is_number(row, "images_per_s"):
            parts.append(rate(row["images_per_s"]))
        if self._step_s is not None:
            left_s = (self.total_steps - row["step"]) * self._step_s
            parts.append(f"ETA {duration(left_s)}")
        if is_number(row, "lr"):
            parts.append(f"lr {row['lr']:.2e}")
        return "  ".join(parts)

    def message(self, text: str) -> None:
        """Print a line of its own beside the progress line, and keep it in events.jsonl."""
        if not self.silent:
            self._line.message(text)
            self.note(text)

    def note(self, text: str) -> None:
        """Keep in events.jsonl what has been printed before."""
        if not self.silent:
            time_s = self._before_s + time.perf_counter() - self._start_s
            self._said.write({"step": self._step, "time_s": time_s, "text": text})

    def event(self, file: str, row: dict, text: str) -> None:
        """Print what happened, and add it to a JSONL file of that name in the run's folder."""
        if self.silent:
            return
        self._line.message(text)
        if file not in self._events:
            self._events[file] = JsonlWriter(self.message, self._folder / file)
        self._events[file].write(row)

    def rewind_to(self, step: int) -> None:
        """The run has gone back to an earlier step: rows beyond it are dropped from the log.

        TensorBoard hides them. The services keep them: W&B takes no row of an earlier step, MLflow
        holds both.
        """
        if not self.silent:
            for sink in self._sinks:
                if isinstance(sink, TensorBoardSink):
                    sink.rewind_to(step)
                else:
                    self.message(f"WARNING: {sink.name} keeps its rows beyond step {step}")
            try:
                drop_rows_after(self._folder / "log.jsonl", step, self.message)
            except OSError as error:
                self.message(f"WARNING: {self._folder}/log.jsonl keeps rows beyond {step}: {error}")
            self._new_interval(step)

    def close(self) -> None:
        """Finish the line and the files; may be called twice."""
        if self.silent:
            return
        for lines in (self._log, *self._events.values(), self._said):
            lines.close()
        self._line.end()
        for sink in self._sinks:
            sink.close()


def _ema(past: float | None, new: float) -> float:
    return new if past is None else RATE_MEMORY * past + (1 - RATE_MEMORY) * new
