"""Several checkpoints in one table: what the evaluations have left in their runs' folders.

A column is a measure; where the same task was run in several ways, each way has a column of its
own, named by the settings that differ. `--data SET` first computes what is missing.
Below it stand the runs grouped by configuration, and whether the groups differ by more than their
seeds do (seeds.py).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from cjepa_fast.checkpoint.encoders import limits_of, load_encoder, run_of
from cjepa_fast.data.sources import LIMITS
from cjepa_fast.eval import seeds, uncertainty
from cjepa_fast.eval.features import digest
from cjepa_fast.eval.figures.curves import columns_for, short_names
from cjepa_fast.eval.figures.sheets import wrapped
from cjepa_fast.eval.figures.style import BLUE, QUIET, SKY, STYLE, save
from cjepa_fast.eval.options import add_label_lists, fill_defaults
from cjepa_fast.eval.probes import collapse, knn, linear
from cjepa_fast.eval.records import ROW_KEYS, Row, cell, print_table, records_in
from cjepa_fast.eval.splits import held_out
from cjepa_fast.runtime import children
from cjepa_fast.runtime.command_line import Parser
from cjepa_fast.runtime.files import write_text

COMPUTED = {  # with --data; and the settings that a record of it has
    "knn": (knn, knn.SETTINGS),
    "linear": (linear, (*linear.SETTINGS, *linear.SWEEP_SETTINGS)),
    "collapse": (collapse, collapse.SETTINGS),
}
LOWER = {"alignment", "uniformity", "dead", "by_position", "j_decay", "f_decay"}  # is better
UNJUDGED = {"std_mean", "std_min", "by_image", "by_both", "commonest", "held_out"}
BEST = "*"
DIFFERENCE = {
    "measure": "measure",
    "mean": "difference",
    "error": "standard error",
    "interval": "95 % interval",
    "p": "p",
    "seeds": "seeds",
    "how": "compared by",
}
PALE = f"{SKY}90"  # the bars beside the best
Measure = tuple[str, str, str]  # task, key of its rows, the settings that tell it apart
Scores = dict[Measure, float]  # of one checkpoint


def found_in(checkpoint: str | Path, which: str, more: Iterable[dict] = ()) -> list[dict]:
    """The records of a checkpoint's encoder, as its weights are now: of its run's folder, and
    `more`."""
    run = run_of(checkpoint)
    weights = digest(load_encoder(checkpoint, which))
    own = records_in(run) if run else []
    return [r for r in own if r.get("weights") == weights] + list(more)


def measures(records: list[list[dict]]) -> tuple[list[Scores], dict[Measure, str]]:
    """For the records of each checkpoint its values by measure, and the measures' headings.

    Of two records of the same task and settings the later one counts. Counts of images are left
    out, and the rows of what is no trained encoder.
    """
    values: list[Scores] = [{} for _ in records]
    headings: dict[Measure, str] = {}
    for i, measure, heading, row in _each(records):
        values[i][measure] = row[measure[1]]
        headings[measure] = heading
    return values, headings


def intervals(records: list[list[dict]]) -> list[dict[Measure, tuple[float, float]]]:
    """For each checkpoint, by measure, where 95 % of other test images would put it; only for
    shares of test images."""
    found: list[dict] = [{} for _ in records]
    for i, measure, _, row in _each(records):
        if ends := uncertainty.of_row(row, measure[1]):
            found[i][measure] = ends
    return found


def _each(records: list[list[dict]]) -> Iterator[tuple[int, Measure, str, dict]]:
    """(the checkpoint's index, a measure, its heading, the row that has it), later records last."""
    tasks = [
        [r for of_one in records for r in of_one if r["task"] == task] for task in _tasks(records)
    ]
    differing = {group[0]["task"]: _differing([r["settings"] for r in group]) for group in tasks}
    for task in differing:
        for i, of_one in enumerate(records):
            for record in (r for r in of_one if r["task"] == task):
                ways = [f"{k} {record['settings'].get(k)}" for k in differing[task]]
                for row in _trained(record):
                    way = ", ".join([*(str(row[k]) for k in ROW_KEYS if k in row), *ways])
                    for key, word in record["headings"].items():
                        if isinstance(row.get(key), float):
                            yield (
                                i,
                                (task, key, way),
                                f"{task}: {word}" + f" ({way})" * bool(way),
                                row,
                            )


def _tasks(records: list[list[dict]]) -> list[str]:
    return list(dict.fromkeys(r["task"] for of_one in records for r in of_one))


def _differing(settings: list[dict]) -> list[str]:
    """The settings that are not the same everywhere; another seed is the same evaluation, and so
    are other limits, which are the training's."""
    keys = dict.fromkeys(key for s in settings for key in s if key not in ("seed", "limits"))
    return [key for key in keys if len({json.dumps(s.get(key)) for s in settings}) > 1]


def _trained(record: dict) -> list[dict]:
    return [row for row in record["rows"] if row.get("encoder") == "trained"]


def best(measure: Measure, values: list[Scores]) -> float | None:
    """The best of the values, low or high as the measure wants; None where there is one at most."""
    there = [found[measure] for found in values if measure in found]
    if len(there) < 2 or measure[1] in UNJUDGED:
        return None
    return min(there) if measure[1] in LOWER else max(there)


def draw(
    names: list[str],
    values: list[Scores],
    headings: dict[Measure, str],
    out: Path,
    ends: list[dict[Measure, tuple[float, float]]] | None = None,
) -> Path:
    """A panel a measure, a bar a checkpoint with its value, the best in a stronger colour. ends: as
    `intervals` gives them, drawn as error bars."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    ends = ends or [{} for _ in names]
    columns = columns_for(len(headings))
    lines = -(-len(headings) // columns)
    with rc_context(STYLE):
        size = (3.0 * columns, (0.3 * len(names) + 0.55) * lines + 0.4)
        figure = Figure(figsize=size, layout="constrained")
        axes_rc = figure.subplots(lines, columns, squeeze=False)
        for axes in axes_rc.flat[len(headings) :]:
            axes.set_axis_off()
        for axes, (measure, heading) in zip(axes_rc.flat, headings.items(), strict=False):
            _bars(axes, names, measure, values, ends)
            axes.set_title(wrapped(heading, 2.6))
        said = ["dark: best"] if len(names) > 1 else []
        said += ["error bars: 95 % interval over test images"] if any(ends) else []
        figure.supxlabel("; ".join(said), size=8, color=QUIET)
    return save(figure, out)


def _bars(axes, names: list[str], measure: Measure, values: list[Scores], ends: list[dict]) -> None:
    top = best(measure, values)
    for i, (found, own) in enumerate(zip(values, ends, strict=True)):
        value = found.get(measure)
        low, high = own.get(measure, (value, value))
        errors = None if measure not in own else [[value - low], [high - value]]
        axes.barh(
            i, value or 0.0, xerr=errors, color=BLUE if value == top else PALE,
            error_kw={"capsize": 2.5, "elinewidth": 1},
        )  # fmt: skip
        said = {"va": "center", "textcoords": "offset points", "size": 8}
        if value is not None and value < 0:
            said |= {"xytext": (-4, 0), "ha": "right"}
        axes.annotate(cell(value), (high or 0.0, i), **({"xytext": (4, 0)} | said))
    axes.set_yticks(range(len(names)), names)
    axes.axvline(0, color="black", linewidth=0.7)
    axes.margins(x=0.22)
    axes.invert_yaxis()
    axes.set_xticks([])  # the bars say their values
    axes.tick_params(left=False)
    axes.spines[["left", "bottom"]].set_visible(False)


def _compute(checkpoint: str, missing: list[str], args: argparse.Namespace) -> list[dict]:
    """Each task in a process of its own, as a user would start it; its records."""
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for task in missing:
            file = Path(folder) / f"{task}.json"
            words = _words(task, checkpoint, args)
            print(f"\n$ cjepa-eval {' '.join(words)}", flush=True)
            command_line = [sys.executable, "-m", "cjepa_fast.eval", *words, "--json", str(file)]
            if subprocess.run(command_line, env=children.environment()).returncode:
                raise ValueError(f"{task} of {checkpoint} failed, see above")
            records.append(json.loads(file.read_text(encoding="utf-8")))
    return records


def _words(task: str, checkpoint: str, args: argparse.Namespace) -> list[str]:
    """The words of the command that computes it."""
    words = [task, str(checkpoint), "--data", args.data, "--which", args.which]
    for name in ("labels", "test", "test_labels") if task != "collapse" else ():
        if value := getattr(args, name):
            words += [f"--{name.replace('_', '-')}", value]
    return words


def _asked(task: str, checkpoint: str, args: argparse.Namespace) -> dict[str, object]:
    """The settings that its command would record."""
    module, names = COMPUTED[task]
    parser = Parser()
    module.add_options(parser)
    asked = parser.parse_args(_words(task, checkpoint, args)[1:])
    fill_defaults(asked)
    if task == "linear":
        linear.complete_sweep(asked)
    asked.test = held_out(asked.data, getattr(asked, "test", None))
    return json.loads(json.dumps({name: getattr(asked, name) for name in names}))


def _made_so(record: dict, asked: dict[str, object]) -> bool:
    """Whether a record was made with these settings; what it does not say was as usual. k is at
    most the training images."""
    made = {name: record["settings"].get(name, value) for name, value in asked.items()}
    if "k" in asked and made["k"] < asked["k"]:
        made["k"] = asked["k"] if made["k"] in _train_images(record) else made["k"]
    return made == asked


def _train_images(record: dict) -> list[int]:
    return [row.get("train_images") for row in _trained(record)]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="runs or checkpoints")
    parser.add_argument("--which", choices=("target", "context"), default="target", help="encoder")
    parser.add_argument(
        "--data", metavar="SET", help=f"compute what is missing: {', '.join(COMPUTED)}"
    )
    parser.add_argument("--test", metavar="SET", help="of knn and linear; default: as theirs")
    add_label_lists(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="draw them as bars there")


def run(args: argparse.Namespace) -> None:
    """Raises ValueError where no checkpoint has been evaluated."""
    records = []
    for checkpoint in args.checkpoints:
        found = found_in(checkpoint, args.which)
        if args.data:
            # earlier versions read by the usual ones, whatever the run's, and said none
            limits = (limits_of(checkpoint) or LIMITS).changed() or None
            read_so = [r for r in found if r["settings"].get("limits") == limits]
            missing = []
            for task in COMPUTED:
                asked = _asked(task, checkpoint, args)
                if not any(r["task"] == task and _made_so(r, asked) for r in read_so):
                    missing.append(task)
            made = _compute(checkpoint, missing, args)
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
    groups = seeds.groups_of(args.checkpoints, names)
    differences = _by_seeds(groups, values, headings)
    _tell_test_error(values, records)
    if args.json:
        rows = [
            {"checkpoint": name, "values": {headings[m]: value for m, value in found.items()}}
            for name, found in zip(names, values, strict=True)
        ]
        grouped = [
            {"name": g.name, "runs": {str(s): [names[i] for i in r] for s, r in g.runs.items()}}
            for g in groups
        ]
        made = {"task": "compare", "rows": rows, "groups": grouped, "differences": differences}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.json, json.dumps(made, indent=2) + "\n")
    if args.out:
        print(draw(names, values, headings, args.out, intervals(records)))


def _print(names: list[str], values: list[Scores], headings: dict[Measure, str]) -> None:
    tops = {measure: best(measure, values) for measure in headings}
    rows = []
    for name, found in zip(names, values, strict=True):
        row: Row = {"checkpoint": name}
        for measure in headings:
            value = found.get(measure)
            mark = BEST if value is not None and value == tops[measure] else ""
            row[headings[measure]] = cell(value) + mark
        rows.append(row)
    print_table(rows, {h: h for h in headings.values()}, label="checkpoint")
    if any(top is not None for top in tops.values()):
        print(f"{BEST} best of its column")


def _by_seeds(
    groups: list[seeds.Group], values: list[Scores], headings: dict[Measure, str]
) -> list[Row]:
    """Print the groups and how they differ; returns the differences."""
    by_seed = {}
    for m in headings:
        found = [of_one.get(m) for of_one in values]
        by_seed[m] = [seeds.values_of(group, found) for group in groups]
    most = max(len(group.runs) for group in groups)
    if most > 1:
        _tell_groups(groups, by_seed, headings)
    rows = []
    for i, group in enumerate(groups[1:], 1):
        for m, found in by_seed.items():
            if gap := seeds.difference(found[0], found[i]):
                rows.append({"configuration": group.name, "measure": headings[m], **gap._asdict()})
    if rows:
        print(f"\ndifference from {groups[0].name}:")
        print_table([_shown(row) for row in rows], DIFFERENCE, label="configuration")
        print("p is of each comparison alone; of twenty without any effect one has p < 0.05")
    elif len(groups) > 1 or most == 1:
        print("one seed of a configuration: of what another seed would give nothing can be said")
    return rows


def _tell_groups(groups: list[seeds.Group], by_seed: dict, headings: dict[Measure, str]) -> None:
    rows = [
        {"configuration": group.name, "seeds": len(group.runs)}
        | {headings[m]: _spread(found[i]) for m, found in by_seed.items() if found[i]}
        for i, group in enumerate(groups)
    ]
    print("\nmean and standard deviation over the seeds:")
    words = {"seeds": "seeds", **{h: h for h in headings.values()}}
    print_table(rows, words, label="configuration")


def _spread(found: seeds.By) -> str:
    mean = cell(statistics.fmean(found.values()))
    return f"{mean} +- {cell(statistics.stdev(found.values()))}" if len(found) > 1 else mean


def _shown(row: Row) -> Row:
    interval = f"{row['low']:+.2f} to {row['high']:+.2f}"
    seen = {"mean": f"{row['mean']:+.2f}", "error": f"{row['error']:.2f}", "interval": interval}
    return row | seen | {"p": "-" if row["p"] is None else f"{row['p']:.2g}"}


def _tell_test_error(values: list[Scores], records: list[list[dict]]) -> None:
    """The largest standard error that the number of test images leaves of a percentage of them."""
    images = {
        (record["task"], row["test_images"])
        for of_one in records for record in of_one for row in _trained(record)
        if "test_images" in row
    }  # fmt: skip
    errors = [
        (uncertainty.standard_error(value, count), count)
        for found in values for (task, key, _), value in found.items()
        for of, count in images if of == task and key in uncertainty.RIGHT
    ]  # fmt: skip
    if errors:
        error, count = max(errors)
        print(
            f"the test images alone: {count:,} leave a percentage a standard error of up to "
            f"{error:.1f}, which more seeds do not lower"
        )
