"""Several checkpoints in one table: what the evaluations have left in their runs' folders.

A column is a measure; where the same task was run in several ways, each way has a column of its
own, named by the settings that differ. `--data SET` first computes what is missing.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from cjepa_fast.checkpoint.encoders import load_encoder
from cjepa_fast.eval import cli
from cjepa_fast.eval.features import digest
from cjepa_fast.eval.figures.curves import short_names
from cjepa_fast.eval.figures.sheets import FIGURE, save
from cjepa_fast.runtime import children
from cjepa_fast.runtime.files import write_text

COMPUTED = ("knn", "linear", "collapse")  # with --data
LOWER = {"alignment", "uniformity", "dead", "by_position", "j_decay", "f_decay"}  # is better
UNJUDGED = {"std_mean", "std_min", "by_image", "by_both", "commonest", "held_out"}
WAYS = ("question", "labels", "layers")  # what tells the rows of one encoder apart
BEST = "*"
Measure = tuple[str, str, str]  # task, key of its rows, the settings that tell it apart
Scores = dict[Measure, float]  # of one checkpoint


def found_in(checkpoint: str | Path, which: str, more: Iterable[dict] = ()) -> list[dict]:
    """The records of a checkpoint's encoder, as its weights are now: of its run's folder, and
    `more`."""
    run = cli.run_of(checkpoint)
    weights = digest(load_encoder(checkpoint, which))
    own = cli.records(run) if run else []
    return [r for r in own if r.get("weights") == weights] + list(more)


def measures(records: list[list[dict]]) -> tuple[list[Scores], dict[Measure, str]]:
    """For the records of each checkpoint its values by measure, and the measures' headings.

    Of two records of the same task and settings the later one counts. Counts of images are left
    out, and the rows of what is no trained encoder.
    """
    tasks = [
        [r for of_one in records for r in of_one if r["task"] == task] for task in _tasks(records)
    ]
    differing = {group[0]["task"]: _differing([r["settings"] for r in group]) for group in tasks}
    values: list[Scores] = [{} for _ in records]
    headings: dict[Measure, str] = {}
    for task in differing:
        for found, of_one in zip(values, records, strict=True):
            for record in (r for r in of_one if r["task"] == task):
                ways = [f"{k} {record['settings'].get(k)}" for k in differing[task]]
                for row in _trained(record):
                    way = ", ".join([*(str(row[k]) for k in WAYS if k in row), *ways])
                    for key, word in record["headings"].items():
                        if isinstance(row.get(key), float):
                            found[task, key, way] = row[key]
                            headings[task, key, way] = f"{task}: {word}" + f" ({way})" * bool(way)
    return values, headings


def _tasks(records: list[list[dict]]) -> list[str]:
    return list(dict.fromkeys(r["task"] for of_one in records for r in of_one))


def _differing(settings: list[dict]) -> list[str]:
    """The settings that are not the same everywhere."""
    keys = dict.fromkeys(key for s in settings for key in s)
    return [key for key in keys if len({json.dumps(s.get(key)) for s in settings}) > 1]


def _trained(record: dict) -> list[dict]:
    return [row for row in record["rows"] if row.get("encoder") == "trained"]


def best(measure: Measure, values: list[Scores]) -> float | None:
    """Of what is better low or high; None where nothing is to be compared."""
    there = [found[measure] for found in values if measure in found]
    if len(there) < 2 or measure[1] in UNJUDGED:
        return None
    return min(there) if measure[1] in LOWER else max(there)


def draw(names: list[str], values: list[Scores], headings: dict[Measure, str], out: Path) -> Path:
    """A panel a measure, a bar a checkpoint, the best in a stronger colour."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    columns = min(3, len(headings))
    lines = -(-len(headings) // columns)
    with rc_context(FIGURE):
        size = (4.2 * columns, (0.32 * len(names) + 0.5) * lines)
        figure = Figure(figsize=size, layout="constrained")
        axes_rc = figure.subplots(lines, columns, squeeze=False)
        for axes in axes_rc.flat[len(headings) :]:
            axes.set_axis_off()
        for axes, (measure, heading) in zip(axes_rc.flat, headings.items(), strict=False):
            top = best(measure, values)
            bars = [found.get(measure) for found in values]
            colours = ["#e6550d" if bar is not None and bar == top else "#9ecae1" for bar in bars]
            drawn = axes.barh(names, [bar or 0.0 for bar in bars], color=colours)
            axes.bar_label(drawn, [cli.cell(bar) for bar in bars], padding=2)
            axes.margins(x=0.18)
            axes.invert_yaxis()
            axes.set_title(heading)
            axes.set_xticks([])  # the bars say their values
            axes.spines[["top", "right", "bottom"]].set_visible(False)
    return save(figure, out)


def _compute(checkpoint: str, missing: list[str], args: argparse.Namespace) -> list[dict]:
    """Each task in a process of its own, as a user would start it; its records."""
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for task in missing:
            file = Path(folder) / f"{task}.json"
            words = [task, str(checkpoint), "--data", args.data, "--which", args.which]
            for name in ("labels", "test", "test_labels") if task != "collapse" else ():
                if value := getattr(args, name):
                    words += [f"--{name.replace('_', '-')}", value]
            print(f"\n$ cjepa-eval {' '.join(words)}", flush=True)
            command_line = [sys.executable, "-m", "cjepa_fast.eval", *words, "--json", str(file)]
            if subprocess.run(command_line, env=children.environment()).returncode:
                raise ValueError(f"{task} of {checkpoint} failed, see above")
            records.append(json.loads(file.read_text()))
    return records


def _asked(args: argparse.Namespace) -> dict[str, str | None]:
    """Which images, and where their labels are."""
    return {name: getattr(args, name) for name in ("data", "labels", "test", "test_labels")}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="runs or checkpoints")
    parser.add_argument("--which", choices=("target", "context"), default="target", help="encoder")
    parser.add_argument(
        "--data", metavar="SET", help=f"compute what is missing: {', '.join(COMPUTED)}"
    )
    parser.add_argument("--test", metavar="SET", help="of knn and linear; default: 20 %% of --data")
    cli.add_label_lists(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="draw them as bars there")


