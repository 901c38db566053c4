"""k nearest neighbours under cosine similarity, each voting with exp(similarity / temperature).

DINO's protocol (Caron et al. 2021, arXiv 2104.14294): k = 20, temperature 0.07.
Shapes: n training images, m test images, D width, C classes.
"""

import argparse

import torch
import torch.nn.functional as F

from cjepa_fast.data.sources import ImageSet
from cjepa_fast.eval import command, linear
from cjepa_fast.eval.features import image_vectors, shown_bar

HEADINGS = {
    "train_images": "train",
    "test_images": "test",
    "top1": "kNN %",
    "top1_centred": "mean-subtracted",
    "linear": "linear %",
}
PIXELS = 32  # raw pixels are compared at this size: a plain kNN on more gains nothing and is slow


def predict(
    train_nD: torch.Tensor,
    label_n: torch.Tensor,
    test_mD: torch.Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    centre: bool = False,
    batch_size: int = 512,
) -> torch.Tensor:
    """The class with the most votes for each test image: (m,) int64.

    centre: subtract the training mean from both sides first, so that what all images share does
    not hide what sets them apart. Raises ValueError for k or temperature below what makes sense.
    """
    if not 1 <= k <= len(train_nD):
        raise ValueError(f"k = {k}: must be from 1 to the {len(train_nD)} training images")
    if temperature <= 0:
        raise ValueError(f"temperature = {temperature}: must be above 0")
    if centre:
        mean_D = train_nD.mean(0)
        train_nD, test_mD = train_nD - mean_D, test_mD - mean_D
    train_nD = F.normalize(train_nD.float(), dim=1)
    classes = int(label_n.max()) + 1
    votes = []
    with shown_bar(len(test_mD), "neighbours") as bar:
        for test_BD in F.normalize(test_mD.float(), dim=1).split(batch_size):
            votes.append(_votes(test_BD, train_nD, label_n, k, temperature, classes))
            bar.update(len(test_BD))
    return torch.cat(votes).argmax(1)


def _votes(test_BD, train_nD, label_n, k: int, temperature: float, classes: int) -> torch.Tensor:
    similarity_Bk, nearest_Bk = (test_BD @ train_nD.T).topk(k, dim=1)
    # relative to the nearest: the same winner, and no overflow at a low temperature
    weight_Bk = ((similarity_Bk - similarity_Bk[:, :1]) / temperature).exp()
    votes_BC = torch.zeros(len(test_BD), classes, device=test_BD.device)
    return votes_BC.scatter_add_(1, label_n[nearest_Bk], weight_Bk)


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
    k: int = 20,
    temperature: float = 0.07,
    threads: int = 2,
) -> dict[str, dict[str, float]]:
    """kNN in percent from what needs no learning, plain ("top1") and mean-subtracted
    ("top1_centred"), for "raw pixels" (at PIXELS x PIXELS) and "mean colour".

    train and test are labelled; train_keep and test_keep choose positions in them.
    """
    sides = []
    for images, keep in ((train, train_keep), (test, test_keep)):
        flat_nD, place_n = image_vectors(
            images, lambda x: x.flatten(1), image_size=PIXELS, mean=(0.0,) * 3, std=(1.0,) * 3,
            keep=keep, crop=crop, batch_size=256, device="cpu", threads=threads, title="pixels",
        )  # fmt: skip
        colour_n3 = flat_nD.view(len(flat_nD), 3, -1).mean(2)
        sides.append((flat_nD, colour_n3, images.labels[place_n]))
    (*vectors, label), (*test_vectors, test_label) = sides
    named = zip(("raw pixels", "mean colour"), vectors, test_vectors, strict=True)
    options = {"k": k, "temperature": temperature}
    return {name: both(x, label, y, test_label, **options) for name, x, y in named}


def both(train_nD, label_n, test_mD, test_label_m, **options) -> dict[str, float]:
    """top1 as it is and mean-subtracted."""
    sides = train_nD, label_n, test_mD, test_label_m
    centred = top1(*sides, centre=True, **options)
    return {"top1": top1(*sides, **options), "top1_centred": centred}


def add_options(parser: argparse.ArgumentParser) -> None:
    command.add_checkpoint(parser)
    command.add_sets(parser)
    command.add_features(parser)
    parser.add_argument("--k", type=command.positive, help="neighbours; default: the run's eval.k")
    parser.add_argument("--temperature", type=command.above_zero, help="default: the run's")
    parser.add_argument("--pixels", action="store_true", help="also raw pixels and mean colour")
    parser.add_argument("--linear", action="store_true", help="also logistic regression")


def run(args: argparse.Namespace) -> None:
    """A row for each encoder, and for what needs no learning."""
    sides = command.labelled_sides(args.data, args.test, args.max_train)
    encoders = command.encoders_of(args)
    options = {"k": args.k, "temperature": args.temperature}
    rows = []
    if args.pixels:
        (train, train_keep), (test, test_keep) = sides
        found = pixel_baselines(
            train, test, train_keep=train_keep, test_keep=test_keep, crop=args.crop,
            threads=args.threads, **options,
        )  # fmt: skip
        counts = {"train_images": len(train_keep), "test_images": len(test_keep)}
        rows += [{"encoder": name, **counts, **tops} for name, tops in found.items()]
    for name, encoder in encoders.items():
        vectors = command.vectors_of(encoder, sides, args)
        row = {"encoder": name, "train_images": len(vectors[0]), "test_images": len(vectors[2])}
        row |= both(*vectors, **options)
        if args.linear:
            row["linear"] = linear.top1(*vectors)
        rows.append(row)
    settings = ("data", "test", "max_train", "crop", "bf16", "k", "temperature")
    command.report(args, rows, HEADINGS, settings)
