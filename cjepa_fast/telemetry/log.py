"""What a run tells: a progress line, log.jsonl, TensorBoard or W&B scalars, GPU counters.

Between intervals nothing here waits for the device: scalars are added up where they lie, and
only `log_row`, once an interval, reads them. A step is counted from 1: "step 100" is the state
after 100 optimiser steps, as in the names of checkpoints.
"""

import contextlib
import errno
import json
import math
import os
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import numpy as np
import torch

from cjepa_fast.runtime.printable import is_terminal, printable, printable_lines, say
from cjepa_fast.telemetry.nvml import GpuCounters
from cjepa_fast.telemetry.pace import duration, rate
from cjepa_fast.telemetry.rows import drop_rows_after
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
REFRESH_S = 0.5  # on a terminal the line is redrawn no oftener than this
PLAIN_S = 60.0  # and elsewhere written no oftener, but for the first and the last
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
        self._said = Lines(self._line.message, folder / "events.jsonl")
        self._before_s, self._start_s = 0.0, time.perf_counter()
        fresh = not (folder / "log.jsonl").exists()
        last_kept = start_step or -1  # a start at step 0 evaluates that step again
        kept = drop_rows_after(folder / "log.jsonl", last_kept, self.message)
        drop_rows_after(folder / BAD_STEPS, start_step, self.message)
        self._before_s = kept[-1].get("time_s", 0.0) if kept else 0.0
        self._log = Lines(self.message, folder / "log.jsonl")
        self._events: dict[str, Lines] = {}
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
            self._shown = {"step": step, "loss": _number(_scalar(scalars.get("loss", math.nan)))}
            self._line.show(self._text(self._shown))

    def within(self, text: str) -> None:
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
        self._step_s = _moving_average(self._step_s, wall_s / steps)
        row = {
            "step": self._step,
            "epoch": self._step / self.steps_per_epoch,
            "time_s": self._before_s + now_s - self._start_s,
            "images_per_s": steps * self.images_per_step / wall_s,
            **means,
            "data_wait": min(max(self._wait_s, longest_wait_s) / wall_s, 1.0),
            **{name: _number(value) for name, value in (extra or {}).items()},
            **self._gpu.read(),
        }
        self._knn = row.get("knn") or self._knn
        self._write(row)
        self._shown = row
        self._line.show(self._text(row), last=self._step >= self.total_steps)
        self._new_interval(self._step)
        return row

    def row(self, step: int, values: dict[str, float]) -> None:
        """What was measured apart from the steps: before the first, or after the last."""
        if not self.silent:
            self._knn = values.get("knn") or self._knn
            epoch = step / self.steps_per_epoch
            known = {name: _number(value) for name, value in values.items()}
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
            self._events[file] = Lines(self.message, self._folder / file)
        self._events[file].write(row)

    def back_to(self, step: int) -> None:
        """The run has gone back to an earlier step: rows beyond it are dropped from the log.

        TensorBoard hides them. The services keep them: W&B takes no row of an earlier step, MLflow
        holds both.
        """
        if not self.silent:
            for sink in self._sinks:
                if isinstance(sink, TensorBoardSink):
                    sink.back_to(step)
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


