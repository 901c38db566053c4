"""Whether the features of a training collapse, or get worse than before its first step."""

from pathlib import Path

from cjepa_fast.config import Config
from cjepa_fast.telemetry import read_log
from cjepa_fast.training.diagnosis import (
    EARLY,
    degradation_warning,
    likely_cause,
    weak_init_warning,
)

LEAST_FEATURES = 64  # images, before a collapse is believed


class CollapseMonitor:
    """Warns at most once of a collapse, and at most once of features worse than at the start.

    folder: of the run, whose log.jsonl is read. width: the encoder's. total_steps: of the whole
    run. start_step: steps done before; past a tenth of the run the features were compared then.
    """

    def __init__(self, config: Config, folder: Path, width: int, total_steps: int, start_step: int):
        self._config, self._folder, self._width = config, folder, width
        self._total_steps = total_steps
        self._told_of_collapse = self._told_of_worse = False
        self._compared = start_step >= EARLY * total_steps  # with the start

    def warnings(self, row: dict | None, images: int) -> list[str]:
        """What is to be told after a row of the log, a line each. row: None on a silent rank, which
        tells nothing. images: whose features the row's RankMe and standard deviation are of."""
        if row is None:
            return []
        lines = self._collapse(row, images), self._worse_than_the_start(row)
        return [line for line in lines if line]

    def _collapse(self, row: dict, images: int) -> str | None:
        """Where the target's features of many images come out nearly alike."""
        own = self._config.telemetry
        if self._told_of_collapse or images < LEAST_FEATURES:
            return None
        floors = {"rankme": own.rankme_floor, "feature_std": own.feature_std_floor}
        known = {name: floor for name, floor in floors.items() if row[name] is not None}
        low = [f"{k} {row[k]:.3g}, floor {v:g}" for k, v in known.items() if row[k] < v]
        if not low:
            return None
        self._told_of_collapse = True
        cause = likely_cause(self._config, self._total_steps)
        return (
            f"WARNING: the target's features are collapsing ({'; '.join(low)}; over the last "
            f"{images} images at step {row['step']}). Likely: {cause}"
        )

    def _worse_than_the_start(self, row: dict) -> str | None:
        """What to change first where they get worse: at a tenth of the run or soon after, and by
        kNN at each evaluation from there on, until it has been told."""
        total = self._total_steps
        if self._told_of_worse or row["step"] < EARLY * total:
            return None
        # At the end of the run it is told anyway.
        evaluated = row.get("knn") is not None and row["step"] < total
        if not evaluated and (self._compared or row["rankme"] is None):
            return None
        try:
            rows = read_log(self._folder)
        except (OSError, ValueError):  # moved, or damaged: it is but advice
            rows = []
        line = degradation_warning(rows, self._config, self._width, total)
        if not self._compared:
            line = line or weak_init_warning(rows, self._config, self._width)
            self._compared = sum(row.get("rankme") is not None for row in rows) > 1
        self._told_of_worse = bool(line)
        return line
