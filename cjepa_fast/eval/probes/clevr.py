"""Clevr/Count and Clevr/Dist: linear probes that count objects and tell how far the nearest stands.

The two tasks are VTAB's (Zhai et al. 2019, arXiv 1910.04867): 3 to 10 objects, and the smallest
depth among the objects' `pixel_coords` in six bins. As in the paper the images are centre crops,
in training mirrored ones too. The probes are those of `linear`.

SET is CLEVR as it unpacks (images/train/*.png, scenes/CLEVR_train_scenes.json, the same of val,
which is the test set), or a set whose images have a .json beside them: with CLEVR's "objects", or
with a count "objects" and a "distance", as the shapes set has. Its distances, which have other
units, are cut into six bins of equally many training images.
Shapes: n training images, m test images.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from cjepa_fast.data.sources import LIMITS, ImageSet, Limits, open_images
from cjepa_fast.eval.features import extract, split_by_name
from cjepa_fast.eval.options import add_checkpoint, add_features, add_sets, encoders_of
from cjepa_fast.eval.probes import linear
from cjepa_fast.eval.records import report
from cjepa_fast.eval.splits import Split, cache_of, require_memory, subsample
from cjepa_fast.model.vit import Encoder
from cjepa_fast.runtime import json_text
from cjepa_fast.runtime.distributed import broadcast_from_rank_0, rank
from cjepa_fast.runtime.hardware import default_device

DISTANCES = (8.0, 8.5, 9.0, 9.5, 10.0)  # between VTAB's bins
HEADINGS = {"question": "question", "commonest": "commonest %"}


class Fact(NamedTuple):
    """is_depth: the distance of the nearest object is CLEVR's, which VTAB's bins are for."""

    objects: int
    distance: float
    is_depth: bool


def fact_of(scene: dict, where: str) -> Fact:
    """Raises ValueError, naming `where`, for a scene without objects or distances."""
    try:
        objects = scene["objects"]
        if isinstance(objects, int):
            return Fact(objects, float(scene["distance"]), False)
        nearest = min(float(thing["pixel_coords"][2]) for thing in objects)
        return Fact(len(objects), nearest, True)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f'{where}: no scene of CLEVR ("objects", each with "pixel_coords") nor a count '
            f'"objects" with a "distance": {error!r}'
        ) from error


def facts_of_clevr(root: Path, split: str, images: ImageSet) -> list[Fact]:
    """Each image's facts, from the scenes' file. Raises OSError or ValueError where some lack."""
    path = root / "scenes" / f"CLEVR_{split}_scenes.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: CLEVR_v1.0.zip holds it beside images/")
    try:
        scenes = {
            scene["image_filename"]: scene
            for scene in json_text.parse(path.read_text(encoding="utf-8"))["scenes"]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no file of CLEVR's scenes: {error!r}") from error
    found = []
    for i in range(len(images)):
        name = images.name(i).rpartition("/")[2]
        if name not in scenes:
            raise ValueError(f"{path} has no scene of {name}, which is in images/{split}")
        found.append(fact_of(scenes[name], f"{path}, {name}"))
    return found


def facts_beside(images: ImageSet) -> list[Fact]:
    """Each image's facts, from the .json beside it. Raises ValueError naming the first without."""
    found = []
    for i in range(len(images)):
        text = images.sidecar(i, "json")
        if text is None:
            raise ValueError(
                f"{images.name(i)} has no .json beside it, nor is {images.root} CLEVR's folder "
                "with images/ and scenes/"
            )
        found.append(fact_of(json_text.parse(text), images.name(i)))
    return found


