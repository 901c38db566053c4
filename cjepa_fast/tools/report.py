"""One HTML page about a run: `cjepa-report RUN`, or `python -m cjepa_fast.tools.report RUN`.

Curves, throughput, events, evaluations, figures and configuration, all in one file that can be
mailed and read anywhere. The run may still be training, and need have no checkpoint yet. Figures
are made where the images are: the run's own, or --images SET.
"""

import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from cjepa_fast import checkpoint, config
from cjepa_fast.checkpoint.encoders import load_encoders
from cjepa_fast.data.sources import ImageSet, open_images
from cjepa_fast.eval import cli
from cjepa_fast.eval.figures import attention, mask_columns, pca, retrieve
from cjepa_fast.eval.figures.curves import PANELS, series
from cjepa_fast.eval.figures.sheets import as_arrays, load_images, sheet, spread_over
from cjepa_fast.eval.figures.side_by_side import Encoders
from cjepa_fast.model.vit import count_parameters
from cjepa_fast.runtime import caches, files
from cjepa_fast.runtime.command_line import Parser
from cjepa_fast.runtime.image_size import shown as shown_size
from cjepa_fast.runtime.printable import printable_lines
from cjepa_fast.telemetry import read_log
from cjepa_fast.telemetry.progress import shown_clock
from cjepa_fast.tools import html_page
from cjepa_fast.training import build

SPEED = {  # the throughput's curves; all others of the log are of the training
    "images_per_s": PANELS["images_per_s"],
    "data_wait": PANELS["data_wait"],
    "gpu_util": ("GPU utilisation, share", False),
    "gpu_power_w": ("GPU power, W", False),
    "gpu_mem_gib": ("GPU memory in use, GiB", False),
}
NOT_DRAWN = ("step", "epoch", "time_s")
SHOWN = 6  # images of a figure
SEARCHED = 500  # images that neighbours are looked for among
EVENTS_SHOWN = 200


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="cjepa-report",
        description=__doc__.strip(),
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="its folder")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="default: RUN/report.html")
    parser.add_argument("--images", metavar="SET", help="for the figures; default: the run's own")
    args = parser.parse_args(argv)
    caches.root()
    try:
        with shown_clock("report"):
            written = write(args.run, args.out or args.run / "report.html", args.images)
        print(written)
    except (ValueError, OSError) as error:  # the user's input: said, without a traceback
        print(f"error: {printable_lines(error)}", file=sys.stderr)
        return 2
    return 0


def write(run: Path, out: Path, images: str | None = None) -> Path:
    """Raises FileNotFoundError where `run` is no run's folder, ValueError for what is corrupt."""
    if not (run / "config.json").is_file():
        raise FileNotFoundError(f"{run}: no config.json there, so it is no run's folder")
    settings = config.read(run)
    rows = read_log(run) if (run / "log.jsonl").is_file() else []
    records = cli.records(run)
    sections = [
        ("Summary", _summary(run, settings, rows, records)),
        ("Curves", _curves(rows, [name for name in _logged(rows) if name not in SPEED])),
        ("Throughput and hardware", _throughput(run, rows)),
        ("Events", _events(run, settings, rows)),
        ("Evaluation", _evaluations(records)),
        *_figures(run, settings, images),
        ("Configuration", html_page.configuration(settings.to_json())),
    ]
    under = f"cjepa_fast run in {run.resolve()}; page made {time.strftime('%Y-%m-%d %H:%M')}"
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(out, html_page.document(run.resolve().name, sections, under))
    return out


# ------------------------------------------------------------------------------- numbers of a run


def _summary(run: Path, settings: config.Config, rows: list[dict], records: list[dict]) -> str:
    model, data = settings.model, settings.data
    sizes = build.model_sizes(settings)
    last = rows[-1] if rows else {"step": 0}
    shape = f"{sizes['width']} wide, {sizes['depth']} blocks, {sizes['heads']} heads"
    paths = " and ".join(config.image_paths(data))
    pairs = [
        ("Model", f"{model.name}, patch {model.patch_size}: {shape}"),
        ("Images", f"{paths}, {shown_size(data.image_size)} pixels, batch {data.batch_size:,}"),
        ("Method", _method(settings)),
        ("Steps", f"{last['step']:,}"),
        ("Epochs", f"{last.get('epoch', 0):.2f} of {settings.run.epochs}"),
        ("Time", _hours(last.get("time_s", 0))),
        ("State", _state(run, settings, rows)),
    ]
    pairs += [
        (f"Best {heading}", f"{value:.1f} at {where}")
        for heading, value, where in _best(rows, records)
    ]
    pairs += [
        (name, f"{last[key]:.3g}")
        for key, name in (("rankme", "RankMe at the end"), ("loss", "Loss at the end"))
        if last.get(key) is not None
    ]
    return html_page.facts(pairs)


