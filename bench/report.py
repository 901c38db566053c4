"""RESULTS.md, the README's figures and cjepa-plan's measured shares, from bench/results/.

    python bench/report.py            # writes them all
    python bench/report.py --check    # exits with 1 where one of the texts says something else
    python bench/report.py --collect bench/results/gate-DATE    # first takes over what a GPU gave
    python bench/report.py --collect results.tar.gz             # the same, as it came back

So no figure is typed by hand, and what was not measured is said to be so. collect.py takes over
what a GPU gave.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from collect import collect, on_gpu
from files import loaded
from matplotlib import rc_context
from matplotlib.figure import Figure

from cjepa_fast.eval.figures import style
from cjepa_fast.tools.plan import MEASURED, measured_rows

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
README, TABLE = ROOT / "README.md", ROOT / "RESULTS.md"
BEGIN, END = "<!-- bench/report.py writes from here -->\n", "<!-- to here -->\n"
UNTRAINED, TRAINED, PIXELS = "untrained", "trained", "raw pixels"
PHASES = ("target", "context", "predictor", "loss", "backward", "optimiser", "average", "rest")
ERRORS = {"error_kw": {"capsize": 2.5, "elinewidth": 1}}
# Overrides after which a step does less than a run of that configuration, or computes another one.
LESS = (
    "model.target_precision=fp8",
    "model.context_precision=fp8",
    "model.gelu=tanh",
    "mask.keep=",
)
Line = tuple[str, str, str, str]  # what, hardware, figure, where it is from
# The README's rows: the first line of the table that holds these words.
SHOWN = (
    "vit_h, batch", "vit_b, batch", "reference, bf16 autocast", "CIFAR-10, cifar10_vit_t_long.json",
    "`make demo`: kNN, mean-subtracted",
)  # fmt: skip
HEAD = """# Results

Every figure comes from a run; `python bench/report.py` writes this page from `bench/results/`,
which has the versions and commits. Times of a shared CPU say little, so of a CPU ratios are shown,
between steps that took turns in one process.

- MFU: the counted work over the GPU's peak. K: context patches an image.
- kNN: 20 neighbours by cosine similarity. Mean-subtracted: after the training images' mean is taken
  away.
- Logistic and ridge probe: linear classifiers on the frozen features, as `cjepa-eval knn --linear`
  and `eval.online` fit them.
- VICReg at each position (ours): variance and covariance taken apart at each patch position, where
  the paper takes them of means over patches. "Begun for 44": the schedule was for 44 epochs and was
  cut to 40 on a resume.

"""


def latest(rows: list[dict], *keys: str) -> list[dict]:
    """The last row of each kind, kinds being told apart by these keys."""
    return list({tuple(str(row.get(key) or "") for key in keys): row for row in rows}.values())


def changes(row: dict) -> list[str]:
    """What its step is of, beside the configuration: overrides, and what no key sets."""
    return [*(row.get("overrides") or ()), *(row.get("also") or ())]


def does_less(row: dict) -> bool:
    return bool(row.get("also")) or any(text.startswith(LESS) for text in changes(row))


def figure_of(row: dict) -> str:
    """images/s; MFU of a data sheet's rate, with the context length K of its work; J an image."""
    figures = [
        text.format(row[key])
        for key, text in (
            ("images_per_s", "{:.0f} images/s"), ("mfu_sheet_pct", "MFU {:.1f} %"),
            ("context_k", "K {:.0f}"), ("joules_per_image", "{:.2f} J an image"),
        ) if row.get(key)
    ]  # fmt: skip
    return ", ".join(figures)


