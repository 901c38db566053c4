"""The rows of a run elsewhere: TensorBoard, Weights & Biases, MLflow."""

import contextlib
import hashlib
import os
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

ROWS_WAITING = 500  # for a service that does not answer, before it is given up
ANSWER_S = 60.0  # that a service has for the last rows when the run ends


class Sink:
    """A copy of the rows elsewhere. What goes wrong in it is said once and never stops the run."""

    name = extra = ""  # extra: of setup.py, which brings what it needs

    def __init__(self, say: Callable[[str], None], *where):
        self._say, self._writer = say, None
        with self._guarded():
            self._writer = self._open(*where)

    def write(self, row: dict) -> None:
        if self._writer is not None:
            scalars = {name: row[name] for name in row if name != "step" and is_number(row, name)}
            with self._guarded():
                self._put(scalars, row["step"])

    def close(self) -> None:
        if self._writer is not None:
            with self._guarded():
                self._end()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # an import, a disk or a service that fails
            self._writer = None
            missing = isinstance(error, ImportError) and self.extra
            more = f" (pip install '.[{self.extra}]')" if missing else ""
            self._say(
                f"{self.name} is off for the rest of the run: {type(error).__name__}: {error}{more}"
            )


class AsyncSink:
    """A sink in a thread of its own: a service that hangs there holds nobody up."""

    def __init__(self, sink: type[Sink], say: Callable[[str], None], *where):
        self.name, self._say, self._on = sink.name, say, True
        self._rows: queue.Queue[dict | None] = queue.Queue(ROWS_WAITING)  # None: the end
        self._thread = threading.Thread(
            target=self._serve, args=(sink, *where), name=sink.name, daemon=True
        )
        self._thread.start()

    def _serve(self, sink: type[Sink], *where) -> None:
        served = sink(self._end_with, *where)
        while (row := self._rows.get()) is not None:
            served.write(row)
        served.close()

    def write(self, row: dict | None) -> None:
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._give_up()

    def close(self) -> None:
        self.write(None)
        if self._on:
            self._thread.join(ANSWER_S)
            if self._thread.is_alive():
                self._give_up()

    def _give_up(self) -> None:
        self._end_with(f"{self.name} is off for the rest of the run: it does not answer")

    def _end_with(self, text: str) -> None:
        if self._on:  # said once, however it ends
            self._on = False
            self._say(text)


class TensorBoardSink(Sink):
    """TensorBoard scalars in `folder`."""

    name = "TensorBoard"

    def _open(self, folder: Path, start_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        # events beyond the resumed step, of the run that was interrupted, are hidden
        return SummaryWriter(str(folder), purge_step=start_step + 1)

    def _put(self, scalars: dict, step: int) -> None:
        if not self._folder.is_dir():  # the open file would take rows that nobody will find
            raise NotADirectoryError(f"{self._folder} is gone")
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # its writer thread hands any error of the disk on to here

    def rewind_to(self, step: int) -> None:
        """Events beyond that step are hidden, as after a resume."""
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is not None:
            with self._guarded():
                self._writer.close()
                self._writer = SummaryWriter(str(self._folder), purge_step=step + 1)

    def figures(self, figures: dict[str, np.ndarray], step: int) -> None:
        if self._writer is not None:
            with self._guarded():
                for name, figure_HW3 in figures.items():
                    self._writer.add_image(name, figure_HW3, step, dataformats="HWC")

    def _end(self) -> None:
        self._writer.close()


class WandbSink(Sink):
    """A run of a project on Weights & Biases, the same one after a resume."""

    name, extra = "Weights & Biases", "wandb"

    def _open(self, folder: Path, own: str, project: str):
        import wandb

        # beyond this even the interpreter's end would wait (wandb's pull request 11737)
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(ANSWER_S))
        return wandb.init(project=project, name=folder.name, dir=folder, id=own, resume="allow")

    def _put(self, scalars: dict, step: int) -> None:
        self._writer.log(scalars, step=step)

    def _end(self) -> None:
        self._writer.finish()


class MLflowSink(Sink):
    """A run of an experiment of MLflow, at MLFLOW_TRACKING_URI; the same one after a resume, found
    by its tag."""

    name, extra = "MLflow", "mlflow"
    TAG = "cjepa_fast.run"

    def _open(self, folder: Path, own: str, experiment: str):
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        client, self._metric = MlflowClient(), Metric
        known = client.get_experiment_by_name(experiment)
        experiment_id = known.experiment_id if known else client.create_experiment(experiment)
        wanted = f"tags.`{self.TAG}` = '{own}'"
        if found := client.search_runs([experiment_id], filter_string=wanted, max_results=1):
            self._run_id = found[0].info.run_id
            client.update_run(self._run_id, status="RUNNING")
        else:
            run = client.create_run(experiment_id, tags={self.TAG: own}, run_name=folder.name)
            self._run_id = run.info.run_id
        return client

    def _put(self, scalars: dict, step: int) -> None:
        now_ms = int(time.time() * 1000)
        metrics = [self._metric(name, value, now_ms, step) for name, value in scalars.items()]
        self._writer.log_batch(self._run_id, metrics=metrics)

    def _end(self) -> None:
        self._writer.set_terminated(self._run_id)


def service_id(folder: Path, fresh: bool) -> str:
    """What services know a training by: drawn where its folder is new (fresh), and kept there.

    A run that has no such file began before there was one, and is known by its folder's path.
    Raises OSError where the file cannot be written or read, or holds something else.
    """
    file = folder / "service_id"
    if fresh:
        file.write_text(secrets.token_hex(8), encoding="utf-8")
    elif not file.exists():
        return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    own = file.read_bytes()
    if not re.fullmatch(rb"[0-9a-f]{16}", own):
        raise OSError(f"{file} holds no id of a training")
    return own.decode()


def is_number(row: dict, name: str) -> bool:
    return isinstance(row.get(name), (int, float))
