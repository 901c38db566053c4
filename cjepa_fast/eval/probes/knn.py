"""k nearest neighbours under cosine similarity, each voting with exp(similarity / temperature).

DINO's protocol (Caron et al. 2021, arXiv 2104.14294): k = 20, temperature 0.07.
Shapes: n training images, m test images, D width, C classes.
"""

import argparse
import math
from functools import partial

import torch
import torch.nn.functional as F

from cjepa_fast.data.sources import ImageSet
from cjepa_fast.eval.features import image_vectors
from cjepa_fast.eval.options import (
    above_zero,
    add_checkpoint,
    add_features,
    add_sets,
    encoders_of,
    positive,
)
from cjepa_fast.eval.probes import linear
from cjepa_fast.eval.records import report
from cjepa_fast.eval.splits import require_memory, splits_of, vectors_of
from cjepa_fast.model.vit import Encoder
from cjepa_fast.runtime import distributed
from cjepa_fast.runtime.hardware import default_device
from cjepa_fast.runtime.image_size import ImageSize, height_width, with_short_side
from cjepa_fast.telemetry.progress import shown_bar

HEADINGS = {
    "train_images": "train",
    "test_images": "test",
    "top1": "kNN %",
    "top1_centred": "mean-subtracted",
    "linear": "logistic %",
}
SETTINGS = (*linear.SETTINGS, "k", "temperature")
TRAIN, TEST = 65536, 2048  # images of either split that are compared at a time
PIXELS = (
    32  # raw pixels are compared at this short side: a plain kNN on more gains nothing and is slow
)


