"""What a report knows of a run: its folder read once, and its story in words."""

import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cjepa_fast import config
from cjepa_fast.data.sources import Limits
from cjepa_fast.eval import uncertainty
from cjepa_fast.eval.figures.curves import series
from cjepa_fast.eval.records import records_in
from cjepa_fast.eval.splits import labelled_splits
from cjepa_fast.telemetry import read_log
from cjepa_fast.telemetry.pace import rate
from cjepa_fast.training.diagnosis import KNN_DROP, degradation_warning, first_change, start_name
from cjepa_fast.training.sizes import model_sizes

CHECK = "docs/collapse.md says what to look at."


@dataclass(frozen=True)
class Scores:
    """kNN of a run in percent: untrained (or as the weights it began with), at its best and at the
    end, with the steps of the two, of equal ones the first (its checkpoint is RUN/best);
    images: tested on, None where that is not known; others: of what needs no learning, by name;
    start: the first one's name."""

    untrained: float | None
    best: float
    best_step: int | None
    last: float
    last_step: int | None
    images: int | None
    others: dict[str, float]
    start: str = "untrained"

    def with_interval(self, percent: float) -> str:
        return (
            uncertainty.with_interval(percent, self.images) if self.images else f"{percent:.1f} %"
        )

    @property
    def learnt(self) -> bool | None:
        """Whether the end is above untrained by more than their intervals; None where it is not
        known."""
        if self.untrained is None:
            return None
        if not self.images:
            return self.last > self.untrained + KNN_DROP
        low, _ = uncertainty.interval(self.last, self.images)
        _, high = uncertainty.interval(self.untrained, self.images)
        return low > high


@dataclass(frozen=True)
class RunRecord:
    """A run's folder: its name in the report, settings, log and evaluations."""

    name: str
    folder: Path
    settings: config.Config
    rows: list[dict]
    records: list[dict]

    @classmethod
    def read(cls, name: str, folder: Path) -> "RunRecord":
        """Raises FileNotFoundError where it is no run's folder, ValueError for what is corrupt."""
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder}: no config.json there, so it is no run's folder")
        rows = read_log(folder) if (folder / "log.jsonl").is_file() else []
        return cls(name, folder, config.load_run(folder), rows, records_in(folder))

    @property
    def finished(self) -> bool:
        return (self.folder / "encoder.safetensors").is_file()

    @property
    def steps(self) -> int | None:
        """The steps of the whole training; None where the log does not tell."""
        row, epochs = (self.rows or [{}])[-1], self.settings.run.epochs
        known = row.get("step") and row.get("epoch") and epochs != "auto"
        return round(epochs * row["step"] / row["epoch"]) if known else None

    def last(self, key: str):
        """The last value that was logged, None without one."""
        values = series(self.rows, key)[1]
        return values[-1] if values else None

    @cached_property
    def tested_on(self) -> int | None:
        """Test images of the evaluation while training; None where they cannot be counted."""
        own = self.settings.eval.online
        if own.data is None:
            return None
        paths = (own.data, own.test, own.labels, own.test_labels)
        train, test, *labels = (path and config.expand_path(path) for path in paths)
        try:
            _, (_, keep) = labelled_splits(
                train, test, own.max_train, own.max_test, *labels,
                limits=Limits.of(self.settings.data),
            )  # fmt: skip
        except (ValueError, OSError):
            return None
        return len(keep)

    @cached_property
    def online(self) -> Scores | None:
        """kNN while training."""
        steps, values = series(self.rows, "knn")
        trained = [(value, step) for step, value in zip(steps, values, strict=True) if step > 0]
        if not trained:
            return None
        untrained = values[0] if steps[0] == 0 else None
        best, step = max(trained, key=lambda score: score[0])
        start = start_name(self.settings)
        return Scores(untrained, best, step, *trained[-1], self.tested_on, {}, start)

    @cached_property
    def after(self) -> Scores | None:
        """kNN of the last evaluation of the target encoder as it ended."""
        found = [
            {row.get("encoder"): row for row in record["rows"]}
            for record in self.records
            if record["task"] == "knn" and record["which"] == "target"
            and record["inside"] in (None, ".")
        ]  # fmt: skip
        found = [rows for rows in found if "top1" in rows.get("trained", {})]
        if not found:
            return None
        tops = {name: row["top1"] for name, row in found[-1].items() if "top1" in row}
        images = found[-1]["trained"].get("test_images")
        trained, untrained = tops.pop("trained"), tops.pop("untrained", None)
        return Scores(untrained, trained, None, trained, None, images, tops)

    @property
    def scores(self) -> Scores | None:
        """Those that compare with the untrained encoder, where there are some."""
        both = [found for found in (self.after, self.online) if found]
        compared = [found for found in both if found.untrained is not None]
        return next(iter(compared + both), None)


