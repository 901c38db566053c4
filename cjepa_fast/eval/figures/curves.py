"""The curves of one or several runs, from their log.jsonl."""

import argparse
from pathlib import Path

from cjepa_fast.eval import cli
from cjepa_fast.eval.figures.sheets import FIGURE, save
from cjepa_fast.telemetry import read_log

# name in the log: (title, logarithmic)
PANELS = {
    "loss": ("loss", False),
    "jepa": ("prediction loss", False),
    "sim": ("invariance", True),
    "std": ("variance", False),
    "cov": ("covariance", True),
    "sigreg": ("SIGReg's statistic", True),
    "knn": ("kNN, %", False),
    "linear": ("linear probe, %", False),
    "feature_std": ("std of the features, per dimension", False),
    "rankme": ("RankMe of the features", False),
    "by_position": ("share of the tokens' variance that position explains", False),
    "grad_norm": ("gradient norm", True),
    "lr": ("learning rate", False),
    "images_per_s": ("images/s", False),
    "data_wait": ("share of the step spent waiting for data", False),
}
COLUMNS = 4


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

    logs = {name: _rows(run) for name, run in zip(short_names(runs), runs, strict=True)}
    shown = [n for n in PANELS if any(series(rows, n)[0] for rows in logs.values())]
    columns = min(COLUMNS, len(shown))
    lines = -(-len(shown) // columns)
    with rc_context(FIGURE):
        figure = Figure(figsize=(3.1 * columns, 2.3 * lines + 0.6), layout="constrained")
        axes_rc = figure.subplots(lines, columns, squeeze=False, sharex=True)
        for axes, name in zip(axes_rc.flat, shown, strict=False):
            _panel(axes, name, logs)
        for axes in axes_rc.flat[len(shown) :]:
            axes.set_axis_off()
        for axes in axes_rc.flat[max(0, len(shown) - columns) : len(shown)]:
            axes.set_xlabel("step")
            axes.tick_params(labelbottom=True)
        handles, labels = axes_rc.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)))
        return save(figure, out)


def _panel(axes, name: str, logs: dict[str, list[dict]]) -> None:
    title, logarithmic = PANELS[name]
    everything = []
    for i, (run, rows) in enumerate(logs.items()):
        steps, values = series(rows, name)
        marker = "o" if len(steps) < 10 else None
        axes.plot(steps, values, color=f"C{i}", label=run, linewidth=1.2, marker=marker, ms=3)
        everything += values
    if logarithmic and everything and min(everything) > 0:
        axes.set_yscale("log")
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.margins(x=0.02)


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
    cli.add_out(parser)


def run(args: argparse.Namespace) -> None:
    """And the last value of each curve."""
    drawn, rows = draw(args.runs, args.out), []
    for name, folder in zip(short_names(args.runs), args.runs, strict=True):
        ends = {key: series(_rows(folder), key) for key in PANELS}
        last = {key: values[-1] for key, (_, values) in ends.items() if values}
        step = max(steps[-1] for steps, _ in ends.values() if steps)
        rows.append({"run": name, "step": step, **last})
    headings = {"step": "step", **{key: title for key, (title, _) in PANELS.items()}}
    cli.tell(args, rows, headings, "run")
    print(drawn)