def splits_of(
    data: str, test: str | None, max_train: int | None, limits: Limits = LIMITS
) -> tuple[list[Split], list[list[Fact]]]:
    """Training and test images with their facts, in the order of their positions."""
    root = Path(data)
    if (root / "images" / "train").is_dir():
        if test:
            raise ValueError(f"--test {test}: of a CLEVR folder its own val is taken; leave it out")
        paths = [root / "images" / split for split in ("train", "val")]
        sets = [open_images(path, limits=limits) for path in paths]
        facts = [facts_of_clevr(root, s, x) for s, x in zip(("train", "val"), sets, strict=True)]
        keeps = [torch.arange(len(images)) for images in sets]
    elif test or data == "shapes":
        sets = [open_images(path, limits=limits) for path in (data, test or "shapes:val")]
        facts = [facts_beside(images) for images in sets]
        keeps = [torch.arange(len(images)) for images in sets]
    else:
        sets = [open_images(data, limits=limits)] * 2
        facts = [facts_beside(sets[0])] * 2
        keeps = list(split_by_name(sets[0]))
        if not all(map(len, keeps)):
            raise ValueError(f"{data}: {len(sets[0])} images are too few to split; name a --test")
    keeps[0] = subsample(keeps[0], max_train)
    chosen = [[fact[i] for i in keep.tolist()] for fact, keep in zip(facts, keeps, strict=True)]
    return list(zip(sets, keeps, strict=True)), chosen


def labels_of(train: list[Fact], test: list[Fact]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Classes from 0, for training (n,) and test (m,), by question: "count" and "distance"."""
    splits = train, test
    counts = [torch.tensor([fact.objects for fact in split]) for split in splits]
    fewest = min(int(count.min()) for count in counts)
    far = [torch.tensor([fact.distance for fact in split]).double() for split in splits]
    bounds = torch.tensor(DISTANCES).double()
    if not train[0].is_depth:
        bounds = far[0].quantile(torch.arange(1, 6).double() / 6)
    return {
        "count": tuple(count - fewest for count in counts),
        "distance": tuple(torch.bucketize(x, bounds) for x in far),
    }


def features_of(
    encoder: Encoder, splits: list[Split], layers: list[int], args: argparse.Namespace
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(features, positions) of the training images, these as they are and then mirrored, and of the
    test images; the features on the first rank, others may have none.

    Raises ValueError where an image could be read but once, or there is not the memory.
    """
    (train, keep), (test, test_keep) = splits
    width, each = encoder.width * len(layers), linear.BYTES[args.optimizer]
    require_memory([splits[0], *splits], width, each)
    options = {"crop": args.crop, "layers": layers, "device": default_device(), "bf16": args.bf16}
    options |= {"batch_size": args.batch_size, "threads": args.threads}
    options |= {"cache": cache_of(args), "everywhere": False}
    both = [extract(encoder, train, keep=keep, flip=flip, **options) for flip in (False, True)]
    if not torch.equal(both[0][1], both[1][1]):
        raise ValueError(
            "some images of the training set could be read only now and then: try again"
        )
    (x_nD, index_n), (mirrored_nD, _) = both
    twice = torch.cat([x_nD, mirrored_nD]) if rank() == 0 else x_nD
    return [(twice, index_n), extract(encoder, test, keep=test_keep, **options)]


def add_options(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    add_sets(parser, own_labels=False)
    add_features(parser)
    linear.add_sweep(parser)


def run(args: argparse.Namespace) -> None:
    """A row for each encoder, question and number of layers."""
    linear.complete_sweep(args)
    splits, facts = splits_of(args.data, args.test, args.max_train, args.limits)
    labels = labels_of(*facts)
    rows = []
    for name, encoder in encoders_of(args).items():
        for reading in linear.readings(encoder, args.layers):
            (features_nD, index_n), (y_mD, index_m) = features_of(
                encoder, splits, reading.blocks, args
            )
            indices = zip(splits, (index_n, index_m), strict=True)
            # an image that could not be read has no features
            at_n, at_m = (torch.searchsorted(keep, index) for (_, keep), index in indices)
            for question, (label_n, label_m) in labels.items():
                train, label_m = label_n[at_n].repeat(2), label_m[at_m]
                vectors = features_nD, train, y_mD, label_m
                commonest = 100 * label_m.bincount().max().item() / len(label_m)
                own = partial(linear.rows_of, name, encoder, vectors, reading, args, copies=2)
                found = broadcast_from_rank_0(own)
                rows += [{**row, "question": question, "commonest": commonest} for row in found]
    report(args, rows, HEADINGS | linear.headings(args), (*linear.SETTINGS, *linear.SWEEP_SETTINGS))