class Lines:
    """A JSONL file that is added to. What a full disk refuses is said, kept, and written later, at
    the latest by close()."""

    def __init__(self, say: Callable[[str], None], path: Path):
        self._say, self._path = say, path
        self._waiting: list[str] = []
        self._lock = threading.Lock()  # the loader's thread writes some of them

    def write(self, row: dict) -> None:
        with self._lock:
            self._add(json.dumps(row, allow_nan=False) + "\n")

    def _add(self, line: str) -> None:
        self._waiting.append(line)
        try:
            _append(self._path, "".join(self._waiting).encode())
        except OSError as error:
            if len(self._waiting) == 1:
                self._say(f"WARNING: {self._path} cannot be written ({error}); trying again later")
        else:
            self._waiting.clear()

    def close(self) -> None:
        """Try once more what is still kept; what is refused again is lost, and counted."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        try:
            if waiting:
                _append(self._path, "".join(waiting).encode())
        except OSError as error:
            rows = f"{len(waiting)} row{'s' * (len(waiting) > 1)}"
            self._say(
                f"WARNING: {rows} of {self._path} could not be written, and are lost: {error}"
            )


def _append(path: Path, data: bytes) -> None:
    """All of it or nothing. Unbuffered: what a buffer still holds is written when it is closed."""
    with open(path, "ab", buffering=0) as file:
        whole = file.tell()
        if file.write(data) < len(data):
            file.truncate(whole)  # no torn line stays
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


class DeviceMeans:
    """Means of named scalars, kept on their own device until read; non-finite values left out."""

    def __init__(self):
        self._sums: dict[tuple, torch.Tensor] = {}

    @torch.no_grad()
    def add(self, scalars: dict[str, torch.Tensor | float]) -> None:
        groups: dict[torch.device, list[str]] = {}
        for name, value in scalars.items():
            device = value.device if isinstance(value, torch.Tensor) else torch.device("cpu")
            groups.setdefault(device, []).append(name)
        for device, names in groups.items():
            values = torch.stack([_scalar(scalars[name]) for name in names])
            finite = values.isfinite()
            both = torch.stack([torch.where(finite, values, 0), finite.to(values.dtype)])
            key = (device, *names)
            self._sums[key] = self._sums[key] + both if key in self._sums else both

    def read(self) -> dict[str, float | None]:
        """The means by name (None where no value was finite): one transfer a device."""
        totals: dict[str, list[float]] = {}
        for (_, *names), both in self._sums.items():
            for name, total, count in zip(names, *both.tolist(), strict=True):
                known = totals.setdefault(name, [0.0, 0.0])
                known[0] += total
                known[1] += count
        return {
            name: _number(total / count) if count else None
            for name, (total, count) in totals.items()
        }


class ProgressLine:
    """A line that redraws itself on a terminal; elsewhere (files, pipes) a plain line a minute, the
    first and the last."""

    def __init__(self, stream: TextIO, quiet: bool = False):
        self._stream, self._quiet = stream, quiet
        self._live = is_terminal(stream)
        self._drawn = ""
        self._drawn_s = -math.inf

    def show(self, text: str, last: bool = False) -> None:
        now_s = time.perf_counter()
        if self._quiet or (not self._live and not last and now_s - self._drawn_s < PLAIN_S):
            return
        self._drawn_s = now_s
        if not self._live:
            say(printable(text), self._stream)
        else:
            # a line that wraps cannot be returned to; \x1b[K wipes what a longer one left
            self._drawn = text[: max(shutil.get_terminal_size().columns - 1, 20)]
            say(f"\r{self._drawn}\x1b[K", self._stream, end="")

    def refresh(self, text: Callable[[], str], plain: bool = False) -> None:
        """Show text() if what was shown last is old enough. plain: not on a terminal alone."""
        old_s = REFRESH_S if self._live else PLAIN_S
        if (self._live or plain) and time.perf_counter() - self._drawn_s >= old_s:
            self.show(text())

    def message(self, text: str) -> None:
        text = printable_lines(text)
        if self._live:  # over what progress.py may have drawn there
            say(f"\r\x1b[K{text}\n{self._drawn}", self._stream, end="")
        else:
            say(text, self._stream)

    def end(self) -> None:
        if self._drawn:
            say("", self._stream)
            self._drawn = ""


def _scalar(value: torch.Tensor | float) -> torch.Tensor:
    """A 0-d fp32 tensor where the value lies; a Python number (K, seconds) lies on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.reshape(()).float()
    return torch.tensor(float(value))


def _number(value: torch.Tensor | float) -> float | int | None:
    """A JSON number, or None for what JSON has no word for."""
    value = value.item() if isinstance(value, torch.Tensor) else value
    return value if math.isfinite(value) else None


def _moving_average(past: float | None, new: float) -> float:
    return new if past is None else RATE_MEMORY * past + (1 - RATE_MEMORY) * new