def throughput_lines(rows: list[dict]) -> Iterator[Line]:
    """images/s only from a GPU, the fastest of a configuration first; of a CPU the ratios to the
    reference's step, those of a command on one line."""
    rows = latest(rows, "config", "step", "batch", "data", "overrides", "also")
    names = list(dict.fromkeys(row["config"] for row in rows))
    turns: dict[tuple[str, str, str], list[dict]] = {}

    def order(row: dict) -> tuple:
        turn = "step" in row
        speed = 0 if turn else -row["images_per_s"]
        return not on_gpu(row), names.index(row["config"]), turn, does_less(row), speed

    for row in sorted(rows, key=order):
        device, where = row["hardware"]["device"], f"`{row['command']}`"
        size = ", ".join((f"batch {row['batch']}", *changes(row)))
        if "step" in row:
            if row["step"] != "ours":
                what = f"{size}: our step beside the plain {row['step']}"
                turns.setdefault((what, device, where), []).append(row)
        elif on_gpu(row):
            yield f"{row['config']}, {size}, {row['data']}", device, figure_of(row), where
    for (what, device, where), found in turns.items():
        configs = ", ".join(row["config"] for row in found)
        times = ", ".join(f"{row['ours_times']:.2f}" for row in found)
        yield f"{configs}, {what}", device, f"{times} times as fast", where


def encoder_of(rows: list[dict], encoder: str, **facts) -> dict:
    return next(
        row for row in rows
        if row["encoder"] == encoder and all(row.get(k) == v for k, v in facts.items())
    )  # fmt: skip


def cifar_lines(found: dict) -> Iterator[Line]:
    rows, where = found["rows"], "[bench/results/cifar10](bench/results/cifar10/README.md)"
    device, most = found["hardware"]["device"], max(row["train_images"] for row in rows)

    def figure(rows: list[dict], name: str, encoder: str, **facts) -> str:
        row = encoder_of(rows, encoder, train_images=most, **facts)
        return f"{name} {row['top1']:.1f}, {row['linear']:.1f}"

    fresh = figure(rows, "untrained", UNTRAINED)
    both = (figure(rows, n, TRAINED, beta=b) for n, b in (("C-JEPA", 0.001), ("I-JEPA", 0.0)))
    what = "kNN and logistic probe, %, one seed"
    yield f"CIFAR-10, {found['epochs']} epochs: {what}", device, "; ".join([*both, fresh]), where
    recipe = "VICReg at each position (ours)"
    for key, name, trained in (
        ("longer", "CIFAR-10", "C-JEPA"),
        ("recipe", "CIFAR-10, cifar10_vit_t.json", recipe),
        ("long_recipe", "CIFAR-10, cifar10_vit_t_long.json", recipe),
    ):
        if more := found.get(key):
            names = ((trained, TRAINED), ("untrained", UNTRAINED))
            figures = (figure(more["rows"], label, encoder) for label, encoder in names)
            length = more.get("of", f"{more['epochs']} epochs")
            yield f"{name}, {length}: {what}", device, "; ".join(figures), where


def ablation_lines(found: dict) -> Iterator[Line]:
    """How far C-JEPA is from I-JEPA, seed by seed: mean and standard deviation."""
    for row in found["rows"]:
        if row["row"] != "all (C-JEPA)":
            continue
        gaps = [
            f"{name} {row[f'{key}_gain']:+.1f} ± {row[f'{key}_gain_std']:.1f}"
            for key, name in (("knn", "kNN"), ("linear", "ridge probe"))
        ]
        what = f"{found['what']}: C-JEPA minus I-JEPA over {row['seeds']} seeds, points"
        where = "[bench/results/ablations](bench/results/ablations/README.md)"
        yield what, found["hardware"], ", ".join(gaps), where


def demo_lines(found: dict) -> Iterator[Line]:
    rows, where = found["rows"], "[bench/results/demo](bench/results/demo/demo.json)"
    ours, fresh, raw = (encoder_of(rows, name) for name in (TRAINED, UNTRAINED, PIXELS))
    device = found["hardware"]["device"]
    kinds = {"top1": "kNN", "top1_centred": "kNN, mean-subtracted", "linear": "logistic probe"}
    for key, name in kinds.items():
        figure = f"trained {ours[key]:.1f}; untrained {fresh[key]:.1f}"
        if key in raw:
            figure += f"; raw pixels {raw[key]:.1f}"
        yield f"`make demo`: {name}, %, chance 12.5", device, figure, where


