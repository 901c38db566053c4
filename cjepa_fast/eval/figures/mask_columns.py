"""Masks drawn on their images.

Shapes: B images, N patches, K context patches, M target blocks, P patches a block.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cjepa_fast import config as configuration
from cjepa_fast.checkpoint.pretrained import Transform
from cjepa_fast.config import Config
from cjepa_fast.data.masks import Masks
from cjepa_fast.eval.figures.sheets import Column, as_arrays, sheet
from cjepa_fast.runtime.image_size import height_width
from cjepa_fast.training.build import build_masks

BLOCK_COLOURS = ("#e6550d", "#3182bd", "#31a354", "#c51b8a", "#756bb1", "#fdae6b")


def covered(idx_K: torch.Tensor, grid: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """Which pixels (H, W) lie in the patches of row-major indices idx_K."""
    cells = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
    cells[idx_K] = True
    cells_rc = cells.view(grid).numpy()
    return cells_rc.repeat(shape[0] // grid[0], 0).repeat(shape[1] // grid[1], 1)


def columns(
    images_B3HW: torch.Tensor, mean, std, masks: Masks, grid: tuple[int, int]
) -> list[Column]:
    """The image, what the context encoder sees, the blocks, each block alone; a row an image."""
    images = as_arrays(images_B3HW, mean, std)
    M = masks.target_idx_BMP.shape[1]
    names = ["image", "context", "context and targets", *(f"target {m + 1}" for m in range(M))]
    views = [_views(image, masks, b, grid) for b, image in enumerate(images)]
    return list(zip(names, zip(*views, strict=True), strict=True))


def masks(
    config: str | Path | dict | Config,
    images: Sequence = (),
    count: int = 4,
    overrides: Mapping[str, Any] | None = None,
):
    """A matplotlib figure of the masks that a configuration draws, a row an image.

    config, overrides: as of `pretrain`; images: as an encoder's `embed` takes them, else `count`
    blank ones. Raises ConfigError or ValueError.
    """
    settings = configuration.of(config, overrides or {})
    data, sampler = settings.data, build_masks(settings)
    transform = Transform(data.image_size, data.mean, data.std, settings.eval.crop)
    blank = [torch.zeros(data.channels, *height_width(data.image_size))] * count
    images_B3HW = torch.stack([transform(image) for image in images] or blank)
    drawn = sampler(epoch=0, step=0, index_B=torch.arange(len(images_B3HW)))
    title = f"Masks: {config if isinstance(config, str | Path) else 'context and targets'}"
    return figure(images_B3HW, data.mean, data.std, drawn, sampler.grid, title)


def figure(images_B3HW: torch.Tensor, mean, std, masks: Masks, grid: tuple[int, int], title: str):
    return sheet(columns(images_B3HW, mean, std, masks, grid), title, side=1.7)


def _views(image_HW3: np.ndarray, masks: Masks, b: int, grid) -> list[np.ndarray]:
    shape = image_HW3.shape[:2]
    hidden = np.full_like(image_HW3, 0.92)
    context = covered(masks.context_of(b).cpu(), grid, shape)[..., None]
    blocks = [covered(idx_P.cpu(), grid, shape)[..., None] for idx_P in masks.target_idx_BMP[b]]
    both = np.where(context, image_HW3, hidden)
    for block, colour in zip(blocks, _colours(len(blocks)), strict=True):
        both = np.where(block, 0.45 * both + 0.55 * colour, both)
    alone = [np.where(block, image_HW3, hidden) for block in blocks]
    return [image_HW3, np.where(context, image_HW3, hidden), both, *alone]


def _colours(count: int) -> list[np.ndarray]:
    from matplotlib.colors import to_rgb

    return [np.array(to_rgb(BLOCK_COLOURS[m % len(BLOCK_COLOURS)])) for m in range(count)]
