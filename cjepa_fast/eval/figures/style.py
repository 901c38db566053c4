"""How every figure looks, for a page of a paper or a talk: type, colours, lines, resolution.

The colours are those of Okabe and Ito (Color Universal Design, 2008), which colour-blind readers
tell apart. Lines differ in dash and marker too, so that a grey print does.
"""

from pathlib import Path

ORANGE, SKY, GREEN, BLUE = "#e69f00", "#56b4e9", "#009e73", "#0072b2"
VERMILION, PURPLE, BLACK, QUIET = "#d55e00", "#cc79a7", "#000000", "0.45"
COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK)
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.2, 1.2, 1.2)))
MARKERS = "osD^vPX"
DPI = 200  # of a PNG
STYLE = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "figure.titlesize": 11,
    "legend.fontsize": 8.5, "legend.frameon": False, "figure.dpi": 130,  # on a page, TensorBoard
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7,
    "grid.alpha": 0.25, "hatch.linewidth": 0.6, "hatch.color": "0.62", "pdf.fonttype": 42,
}  # fmt: skip


def line(i: int) -> dict:
    """Colour, dash and marker of the i-th line; 28 lines differ in more than one of them."""
    n = len(COLOURS)
    return {
        "color": COLOURS[i % n],
        "linestyle": DASHES[i % len(DASHES)],
        "marker": MARKERS[(i + i // n) % n],
    }


def save(figure, out: Path | str) -> Path:
    """Write a figure as its ending says (PNG, PDF, SVG, ...); its folder is made. Raises ValueError
    for an ending that cannot be drawn."""
    from matplotlib import rc_context

    out = Path(out)
    endings = figure.canvas.get_supported_filetypes()
    if out.suffix.lstrip(".").lower() not in endings:
        raise ValueError(f"{out}: cannot draw to {out.suffix!r}; use one of {', '.join(endings)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        figure.savefig(out, dpi=DPI)
    return out
