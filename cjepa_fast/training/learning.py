"""Whether a training learns: its log against the untrained encoder's rows, in a line of words."""

import shlex
import statistics
from pathlib import Path

from cjepa_fast.config import Config
from cjepa_fast.model.vit import initialisation
from cjepa_fast.telemetry.pace import duration, rate

EARLY = 0.1  # of a run: when its features are compared with the first ones
FALLEN = 2.0  # points of kNN: more than one evaluation's standard error
LESS_SPREAD = 0.8  # of the first RankMe. A run that learns may dip to 0.84 in its first twentieth
BY_POSITION = 0.5  # of the tokens' variance: more tells where a patch is rather than what is there
NAMES = {"knn": "kNN %", "rankme": "RankMe", "by_position": "share of position"}


def ended(rows: list[dict], run: Path) -> list[str]:
    """Of a training that is done, from its log: where the encoder is, what it took, and what users
    do next."""
    took = rows[-1].get("time_s", 0.0) if rows else 0.0
    rates = [row["images_per_s"] for row in rows if row.get("images_per_s")]
    speed = f", {rate(statistics.median(rates))}" if rates else ""
    lines = [f"done: {run / 'encoder.safetensors'} ({duration(took)}{speed})"]
    if line := learnt(rows):
        lines.append(line)
    folder = shlex.quote(str(run))
    return [
        *lines,
        f"next: cjepa-eval knn {folder} --data LABELLED_IMAGES --untrained",
        f"      cjepa-embed {folder} IMAGES --out features.npz",
        f"      cjepa-report {folder}",
    ]


def learnt(rows: list[dict]) -> str | None:
    """Of a finished log, whether the features beat the untrained encoder's; None where neither
    was evaluated (eval.online)."""
    scores = [(row["step"], row["knn"]) for row in rows if row.get("knn") is not None]
    if len(scores) < 2 or scores[0][0] != 0:
        return None
    (_, start), (_, end) = scores[0], scores[-1]
    step, best = max(scores[1:], key=lambda score: score[1])
    line = f"kNN: untrained {start:.1f} %, best {best:.1f} % (step {step}), at the end {end:.1f} %"
    if end <= start:
        return f"WARNING: {line}. The features are no better than untrained ones: docs/collapse.md"
    if end < best - FALLEN:
        line += "; it fell: RUN/best is the better checkpoint"
    return line


def getting_worse(rows: list[dict], config: Config, width: int) -> str | None:
    """Of a log so far, a line where its features are worse than the first ones, which are as good
    as untrained; None where they are not. kNN decides where it was evaluated twice.

    width: the encoder's.
    """
    ends = {key: _first_and_last(rows, key) for key in ("knn", "rankme", "by_position")}
    signs = {
        "knn": lambda first, last: last < first - FALLEN,
        "rankme": lambda first, last: last < LESS_SPREAD * first,
        "by_position": lambda first, last: last > max(first, BY_POSITION),
    }
    deciding = ["knn"] if ends["knn"] else ["rankme", "by_position"]
    if not any(ends[key] and signs[key](*ends[key]) for key in deciding):
        return None
    said = [f"{NAMES[key]} {pair[0]:.3g} -> {pair[1]:.3g}" for key, pair in ends.items() if pair]
    return (
        f"WARNING: the features get worse than untrained ones ({', '.join(said)}). "
        f"First change {first_change(config, width)}; see docs/collapse.md"
    )


def _first_and_last(rows: list[dict], key: str) -> tuple[float, float] | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return (values[0], values[-1]) if len(values) > 1 else None


def first_change(config: Config, width: int) -> str:
    """What helped most where small runs did not learn (docs/collapse.md), if it is not set yet."""
    own, optim = config.loss.regularised_by, config.optim
    if initialisation(config.model.init, width) != initialisation("auto", width):
        return 'model.init to "auto"'
    if own.beta == 0:
        return f"loss.{config.loss.regulariser}.beta from 0 to 0.001"
    if own.views in ("blocks", "tokens"):
        return f'loss.{config.loss.regulariser}.views to "positions", which acts on the encoder'
    return f"optim.lr = {optim.lr:g}, to half of it"
