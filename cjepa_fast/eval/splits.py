"""Labelled training and test images: which they are, their classes, and their features."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from cjepa_fast.data import locations, rng
from cjepa_fast.data.sources import LIMITS, ImageSet, Limits, NothingUsable, open_images
from cjepa_fast.eval.features import extract, split_by_name
from cjepa_fast.model.vit import Encoder
from cjepa_fast.runtime import caches, distributed
from cjepa_fast.runtime.hardware import default_device
from cjepa_fast.runtime.memory import free_bytes
from cjepa_fast.runtime.printable import printable

LABELLED = (
    "it needs a folder for each class, a .cls or .json for each image, or a file of labels "
    "(--labels, --test-labels; a list)"
)
SPLITS = {locations.TRAINING, *locations.OTHER_SPLITS}
Split = tuple[ImageSet, torch.Tensor]  # a set and the indices used of it


def labelled(
    path: str, label_list: str | None = None, limits: Limits = LIMITS, part: bool = False
) -> ImageSet:
    """The images that have a label; the others are left out aloud. Raises ValueError where those
    are more, unless a part of the images is meant. label_list: a file of labels, instead of the
    images' own."""
    try:
        images = open_images(path, labelled=True, label_list=label_list, limits=limits)
    except NothingUsable as error:
        raise ValueError(f"{path} has no labels: {LABELLED} ({error})") from error
    without = images.unlabelled
    if without > len(images) and not part:
        raise ValueError(
            f"{path}: {without} of {without + len(images)} images have no label: {LABELLED}"
        )
    if images.classes and {name.lower() for name in images.classes} <= SPLITS:
        raise ValueError(
            f"{path} holds splits, not classes ({', '.join(images.classes)}): name one of these "
            "folders, and another as the test set"
        )
    return images


def labelled_splits(
    data: str,
    test: str | None,
    max_train: int | None = None,
    max_test: int | None = None,
    labels: str | None = None,
    test_labels: str | None = None,
    limits: Limits = LIMITS,
) -> tuple[Split, Split]:
    """Training and test images, at most so many. labels, test_labels: files of them. limits: what
    counts as usable, and how it is read.

    Without `test`, what `held_out` says, else 20 % of `data` by a hash of the names; the synthetic
    dataset has its own held-out split. `test` may be `data`, where files of labels divide its
    images. Says how many test images no probe can name. Raises ValueError where labels are missing,
    or an image is in both.
    """
    test = held_out(data, test)
    same = test is not None and _same_file(data, test)
    if same and _same_file(labels, test_labels):
        which = f"with the labels of {labels}" if labels else "with its own labels"
        raise ValueError(
            f"{data} is the training set and the test set, both {which}: name another test set, "
            "files of labels for each, or no test set, which keeps 20 % of the images for testing"
        )
    train_set = labelled(data, labels, limits=limits, part=same)
    if test is None and data == "shapes":
        test = "shapes:val"
    if test is None and test_labels:
        raise ValueError(f"--test-labels {test_labels}: name the images too, by --test")
    if test is None:
        train_keep, test_keep = split_by_name(train_set)
        test_set = train_set
    else:
        test_set = labelled(test, test_labels, limits=limits, part=same)
        train_keep, test_keep = torch.arange(len(train_set)), torch.arange(len(test_set))
        names = (labels or data, test_labels or test) if same else (data, test)
        _refuse_shared(train_set, test_set, " and ".join(names))
        _match_classes(list(zip(names, (train_set, test_set), strict=True)))
    if not len(train_keep) or not len(test_keep):
        raise ValueError(
            f"{data}: splitting its {len(train_set)} images leaves {len(train_keep)} for training "
            f"and {len(test_keep)} for testing; name a test set with --test"
        )
    splits = (
        (train_set, subsample(train_keep, max_train)),
        (test_set, subsample(test_keep, max_test)),
    )
    say_unlearnt(*splits)
    return splits


def say_unlearnt(train: Split, test: Split) -> None:
    """Say, on the first rank, how many test images are of classes without a training image: no
    probe can name these."""
    learnt_n, label_m = (images.labels[keep] for images, keep in (train, test))
    strange_k = label_m[~torch.isin(label_m, learnt_n)]
    if len(strange_k) and distributed.rank() == 0:
        print(
            f"{len(strange_k.unique())} of the {len(label_m.unique())} classes tested have no "
            f"training image, so {len(strange_k)} of {len(label_m)} test images cannot be named "
            "rightly: train on more images"
        )


def held_out(data: str, test: str | None) -> str | None:
    """The test set, where none is named that of a folder which holds splits: its val/ or the like,
    as its train/ is trained on; None without."""
    beside = locations.split_beside(Path(data)) if test is None else None
    return str(beside) if beside else test