def predict(
    train_nD: torch.Tensor,
    label_n: torch.Tensor,
    test_mD: torch.Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    centre: bool = False,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The class with the most votes for each test image: (m,) int64, on the CPU.

    centre: subtract the training mean from both splits first, so that what all images share does
    not hide what sets them apart. device: to compare on, a part of the training images at a time.
    Raises ValueError for k or temperature below what makes sense.
    """
    if not 1 <= k <= len(train_nD):
        raise ValueError(f"k = {k}: must be from 1 to the {len(train_nD)} training images")
    if temperature <= 0:
        raise ValueError(f"temperature = {temperature}: must be above 0")
    mean_D = train_nD.mean(0) * centre

    def unit(x_nD: torch.Tensor) -> torch.Tensor:
        return F.normalize((x_nD - mean_D).to(device, torch.float32), dim=1)

    test_mD = unit(test_mD)
    nearest = test_mD.new_empty(len(test_mD), 0), label_n.new_empty(len(test_mD), 0, device=device)
    with shown_bar(len(train_nD) * len(test_mD), "neighbours", "pair") as bar:
        for train_tD, label_t in zip(train_nD.split(TRAIN), label_n.split(TRAIN), strict=True):
            here = _nearest(test_mD, unit(train_tD), label_t.to(device), k, bar)
            both = [torch.cat(pair, 1) for pair in zip(nearest, here, strict=True)]
            similarity_mk, at_mk = both[0].topk(min(k, both[0].shape[1]), dim=1)
            nearest = similarity_mk, both[1].gather(1, at_mk)
    similarity_mk, label_mk = nearest
    # relative to the nearest: the same winner, and no overflow at a low temperature
    weight_mk = ((similarity_mk - similarity_mk[:, :1]) / temperature).exp()
    classes_C = label_n.unique().to(device)  # their numbers may be large and far apart
    class_mk, winner = torch.searchsorted(classes_C, label_mk), []
    for class_Bk, weight_Bk in zip(class_mk.split(TEST), weight_mk.split(TEST), strict=True):
        votes_BC = torch.zeros(len(class_Bk), len(classes_C), device=device)
        winner.append(votes_BC.scatter_add_(1, class_Bk, weight_Bk).argmax(1))
    return classes_C[torch.cat(winner)].cpu()


def _nearest(test_mD, train_tD, label_t, k: int, bar) -> tuple[torch.Tensor, torch.Tensor]:
    """Similarities and labels of the nearest of some training images, at most k: (m, <= k)."""
    found = []
    for test_BD in test_mD.split(TEST):
        found.append((test_BD @ train_tD.T).topk(min(k, len(train_tD)), dim=1))
        bar.update(len(test_BD) * len(train_tD))
    return torch.cat([x.values for x in found]), label_t[torch.cat([x.indices for x in found])]


def top1(train_nD, label_n, test_mD, test_label_m, **options) -> float:
    """Percent of the test images classified rightly; options as in `predict`."""
    right_m = predict(train_nD, label_n, test_mD, **options) == test_label_m
    return 100 * right_m.double().mean().item()


def pixel_baselines(
    train: ImageSet,
    test: ImageSet,
    *,
    train_keep: torch.Tensor | None = None,
    test_keep: torch.Tensor | None = None,
    crop: float = 1.0,
    image_size: ImageSize = PIXELS,
    channels: int = 3,
    threads: int = 2,
    **options,
) -> dict[str, dict[str, float]]:
    """kNN in percent from what needs no learning, plain ("top1") and mean-subtracted
    ("top1_centred"), for "raw pixels" (at image_size) and "mean colour"; with "train_images" and
    "test_images", those that could be read.

    train and test are labelled; train_keep and test_keep choose positions in them; options as in
    `predict`.
    """
    flat_nD, label_n, test_mD, test_label_m = pixel_vectors(
        train, test, train_keep=train_keep, test_keep=test_keep, crop=crop, image_size=image_size,
        channels=channels, threads=threads,
    )  # fmt: skip

    def scores() -> dict[str, dict[str, float]]:
        colours = (x.unflatten(1, (channels, -1)).mean(2) for x in (flat_nD, test_mD))
        splits = {"raw pixels": (flat_nD, test_mD), "mean colour": tuple(colours)}
        counts = {"train_images": len(label_n), "test_images": len(test_label_m)}
        return {
            name: counts | both(x, label_n, y, test_label_m, **options)
            for name, (x, y) in splits.items()
        }

    return distributed.broadcast_from_rank_0(scores)


def pixel_vectors(
    train: ImageSet,
    test: ImageSet,
    *,
    train_keep: torch.Tensor | None,
    test_keep: torch.Tensor | None,
    crop: float,
    image_size: ImageSize,
    channels: int,
    threads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images as they are, small: (n, channels H W) in 0..1, on the first rank alone, and labels
    (n,), then of the test images. Options as in `pixel_baselines`."""
    found = []
    for images, keep in ((train, train_keep), (test, test_keep)):
        flat_nD, index_n = image_vectors(
            images, lambda x: x.flatten(1), image_size=image_size, mean=(0.0,) * channels,
            std=(1.0,) * channels, keep=keep, crop=crop, batch_size=256, device="cpu",
            threads=threads, title="pixels", everywhere=False,
        )  # fmt: skip
        found += [flat_nD, images.labels[index_n]]
    return tuple(found)


def both(train_nD, label_n, test_mD, test_label_m, **options) -> dict[str, float]:
    """top1 as it is and mean-subtracted."""
    splits = train_nD, label_n, test_mD, test_label_m
    centred = top1(*splits, centre=True, **options)
    return {"top1": top1(*splits, **options), "top1_centred": centred}


def add_votes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--k", type=positive, help="neighbours; default: the run's eval.k")
    parser.add_argument("--temperature", type=above_zero, help="default: the run's")


def add_options(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    add_sets(parser)
    add_features(parser)
    add_votes(parser)
    parser.add_argument("--pixels", action="store_true", help="also raw pixels and mean colour")
    parser.add_argument("--linear", action="store_true", help="also logistic regression")


def _scores(vectors: linear.Vectors, args: argparse.Namespace) -> dict[str, float]:
    k = min(args.k, len(vectors[0]))  # an image may have turned out unreadable
    found = both(*vectors, k=k, temperature=args.temperature, device=default_device())
    return found | ({"linear": linear.top1(*vectors)} if args.linear else {})


def pixel_values(encoder: Encoder) -> int:
    """How many values an image has in `pixel_vectors`, beside this encoder."""
    return encoder.channels * math.prod(height_width(with_short_side(encoder.image_size, PIXELS)))


def run(args: argparse.Namespace) -> None:
    """A row for each encoder, and for what needs no learning."""
    splits = splits_of(args)
    (_, train_keep), _ = splits
    if args.k > len(train_keep):
        if distributed.rank() == 0:
            print(f"k = {args.k}: there are {len(train_keep)} training images, so k is that")
        args.k = len(train_keep)
    encoders = encoders_of(args)
    options = {"k": args.k, "temperature": args.temperature, "device": default_device()}
    rows = []
    if args.pixels:
        (train, train_keep), (test, test_keep) = splits
        first = next(iter(encoders.values()))
        require_memory(splits, pixel_values(first), 4)
        found = pixel_baselines(
            train, test, train_keep=train_keep, test_keep=test_keep, crop=args.crop,
            image_size=with_short_side(first.image_size, PIXELS), channels=first.channels,
            threads=args.threads, **options,
        )  # fmt: skip
        rows += [{"encoder": name, **scores} for name, scores in found.items()]
    each = linear.BYTES["logistic"] if args.linear else 4
    for name, encoder in encoders.items():
        vectors = vectors_of(encoder, splits, args, bytes_each=each)
        found = distributed.broadcast_from_rank_0(partial(_scores, vectors, args))
        counts = {"train_images": len(vectors[1]), "test_images": len(vectors[3])}
        rows.append({"encoder": name, **counts, **found})
        del vectors  # before the next are read
    report(args, rows, HEADINGS, SETTINGS)
