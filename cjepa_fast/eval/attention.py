"""Where the encoders look: the last block's attention, target and context encoder side by side.

A patch's attention is what it receives, averaged over all the queries (and over the heads).
Shapes: B images, H heads, N patches, rows x cols the grid.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from cjepa_fast.data.sources import open_images
from cjepa_fast.encoders import load_encoder
from cjepa_fast.eval import command
from cjepa_fast.eval.pictures import FIGURE, as_pictures, load_images, save
from cjepa_fast.vit import Encoder

SINGLE_HEADS = 3  # heads shown on their own, of the target encoder


def received(encoder: Encoder, images_B3HW: torch.Tensor) -> torch.Tensor:
    """Attention each patch receives, by head: (B, H, rows, cols); a head's map sums to one."""
    attention_BHNN = encoder.attention_maps(images_B3HW)
    patch = encoder.patch_size
    grid = (images_B3HW.shape[-2] // patch, images_B3HW.shape[-1] // patch)
    return attention_BHNN.float().mean(2).unflatten(-1, grid)


def most_different(maps_BHrc: torch.Tensor, count: int) -> list[int]:
    """The heads whose maps are the least even (lowest entropy, averaged over images)."""
    entropy_H = torch.special.entr(maps_BHrc).sum((-2, -1)).mean(0)
    return entropy_H.argsort()[:count].sort().values.tolist()


def draw(
    target: Encoder, context: Encoder, images_B3HW: torch.Tensor, out: Path | str, title: str
) -> Path:
    """A row an image: the picture, the target's and the context's attention, single heads.

    images_B3HW: fp32, normalised with the encoders' mean and std. Returns the file written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    target_BHrc, context_BHrc = (received(e, images_B3HW) for e in (target, context))
    heads = most_different(target_BHrc, SINGLE_HEADS)
    columns = [("target encoder", target_BHrc.mean(1)), ("context encoder", context_BHrc.mean(1))]
    columns += [(f"target, head {head + 1}", target_BHrc[:, head]) for head in heads]
    pictures = as_pictures(images_B3HW, target.mean, target.std)
    size = (1.9 * (len(columns) + 1), 1.9 * len(pictures) + 0.9)
    with rc_context(FIGURE):
        figure = Figure(figsize=size, layout="constrained")
        axes_rc = figure.subplots(len(pictures), len(columns) + 1, squeeze=False)
        for row, (picture, axes_c) in enumerate(zip(pictures, axes_rc, strict=True)):
            axes_c[0].imshow(picture)
            for axes, (_, maps) in zip(axes_c[1:], columns, strict=True):
                drawn = _overlay(axes, picture, maps[row])
        for axes, name in zip(axes_rc[0], ["image", *(name for name, _ in columns)], strict=True):
            axes.set_title(name)
        for axes in axes_rc.flat:
            axes.set_axis_off()
        figure.suptitle(title)
        bar = figure.colorbar(drawn, ax=axes_rc, shrink=0.4, pad=0.01, ticks=[0, 1])
        bar.set_ticklabels(["least", "most"])
        bar.set_label("attention received, within each map")
        return save(figure, out)


def _overlay(axes, picture_HW3: np.ndarray, map_rc: torch.Tensor):
    """The map over a pale grey copy of its picture; its own range is spread over the colours."""
    span = (map_rc.max() - map_rc.min()).clamp(min=torch.finfo(torch.float32).tiny)
    shown = ((map_rc - map_rc.min()) / span).numpy()
    height, width = picture_HW3.shape[:2]
    axes.imshow(picture_HW3.mean(2), cmap="gray", vmin=0, vmax=1)
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    return axes.imshow(
        shown, cmap="inferno", vmin=0, vmax=1, alpha=0.72, extent=extent, interpolation="bilinear"
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="RUN")
    command.add_picture(parser)
    command.add_crop(parser)


def run(args: argparse.Namespace) -> None:
    target, context = (load_encoder(args.checkpoint, which) for which in ("target", "context"))
    images_B3HW = load_images(
        open_images(args.images), args.count, image_size=target.image_size, mean=target.mean,
        std=target.std, crop=args.crop,
    )  # fmt: skip
    title = f"Attention of the last block: {Path(args.checkpoint).resolve().name}"
    print(draw(target, context, images_B3HW, args.out, title))