def _method(settings: config.Config) -> str:
    beta = settings.loss.regularised_by.beta
    if beta == 0:
        return "I-JEPA"
    if settings.loss.regulariser == "sigreg":
        return f"I-JEPA with SIGReg, beta {beta:g}"
    return f"C-JEPA, VICReg beta {beta:g}"


def _state(run: Path, settings: config.Config, rows: list[dict]) -> str:
    if (run / "encoder.safetensors").is_file():
        return "finished"
    if not rows:
        return "no row in its log yet"
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime((run / "log.jsonl").stat().st_mtime))
    return f"training or stopped; last row of {when}"


def _best(rows: list[dict], records: list[dict]) -> Iterator[tuple[str, float, str]]:
    """Of kNN: (what, percent, where), while training and after."""
    steps, values = series(rows, "knn")
    if values:
        best = max(values)
        yield "kNN %, while training", best, f"step {steps[values.index(best)]:,}"
    after = [
        (row["top1"], f"{record['settings'].get('data')} ({record['which']} encoder)")
        for record in records
        for row in record["rows"]
        if record["task"] == "knn" and row.get("encoder") == "trained" and "top1" in row
    ]
    if after:
        value, data = max(after)
        yield "kNN %, after", value, str(data)


def _logged(rows: list[dict]) -> list[str]:
    """Names that rows have numbers for, those with a title first; of the others none that never
    changes."""
    found = {name for row in rows for name, x in row.items() if isinstance(x, (int, float))}
    known = [name for name in (*PANELS, *SPEED) if name in found]
    others = sorted(found - {*known, *NOT_DRAWN})
    return known + [name for name in others if len(set(series(rows, name)[1])) > 1]


def _curves(rows: list[dict], names: list[str]) -> str:
    if not names:
        return html_page.note("The log has no rows yet.")
    titles = PANELS | SPEED
    drawn = []
    for name in names:
        title, logarithmic = titles.get(name, (name.replace("_", " "), False))
        drawn.append(html_page.curve(title, *series(rows, name), logarithmic=logarithmic))
    return f'<div class="curves">{"".join(drawn)}</div>'


def _throughput(run: Path, rows: list[dict]) -> str:
    pairs: list[tuple[str, object]] = []
    if rates := series(rows, "images_per_s")[1]:
        pairs.append(("Images/s, median", f"{statistics.median(rates):,.0f}"))
        pairs.append(("Images/s, best interval", f"{max(rates):,.0f}"))
    if waits := series(rows, "data_wait")[1]:
        pairs.append(("Waiting for data", f"{100 * statistics.mean(waits):.1f} % of the time"))
    if watts := series(rows, "gpu_power_w")[1]:
        kwh = statistics.mean(watts) * rows[-1]["time_s"] / 3.6e6
        pairs.append(("Energy of the first GPU", f"{kwh:.2f} kWh"))
    newest = checkpoint.latest(run)
    state = checkpoint.state_of(newest) if newest else {}
    if "machine" in state:
        pairs.append(("Ranks and hardware", state["machine"]))
    pairs.append(("GPU counters", "logged" if watts else "none: a CPU, or no NVML"))
    pairs += [(f"Version of {name}", of) for name, of in state.get("versions", {}).items()]
    drawn = [name for name in SPEED if series(rows, name)[0]]
    return html_page.facts(pairs) + "<br>" + (_curves(rows, drawn) if drawn else "")


