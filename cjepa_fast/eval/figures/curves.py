"""The curves of one or several runs, from their log.jsonl.

Runs that differ in nothing but their seed are one line, their mean, within a band.
"""

import argparse
import itertools
from pathlib import Path
from typing import NamedTuple

from cjepa_fast.eval import seeds
from cjepa_fast.eval.figures import seed_bands
from cjepa_fast.eval.figures.style import QUIET, STYLE, save
from cjepa_fast.eval.options import add_out
from cjepa_fast.eval.records import print_numbers
from cjepa_fast.telemetry import read_log


class Panel(NamedTuple):
    """A quantity: what it is, its unit ("" for none), whether its axis is logarithmic where it
    spans a decade, and the least that its axis spans."""

    name: str
    unit: str = ""
    logarithmic: bool = False
    least_span: float = 0.0

    @property
    def axis(self) -> str:
        """For an axis or a table: the unit in brackets."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    @property
    def label(self) -> str:
        """For the axis of a small panel: in two lines where it is long."""
        return self.axis if len(self.axis) <= LONGEST else self.axis.replace(" (", "\n(")


# by the name in the log
PANELS = {
    "loss": Panel("loss"),
    "jepa": Panel("prediction loss"),
    "sim": Panel("invariance term", "", True),
    "std": Panel("variance term"),
    "cov": Panel("covariance term", "", True),
    "sigreg": Panel("SIGReg's statistic", "", True),
    "knn": Panel("kNN", "% right", least_span=5.0),
    "knn_centred": Panel("kNN, mean-subtracted", "% right", least_span=5.0),
    "linear": Panel("ridge probe", "% right", least_span=5.0),
    "feature_std": Panel("std of a feature"),
    "rankme": Panel("RankMe", "directions"),
    "by_position": Panel("explained by position", "share of variance"),
    "grad_norm": Panel("gradient norm", "", True),
    "lr": Panel("learning rate"),
    "images_per_s": Panel("speed", "images/s"),
    "data_wait": Panel("waiting for data", "share of time"),
}
WIDEST = 5  # panels in a row
LONGEST = 26  # letters along a panel's axis
Logs = dict[str, list[list[dict]]]  # by a line's name, the rows of each of its runs


def series(rows: list[dict], name: str) -> tuple[list[float], list[float]]:
    """(steps, values) of a name, where it was logged and is finite (JSON null otherwise)."""
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def draw(runs: list[Path | str], out: Path | str) -> Path:
    """A panel for each quantity that any run has logged, the runs overlaid.

    Raises FileNotFoundError for a run without log.jsonl, ValueError for one without rows.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    logs = grouped(runs)
    every = [rows for group in logs.values() for rows in group]
    shown = [n for n in PANELS if any(series(rows, n)[0] for rows in every)]
    columns = columns_for(len(shown))
    lines = -(-len(shown) // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(2.9 * columns, 2.2 * lines + 0.7), layout="constrained")
        axes_rc = figure.subplots(lines, columns, squeeze=False, sharex=True)
        for axes, name in zip(axes_rc.flat, shown, strict=False):
            _panel(axes, name, logs)
            axes.tick_params(labelbottom=True)
        for axes in axes_rc.flat[len(shown) :]:
            axes.set_axis_off()
        for axes in axes_rc.flat[max(0, len(shown) - columns) : len(shown)]:
            axes.set_xlabel("optimiser step")
        seed_bands.legend(figure, axes_rc.flat[: len(shown)])
        return save(figure, out)


def columns_for(panels: int) -> int:
    """Panels in a row, such that the last row is full or nearly so and never a panel alone."""
    if panels <= WIDEST:
        return panels

    def blanks(columns: int) -> tuple[bool, int, int]:
        last = panels % columns or columns
        return last == 1, columns - last, -columns

    return min(range(3, WIDEST + 1), key=blanks)


def grouped(runs: list[Path | str]) -> Logs:
    """The rows of the runs, those of one configuration's seeds under one name."""
    names = short_names(runs)
    folders = [Path(run) if Path(run).is_dir() else Path(run).parent for run in runs]
    found: Logs = {}
    for group in seeds.groups_of(folders, names):
        members = [i for of_seed in group.runs.values() for i in of_seed]
        own = [names[i] for i in members]
        name = own[0] if len(own) == 1 else f"{_shared(own)} ({len(own)} seeds)"
        found[name if name not in found else own[0]] = [_rows(runs[i]) for i in members]
    return found


def _shared(names: list[str]) -> str:
    """What the names begin with, without a torn word or the word seed."""
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    begin = "".join(letter for letter, *_ in alike).rstrip("0123456789")
    begin = begin.rstrip("_-/ .").removesuffix("seed").rstrip("_-/ .")
    return begin or names[0]


def _panel(axes, name: str, logs: Logs) -> None:
    panel, everything, missing, starts = PANELS[name], [], [], []
    for i, (run, logged) in enumerate(logs.items()):
        points = [series(rows, name) for rows in logged]
        points = [pair for pair in points if pair[0]]
        seed_bands.draw(axes, i, len(logs), run, points)
        everything += [value for _, values in points for value in values]
        missing += [run] if not points else []
        starts += [rows[0][name] for rows in logged if at_start(rows, name)]
    seed_bands.at_start(axes, starts)
    if panel.logarithmic and 0 < 10 * min(everything) < max(everything):
        axes.set_yscale("log")
    else:
        seed_bands.at_least(axes, panel.least_span)
    axes.set_ylabel(panel.label)
    axes.grid()
    if missing:
        note = {"size": 7, "color": QUIET, "ha": "right"}
        axes.text(0.98, 0.03, f"not logged: {', '.join(missing)}", transform=axes.transAxes, **note)


def at_start(rows: list[dict], name: str) -> bool:
    """Whether the first row is of the encoder before the first step and has the quantity."""
    return bool(rows) and rows[0]["step"] == 0 and rows[0].get(name) is not None


def _rows(run: Path | str) -> list[dict]:
    path = Path(run)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such run; name a run's folder or its log.jsonl")
    if path.is_dir() and not (path / "log.jsonl").is_file():
        raise FileNotFoundError(f"{path}: holds no log.jsonl, so it is no run (or has not begun)")
    rows = read_log(path)
    if not rows:
        raise ValueError(f"{path}: its log has no rows yet")
    return rows


def short_names(runs: list[Path | str]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    parts = [Path(run).resolve().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{p[-1]} ({i + 1})" for i, p in enumerate(parts)]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN")
    add_out(parser)


def run(args: argparse.Namespace) -> None:
    """And the last value of each curve."""
    drawn, rows = draw(args.runs, args.out), []
    for name, folder in zip(short_names(args.runs), args.runs, strict=True):
        ends = {key: series(_rows(folder), key) for key in PANELS}
        last = {key: values[-1] for key, (_, values) in ends.items() if values}
        step = max(steps[-1] for steps, _ in ends.values() if steps)
        rows.append({"run": name, "step": step, **last})
    headings = {"step": "step", **{key: panel.axis for key, panel in PANELS.items()}}
    print_numbers(args, rows, headings, "run")
    print(drawn)
