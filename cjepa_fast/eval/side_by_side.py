"""Pictures of several checkpoints' target and context encoders on the same images.

Of a checkpoint that holds one encoder, as an export does, that one is shown.
"""

import argparse
from collections.abc import Callable

import torch

from cjepa_fast.data.sources import open_images
from cjepa_fast.encoders import load_encoders
from cjepa_fast.eval import command
from cjepa_fast.eval.curves import short_names
from cjepa_fast.eval.pictures import Column, as_pictures, load_images
from cjepa_fast.progress import shown_clock
from cjepa_fast.vit import Encoder

Encoders = dict[str, Encoder]  # by "target" and "context"
Drawn = Callable[[Encoders, torch.Tensor], list[Column]]  # of the encoders and the images
Measured = Callable[[Encoder, torch.Tensor], command.Row]  # of an encoder and the images


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="runs or checkpoints")
    command.add_picture(parser)
    command.add_crop(parser)


def columns(
    args: argparse.Namespace, drawn: Drawn, measured: Measured, size: int | None = None
) -> tuple[list[Column], str, list[command.Row]]:
    """The images, then what `drawn` makes of each checkpoint; the checkpoints' names; and what
    `measured` finds of each encoder.

    size: of the images in pixels, rounded to whole patches; None: what each encoder was trained at.
    """
    images, shown, rows = open_images(args.images), [], []
    names = short_names(args.checkpoints)
    for name, checkpoint in zip(names, args.checkpoints, strict=True):
        encoders = {k: x.to(command.device()) for k, x in load_encoders(checkpoint).items()}
        first = next(iter(encoders.values()))
        patch = first.patch_size
        pixels = max(round(size / patch), 1) * patch if size else first.image_size
        images_B3HW = load_images(
            images, args.count, image_size=pixels, mean=first.mean, std=first.std, crop=args.crop
        )
        if not shown:
            shown.append(("image", as_pictures(images_B3HW, first.mean, first.std)))
        over = f"{name}\n" if len(names) > 1 else ""
        images_B3HW = images_B3HW.to(command.device())
        with shown_clock(f"pictures of {name}"):
            made = drawn(encoders, images_B3HW)
            rows += [
                {"encoder": f"{name}, {which}", **measured(encoder, images_B3HW)}
                for which, encoder in encoders.items()
            ]
        shown += [(over + heading, pictures) for heading, pictures in made]
    return shown, ", ".join(names), rows