def splits_of(args: argparse.Namespace) -> tuple[Split, Split]:
    """`labelled_splits` by the options of `add_sets`. args.test becomes what is tested on, where
    that is a set of its own, for `report`."""
    args.test = held_out(args.data, args.test)
    files = {"labels": args.labels, "test_labels": args.test_labels}
    return labelled_splits(args.data, args.test, args.max_train, **files, limits=args.limits)


def _same_file(one: str | None, other: str | None) -> bool:
    if one is None or other is None:
        return one is other
    return os.path.realpath(one) == os.path.realpath(other)


def _refuse_shared(train: ImageSet, test: ImageSet, both: str) -> None:
    tested = set(test.files())
    if shared := [file for file in train.files() if file in tested]:
        first = printable(os.fsdecode(shared[0]))
        raise ValueError(
            f"{both}: {len(shared)} images are in both, {first} among them: an image for testing "
            "must not be trained on"
        )


def _match_classes(splits: list[tuple[str, ImageSet]]) -> None:
    """Number the second split's classes as the first does, by their names. splits: each with what
    names it. Classes of the first alone are said. Raises ValueError for one of the second alone."""
    (one, train), (other, test) = splits
    if (train.classes is None) != (test.classes is None):
        raise ValueError(
            f"{one} and {other}: one has names of classes, the other numbers: name these in a "
            "classes.txt, a name a line from class 0 on, beside the shards or the list of labels"
        )
    own, tested = (set(s.classes or s.labels.unique().tolist()) for s in (train, test))
    if only := tested - own:
        raise ValueError(
            f"{one} and {other} do not have the same classes: {first_names(only)} only in {other}, "
            "of which nothing is trained on"
        )
    if (only := own - tested) and distributed.rank() == 0:
        print(f"{other} has no image of {len(only)} of the {len(own)} classes: {first_names(only)}")
    if test.classes != train.classes:
        number = torch.tensor([train.classes.index(name) for name in test.classes])
        test.labels, test.classes = number[test.labels], train.classes


def first_names(classes: set[str] | set[int]) -> str:
    return f"{', '.join(map(repr, sorted(classes)[:3]))}{', ...' * (len(classes) > 3)}"


def require_classes(label_n: torch.Tensor, what: str) -> None:
    """Raises ValueError where there is but one class to learn."""
    if len(label_n.unique()) < 2:
        raise ValueError(f"{what} needs at least two classes among the training images")


def class_numbers(splits: tuple[Split, Split]) -> torch.Tensor:
    """`numbers_of` both splits' labels."""
    return numbers_of(torch.cat([images.labels[keep] for images, keep in splits]))


def numbers_of(label_n: torch.Tensor) -> torch.Tensor:
    """The number that each of the C classes has in the labels, ascending: (C,). All from 0 on; but
    where most of those would stand empty, as of ids, those alone that are used."""
    used = label_n.unique()
    every = 1 + int(used[-1])
    return torch.arange(every) if every <= 2 * len(used) else used


def subsample(keep: torch.Tensor, most: int | None) -> torch.Tensor:
    """At most so many positions, drawn evenly, ascending."""
    if most is None or most >= len(keep):
        return keep
    return keep[rng.permutation(0, 0, len(keep))[:most].sort().values]


def vectors_of(
    encoder: Encoder,
    splits: tuple[Split, Split],
    args: argparse.Namespace,
    layers: Sequence[int] | None = None,
    bytes_each: int = 4,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features (n, layers * D) and labels (n,) of both splits, one after the other, on the CPU. The
    features are on the first rank, others may have none. bytes_each: as in `require_memory`."""
    require_memory(splits, encoder.width * len(layers or [0]), bytes_each)
    found = []
    for images, keep in splits:
        vectors, index = extract(
            encoder, images, keep=keep, crop=args.crop, layers=layers, device=default_device(),
            bf16=args.bf16, batch_size=args.batch_size, threads=args.threads, cache=cache_of(args),
            everywhere=False,
        )  # fmt: skip
        found += [vectors, images.labels[index]]
    encoder.cpu()
    return tuple(found)


def require_memory(splits: Sequence[Split], width: int, bytes_each: int) -> None:
    """Raises ValueError, on all ranks, where the first has not the memory for features of `width`
    of all splits. bytes_each: what a value takes at the peak, with the copies that a probe makes
    of it."""
    images = sum(len(keep) for _, keep in splits)
    needed = width * bytes_each * images

    def check() -> None:
        free = free_bytes()
        if free is not None and needed > free:
            raise ValueError(
                f"{images:,} images with {width:,} values each take {needed / 2**30:.1f} GiB of "
                f"memory at once, of {free / 2**30:.1f} free: use fewer, --max-train N"
            )

    distributed.broadcast_from_rank_0(check)


def cache_of(args: argparse.Namespace) -> Path | None:
    """The folder features are kept in."""
    return None if args.no_cache else caches.folder("features")