def kernel_line(found: dict) -> Line:
    """The share of a copy's bandwidth that the blocks' kernels reach at the width of ViT-H."""
    shares = {row["op"]: row["of_copy_pct"] for row in found["rows"] if "1408" not in row["shape"]}
    names = ("add_norm", "add_norm backward", "gelu", "gelu backward")
    figure = ", ".join(f"{shares[name]:.0f}" for name in names)
    what = f"{', '.join(names)} at ViT-H's width: share of a copy's bandwidth"
    where = "[bench/results/h200](bench/results/h200/README.md)"
    return what, found["hardware"]["device"], f"{figure} %", where


def lines(results: Path) -> list[Line]:
    found: list[Line] = []
    rows = loaded(results, "throughput.json") or []
    if not any(on_gpu(row) and not row.get("overrides") for row in rows):
        what = "images/s and MFU of every model as it ships"
        found.append((what, "GPU", "not yet measured", "`bench/gpu_gate.sh`"))
    if kernels := loaded(results, "h200/kernels.json"):
        found.append(kernel_line(kernels))
    elif loaded(results, "ops.json") is None:
        where = "[compiled](bench/results/aot.md), [predicted](bench/results/ops_predicted.md)"
        figure = "not yet run on one; interpreted, and compiled for sm_80, sm_90 and sm_100"
        found.append(("Triton kernels", "GPU", figure, where))
    found.append(("ImageNet-1K accuracy", "GPU", "not yet measured", ""))
    found += throughput_lines(rows)
    for name, of in (("cifar10/cifar10.json", cifar_lines), ("demo/demo.json", demo_lines)):
        if (made := loaded(results, name)) is not None:
            found += of(made)
    for path in sorted((results / "ablations").glob("*.json")):
        found += ablation_lines(loaded(results, path.relative_to(results)))
    return found


