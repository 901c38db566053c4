"""Tables and curves of bench/results/claim: `python bench/claim_report.py` writes its README.md."""

import argparse
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from claim import UNTRAINED
from hardware import ROOT

from cjepa_fast.eval.figures import seed_bands
from cjepa_fast.eval.figures.style import STYLE, save
from cjepa_fast.runtime.printable import in_markdown

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
PANELS = {
    "knn": "kNN (% right)",
    "logistic": "logistic regression (% right)",
    "rankme": "RankMe (directions)",
}
CHOICE = "knn"  # at the last reading: by it the row of a family is chosen that is drawn
BASE = "I-JEPA"
BETA = "loss.vicreg.beta"  # 0 in I-JEPA
Group = tuple[str, int, str]  # the set, the length, what is scored on
Key = tuple[str, tuple[str, ...]]  # of a row: its name and its overrides
Rows = dict[Key, dict[int | None, dict]]  # lines by seed
HEAD = """# C-JEPA's claim at small size

Each row of [claim.json](../../../configs/ablations/claim.json): an encoder 96 wide of 3 blocks on
36 tokens, fp32, batch 64, Xavier's initialisation but where a row names another, trained and scored
by `python bench/claim.py`. Probes are fitted on 5,000 training images, their penalties chosen
inside those. Percent right; "held" are training images that neither encoder nor probe has seen, by
which rows are chosen; "test" is the test set. In brackets: the difference from I-JEPA at the same
optimiser and initialisation where there is such a row, else from the first row; and of I-JEPA's own
other settings the difference from that.

- One seed: a score of m images has a binomial standard error of about {error} points. A difference
  has one of at most {bound}: that of two scores on images of their own. Both encoders are scored on
  the same images, which makes it smaller; by how much is not known, as the single answers are not
  kept. What other seeds would give is in neither.
- Several seeds: mean ± standard error over the seeds, and in the brackets the mean of the
  differences seed by seed ± its standard error.
- "by position %": the share of the tokens' variance that position explains, of 256 images. So few
  make it up to 0.4 points too high, hence whole percents.

Not tried: a norm of the targets other than I-JEPA's LayerNorm. It has no key, as the kernel that
gathers the targets computes it.

[prototype.md](prototype.md) has an earlier study of initialisation and views, in a prototype.

`python bench/claim_report.py` writes this page from the JSON lines beside it, which have settings,
commit, hardware and versions.
"""


DRAWN = f"""Drawn, from the untrained encoder (0 images) on: of each kind of loss the row with the
highest {MEASURES[CHOICE]} at its last reading. The kinds are I-JEPA, the four views of VICReg,
pooled and positions together, VICReg alone, and SIGReg."""
ALL_DRAWN = "Drawn, from the untrained encoder (0 images) on: every row. They were chosen on held."


def lines() -> dict[Group, list[dict]]:
    found = defaultdict(list)
    for path in sorted(RESULTS.glob("*.jsonl")):
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            found[line["set"], line["length"], line["scored_on"]].append(line)
    return found


def by_row(group: list[dict]) -> Rows:
    """The rows in the order they came; the same row with other overrides is another row."""
    found: Rows = {}
    for line in group:
        found.setdefault((line["row"], tuple(line["overrides"])), {})[line["seed"]] = line
    return found


def name_of(key: Key) -> str:
    row, overrides = key
    return f"{row} ({', '.join(overrides)})" if overrides else row


def mean_and_error(values: list[float], form: str) -> str:
    """ "36.8 ± 0.4": the mean, and of several values its standard error."""
    text = f"{statistics.fmean(values):{form}}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values) / math.sqrt(len(values)):{form.lstrip('+')}}"
    return text


def cell(own: dict[int, dict], base: dict[int, dict], key: str, at: int) -> str:
    """A measure over the seeds, and its difference from I-JEPA, seed by seed."""
    values = {seed: line["readings"][at].get(key) for seed, line in own.items()}
    if None in values.values():
        return "-"
    text = mean_and_error(list(values.values()), ".0f" if key == "by_position" else ".1f")
    shared = values.keys() & base.keys() if own is not base else ()
    gaps = [values[seed] - base[seed]["readings"][at][key] for seed in sorted(shared)]
    return f"{text} ({mean_and_error(gaps, '+.1f')})" if key in PERCENT and gaps else text


def trained(own: dict[int, dict]) -> bool:
    return next(iter(own.values()))["readings"][0]["images"] > 0


def base_of(key: Key, rows: Rows) -> dict[int, dict]:
    """The lines of I-JEPA to compare a trained row with, by seed: those at its own settings but for
    the loss, else the plain ones. Of I-JEPA itself the plain ones."""
    own = next(iter(rows[key].values()))
    if family(own) != BASE:
        for other, lines in rows.items():
            line = next(iter(lines.values()))
            plain = trained(lines) and line["settings"] == beside_loss(own) | {BETA: 0}
            if plain and other[1] == key[1]:
                return lines
    return rows.get((BASE, key[1]), {})


