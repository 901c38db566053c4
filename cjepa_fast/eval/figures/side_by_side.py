"""Figures of several checkpoints' target and context encoders on the same images.

Of a checkpoint that holds one encoder, as an export does, that one is shown.
"""

import argparse
from collections.abc import Callable
from typing import TypeVar

import torch

from cjepa_fast.checkpoint.encoders import load_encoders
from cjepa_fast.data.sources import open_images
from cjepa_fast.eval.figures.curves import short_names
from cjepa_fast.eval.figures.sheets import Column, as_arrays, load_images
from cjepa_fast.eval.options import add_crop, add_figure_options, tell_other_limits
from cjepa_fast.eval.records import Row
from cjepa_fast.model.vit import Encoder
from cjepa_fast.runtime.hardware import default_device
from cjepa_fast.runtime.image_size import with_short_side
from cjepa_fast.telemetry.progress import shown_clock

Encoders = dict[str, Encoder]  # by "target" and "context"
Shown = TypeVar("Shown")  # what is to be drawn of an encoder, before colours are chosen
Found = Callable[[Encoders, torch.Tensor], dict[str, Shown]]  # of the encoders and the images
Measured = Callable[[Encoder, torch.Tensor], Row]  # of an encoder and the images


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="runs or checkpoints")
    add_figure_options(parser)
    add_crop(parser)


def gather(
    args: argparse.Namespace, found: Found, measured: Measured, size: int | None = None
) -> tuple[Column, dict[str, Shown], str, list[Row]]:
    """The images; what `found` gives of each checkpoint, by heading; the checkpoints' names; and
    what `measured` finds of each encoder. Colours come after it, so that one scale serves all.

    size: of the images' short side in pixels, rounded to whole patches; None: what each encoder was
    trained at.
    """
    tell_other_limits(args.checkpoints, args.limits)
    images = open_images(args.images, limits=args.limits)
    column, shown, rows = None, {}, []
    names = short_names(args.checkpoints)
    for name, checkpoint in zip(names, args.checkpoints, strict=True):
        encoders = {k: x.to(default_device()) for k, x in load_encoders(checkpoint).items()}
        first = next(iter(encoders.values()))
        pixels = first.image_size
        if size:
            pixels = with_short_side(pixels, size, first.patch_size)
        images_BCHW = load_images(
            images, args.count, image_size=pixels, mean=first.mean, std=first.std, crop=args.crop
        )
        column = column or Column("image", as_arrays(images_BCHW, first.mean, first.std))
        over = f"{name}\n" if len(names) > 1 else ""
        images_BCHW = images_BCHW.to(default_device())
        with shown_clock(f"figures of {name}"):
            shown |= {over + key: x for key, x in found(encoders, images_BCHW).items()}
            rows += [
                {"encoder": f"{name}, {which}", **measured(encoder, images_BCHW)}
                for which, encoder in encoders.items()
            ]
    return column, shown, ", ".join(names), rows
