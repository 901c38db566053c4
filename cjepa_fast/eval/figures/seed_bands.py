"""Lines over their seeds, told apart where they lie on each other."""

import statistics
from collections.abc import Sequence

from cjepa_fast.eval.figures import style

Points = tuple[Sequence[float], Sequence[float]]  # x, y
FEW = 12  # points that are all marked; of more, about MARKS
MARKS = 6
THINNEST, THICKER, WIDEST = 1.2, 0.3, 2.8  # of lines: a later one is thinner and lies on top


def common(runs: Sequence[Points]) -> tuple[list[float], list[list[float]]]:
    """The x that all runs have, ascending, and at each the runs' values."""
    by_x = [dict(zip(*run, strict=True)) for run in runs]
    xs = sorted(set.intersection(*map(set, by_x))) if by_x else []
    return xs, [[of[x] for of in by_x] for x in xs]


def draw(axes, i: int, of: int, label: str, runs: Sequence[Points]) -> None:
    """The i-th of `of` lines: the mean of its runs, and a band from the least to the most."""
    xs, values = common(runs)
    if not xs:
        return
    look = style.line(i)
    if len(runs) > 1:
        least, most = ([end(v) for v in values] for end in (min, max))
        axes.fill_between(xs, least, most, color=look["color"], alpha=0.18, linewidth=0)
    width = min(WIDEST, THINNEST + THICKER * (of - 1 - i))
    every = max(1, len(xs) // MARKS)
    marked = 1 if len(xs) <= FEW else (every * i // max(1, of) + every // 2, every)
    means = [statistics.fmean(v) for v in values]
    axes.plot(xs, means, label=label, linewidth=width, markersize=3.5, markevery=marked, **look)


def at_start(axes, values: Sequence[float]) -> None:
    """A level line at what the encoders have before the first step."""
    if values:
        level = statistics.fmean(values)
        axes.axhline(level, color=style.QUIET, linestyle=(0, (1, 2)), linewidth=1.3)
        axes.annotate(
            "at the start", (1, level), xycoords=("axes fraction", "data"), xytext=(0, 2),
            textcoords="offset points", ha="right", va="bottom", size=7, color=style.QUIET,
            bbox={"fc": "white", "ec": "none", "pad": 0.3, "alpha": 0.7},
        )  # fmt: skip


def at_least(axes, span: float) -> None:
    """Widen the y axis to a span, so that noise does not look like a trend."""
    low, high = axes.get_ylim()
    if high - low < span:
        middle = (low + high) / 2
        axes.set_ylim(middle - span / 2, middle + span / 2)


def legend(figure, panels) -> None:
    """Above all panels, each line once."""
    found = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        figure.legend(
            found.values(), found, loc="outside upper center", ncols=min(4, len(found)),
            handlelength=3.2,
        )  # fmt: skip