def headline(found: list[Line]) -> str:
    """The README's: the chosen lines, without where they are from."""
    chosen = [next((line[:3] for line in found if name in line[0]), None) for name in SHOWN]
    rows = [("what", "hardware", "figure"), ("---",) * 3, *filter(None, chosen)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def table(found: list[Line]) -> str:
    rows = [("what", "hardware", "figure", "from"), ("---",) * 4, *found]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def with_table(readme: str, text: str) -> str:
    """The README with its table replaced. Raises ValueError where the markers are missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the README has no lines {BEGIN.strip()} and {END.strip()}")
    return before + begin + text + end + after


def draw(rows: list[dict], path: Path) -> bool:
    """Bars of images/s, and of where a step's time goes, a bar a configuration. False, and nothing
    is written, where no row has phases."""
    rows = [row for row in rows if row.get("phases_ms") and not does_less(row)]
    rows = latest(rows, "config", "batch", "data")
    if not rows:
        return False
    names = [f"{row['config']}\n{row['data']}, batch {row['batch']}" for row in rows]
    with rc_context(style.STYLE):
        size = (9, 1.7 + 0.5 * len(rows))
        figure = Figure(figsize=size, layout="constrained")
        speed, parts = figure.subplots(1, 2, sharey=True)
        rates = [row["images_per_s"] for row in rows]
        bars = speed.barh(names, rates, color=style.BLUE, xerr=_errors(rows, rates), **ERRORS)
        speed.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3)
        speed.set_xlabel("throughput (images/s)")
        speed.margins(x=0.2)
        left = [0.0] * len(rows)
        for i, name in enumerate(PHASES):
            share = [100 * r["phases_ms"][name] / sum(r["phases_ms"].values()) for r in rows]
            hatch = "////" if i >= len(style.COLOURS) else None
            colour = style.COLOURS[i % len(style.COLOURS)]
            parts.barh(names, share, left=left, label=name, color=colour, hatch=hatch)
            left = [a + b for a, b in zip(left, share, strict=True)]
        parts.set_xlabel("time of a step (%)")
        figure.legend(*parts.get_legend_handles_labels(), loc="outside lower center", ncols=4)
        speed.invert_yaxis()
        figure.suptitle(rows[0]["hardware"]["device"])
    style.save(figure, path)
    return True


def _errors(rows: list[dict], values: list[float]) -> list[list[float]] | None:
    """How far below and above each value its slow and its fast steps lie (10th and 90th percentile
    of their times); None where a row has no such times."""
    if not all(row.get("step_ms_p10") and row.get("step_ms_p90") for row in rows):
        return None
    pairs = list(zip(rows, values, strict=True))
    return [
        [max(0.0, value * (1 - row["step_ms"] / row["step_ms_p90"])) for row, value in pairs],
        [max(0.0, value * (row["step_ms"] / row["step_ms_p10"] - 1)) for row, value in pairs],
    ]


def draw_beside_reference(rows: list[dict], path: Path) -> bool:
    """How many times as fast as the plain step in fp32 ours and the plain one under bf16 autocast
    are, a group of bars a configuration; of a GPU where there is one. False without such rows."""
    turns = latest([row for row in rows if "step" in row], "config", "step", "hardware")
    turns = [row for row in turns if on_gpu(row)] or turns
    plain = {row["config"]: row for row in turns if row["step"] == "reference, fp32"}
    if not plain:
        return False
    shown = {
        "reference, fp32": "0.75", "reference, bf16 autocast": style.SKY, "ours": style.BLUE,
    }  # fmt: skip
    with rc_context(style.STYLE):
        figure = Figure(figsize=(7, 3.0), layout="constrained")
        axes = figure.subplots()
        for bar, (step, colour) in enumerate(shown.items()):
            rows = [row for row in turns if row["step"] == step and row["config"] in plain]
            times = [row["images_per_s"] / plain[row["config"]]["images_per_s"] for row in rows]
            at = [list(plain).index(row["config"]) + 0.28 * (bar - 1) for row in rows]
            name = f"I-JEPA {step}" if bar < 2 else step
            axes.bar(at, times, 0.25, label=name, color=colour, yerr=_errors(rows, times), **ERRORS)
            for x, time in zip(at, times, strict=True):
                # in the bar, under its error bar
                axes.text(x, 0.05, f"{time:.1f}", ha="center", size=8, color=("k", "k", "w")[bar])
        axes.set_xticks(range(len(plain)), list(plain))
        axes.set_ylabel("throughput (plain fp32 step = 1)")
        device = next(iter(plain.values()))["hardware"]["device"]
        axes.set_title(
            f"A training step beside the plain one: {device}\n"
            "error bars: 10th to 90th percentile of the steps"
        )
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    style.save(figure, path)
    return True


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--collect", type=Path, metavar="OUT", help="of a gate, or its tar")
    args = parser.parse_args(argv)
    if args.collect:
        try:
            print("\n".join(collect(args.collect, RESULTS, ROOT / "kernels" / "tuned.py")))
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    rows = loaded(RESULTS, "throughput.json") or []
    texts = fresh_texts(rows)
    if args.check:
        stale = [path.name for path, text in texts.items() if path.read_text("utf-8") != text]
        if stale:
            print(f"stale: {', '.join(stale)}: python bench/report.py", file=sys.stderr)
        return int(bool(stale))
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    # Of a shared CPU only ratios are told.
    draw([row for row in rows if on_gpu(row)], RESULTS / "throughput.png")
    draw_beside_reference(rows, RESULTS / "beside_reference.png")
    return 0


def fresh_texts(rows: list[dict]) -> dict[Path, str]:
    """What each of the written files must hold."""
    found = lines(RESULTS)
    return {
        README: with_table(README.read_text(encoding="utf-8"), headline(found)),
        TABLE: HEAD + table(found),
        MEASURED: json.dumps(measured_rows(rows), indent=1) + "\n",
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
