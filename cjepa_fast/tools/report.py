"""One HTML page about a run, or several side by side: `cjepa-report RUN [RUN ...]`.

What happened in words, curves, throughput, events, evaluations, figures and configuration, all in
one file that can be mailed and read anywhere. A run may still be training, and need have no
checkpoint yet. Figures are made where the images are: the first run's own, or --images SET.
"""

import statistics
import sys
import time
from pathlib import Path

from cjepa_fast import checkpoint, config
from cjepa_fast.eval import compare, uncertainty
from cjepa_fast.eval.figures.curves import PANELS, Panel, at_start, series, short_names
from cjepa_fast.eval.records import cell
from cjepa_fast.runtime import caches, files
from cjepa_fast.runtime.command_line import Parser
from cjepa_fast.runtime.image_size import shown as shown_size
from cjepa_fast.runtime.printable import printable_lines, say
from cjepa_fast.telemetry.progress import shown_clock
from cjepa_fast.tools import html_charts, html_page, report_events, report_figures
from cjepa_fast.tools.report_run import RunRecord, hours, story
from cjepa_fast.training.sizes import model_sizes

SPEED = {  # the throughput's curves; all others of the log are of the training
    "images_per_s": PANELS["images_per_s"],
    "data_wait": PANELS["data_wait"],
    "gpu_util": Panel("GPU utilisation", "share"),
    "gpu_power_w": Panel("GPU power", "W"),
    "gpu_mem_gib": Panel("GPU memory in use", "GiB"),
}
NAMES = PANELS | SPEED | {
    "context_k": Panel("context patches", "an image"),
    "targets_p": Panel("patches of a target block"),
    "weight_decay": Panel("weight decay"),
    "momentum": Panel("momentum of the target's EMA"),
    "skipped_steps": Panel("skipped steps"),
    "skipped_images": Panel("skipped images"),
}  # fmt: skip
NOT_DRAWN = ("step", "epoch", "time_s")
SETTINGS = {  # of an evaluation, in words
    "data": "images", "labels": "labels from", "test": "tested on",
    "test_labels": "test labels from", "max_train": "training images at most",
    "k": "neighbours", "temperature": "temperature",
    "crop": "centre crop", "bf16": "in bf16", "seed": "seed", "count": "images taken",
    "views": "views of an image",
}  # fmt: skip
SCORES = ("knn", "knn_centred", "linear")  # shares of test images


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="cjepa-report",
        description=__doc__.strip(),
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="its folder")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.html",
        help="default: report.html in the run's folder, side_by_side.html in the first of several",
    )  # fmt: skip
    parser.add_argument("--images", metavar="SET", help="for the figures; default: the run's own")
    args = parser.parse_args(argv)
    caches.root()
    name = "report.html" if len(args.runs) == 1 else "side_by_side.html"
    try:
        with shown_clock("report"):
            written = write(args.runs, args.out or args.runs[0] / name, args.images)
        print(written)
    except (ValueError, OSError) as error:  # the user's input: said, without a traceback
        say(f"error: {printable_lines(error)}", sys.stderr)
        return 2
    return 0


def write(folders: Path | list[Path], out: Path, images: str | None = None) -> Path:
    """Raises FileNotFoundError where one is no run's folder, ValueError for what is corrupt."""
    folders = [folders] if isinstance(folders, Path) else folders
    names = short_names(folders)
    runs = [RunRecord.read(*pair) for pair in zip(names, folders, strict=True)]
    logged = _logged(runs)
    sections = [
        ("What happened", _stories(runs) + _summary(runs)),
        ("Curves", _best_and_last(runs) + _charts(runs, [n for n in logged if n not in SPEED])),
        ("Throughput and hardware", _throughput(runs)),
        ("Events", "".join(_over(run, runs) + _events(run) for run in runs)),
        ("Evaluation", _evaluations(runs)),
        *report_figures.sections(runs, images),
        ("Configuration", _configurations(runs)),
    ]
    where = ", ".join(str(run.folder.resolve()) for run in runs)
    under = f"cjepa_fast {'run' if len(runs) == 1 else 'runs'} in {where}; page made "
    under += time.strftime("%Y-%m-%d %H:%M")
    out.parent.mkdir(parents=True, exist_ok=True)
    title = " beside ".join(names)
    files.write_text(out, html_page.document(title, sections, under))
    return out


def _over(run: RunRecord, runs: list[RunRecord]) -> str:
    return html_page.heading(run.name) if len(runs) > 1 else ""


# -------------------------------------------------------------------------------------- summary


def _stories(runs: list[RunRecord]) -> str:
    told = [html_page.story(*story(run), run.name if len(runs) > 1 else "") for run in runs]
    return f'<div class="stories">{"".join(told)}</div>'


