"""Charts of a page as inline SVG: lines with bands, their values at the pointer.

The script reads what a chart holds in its own attributes, writes text and moves marks; it fetches
nothing. Without it the charts are the same, but for the pointer.
"""

import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

MOST_POINTS = 300  # of a line; a longer one is drawn as means, in a band from least to most
FEW = 12  # points that are all marked
WIDTH, HEIGHT = 320, 170
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 20  # around the plot, for the ticks
LINES = 7  # colours of STYLE; later lines begin again, with other dashes

# Okabe and Ito's colours, lighter on a dark page.
STYLE = """
:root { --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #a36f00; --c4: #b4568c; --c5: #2f87c0;
  --c6: #000; }
@media (prefers-color-scheme: dark) { :root { --c0: #6cb8ef; --c1: #ff9a5c; --c2: #2fd3a5;
  --c3: #f0b93a; --c4: #eb9fcb; --c5: #9fd8fb; --c6: #fff; } }
.curves { display: grid; gap: .7rem; grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); }
.curves figure { position: relative; display: flex; flex-direction: column;
  justify-content: space-between; }
figure { margin: 0; }
figcaption { font-size: .85rem; display: flex; justify-content: space-between; gap: .6rem; }
svg { width: 100%; display: block; touch-action: pan-y; }
svg text { fill: var(--quiet); font-size: 10px; }
svg .grid { stroke: var(--rule); } svg .line { fill: none; }
svg .band { opacity: .2; stroke: none; }
svg .level { stroke: var(--quiet); stroke-dasharray: 2 3; }
svg .cross { stroke: var(--quiet); visibility: hidden; } svg .at { visibility: hidden; }
.tip { position: absolute; pointer-events: none; background: var(--ground); color: var(--ink);
  border: 1px solid var(--rule); border-radius: 6px; padding: .15rem .45rem; font-size: .78rem;
  white-space: pre; visibility: hidden; top: 2.2rem; z-index: 2;
  font-variant-numeric: tabular-nums; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: 0 0 .7rem; font-size: .9rem; }
.key svg { display: inline-block; width: 2.2rem; height: .8rem; vertical-align: middle; }
"""

SCRIPT = """
for (const svg of document.querySelectorAll('svg[data-lines]')) {
  const lines = JSON.parse(svg.dataset.lines), axis = JSON.parse(svg.dataset.axis);
  const tip = svg.parentElement.querySelector('.tip'), cross = svg.querySelector('.cross');
  const dots = [...svg.querySelectorAll('.at')];
  const show = on => { for (const e of [tip, cross, ...dots])
    e.style.visibility = on ? 'visible' : 'hidden'; };
  const said = v => v === null ? '-' : String(Number(Number(v).toPrecision(4)));
  const move = event => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * axis.width;
    const text = [];
    let where = null;
    lines.forEach((line, i) => {
      let near = 0;
      line.px.forEach((px, k) => { if (Math.abs(px - x) < Math.abs(line.px[near] - x)) near = k; });
      dots[i].setAttribute('cx', line.px[near]);
      dots[i].setAttribute('cy', line.py[near]);
      const found = line.px[near];
      if (where === null || Math.abs(found - x) < Math.abs(where - x)) where = found;
      let row = said(line.y[near]);
      if (line.low) row += ` (${said(line.low[near])} to ${said(line.high[near])})`;
      const step = 'step ' + Math.round(line.x[near]).toLocaleString('en');
      text.push(lines.length > 1 ? `${line.label}: ${row}, ${step}` : `${step}: ${row}`);
    });
    cross.setAttribute('d', `M${where} ${axis.top}V${axis.bottom}`);
    tip.textContent = text.join('\\n');
    show(true);
    const within = box.left - tip.parentElement.getBoundingClientRect().left;
    const left = within + where / axis.width * box.width;
    const most = tip.parentElement.clientWidth - tip.offsetWidth - 4;
    tip.style.left = Math.max(4, Math.min(most, left + 10)) + 'px';
  };
  svg.addEventListener('pointermove', move);
  svg.addEventListener('pointerdown', move);
  svg.addEventListener('pointerleave', () => show(false));
}
"""


