"""Drawn on real images: the masks. Also what the other drawings share.

Shapes: B images, N patches, K context patches, M target blocks, P patches a block.
"""

from pathlib import Path

import numpy as np
import torch

from cjepa_fast.data.evaluation import eval_batches
from cjepa_fast.data.sources import ImageSet
from cjepa_fast.eval.features import Subset
from cjepa_fast.masks import Masks

FIGURE = {"font.size": 9, "axes.titlesize": 9, "figure.titlesize": 11, "figure.dpi": 130}
BLOCK_COLOURS = ("#e6550d", "#3182bd", "#31a354", "#c51b8a", "#756bb1", "#fdae6b")


def load_images(images: ImageSet, count: int, *, image_size: int, mean, std, crop: float = 1.0):
    """`count` images spread evenly over a set: (B, 3, image_size, image_size) fp32, normalised."""
    keep = torch.linspace(0, len(images) - 1, min(count, len(images))).round().long().unique()
    batches = eval_batches(
        Subset(images, keep), image_size=image_size, resize=crop, batch_size=len(keep),
        device="cpu", dtype=torch.float32, mean=mean, std=std, threads=1,
    )  # fmt: skip
    return torch.cat([images_B3HW.clone() for images_B3HW, _ in batches])


def as_pictures(images_B3HW: torch.Tensor, mean, std) -> np.ndarray:
    """Normalised images as RGB in [0, 1]: (B, H, W, 3)."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (mean, std))
    return (images_B3HW.cpu().float() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def covered(idx_K: torch.Tensor, grid: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """Which pixels (H, W) lie in the patches of row-major indices idx_K."""
    cells = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
    cells[idx_K] = True
    cells_rc = cells.view(grid).numpy()
    return cells_rc.repeat(shape[0] // grid[0], 0).repeat(shape[1] // grid[1], 1)


def draw_masks(
    images_B3HW: torch.Tensor, mean, std, masks: Masks, grid: tuple[int, int], out: Path | str,
    title: str,
) -> Path:  # fmt: skip
    """A row an image: the picture, what the context encoder sees, the blocks, each block alone."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    pictures = as_pictures(images_B3HW, mean, std)
    B, M = masks.target_idx_BMP.shape[:2]
    names = ["image", "context", "context and targets", *(f"target {m + 1}" for m in range(M))]
    size = (1.7 * len(names), 1.7 * B + 0.7)
    with rc_context(FIGURE):
        figure = Figure(figsize=size, layout="constrained")
        axes_rc = figure.subplots(B, len(names), squeeze=False)
        for b, axes_c in enumerate(axes_rc):
            for axes, shown in zip(axes_c, _views(pictures[b], masks, b, grid), strict=True):
                axes.imshow(shown)
        for axes, name in zip(axes_rc[0], names, strict=True):
            axes.set_title(name)
        for axes in axes_rc.flat:
            axes.set_axis_off()
        figure.suptitle(title)
        return save(figure, out)


def _views(picture_HW3: np.ndarray, masks: Masks, b: int, grid) -> list[np.ndarray]:
    shape = picture_HW3.shape[:2]
    hidden = np.full_like(picture_HW3, 0.92)
    context = covered(masks.context_of(b).cpu(), grid, shape)[..., None]
    blocks = [covered(idx_P.cpu(), grid, shape)[..., None] for idx_P in masks.target_idx_BMP[b]]
    both = np.where(context, picture_HW3, hidden)
    for block, colour in zip(blocks, _colours(len(blocks)), strict=True):
        both = np.where(block, 0.45 * both + 0.55 * colour, both)
    alone = [np.where(block, picture_HW3, hidden) for block in blocks]
    return [picture_HW3, np.where(context, picture_HW3, hidden), both, *alone]


def _colours(count: int) -> list[np.ndarray]:
    from matplotlib.colors import to_rgb

    return [np.array(to_rgb(BLOCK_COLOURS[m % len(BLOCK_COLOURS)])) for m in range(count)]


def save(figure, out: Path | str) -> Path:
    """Write a figure; its folder is made. Raises ValueError for an ending that cannot be drawn."""
    out = Path(out)
    endings = figure.canvas.get_supported_filetypes()
    if out.suffix.lstrip(".") not in endings:
        raise ValueError(f"{out}: cannot draw to {out.suffix!r}; use one of {', '.join(endings)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    return out
