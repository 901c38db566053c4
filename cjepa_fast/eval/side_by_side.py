"""Pictures of several checkpoints' target and context encoders on the same images."""

import argparse
from collections.abc import Callable

import torch

from cjepa_fast.data.sources import open_images
from cjepa_fast.encoders import load_encoder
from cjepa_fast.eval import command
from cjepa_fast.eval.curves import short_names
from cjepa_fast.eval.pictures import Column, as_pictures, load_images
from cjepa_fast.vit import Encoder

Drawn = Callable[[Encoder, Encoder, torch.Tensor], list[Column]]  # of target, context, images


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="runs or checkpoints")
    command.add_picture(parser)
    command.add_crop(parser)


def columns(
    args: argparse.Namespace, drawn: Drawn, size: int | None = None
) -> tuple[list[Column], str]:
    """The images, then what `drawn` makes of each checkpoint, and the checkpoints' names.

    size: of the images in pixels, rounded to whole patches; None: what each encoder was trained at.
    """
    images, shown = open_images(args.images), []
    names = short_names(args.checkpoints)
    for name, checkpoint in zip(names, args.checkpoints, strict=True):
        target, context = (load_encoder(checkpoint, which) for which in ("target", "context"))
        patch = target.patch_size
        pixels = max(round(size / patch), 1) * patch if size else target.image_size
        images_B3HW = load_images(
            images, args.count, image_size=pixels, mean=target.mean, std=target.std, crop=args.crop
        )
        if not shown:
            shown.append(("image", as_pictures(images_B3HW, target.mean, target.std)))
        over = f"{name}\n" if len(names) > 1 else ""
        made = drawn(target, context, images_B3HW)
        shown += [(over + heading, pictures) for heading, pictures in made]
    return shown, ", ".join(names)
