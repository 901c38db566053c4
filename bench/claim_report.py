"""Tables and curves of bench/results/claim: `python bench/claim_report.py` writes its README.md."""

import argparse
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from hardware import ROOT

from cjepa_fast.eval.figures import bands
from cjepa_fast.eval.figures.curves import PANELS
from cjepa_fast.eval.figures.style import STYLE, save

RESULTS = ROOT / "bench" / "results" / "claim"
MEASURES = {
    "knn": "kNN",
    "knn_centred": "mean-subtracted",
    "ridge": "ridge",
    "logistic": "logistic",
    "rankme": "RankMe",
    "by_position": "by position %",
}
PERCENT = ("knn", "knn_centred", "ridge", "logistic")
BASE = "I-JEPA"
Group = tuple[str, int, str]  # the set, the length, what is scored on
HEAD = """# C-JEPA's claim at small size

Each row of [claim.json](../../../configs/ablations/claim.json): an encoder 96 wide of 3 blocks on
36 tokens, fp32, Xavier's initialisation, batch 64, trained and scored by `python bench/claim.py`.
Probes are fitted on 5,000 training images, their penalties chosen inside those. Percent right;
"held" are training images that neither encoder nor probe has seen, by which rows are chosen;
"test" is the test set. One score of m images has a standard error of about {error}. With more than
one seed: mean and standard deviation, and the paired difference from I-JEPA.
`python bench/claim_report.py` writes this page from the JSON lines beside it, which have settings,
commit, hardware and versions.
"""


def lines() -> dict[Group, list[dict]]:
    found = defaultdict(list)
    for path in sorted(RESULTS.glob("*.jsonl")):
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            found[line["set"], line["length"], line["scored_on"]].append(line)
    return found


def by_row(group: list[dict]) -> dict[str, dict[int, dict]]:
    """Lines by row and seed, the rows in the order they came."""
    found: dict[str, dict[int, dict]] = {}
    for line in group:
        found.setdefault(line["row"], {})[line["seed"]] = line
    return found


def cell(own: dict[int, dict], base: dict[int, dict], key: str, at: int) -> str:
    """The mean of the seeds, its deviation, and the difference from I-JEPA, seed by seed."""
    values = {seed: line["readings"][at].get(key) for seed, line in own.items()}
    if None in values.values():
        return "-"
    text = f"{statistics.fmean(values.values()):.1f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values.values()):.1f}"
    shared = values.keys() & base.keys() if own is not base else ()
    gaps = [values[seed] - base[seed]["readings"][at][key] for seed in shared]
    if key in PERCENT and gaps:
        text += f" ({statistics.fmean(gaps):+.1f}"
        text += f" ± {statistics.stdev(gaps):.1f})" if len(gaps) > 1 else ")"
    return text


def table(group: list[dict]) -> str:
    rows = by_row(group)
    base = rows.get(BASE, {})
    out = [["row", "seeds", "images", *MEASURES.values()]]
    out.append(["---"] * len(out[0]))
    for name, own in rows.items():
        readings = next(iter(own.values()))["readings"]
        trained = readings[0]["images"] > 0
        for at in range(len(readings)):
            cells = [cell(own, base if trained else {}, key, at) for key in MEASURES]
            images = f"{readings[at]['images']:,}" if trained else "-"
            out.append([name, str(len(own)), images, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in out)


def draw(group: list[dict], path: Path) -> None:
    """kNN and RankMe against images for each row, seeds averaged."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = by_row(group)
    curves = {
        name: [line["readings"] for line in own.values()]
        for name, own in rows.items()
        if next(iter(own.values()))["readings"][0]["images"]
    }
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 3.8), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, key in zip(panels, ("knn", "rankme"), strict=True):
            for i, (name, runs) in enumerate(curves.items()):
                points = [
                    ([r["images"] / 1000 for r in run], [r[key] for r in run]) for run in runs
                ]
                bands.draw(axes, i, len(curves), name, points)
            axes.set_xlabel("images (thousands)")
            axes.set_ylabel(PANELS[key].label)
            axes.grid()
        bands.legend(figure, panels)
    save(figure, path)


def main(argv: Sequence[str] = ()) -> int:
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    groups = lines()
    if not groups:
        print(f"{RESULTS}: no results yet", file=sys.stderr)
        return 1
    scored = {line["readings"][0]["scored"] for group in groups.values() for line in group}
    error = " to ".join(f"{100 * math.sqrt(0.24 / m):.1f}" for m in sorted(scored, reverse=True))
    parts = [HEAD.format(error=error)]
    for (name, length, scored_on), group in groups.items():
        figure = f"{name}_{length}_{scored_on}.png"
        on = group[0]["on"]
        commits = ", ".join(dict.fromkeys(line["on"]["commit"][:7] for line in group))
        where = f"{on['hardware']['device']}; torch {on['versions']['torch']}; commits "
        parts.append(
            f"## {name}, scored on {scored_on}, up to {group[-1]['readings'][-1]['images']:,} "
            f"images\n\n{where}{commits}.\n\n{table(group)}\n\n![curves]({figure})\n"
        )
        draw(group, RESULTS / figure)
    if (notes := RESULTS / "reading.md").exists():
        parts.insert(1, notes.read_text(encoding="utf-8"))
    (RESULTS / "README.md").write_text("\n".join(parts), encoding="utf-8")
    print(RESULTS / "README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
