"""Whether a training learns: its log against its first rows, in a line of words."""

import shlex
import statistics
from pathlib import Path

from cjepa_fast.config import Config
from cjepa_fast.model.vit import initialisation
from cjepa_fast.telemetry.pace import duration, rate

EARLY = 0.1  # of a run: when its features are compared with the first ones
KNN_DROP = 2.0  # points of kNN: more than one evaluation's standard error
RANKME_DROP = 0.8  # of the first RankMe. A run that learns may dip to 0.84 in its first twentieth
BY_POSITION = 0.5  # of the tokens' variance: more tells where a patch is rather than what is there
SHARE_NOISE = 0.05  # of a share of position, taken of 32 images
FEW_STEPS = 10_000  # of a run: so many or more leave the target time at a momentum above SLOW
SLOW = 0.99
NAMES = {"knn": "kNN %", "rankme": "RankMe", "by_position": "share of position"}


def end_messages(rows: list[dict], run: Path, config: Config) -> list[str]:
    """Lines for a training that is done, from its log: where the encoder is, what it took, and what
    users do next."""
    took = rows[-1].get("time_s", 0.0) if rows else 0.0
    rates = [row["images_per_s"] for row in rows if row.get("images_per_s")]
    speed = f", {rate(statistics.median(rates))}" if rates else ""
    lines = [f"done: {run / 'encoder.safetensors'} ({duration(took)}{speed})"]
    if line := knn_summary(rows, config):
        lines.append(line)
    folder = shlex.quote(str(run))
    return [
        *lines,
        f"next: cjepa-eval knn {folder} --data LABELLED_IMAGES --untrained",
        f"      cjepa-embed {folder} IMAGES --out features.npz",
        f"      cjepa-report {folder}",
    ]


def start_name(config: Config) -> str:
    """What a run's encoder is before the first step, in a word."""
    return "untrained" if config.run.init_from is None else "at the start"


def knn_summary(rows: list[dict], config: Config) -> str | None:
    """Whether a finished log's features beat those before the first step, in a line; None where
    neither was evaluated (eval.online)."""
    scores = [(row["step"], row["knn"]) for row in rows if row.get("knn") is not None]
    later = [score for score in scores if score[0] > 0]
    if not later or scores[0][0] != 0:
        return None
    (_, start), (_, end) = scores[0], later[-1]
    step, best = max(later, key=lambda score: score[1])
    name = start_name(config)
    line = f"kNN: {name} {start:.1f} %, best {best:.1f} % (step {step}), at the end {end:.1f} %"
    if end < best - KNN_DROP:
        line += "; it fell: RUN/best is the better checkpoint"
    if end <= start:
        return f"WARNING: {line}. The features are no better than {name}: docs/collapse.md"
    return line


def degradation_warning(
    rows: list[dict], config: Config, width: int, steps: int | None
) -> str | None:
    """A warning where a log's features are worse than in its first rows; None where they are not,
    or the log does not go back to the start. kNN decides where it was evaluated twice.

    width: the encoder's. steps: of the whole run, None where they are not known.
    """
    if not from_the_start(rows, config):
        return None
    ends = {key: _first_and_last(rows, key) for key in ("knn", "rankme", "by_position")}
    signs = {
        "knn": lambda first, last: last < first - KNN_DROP,
        "rankme": lambda first, last: last < RANKME_DROP * first,
        "by_position": lambda first, last: last > max(first + SHARE_NOISE, BY_POSITION),
    }
    deciding = ["knn"] if ends["knn"] else ["rankme", "by_position"]
    if not any(ends[key] and signs[key](*ends[key]) for key in deciding):
        return None
    said = [f"{NAMES[key]} {pair[0]:.3g} -> {pair[1]:.3g}" for key, pair in ends.items() if pair]
    return (
        f"WARNING: the features get worse than {start_name(config)} ({', '.join(said)}). "
        f"First change {first_change(config, width, steps)}; see docs/collapse.md"
    )


def weak_init_warning(rows: list[dict], config: Config, width: int) -> str | None:
    """A warning where an initialisation that does not suit the width left the position to explain
    most of the tokens, and kNN has not risen since; else None."""
    share, knn = _first_and_last(rows, "by_position"), _first_and_last(rows, "knn")
    if not from_the_start(rows, config) or not share or share[0] <= BY_POSITION:
        return None
    if _init_suits_width(config, width) or (knn and knn[1] > knn[0]):
        return None
    return (
        f"WARNING: the first features tell little but where a patch is (share of position "
        f'{share[0]:.3g} -> {share[1]:.3g}): model.init "{config.model.init}" is too weak for a '
        f'width of {width}. First change model.init to "auto"; see docs/collapse.md'
    )


def _init_suits_width(config: Config, width: int) -> bool:
    """Whether the initialisation is the one that "auto" takes at this width, or plays no part."""
    loaded = config.run.init_from is not None
    return loaded or initialisation(config.model.init, width) == initialisation("auto", width)


def from_the_start(rows: list[dict], config: Config) -> bool:
    """Whether a log has its first rows: that of a run resumed in another folder has not."""
    return bool(rows) and rows[0]["step"] <= config.telemetry.every_steps


def _first_and_last(rows: list[dict], key: str) -> tuple[float, float] | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return (values[0], values[-1]) if len(values) > 1 else None


def first_change(config: Config, width: int, steps: int | None) -> str:
    """What helped most where small runs did not learn (docs/collapse.md), if it is not set yet.
    Arguments as in `degradation_warning`."""
    own, optim = config.loss.active_regulariser, config.optim
    if not _init_suits_width(config, width):
        return 'model.init to "auto"'
    if own.beta == 0:
        return f"loss.{config.loss.regulariser}.beta from 0 to {type(own)().beta:g}"
    if own.views in ("blocks", "tokens") and not getattr(own, "positions_weight", 0):
        return f'loss.{config.loss.regulariser}.views to "positions", which acts on the encoder'
    if ema_too_slow(config, steps):
        return f"optim.momentum = {optim.momentum:g}, to 0.98: the run is short"
    return f"optim.lr = {optim.lr:g}, to half of it"


def ema_too_slow(config: Config, steps: int | None) -> bool:
    """Whether the EMA keeps the target near its start for too much of a run of few steps."""
    return steps is not None and steps < FEW_STEPS and config.optim.momentum > SLOW


def likely_cause(config: Config, steps: int) -> str:
    """Why features may all come out alike in a run of so many steps."""
    own, optim = config.loss.active_regulariser, config.optim
    key = f"loss.{config.loss.regulariser}.beta"
    if own.beta == 0:
        return f"{key} is 0: nothing holds their variance up; {type(own)().beta:g} does"
    causes = [f"optim.lr = {optim.lr:g} too high"]
    if steps >= FEW_STEPS:  # in shorter runs a low momentum was better: docs/collapse.md
        causes.append(f"optim.momentum = {optim.momentum:g} too low")
    return f"{', '.join(causes)}, or {key} = {own.beta:g} too small or too large"
