"""Few labels: the encoder fine-tuned, or probed, on a share of each class's images.

The paper's protocol for 1 %: fine-tuning of 50 epochs, batch 512, layer decay 0.75, label smoothing
0.1. A share has the same number of images in each class, those whose names hash lowest, so 1 % lies
within 10 % on every machine. The official splits of ImageNet are lists of names: `--list`.
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path

import torch

from cjepa_fast.checkpoint.encoders import load_encoder
from cjepa_fast.data.sources import ImageSet
from cjepa_fast.eval.features import name_hashes
from cjepa_fast.eval.finetuning import classify, recipe
from cjepa_fast.eval.options import add_checkpoint, add_sets, encoders_of, up_to_one
from cjepa_fast.eval.probes import linear
from cjepa_fast.eval.records import report
from cjepa_fast.eval.splits import say_unlearnt, splits_of

PROBING = {option: f"--{option}" for option in linear.SWEEP_SETTINGS}
PROBING |= {"batch": "--probe-batch-size", "no_cache": "--no-cache"}
TUNING = {option: f"--{option}" for option in ("set", "resume", "out")}
TUNING |= {"micro_batch_size": "--micro-batch-size"}
HEADINGS = {"labels": "labels", **linear.HEADINGS, **classify.HEADINGS}


def drawn(images: ImageSet, keep_n: torch.Tensor, share: float) -> torch.Tensor:
    """Positions, ascending: of each class the same number, `share` of keep_n in all.

    Raises ValueError where that is no image, or more than a class has.
    """
    label_n = images.labels[keep_n]
    classes = label_n.unique()
    count = round(share * len(keep_n) / len(classes))
    if not count:
        raise ValueError(
            f"--share {share:g} of {len(keep_n)} images in {len(classes)} classes is not one image "
            "of each: ask for a larger share or bring more images"
        )
    hash_n, chosen = name_hashes(images)[keep_n], []
    for label in classes:
        mine = keep_n[label_n == label]
        if len(mine) < count:
            name = images.classes[label] if images.classes else f"number {label}"
            raise ValueError(
                f"--share {share:g} wants {count} images of each class, and class {name} has "
                f"{len(mine)}: ask for a smaller share"
            )
        chosen.append(mine[hash_n[label_n == label].argsort()[:count]])
    return torch.cat(chosen).sort().values


def listed(images: ImageSet, keep_n: torch.Tensor, file: Path) -> torch.Tensor:
    """Positions of the images that a file names, one a line, by path or by last part alone.

    Raises ValueError where one is not among keep_n, or is several, OSError where there is no such
    file.
    """
    names = {line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()}
    at = {images.name(i): i for i in keep_n.tolist()}
    ends: dict[str, list[str]] = {}
    for path in at:
        ends.setdefault(path.rpartition("/")[2], []).append(path)
    found, missing = set(), []
    for name in sorted(names):
        paths = [name] if name in at else ends.get(name, [])
        if len(paths) > 1:
            raise ValueError(
                f"{file}: {name} may be {paths[0]} or {paths[1]}: write the path below the folder"
            )
        found.update(at[path] for path in paths)
        missing += [] if paths else [name]
    if missing:
        raise ValueError(
            f"{file}: {len(missing)} of its {len(names)} names are not among the training images; "
            f"the first is {missing[0]}"
        )
    if not found:
        raise ValueError(f"{file} names no image")
    return torch.tensor(sorted(found))


def shares(text: str) -> list[float]:
    return [up_to_one(part) for part in text.split(",")]


def add_options(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    add_sets(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--share", type=shares, default=[0.01, 0.1], metavar="LIST",
                       help="of the labels")  # fmt: skip
    which.add_argument("--list", type=Path, metavar="FILE", help="names of images instead")
    parser.add_argument("--probe", action="store_true", help="linear probes, which are cheap")
    classify.add_tuning(parser)
    linear.add_sweep(parser)
    parser.add_argument("--no-cache", action="store_true", help="keep no features on disk")
    parser.set_defaults(default=parser.get_default)


def run(args: argparse.Namespace) -> None:
    """A row for each encoder and share, and with --probe for each number of layers.

    Raises ValueError for an option of the other of the two ways.
    """
    for option, name in (TUNING if args.probe else PROBING).items():
        if getattr(args, option) != args.default(option):
            way = "without" if args.probe else "with"
            raise ValueError(f"{name} is for semi {way} --probe")
    linear.complete_sweep(args)
    (images, keep_n), test = splits_of(args)
    if args.list:
        few = {args.list.name: listed(images, keep_n, args.list)}
    else:
        few = {f"{share:.4g}": drawn(images, keep_n, share) for share in args.share}
    whole = recipe.recipe_of(load_encoder(args.checkpoint, args.which))
    chosen = classify.changed(replace(whole, **recipe.FEW_LABELS), args.set)
    args.recipe = asdict(chosen)
    rows = []
    for labels, few_n in few.items():
        splits = (images, few_n), test
        say_unlearnt(*splits)
        for name, encoder in encoders_of(args).items():
            if args.probe:
                found = []
                for reading in linear.readings(encoder, args.layers):
                    found += linear.probed(name, encoder, splits, reading, args)
            else:
                folder = classify.folder_of(args) / labels / name
                found = [classify.tuned_row(name, encoder, splits, chosen, args, folder)]
            rows += [{**row, "labels": labels} for row in found]
    settings = ("share", "list", "probe", *classify.SETTINGS)
    if args.probe:
        settings = ("share", "list", "probe", *linear.SETTINGS, *linear.SWEEP_SETTINGS)
    headings = {**linear.headings(args), "labels": "labels"} if args.probe else HEADINGS
    report(args, rows, {"labels": "labels", **headings}, settings)