def _events(run: Path, settings: config.Config, rows: list[dict]) -> str:
    """What the log shows to have gone wrong, and every other .jsonl of the run's folder."""
    own = settings.telemetry
    lines = []
    for name, floor in (("rankme", own.rankme_floor), ("feature_std", own.feature_std_floor)):
        low = [step for step, value in zip(*series(rows, name), strict=True) if value < floor]
        if low:
            lines.append([f"{low[0]:,}", f"{name} below its floor of {floor:g} in {len(low)} rows"])
    for name, what in (("skipped_steps", "steps"), ("skipped_images", "unreadable images")):
        if (counts := series(rows, name)[1]) and counts[-1]:
            lines.append([f"{rows[-1]['step']:,}", f"{counts[-1]:,} {what} skipped by now"])
    for path in sorted(run.glob("*.jsonl")):
        if path.name == "log.jsonl":
            continue
        for row in read_log(path)[-EVENTS_SHOWN:]:
            said = ", ".join(f"{k}: {_short(v)}" for k, v in row.items() if k != "step")
            lines.append([f"{row.get('step', 0):,}", f"{path.stem}: {said}"])
    if branches := sorted((run / "checkpoints").glob("abandoned_*")):
        names = ", ".join(path.name for path in branches)
        lines.append(["", f"went back and on from earlier than {names}"])
    return (
        html_page.table(["step", "what"], lines, words=True) if lines else html_page.note("None.")
    )


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and len(value) > 4:
        return f"{', '.join(map(str, value[:4]))} and {len(value) - 4} more"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _evaluations(records: list[dict]) -> str:
    if not records:
        return html_page.note(
            "None yet: `cjepa-eval knn RUN --data SET` and the like add to this page."
        )
    return "".join(map(_evaluation, records))


def _evaluation(record: dict) -> str:
    rows = record["rows"]
    shown = {k: v for k, v in record["headings"].items() if any(k in row for row in rows)}
    cells = [[str(row["encoder"]), *(cli.cell(row.get(k)) for k in shown)] for row in rows]
    settings = ", ".join(
        f"{k} {v}" for k, v in record["settings"].items() if v not in (None, False)
    )
    of = "" if record["inside"] in (None, ".") else f" of {record['inside']}"
    which = f"{record['which']} encoder{of}"
    caption = f"{record['task']}, {which}: {settings} ({record['made'][:10]})"
    return html_page.table(["encoder", *shown.values()], cells, caption)


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.1f} min"


# --------------------------------------------------------------------------------------- figures


def _figures(run: Path, settings: config.Config, named: str | None) -> list[tuple[str, str]]:
    """Masks, attention, features and neighbours, or why they are not there."""
    paths = [config.expanded(named)] if named else config.image_paths(settings.data)
    try:
        images = open_images(paths, log=lambda text: None)
    except (ValueError, OSError) as error:
        why = f"Not drawn, since the images are not here ({error}); --images SET names others."
        return [("Figures", html_page.note(why, "warn"))]
    sections = [("Masks", _masks(settings, images))]
    try:
        both = {which: x.to(cli.device()) for which, x in load_encoders(run).items()}
    except (ValueError, OSError) as error:
        return [*sections, ("Features", html_page.note(f"Not drawn: {error}", "warn"))]
    return sections + _of_features(settings, images, both)


def _masks(settings: config.Config, images: ImageSet) -> str:
    data, sampler = settings.data, build.build_masks(settings)
    images_B3HW = load_images(
        images, SHOWN, image_size=data.image_size, mean=data.mean, std=data.std
    )
    masks = sampler(epoch=0, step=0, index_B=torch.arange(len(images_B3HW)))
    figure = mask_columns.figure(images_B3HW, data.mean, data.std, masks, sampler.grid, "")
    return html_page.figure_image(figure, "images with their context and target blocks")


@torch.inference_mode()
def _of_features(
    settings: config.Config, images: ImageSet, both: Encoders
) -> list[tuple[str, str]]:
    target = both["target"]
    look = target.mean, target.std
    crop = settings.eval.crop
    images_B3HW = load_images(
        images, SHOWN, image_size=target.image_size, mean=look[0], std=look[1], crop=crop
    ).to(cli.device())
    shown = ("image", as_arrays(images_B3HW, *look))
    maps = attention.columns(both, images_B3HW, *look, attention.SINGLE_HEADS)
    colours = pca.columns(both, images_B3HW)
    near, _ = retrieve.sheet_of(
        {"target encoder": target}, images, queries=SHOWN, k=7, crop=crop,
        keep=spread_over(images, SEARCHED), device=cli.device(),
        bf16=cli.device().type == "cuda", title="neighbours",
    )  # fmt: skip
    about = html_page.note(
        f"{count_parameters(target):,} parameters an encoder. Attention: what each patch receives "
        "in the last block. PCA: the patches' first three principal components as colours."
    )
    drawn = {
        "Attention": attention.figure([shown, *maps], ""),
        "PCA of the patch features": sheet([shown, *colours], ""),
        "Neighbours": near,
    }
    sections = [(name, html_page.figure_image(figure, name)) for name, figure in drawn.items()]
    name, first = sections[0]
    return [(name, about + first), *sections[1:]]


if __name__ == "__main__":
    sys.exit(main())
