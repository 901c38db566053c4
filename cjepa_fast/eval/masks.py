"""A run's masks, drawn on its images."""

import argparse

import torch

from cjepa_fast import build, config
from cjepa_fast.data.sources import open_images
from cjepa_fast.eval import command
from cjepa_fast.eval.drawn_masks import figure
from cjepa_fast.eval.pictures import load_images, save


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
    print(save(figure(images_B3HW, data.mean, data.std, masks, sampler.grid, title), args.out))
