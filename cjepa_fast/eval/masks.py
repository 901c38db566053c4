"""A run's masks, drawn on its images.

Shapes: B images, N patches, K context patches, M target blocks, P patches a block.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from cjepa_fast import build, config
from cjepa_fast.data.sources import open_images
from cjepa_fast.eval import command
from cjepa_fast.eval.pictures import FIGURE, as_pictures, load_images, save
from cjepa_fast.masks import Masks

BLOCK_COLOURS = ("#e6550d", "#3182bd", "#31a354", "#c51b8a", "#756bb1", "#fdae6b")


def covered(idx_K: torch.Tensor, grid: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """Which pixels (H, W) lie in the patches of row-major indices idx_K."""
    cells = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
    cells[idx_K] = True
    cells_rc = cells.view(grid).numpy()
    return cells_rc.repeat(shape[0] // grid[0], 0).repeat(shape[1] // grid[1], 1)


def draw(
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


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="RUN")
    command.add_picture(parser, images="the run's own")


def run(args: argparse.Namespace) -> None:
    """Raises FileNotFoundError where there is no run's config.json."""
    folder = command.run_of(args.checkpoint)
    if folder is None:
        raise FileNotFoundError(
            f"{args.checkpoint}: no config.json there, so it is no run's folder"
        )
    settings = config.read(folder)
    data, sampler = settings.data, build.build_masks(settings)
    images_B3HW = load_images(
        open_images(args.images or config.expanded(data.path)), args.count,
        image_size=data.image_size, mean=data.mean, std=data.std,
    )  # fmt: skip
    masks = sampler(epoch=0, step=0, places_B=torch.arange(len(images_B3HW)))
    title = (
        f'Masks, sampler "{settings.mask.sampler}", context "{settings.mask.context}": '
        f"{masks.context_k:g} context patches, "
        f"{masks.target_idx_BMP.shape[1]} x {masks.target_idx_BMP.shape[2]} target patches"
    )
    print(draw(images_B3HW, data.mean, data.std, masks, sampler.grid, args.out, title))
