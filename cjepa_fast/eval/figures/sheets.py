"""What the drawings share: images in, figures out."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from cjepa_fast.data.evaluation import eval_batches
from cjepa_fast.data.sources import ImageSet
from cjepa_fast.eval.features import Subset
from cjepa_fast.runtime.image_size import ImageSize

FIGURE = {"font.size": 9, "axes.titlesize": 9, "figure.titlesize": 11, "figure.dpi": 130}
Column = tuple[str, Sequence[np.ndarray]]  # its heading, and an RGB image in [0, 1] for each row


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
    return torch.cat([images_B3HW.clone() for images_B3HW, _ in batches])


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

    rows = len(columns[0][1])
    height, width = columns[0][1][0].shape[:2]
    tall = side * height / width
    with rc_context(FIGURE):
        figure = Figure(figsize=(side * len(columns), tall * rows + 0.8), layout="constrained")
        axes_rc = figure.subplots(rows, len(columns), squeeze=False)
        for axes_r, (heading, shown) in zip(axes_rc.T, columns, strict=True):
            axes_r[0].set_title(heading)
            for axes, image_HW3 in zip(axes_r, shown, strict=True):
                axes.imshow(image_HW3)
        for axes in axes_rc.flat:
            axes.set_axis_off()
        figure.suptitle(title)
    return figure


def save(figure, out: Path | str) -> Path:
    """Write a figure; its folder is made. Raises ValueError for an ending that cannot be drawn."""
    out = Path(out)
    endings = figure.canvas.get_supported_filetypes()
    if out.suffix.lstrip(".") not in endings:
        raise ValueError(f"{out}: cannot draw to {out.suffix!r}; use one of {', '.join(endings)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    return out


def as_array(figure) -> np.ndarray:
    """A figure's pixels: (H, W, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