def beside_loss(line: dict) -> dict:
    return {k: v for k, v in line["settings"].items() if not k.startswith("loss.")}


def table(group: list[dict]) -> str:
    rows = by_row(group)
    out = [["row", "seeds", "images", *MEASURES.values()]]
    out.append(["---"] * len(out[0]))
    for (name, overrides), own in rows.items():
        base = base_of((name, overrides), rows) if trained(own) else {}
        for at, found in enumerate(next(iter(own.values()))["readings"]):
            cells = [cell(own, base, key, at) for key in MEASURES]
            images = f"{found['images']:,}" if trained(own) else "-"
            out.append([in_markdown(name_of((name, overrides))), str(len(own)), images, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in out)


# ------------------------------------------------------------------------------------- the curves


def family(line: dict) -> str:
    """What kind of loss a row has, whatever its weights and its optimiser."""
    settings = line["settings"]
    kind = settings.get("loss.regulariser", "vicreg")
    if settings.get(f"loss.{kind}.beta") == 0:
        return BASE
    if kind == "sigreg":
        return "SIGReg"
    if settings.get("loss.prediction_weight") == 0:
        return "VICReg alone"
    both = settings.get("loss.vicreg.positions_weight")
    return "pooled and positions" if both else settings["loss.vicreg.views"]


def best_rows(rows: Rows) -> Rows:
    """The best row of each family: the highest mean of CHOICE at the last reading."""

    def score(key: Key) -> float:
        return statistics.fmean(line["readings"][-1][CHOICE] for line in rows[key].values())

    families: dict[str, list[Key]] = {}
    for key, own in rows.items():
        if trained(own):
            families.setdefault(family(next(iter(own.values()))), []).append(key)
    return {key: rows[key] for key in (max(keys, key=score) for keys in families.values())}


def with_start(line: dict, untrained: dict[int, dict]) -> list[dict]:
    """A line's readings, before them the untrained encoder's of its seed (or, where that was not
    scored, another's), if it has the same weights at its start."""
    changed = any(key.startswith("model.") for key in line["settings"])
    starts = () if changed else untrained.get(line["seed"]) or next(iter(untrained.values()), ())
    return [*(starts["readings"] if starts else ()), *line["readings"]]


def draw(group: list[dict], path: Path, chosen: bool = False) -> None:
    """PANELS against images, seeds averaged, for the best row of each family, or for all trained
    rows where they were chosen before, since test scores choose nothing."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = by_row(group)
    every = {key: own for key, own in rows.items() if trained(own)}
    best = every if chosen else best_rows(rows)
    with rc_context(STYLE):
        figure = Figure(figsize=(10.5, 4.2), layout="constrained")
        panels = figure.subplots(1, len(PANELS))
        for axes, (key, label) in zip(panels, PANELS.items(), strict=True):
            for i, ((name, overrides), own) in enumerate(best.items()):
                untrained = rows.get((UNTRAINED, overrides), {})
                runs = [with_start(line, untrained) for line in own.values()]
                points = [
                    ([r["images"] / 1000 for r in run], [r[key] for r in run]) for run in runs
                ]
                seed_bands.draw(axes, i, len(best), name_of((name, overrides)), points)
            axes.set_xlabel("images (thousands)")
            axes.set_ylabel(label)
            axes.grid()
        seed_bands.legend(figure, panels)
    save(figure, path)


def distinct(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def main(argv: Sequence[str] = ()) -> int:
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    groups = lines()
    if not groups:
        print(f"{RESULTS}: no results yet", file=sys.stderr)
        return 1
    scored = {line["readings"][0]["scored"] for group in groups.values() for line in group}
    errors = [100 * math.sqrt(0.24 / m) for m in sorted(scored, reverse=True)]
    error, bound = (" to ".join(f"{x * e:.1f}" for e in errors) for x in (1, math.sqrt(2)))
    parts = [HEAD.format(error=error, bound=bound)]
    for (name, length, scored_on), group in groups.items():
        figure = f"{name}_{length}_{scored_on}.png"
        on = [line["on"] for line in group]
        devices = distinct(made["hardware"]["device"] for made in on)
        torches = distinct(made["versions"]["torch"] for made in on)
        commits = distinct(made["commit"][:7] for made in on)
        most = max(line["readings"][-1]["images"] for line in group)
        chosen = scored_on == "test"
        parts.append(
            f"## {name}, scored on {scored_on}, up to {most:,} images\n\n"
            f"{devices}; torch {torches}; commits {commits}.\n\n{table(group)}\n\n"
            f"{ALL_DRAWN if chosen else DRAWN}\n\n![curves]({figure})\n"
        )
        draw(group, RESULTS / figure, chosen)
    if (notes := RESULTS / "reading.md").exists():
        parts.insert(1, notes.read_text(encoding="utf-8"))
    (RESULTS / "README.md").write_text("\n".join(parts), encoding="utf-8")
    print(RESULTS / "README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