def story(run: RunRecord) -> tuple[str, str, list[str]]:
    """What happened: ("good", "bad" or "", a headline, sentences)."""
    if not run.rows:
        return "", "Nothing to say yet", ["The log has no rows: the run has only begun."]
    kind, headline, why = _verdict(run)
    if not run.finished:
        headline = f"So far: {headline[0].lower()}{headline[1:]}"
    first, second = (_knn(run), why) if kind == "good" else (why, _knn(run))
    return kind, headline, [*first, *second, *_fell(run), _effort(run)]


def _verdict(run: RunRecord) -> tuple[str, str, list[str]]:
    scores, advice = run.scores, _advice(run)
    if low := _collapsed(run):
        return "bad", "The features collapsed", [*low, advice]
    if scores and scores.learnt:
        return "good", "It learnt", _rank(run)
    if scores and scores.untrained is not None:
        better = scores.last > scores.untrained
        headline = f"{'Hardly' if better else 'No'} better than {scores.start}"
        return "bad", headline, [*_rank(run), advice]
    width = model_sizes(run.settings)["width"]
    if degradation_warning(run.rows, run.settings, width, run.steps):
        return "bad", "The features got worse", [*_rank(run), advice]
    headline = "It trained; what the features are worth is not known yet"
    ask = (
        "`cjepa-eval knn RUN --data LABELLED_IMAGES --untrained` compares them with untrained ones."
    )
    return "", headline, [*_rank(run), ask]


def _collapsed(run: RunRecord) -> list[str]:
    """Sentences where the features at the end are below a floor of the settings."""
    own, found = run.settings.telemetry, []
    meanings = {
        "rankme": (own.rankme_floor, "RankMe, how many directions the features use, ended at"),
        "feature_std": (own.feature_std_floor, "The features' standard deviation ended at"),
    }
    for key, (floor, words) in meanings.items():
        steps, values = series(run.rows, key)
        if values and values[-1] < floor:
            since = next(s for s, v in zip(steps, values, strict=True) if v < floor)
            found.append(f"{words} {values[-1]:.2g}; it fell below {floor:g} at step {since:,}.")
    return [*found, "Nearly all images look alike to the encoder."] if found else []


def _advice(run: RunRecord) -> str:
    change = first_change(run.settings, model_sizes(run.settings)["width"], run.steps)
    return f"First change {change}. {CHECK}"


def _rank(run: RunRecord) -> list[str]:
    values = series(run.rows, "rankme")[1]
    if len(values) < 2:
        return []
    verb = "rose" if values[-1] > values[0] else "fell"
    return [
        f"RankMe, how many directions the features use, {verb} from {values[0]:.0f} to "
        f"{values[-1]:.0f}."
    ]


def _knn(run: RunRecord) -> list[str]:
    if not (scores := run.scores):
        return []
    others = dict(scores.others)
    if scores.untrained is not None:
        name = "an untrained encoder" if scores.start == "untrained" else scores.start
        others = {name: scores.untrained} | others
    text = f"kNN on the features is right for {scores.with_interval(scores.last)} of "
    text += f"{scores.images:,} test images" if scores.images else "the test images"
    if others:
        text += "; " + ", ".join(
            f"{name} {scores.with_interval(of)}" for name, of in others.items()
        )
    return [f"{text}."]


def _fell(run: RunRecord) -> list[str]:
    if not (found := run.online) or found.last >= found.best - KNN_DROP:
        return []
    return [
        f"While training kNN was best at step {found.best_step:,} ({found.best:.1f} %) and fell to "
        f"{found.last:.1f} %: RUN/best is the better checkpoint."
    ]


def _effort(run: RunRecord) -> str:
    rates = series(run.rows, "images_per_s")[1]
    last = run.rows[-1]
    speed = f" at {rate(statistics.median(rates))}" if rates else ""
    epochs = f"{last.get('epoch', 0):.3g} of {run.settings.run.epochs} epochs"
    return f"{last['step']:,} steps, {epochs}, in {hours(last.get('time_s', 0))}{speed}."


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.1f} min"