def _summary(runs: list[RunRecord]) -> str:
    if len(runs) == 1:
        return "<br>" + html_page.facts(_facts(runs[0]).items())
    return _beside({run.name: _facts(run) for run in runs})


def _beside(columns: dict[str, dict[str, str]]) -> str:
    """A table with a column for each run."""
    rows = dict.fromkeys(key for found in columns.values() for key in found)
    cells = [[row, *(found.get(row, "-") for found in columns.values())] for row in rows]
    return html_page.table(["", *columns], cells, kind="words even")


def _facts(run: RunRecord) -> dict[str, str]:
    settings = run.settings
    model, data = settings.model, settings.data
    sizes = model_sizes(settings)
    last = run.rows[-1] if run.rows else {"step": 0}
    shape = f"{sizes['width']} wide, {sizes['depth']} blocks, {sizes['heads']} heads"
    paths = " and ".join(config.image_paths(data))
    found = {
        "Model": f"{model.name}, patch {model.patch_size}: {shape}",
        "Images": f"{paths}, {shown_size(data.image_size)} pixels, batch {data.batch_size:,}",
        "Method": _method(settings),
        "Steps": f"{last['step']:,}",
        "Epochs": f"{last.get('epoch', 0):.2f} of {settings.run.epochs}",
        "Time": hours(last.get("time_s", 0)),
        "State": _state(run),
    }
    if run.after:
        found["kNN after training"] = run.after.with_interval(run.after.last)
    if run.online:
        found["kNN while training"] = (
            f"best {run.online.best:.1f} % (step {run.online.best_step:,}), last "
            f"{run.online.last:.1f} %"
        )
    for key, name in (("rankme", "RankMe at the end"), ("loss", "Loss at the end")):
        if (value := run.last(key)) is not None:
            found[name] = f"{value:.3g}"
    return found


def _method(settings: config.Config) -> str:
    beta = settings.loss.active_regulariser.beta
    if beta == 0:
        return "I-JEPA"
    if settings.loss.regulariser == "sigreg":
        return f"I-JEPA with SIGReg, beta {beta:g}"
    return f"C-JEPA, VICReg beta {beta:g}"


def _state(run: RunRecord) -> str:
    if run.finished:
        return "finished"
    if not run.rows:
        return "no row in its log yet"
    moment = (run.folder / "log.jsonl").stat().st_mtime
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))
    return f"training or stopped; last row of {when}"


# --------------------------------------------------------------------------------------- curves


def _logged(runs: list[RunRecord]) -> list[str]:
    """Names that rows have numbers for, those with a title first; of the others none that never
    changes."""
    rows = [row for run in runs for row in run.rows]
    found = {name for row in rows for name, x in row.items() if isinstance(x, (int, float))}
    known = [name for name in NAMES if name in found]
    others = sorted(found - {*known, *NOT_DRAWN})
    return [
        name for name in known + others if name in PANELS or len(set(series(rows, name)[1])) > 1
    ]


def _charts(runs: list[RunRecord], names: list[str]) -> str:
    if not names:
        return html_page.note("The log has no rows yet.")
    drawn = [_chart(runs, name) for name in names]
    key = html_charts.key(run.name for run in runs) if len(runs) > 1 else ""
    return f'{key}<div class="curves">{"".join(drawn)}</div>'


def _chart(runs: list[RunRecord], name: str) -> str:
    panel = NAMES.get(name, Panel(name.replace("_", " ")))
    lines, starts = {}, []
    for i, run in enumerate(runs):
        steps, values = series(run.rows, name)
        if not steps:
            continue
        ends = {}
        if name in SCORES and run.tested_on:
            pairs = [uncertainty.interval(value, run.tested_on) for value in values]
            ends = dict(zip(("low", "high"), map(list, zip(*pairs, strict=True)), strict=True))
        lines[i] = html_charts.Line(run.name, steps, values, **ends)
        starts += [run.rows[0][name]] if at_start(run.rows, name) else []
    level = statistics.fmean(starts) if starts else None
    return html_charts.chart(panel.axis, lines, panel.logarithmic, level)


def _best_and_last(runs: list[RunRecord]) -> str:
    """kNN while training: at the start, at its best, at the end."""
    rows = []
    for run in runs:
        if not (found := run.online):
            continue
        name = f"{run.name}: " if len(runs) > 1 else ""
        at = {"best": (found.best_step, found.best), "last": (found.last_step, found.last)}
        if found.untrained is not None:
            at = {found.start: (0, found.untrained)} | at
        for which, (step, value) in at.items():
            gain = "" if found.untrained is None else f"{value - found.untrained:+.1f}"
            rows.append([name + which, f"{step:,}", found.with_interval(value), gain])
    if not rows:
        return ""
    caption = (
        "kNN while training, with the 95 % interval over the test images. The best was chosen on "
        "them, so on others expect less of it:"
    )
    return html_page.table(["", "step", "kNN", "minus the start's"], rows, caption)


