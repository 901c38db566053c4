"""The masks that one or several runs draw, on images."""

import argparse
import math
from pathlib import Path

import torch

from cjepa_fast import config
from cjepa_fast.checkpoint.encoders import run_of
from cjepa_fast.config import Config
from cjepa_fast.data.masks import Masks
from cjepa_fast.data.sources import ImageSet, Limits, open_images
from cjepa_fast.eval.figures.curves import short_names
from cjepa_fast.eval.figures.mask_columns import columns
from cjepa_fast.eval.figures.sheets import Column, load_images, sheet
from cjepa_fast.eval.figures.style import save
from cjepa_fast.eval.options import add_figure_options
from cjepa_fast.eval.records import print_numbers
from cjepa_fast.training import build

HEADINGS = {
    "sampler": "sampler",
    "context": "context",
    "context_patches": "context patches",
    "blocks": "blocks",
    "block_patches": "patches a block",
    "patches": "of",
}
ALONE = 3  # columns of a run beside others: its image, its context, its context and targets


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoints", metavar="RUN", nargs="*", help="or a configuration: --config"
    )
    parser.add_argument("--config", metavar="FILE", help="a configuration's masks too")
    add_figure_options(parser, images="the run's own")


def run(args: argparse.Namespace) -> None:
    """Raises FileNotFoundError where there is no run's config.json."""
    names = short_names(args.checkpoints) if args.checkpoints else []
    named = dict(zip(names, map(_of_run, args.checkpoints), strict=True))
    if args.config:
        named[Path(args.config).stem] = config.load(args.config)
    if not named:
        raise ValueError("whose masks? Name a run's folder, or a configuration with --config")
    shown: list[Column] = []
    rows = []
    for name, settings in named.items():
        paths = args.images or config.image_paths(settings.data)
        images = open_images(paths, limits=Limits.of(settings.data))
        made, masks = _drawn(settings, images, args.count)
        if len(named) > 1:
            made = [column._replace(heading=f"{name}\n{column.heading}") for column in made[:ALONE]]
        shown += made
        _, M, P = masks.target_idx_BMP.shape
        patches = math.prod(build.build_masks(settings).grid)
        facts = settings.mask.sampler, settings.mask.context, masks.context_k, M, P, patches
        rows.append({"run": name, **dict(zip(HEADINGS, facts, strict=True))})
    print_numbers(args, rows, HEADINGS, "run")
    print(save(_sheet(shown, ", ".join(named)), args.out))


def draw(settings: Config, images: ImageSet, out: Path, count: int = 4) -> Path:
    """The first masks of a training, on the first images of its set."""
    shown, _ = _drawn(settings, images, count)
    return save(_sheet(shown, Path(settings.run.dir).name), out)


def _sheet(shown: list[Column], names: str):
    return sheet(shown, f"Context and targets: {names} (hatched: not seen)", side=1.7)


def _of_run(path: str) -> Config:
    folder = run_of(path)
    if folder is None:
        raise FileNotFoundError(f"{path}: no config.json there, so it is no run's folder")
    return config.load_run(folder)


def _drawn(settings: Config, images: ImageSet, count: int) -> tuple[list[Column], Masks]:
    data, sampler = settings.data, build.build_masks(settings)
    images_BCHW = load_images(
        images, count, image_size=data.image_size, mean=data.mean, std=data.std
    )
    masks = sampler(epoch=0, step=0, index_B=torch.arange(len(images_BCHW)))
    return columns(images_BCHW, data.mean, data.std, masks, sampler.grid), masks
