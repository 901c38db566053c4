"""Pieces of one self-contained HTML page: sections, tables, figures, curves as SVG.

Nothing is fetched and no script runs. Colours follow the reader's light or dark scheme.
"""

import base64
import io
import math
from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise

MOST_POINTS = 300  # of a curve; a longer one is drawn as means, in a band from least to most
WIDTH, HEIGHT = 320, 170
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 20  # around the plot, for the ticks

STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1c1f23; --quiet: #667; --rule: #d8dbe0;
  --card: #f6f7f9; --line: #1668b8; --warn: #b3540a; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171b; --ink: #e4e7eb; --quiet: #98a1ad;
  --rule: #333941; --card: #1c2026; --line: #6cb2f5; --warn: #f0a35e; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 3.2rem; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
nav { position: sticky; top: 0; z-index: 1; background: var(--ground);
  border-bottom: 1px solid var(--rule); padding: .6rem 1rem;
  overflow-x: auto; white-space: nowrap; }
nav a { color: var(--quiet); text-decoration: none; margin-right: 1rem; }
nav a:hover { color: var(--line); }
main { max-width: 1180px; margin: 0 auto; padding: 0 1rem 4rem; }
h1 { font-size: 1.5rem; margin: 1.2rem 0 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .7rem; border-bottom: 1px solid var(--rule); }
p, .quiet { color: var(--quiet); margin: .3rem 0; }
.warn { color: var(--warn); }
.facts { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); }
.facts div, .curves figure { background: var(--card); border-radius: 8px; padding: .6rem .8rem; }
.facts dt { color: var(--quiet); font-size: .82rem; } .facts dl, .facts dd { margin: 0; }
.facts dd { font-size: 1.02rem; overflow-wrap: anywhere; }
.curves { display: grid; gap: .7rem; grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); }
figure { margin: 0; }
figcaption { font-size: .85rem; display: flex; justify-content: space-between; gap: .6rem; }
svg { width: 100%; display: block; } svg text { fill: var(--quiet); font-size: 10px; }
svg .grid { stroke: var(--rule); } svg .line { stroke: var(--line); fill: none; stroke-width: 1.5; }
svg .band { fill: var(--line); opacity: .22; } svg circle { fill: var(--line); }
.wide { overflow-x: auto; } .wide img { max-width: 100%; border-radius: 6px; background: #fff; }
table { border-collapse: collapse; margin: .4rem 0 1.2rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--rule); text-align: right; }
caption { white-space: nowrap; }
th:first-child, td:first-child, .words th, .words td { text-align: left; } th { font-weight: 600; }
pre { background: var(--card); border-radius: 8px; padding: .8rem; overflow-x: auto; }
@media (max-width: 640px) { .wide img { max-width: none; width: 640px; }
  .facts { grid-template-columns: 1fr 1fr; } }
@media print { nav { display: none; } }
"""


def document(title: str, sections: Sequence[tuple[str, str]], under: str = "") -> str:
    """The page: sections are (heading, HTML); under: a line of text below the title."""
    keys = [heading.split()[0].lower().strip(",") for heading, _ in sections]
    links = "".join(
        f'<a href="#{key}">{escape(heading)}</a>'
        for key, (heading, _) in zip(keys, sections, strict=True)
    )
    bodies = "".join(
        f'<section id="{key}"><h2>{escape(heading)}</h2>{body}</section>\n'
        for key, (heading, body) in zip(keys, sections, strict=True)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>"
        f"<nav>{links}</nav><main><h1>{escape(title)}</h1><p>{escape(under)}</p>\n{bodies}"
        "</main></body></html>\n"
    )


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    cells = "".join(
        f"<div><dl><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></dl></div>"
        for name, value in pairs
    )
    return f'<div class="facts">{cells}</div>'


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", words=False
) -> str:
    """Numbers stand to the right, but for the first column; words all to the left."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    kind = "wide words" if words else "wide"
    return (
        f'<div class="{kind}"><table><caption class="quiet">{escape(caption)}</caption>'
        f"<thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def note(text: str, kind: str = "quiet") -> str:
    return f'<p class="{kind}">{escape(text)}</p>'


def configuration(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def figure_image(figure, alt: str) -> str:
    """A matplotlib figure, embedded as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<div class="wide"><img alt="{escape(alt)}" src="data:image/png;base64,{data}"></div>'


def curve(title: str, steps: Sequence[float], values: Sequence[float], logarithmic=False) -> str:
    """One quantity against the step, its last value beside the title."""
    logarithmic = logarithmic and min(values) > 0
    scale = math.log10 if logarithmic else float
    y_ticks = _ticks(min(values), max(values), logarithmic)
    low, high = scale(min(*values, *y_ticks)), scale(max(*values, *y_ticks))
    x = _Axis(steps[0], steps[-1], LEFT, WIDTH - RIGHT)
    y = _Axis(low, high, HEIGHT - BOTTOM, TOP)
    marks = []
    for tick in y_ticks:
        at = y(scale(tick))
        marks.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        marks.append(f'<text x="{LEFT - 5}" y="{at + 3:.1f}" text-anchor="end">{tick:.3g}</text>')
    ends = ((steps[0], "start"), (steps[-1], "end")) if len(steps) > 1 else ((steps[0], "start"),)
    for step, anchor in ends:
        position = f'x="{x(step):.1f}" y="{HEIGHT - 5}" text-anchor="{anchor}"'
        marks.append(f"<text {position}>{step:,}</text>")
    bins = list(_bins(steps, [scale(value) for value in values]))
    if len(steps) > MOST_POINTS:
        upper = [(x(step), y(most)) for step, _, _, most in bins]
        lower = [(x(step), y(least)) for step, _, least, _ in bins]
        marks.append(f'<polygon class="band" points="{_points(upper + lower[::-1])}"/>')
    means = [(x(step), y(mean)) for step, mean, _, _ in bins]
    marks.append(f'<polyline class="line" points="{_points(means)}"/>')
    if len(means) < 12:
        marks += [f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="2.4"/>' for cx, cy in means]
    return (
        f"<figure><figcaption><span>{escape(title)}</span><b>{values[-1]:.4g}</b></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(marks)}</svg></figure>"
    )


class _Axis:
    """From values between `low` and `high` to pixels between `start` and `end`."""

    def __init__(self, low: float, high: float, start: float, end: float):
        self.low, self.start = low, start
        self.slope = (end - start) / ((high - low) or 1.0)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) * self.slope


def _ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    """A few round values around those drawn."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    locator = LogLocator(numticks=4) if logarithmic else MaxNLocator(4)
    if low == high:
        return [low]
    ticks = [float(tick) for tick in locator.tick_values(low, high)]
    inside = [tick for tick in ticks if low <= tick <= high]
    return inside if len(inside) > 1 else [low, high]


def _bins(steps: Sequence[float], values: Sequence[float]):
    """(step, mean, least, most) of at most MOST_POINTS runs of neighbouring points."""
    count = min(len(steps), MOST_POINTS)
    for first, last in pairwise(len(steps) * i // count for i in range(count + 1)):
        part = values[first:last]
        middle = sum(steps[first:last]) / len(part)
        yield middle, sum(part) / len(part), min(part), max(part)


def _points(pairs: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in pairs)
