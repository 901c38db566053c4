"""What the figures of images share: images in, a sheet of them out."""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from cjepa_fast.data.evaluation import eval_batches
from cjepa_fast.data.sources import ImageSet, Subset
from cjepa_fast.eval.figures.style import STYLE
from cjepa_fast.runtime.image_size import ImageSize

LETTERS = 10.5  # of a title in an inch
# left, top, width, height in pixels; colour, text
Outline = tuple[float, float, float, float, str, str]


class Column(NamedTuple):
    """Images below each other: its heading, and in [0, 1] an RGB image a row, (H, W, 3), or
    (H, W, 4), where what is transparent is hatched. colour: of heading and frames, None for no
    frame; outlines: of each image."""

    heading: str
    images: Sequence[np.ndarray]
    colour: str | None = None
    outlines: Sequence[Sequence[Outline]] = ()


def spread_over(images: ImageSet, count: int) -> torch.Tensor:
    """Positions of `count` images spread evenly over a set, ascending."""
    return torch.linspace(0, len(images) - 1, min(count, len(images))).round().long().unique()


def load_images(
    images: ImageSet,
    count: int,
    *,
    image_size: ImageSize,
    mean=(0.0,) * 3,
    std=(1.0,) * 3,
    crop: float = 1.0,
    keep: torch.Tensor | None = None,
    decoder: str = "auto",
):
    """`count` images spread evenly over a set, or those at the positions `keep`: (B, 3, H, W) fp32,
    normalised (in 0..1 where no normalisation is named)."""
    keep = spread_over(images, count) if keep is None else keep
    batches = eval_batches(
        Subset(images, keep), image_size=image_size, resize=crop, batch_size=len(keep),
        device="cpu", dtype=torch.float32, mean=mean, std=std, threads=1,
        decoder=decoder,
    )  # fmt: skip
    return torch.cat([images_BCHW.clone() for images_BCHW, _ in batches])


def as_arrays(images_BCHW: torch.Tensor, mean, std) -> np.ndarray:
    """Normalised images as RGB in [0, 1]: (B, H, W, 3). Of more channels the first three are shown,
    of fewer the first as gray."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (mean, std))
    shown_BCHW = (images_BCHW.cpu().float() * std + mean).clamp(0, 1)
    channels = [0, 1, 2] if shown_BCHW.shape[1] >= 3 else [0, 0, 0]
    return shown_BCHW[:, channels].permute(0, 2, 3, 1).numpy()


def sheet(columns: Sequence[Column], title: str, side: float = 1.8):
    """A figure of images, `side` inches wide each: a row an image, a heading over each column."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = len(columns[0].images)
    height, width = columns[0].images[0].shape[:2]
    tall = side * height / width
    with rc_context(STYLE):
        figure = Figure(figsize=(side * len(columns), tall * rows + 0.8), layout="constrained")
        axes_rc = figure.subplots(rows, len(columns), squeeze=False)
        for axes_r, column in zip(axes_rc.T, columns, strict=True):
            axes_r[0].set_title(column.heading, color=column.colour or "black")
            for row, (axes, image) in enumerate(zip(axes_r, column.images, strict=True)):
                axes.imshow(image)
                frame(axes, column.colour, 1.5)
                if image.shape[-1] == 4:
                    axes.patch.set(hatch="/////", edgecolor=STYLE["hatch.color"], linewidth=0)
                for outline in column.outlines[row] if column.outlines else ():
                    _outline(axes, *outline)
        figure.suptitle(wrapped(title, figure.get_figwidth()))
    return figure


def wrapped(title: str, width: float) -> str:
    """A title over a figure `width` inches wide, in lines that it holds."""
    return textwrap.fill(title, max(20, int(LETTERS * width)))


def frame(axes, colour: str | None, width: float, dashes="-") -> None:
    """An image's axes without ticks, with a frame where a colour is given."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(visible=colour is not None, color=colour or "none", linewidth=width)
        spine.set(linestyle=dashes, capstyle="butt")  # a spine's own caps would fill the gaps


def _outline(axes, left, top, width, height, colour: str, text: str) -> None:
    from matplotlib.patches import Rectangle

    box = Rectangle((left - 0.5, top - 0.5), width, height, fill=False, ec=colour, lw=1.5)
    axes.add_patch(box)
    label = {"fc": colour, "ec": "none", "pad": 0.8}
    axes.text(left, top, text, color="white", size=6.5, va="top", bbox=label, clip_on=True)


def as_array(figure) -> np.ndarray:
    """A figure's pixels: (H, W, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