# ----------------------------------------------------------------------------------- throughput


def _throughput(runs: list[RunRecord]) -> str:
    found = {run.name: _speeds(run) for run in runs}
    shown = _beside(found) if len(runs) > 1 else html_page.facts(found[runs[0].name].items())
    drawn = [name for name in SPEED if any(series(run.rows, name)[0] for run in runs)]
    return shown + "<br>" + (_charts(runs, drawn) if drawn else "")


def _speeds(run: RunRecord) -> dict[str, str]:
    found = {}
    if rates := series(run.rows, "images_per_s")[1]:
        found["Images/s, median"] = f"{statistics.median(rates):,.0f}"
        found["Images/s, best interval"] = f"{max(rates):,.0f}"
    if waits := series(run.rows, "data_wait")[1]:
        found["Waiting for data"] = f"{100 * statistics.mean(waits):.1f} % of the time"
    watts = series(run.rows, "gpu_power_w")[1]
    if watts:
        kwh = statistics.mean(watts) * run.rows[-1]["time_s"] / 3.6e6
        found["Energy of the first GPU"] = f"{kwh:.2f} kWh"
    newest = checkpoint.latest(run.folder)
    state = checkpoint.state_of(newest) if newest else {}
    if "machine" in state:
        found["Ranks and hardware"] = str(state["machine"])
    found["GPU counters"] = "logged" if watts else "none: a CPU, or no NVML"
    return found | {f"Version of {name}": str(of) for name, of in state.get("versions", {}).items()}


def _events(run: RunRecord) -> str:
    found = report_events.events(run)
    if not found:
        return html_page.note("None.")
    return html_page.table(report_events.HEAD, found, kind="words")


# ----------------------------------------------------------------------------------- evaluations


def _evaluations(runs: list[RunRecord]) -> str:
    if not any(run.records for run in runs):
        return html_page.note(
            "None yet: `cjepa-eval knn RUN --data SET` and the like add to this page."
        )
    beside = _compared(runs) if len(runs) > 1 else ""
    return beside + "".join(
        _over(run, runs) + "".join(map(_evaluation, run.records)) for run in runs if run.records
    )


def _compared(runs: list[RunRecord]) -> str:
    """What both were evaluated on in one way: a row a measure."""
    target = [[r for r in run.records if r["which"] == "target"] for run in runs]
    values, headings = compare.measures(target)
    ends = compare.intervals(target)
    rows = [
        [heading, *(_spread(v[measure], e.get(measure)) for v, e in zip(values, ends, strict=True))]
        for measure, heading in headings.items()
        if all(measure in found for found in values)
    ]
    caption = "Target encoders, what all were evaluated on:"
    return html_page.table(["", *(run.name for run in runs)], rows, caption) if rows else ""


def _evaluation(record: dict) -> str:
    rows = record["rows"]
    shown = {k: v for k, v in record["headings"].items() if any(k in row for row in rows)}
    cells = [[str(row["encoder"]), *(_cell(row, k) for k in shown)] for row in rows]
    settings = ", ".join(
        f"{SETTINGS.get(k, k.replace('_', ' '))} {cell(v) if isinstance(v, int) else v}"
        for k, v in record["settings"].items()
        if v not in (None, False)
    )
    of = "" if record["inside"] in (None, ".") else f" of {record['inside']}"
    which = f"{record['which']} encoder{of}"
    caption = f"{record['task']}, {which}: {settings} ({record['made'][:10]})"
    return html_page.table(["encoder", *shown.values()], cells, caption)


def _cell(row: dict, key: str) -> str:
    return _spread(row.get(key), uncertainty.of_row(row, key))


def _spread(value: object, ends: tuple[float, float] | None) -> str:
    """A value, with half its interval where it has one."""
    return cell(value) + (f" ± {(ends[1] - ends[0]) / 2:.1f}" if ends else "")


# --------------------------------------------------------------------------------- configuration


def _configurations(runs: list[RunRecord]) -> str:
    if len(runs) == 1:
        return html_page.configuration(runs[0].settings.to_json())
    flat = {run.name: dict(_keys(run.settings.model_dump(mode="json"))) for run in runs}
    keys = dict.fromkeys(key for found in flat.values() for key in found)
    rows = [[key, *(str(found.get(key, "-")) for found in flat.values())] for key in keys]
    differing = [row for row in rows if len(set(row[1:])) > 1 and row[0] != "run.dir"]
    if not differing:
        return html_page.note("The runs have the same configuration.")
    return html_page.table(["what differs", *flat], differing, kind="words even")


def _keys(values: dict, prefix: str = ""):
    """(key with dots, value) of nested sections."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


if __name__ == "__main__":
    sys.exit(main())