class Line(NamedTuple):
    """A run's values at steps, with low and high where they are uncertain."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def chart(title: str, lines: dict[int, Line], logarithmic=False, level: float | None = None) -> str:
    """Lines against the step, by the number of their colour; a single one's last value is beside
    the title. level: a dotted line at it, what the encoder has before the first step."""
    every = [v for of in lines.values() for v in (*of.values, *(of.low or ()), *(of.high or ()))]
    every += [level] if level is not None else []
    logarithmic = logarithmic and min(every) > 0
    scale = math.log10 if logarithmic else float
    y_ticks = _ticks(min(every), max(every), logarithmic)
    y = _Axis(*(scale(end(*every, *y_ticks)) for end in (min, max)), HEIGHT - BOTTOM, TOP)
    first = min(of.steps[0] for of in lines.values())
    last = max(of.steps[-1] for of in lines.values())
    x = _Axis(first, last, LEFT, WIDTH - RIGHT)
    marks = [*_grid(x, y, y_ticks, scale, first, last)]
    if level is not None:
        at = y(scale(level))
        marks.append(f'<path class="level" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        marks.append(
            f'<text x="{WIDTH - RIGHT}" y="{at - 3:.1f}" text-anchor="end">at the start</text>'
        )
    held, dots = [], []
    for colour, line in lines.items():
        drawn, data = _line(colour, line, x, y, scale)
        marks += drawn
        held.append(data)
        dots.append(f'<circle class="at" r="3.2" {_fill(colour)}/>')
    marks += ['<path class="cross"/>', *dots]
    axis = {"width": WIDTH, "top": TOP, "bottom": HEIGHT - BOTTOM}
    single = next(iter(lines.values())) if len(lines) == 1 else None
    value = f"<b>{single.values[-1]:.4g}</b>" if single else ""
    return (
        f"<figure><figcaption><span>{escape(title)}</span>{value}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" '
        f'data-lines="{escape(json.dumps(held))}" data-axis="{escape(json.dumps(axis))}">'
        f'{"".join(marks)}</svg><div class="tip"></div></figure>'
    )


def key(names: Iterable[str]) -> str:
    """Which line is whose."""
    line = '<svg viewBox="0 0 34 10"><path d="M0 5H34" {}/></svg>'
    parts = [
        f"<span>{line.format(_stroke(i))} {escape(name)}</span>" for i, name in enumerate(names)
    ]
    return f'<div class="key">{"".join(parts)}</div>'


def _grid(x, y, y_ticks, scale, first: float, last: float):
    for tick in y_ticks:
        at = y(scale(tick))
        yield f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>'
        yield f'<text x="{LEFT - 5}" y="{at + 3:.1f}" text-anchor="end">{tick:.3g}</text>'
    for step, anchor in ((first, "start"), (last, "end"))[: 1 + (last > first)]:
        words = f"step {step:,}" if anchor == "end" else f"{step:,}"
        yield f'<text x="{x(step):.1f}" y="{HEIGHT - 5}" text-anchor="{anchor}">{words}</text>'


def _line(colour: int, line: Line, x, y, scale) -> tuple[list[str], dict]:
    """Its marks, and what the script says of it."""
    bins = list(_bins(line.steps, [scale(value) for value in line.values]))
    points = [(x(step), y(mean)) for step, mean, _, _ in bins]
    marks, band = [], None
    if len(line.steps) > MOST_POINTS:
        band = [(x(s), y(least), y(most)) for s, _, least, most in bins]
    elif line.low and line.high:
        ends = zip(line.steps, line.low, line.high, strict=True)
        band = [(x(s), y(scale(low)), y(scale(high))) for s, low, high in ends]
    if band:
        outline = [(px, high) for px, _, high in band] + [(px, low) for px, low, _ in band[::-1]]
        marks.append(f'<polygon class="band" {_fill(colour)} points="{_points(outline)}"/>')
    marks.append(f'<polyline class="line" {_stroke(colour)} points="{_points(points)}"/>')
    if len(points) <= FEW:
        marks += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.4" {_fill(colour)}/>' for a, b in points]
    values = [10**mean if scale is math.log10 else mean for _, mean, _, _ in bins]
    data = {
        "label": line.label,
        "x": [round(step, 1) for step, *_ in bins],
        "y": [float(f"{value:.5g}") for value in values],
        "px": [round(a, 1) for a, _ in points],
        "py": [round(b, 1) for _, b in points],
    }
    if line.low and line.high and len(line.steps) <= MOST_POINTS:
        data |= {
            name: [float(f"{v:.5g}") for v in of]
            for name, of in (("low", line.low), ("high", line.high))
        }
    return marks, data


def _fill(colour: int) -> str:
    return f'style="fill: var(--c{colour % LINES})"'


def _stroke(colour: int) -> str:
    """Each colour with dashes and a width of its own, so that no line hides another."""
    dashes = ("none", "6 3", "2 2.5", "8 2 2 2")[colour % 4]
    width = 1.9 if colour == 0 else 1.4
    look = f"stroke: var(--c{colour % LINES}); stroke-dasharray: {dashes}; stroke-width: {width}"
    return f'style="{look}"'


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
