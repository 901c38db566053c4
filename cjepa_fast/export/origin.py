"""Where an encoder is from, as far as the files around it say."""

from pathlib import Path
from typing import NamedTuple

from cjepa_fast import config
from cjepa_fast.checkpoint import latest, state_of
from cjepa_fast.checkpoint.encoders import FINAL, is_run, located
from cjepa_fast.eval.records import records_in
from cjepa_fast.telemetry import read_log


class Origin(NamedTuple):
    """state: the checkpoint's state.json; log: the row of log.jsonl at its step; evaluations: what
    `cjepa-eval` left in the run's folder, the oldest first. What is not known is empty."""

    state: dict
    log: dict
    evaluations: list[dict]

    @property
    def config(self) -> dict:
        """As it was trained, with the keys that came later."""
        return config.with_saved_defaults(self.state["config"]) if self.state else {}


def origin_of(path: Path) -> Origin:
    """Where the weights at `path` come from. A run's encoder files are its newest checkpoint's."""
    path = located(path).resolve()
    if (path / "state.json").is_file():
        run, checkpoint = path.parent.parent, path
    else:
        run = path.parent if path.stem in FINAL.values() else path
        checkpoint = latest(run)
    if checkpoint is None:
        return Origin({}, {}, [])
    state = state_of(checkpoint)
    if not is_run(run):  # a checkpoint by itself
        return Origin(state, {}, [])
    return Origin(state, _row_at(run / "log.jsonl", state["step"]), records_in(run))


def _row_at(log: Path, step: int) -> dict:
    """The last row up to a step."""
    rows = read_log(log) if log.is_file() else []
    return next((row for row in reversed(rows) if row.get("step", 0) <= step), {})