def run(args: argparse.Namespace) -> None:
    """Raises ValueError where no checkpoint has been evaluated."""
    records = []
    for checkpoint in args.checkpoints:
        found = found_in(checkpoint, args.which)
        if args.data:
            asked = _asked(args)
            there = {r["task"] for r in found if all(
                r["settings"].get(k, v) == v for k, v in asked.items()
            )}  # fmt: skip
            made = _compute(checkpoint, [t for t in COMPUTED if t not in there], args)
            found += made
        records.append(found)
    values, headings = measures(records)
    if not headings:
        raise ValueError(
            f"{', '.join(map(str, args.checkpoints))}: no evaluations of these weights; run some "
            "(cjepa-eval knn CHECKPOINT --data SET), or name --data SET here"
        )
    names = short_names(args.checkpoints)
    print()
    _print(names, values, headings)
    if args.json:
        rows = [
            {"checkpoint": name, "values": {headings[m]: value for m, value in found.items()}}
            for name, found in zip(names, values, strict=True)
        ]
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.json, json.dumps({"task": "compare", "rows": rows}, indent=2) + "\n")
    if args.out:
        print(draw(names, values, headings, args.out))


def _print(names: list[str], values: list[Scores], headings: dict[Measure, str]) -> None:
    tops = {measure: best(measure, values) for measure in headings}
    rows = []
    for name, found in zip(names, values, strict=True):
        row: cli.Row = {"checkpoint": name}
        for measure in headings:
            value = found.get(measure)
            mark = BEST if value is not None and value == tops[measure] else ""
            row[headings[measure]] = cli.cell(value) + mark
        rows.append(row)
    cli.print_table(rows, {h: h for h in headings.values()}, label="checkpoint")
    if any(top is not None for top in tops.values()):
        print(f"{BEST} best of its column")
