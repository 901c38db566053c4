"""Masks drawn on their images.

Shapes: B images, N patches, K context patches, M target blocks, P patches a block.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cjepa_fast import config as configuration
from cjepa_fast.config import Config
from cjepa_fast.data.masks import Masks
from cjepa_fast.data.sources import Limits
from cjepa_fast.data.transform import Transform, one_by_one
from cjepa_fast.eval.figures import style
from cjepa_fast.eval.figures.sheets import Column, Outline, as_arrays, sheet
from cjepa_fast.runtime.image_size import height_width
from cjepa_fast.training.build import build_masks

BLOCK_COLOURS = (style.ORANGE, style.BLUE, style.GREEN, style.PURPLE, style.VERMILION, style.SKY)
TINT = 0.55  # of a block's colour over its image


def covered(idx_K: torch.Tensor, grid: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """Which pixels (H, W) lie in the patches of row-major indices idx_K."""
    cells = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
    cells[idx_K] = True
    cells_rc = cells.view(grid).numpy()
    return cells_rc.repeat(shape[0] // grid[0], 0).repeat(shape[1] // grid[1], 1)


def columns(
    images_BCHW: torch.Tensor, mean, std, masks: Masks, grid: tuple[int, int]
) -> list[Column]:
    """The image, what the context encoder sees, the blocks, each block alone; a row an image.

    What is hidden is transparent, which a sheet hatches. A block has its colour and number in the
    overlay, and in the heading and the frames of its own column.
    """
    images = as_arrays(images_BCHW, mean, std)
    M = masks.target_idx_BMP.shape[1]
    views = zip(*(_views(image, masks, b, grid) for b, image in enumerate(images)), strict=True)
    image, context, both, *alone = (list(shown) for shown in views)
    size = images[0].shape[:2]
    outlines = [_outlines(idx_MP, grid, size) for idx_MP in masks.target_idx_BMP.cpu()]
    return [
        Column("image", image),
        Column("context", context),
        Column("context and targets", both, outlines=outlines),
        *(Column(f"target {m + 1}", alone[m], _colour(m)) for m in range(M)),
    ]


def _outlines(idx_MP: torch.Tensor, grid: tuple[int, int], size: tuple[int, int]) -> list[Outline]:
    """Around each block, numbered."""
    tall, wide = size[0] // grid[0], size[1] // grid[1]
    found = []
    for m, idx_P in enumerate(idx_MP):
        rows, cols = idx_P // grid[1], idx_P % grid[1]
        (top, bottom), (left, right) = (map(int, (x.min(), x.max() + 1)) for x in (rows, cols))
        box = (left * wide, top * tall, (right - left) * wide, (bottom - top) * tall)
        found.append((*box, _colour(m), str(m + 1)))
    return found


def _colour(m: int) -> str:
    return BLOCK_COLOURS[m % len(BLOCK_COLOURS)]


def masks(
    config: str | Path | dict | Config,
    images: Any = (),
    count: int = 4,
    overrides: Mapping[str, Any] | None = None,
):
    """A matplotlib figure of the masks that a configuration draws, a row an image.

    config, overrides: as of `pretrain`; images: one or many, as an encoder's `embed` takes them,
    else `count` blank ones. Raises ConfigError or ValueError.
    """
    settings = configuration.from_values(config, overrides or {})
    data, sampler = settings.data, build_masks(settings)
    limits = Limits.of(data)
    transform = Transform(data.image_size, data.mean, data.std, settings.eval.crop, limits)
    blank = [torch.zeros(data.channels, *height_width(data.image_size))] * count
    given = () if isinstance(images, Sequence) and not images else one_by_one(images)
    images_BCHW = torch.stack([transform(image) for image in given] or blank)
    drawn = sampler(epoch=0, step=0, index_B=torch.arange(len(images_BCHW)))
    name = Path(config).stem if isinstance(config, str | Path) else "context and targets"
    return figure(images_BCHW, data.mean, data.std, drawn, sampler.grid, f"Masks: {name}")


def figure(images_BCHW: torch.Tensor, mean, std, masks: Masks, grid: tuple[int, int], title: str):
    return sheet(columns(images_BCHW, mean, std, masks, grid), title, side=1.7)


def _views(image_HW3: np.ndarray, masks: Masks, b: int, grid) -> list[np.ndarray]:
    """The image (H, W, 3), then with transparent pixels (H, W, 4) what `columns` lists."""
    from matplotlib.colors import to_rgb

    shape = image_HW3.shape[:2]
    context = covered(masks.context_of(b).cpu(), grid, shape)
    blocks = [covered(idx_P.cpu(), grid, shape) for idx_P in masks.target_idx_BMP[b]]
    tinted = image_HW3
    for m, block in enumerate(blocks):
        over = (1 - TINT) * tinted + TINT * np.array(to_rgb(_colour(m)), tinted.dtype)
        tinted = np.where(block[..., None], over, tinted)
    both = _only(tinted, np.logical_or.reduce([context, *blocks]))
    return [image_HW3, _only(image_HW3, context), both, *(_only(image_HW3, x) for x in blocks)]


def _only(image_HW3: np.ndarray, seen_HW: np.ndarray) -> np.ndarray:
    """(H, W, 4)"""
    return np.concatenate([image_HW3, seen_HW[..., None].astype(image_HW3.dtype)], axis=2)
