"""Everything that needs no fine-tuning, in one table: kNN, three linear probes, signs of collapse;
and the figures.

Beside the encoder stand an untrained one, raw pixels and chance. An encoder reads each image once:
all tasks share its features. Only collapse reads some images again, for their patches and for
random crops.
Shapes: n training images, m test images, D width.
"""

import argparse
import contextlib
import io
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from cjepa_fast.checkpoint.encoders import run_of
from cjepa_fast.eval import uncertainty
from cjepa_fast.eval.features import extract
from cjepa_fast.eval.figures import attention, curves, masks, pca, retrieve
from cjepa_fast.eval.figures.sheets import spread_over
from cjepa_fast.eval.figures.style import save
from cjepa_fast.eval.options import add_checkpoint, add_features, add_sets, encoders_of, positive
from cjepa_fast.eval.probes import collapse, knn, linear
from cjepa_fast.eval.probes.probe_sweep import ProbePlan
from cjepa_fast.eval.records import Row, report
from cjepa_fast.eval.splits import cache_of, require_memory, splits_of
from cjepa_fast.model.vit import Encoder
from cjepa_fast.runtime import distributed
from cjepa_fast.runtime.command_line import Parser
from cjepa_fast.runtime.hardware import default_device
from cjepa_fast.runtime.image_size import with_short_side

HEADINGS = {
    "train_images": "train",
    "test_images": "test",
    "top1": "kNN %",
    "top1_centred": "mean-subtracted",
    "ridge": "ridge %",
    "logistic": "logistic %",
    "lars": "LARS %",
    "rankme": "RankMe",
    "lidar": "LiDAR",
    "dead": "dead dims %",
    "by_position": "by position %",
}
SETTINGS = (*linear.SETTINGS, "k", "temperature", "count", "seed")
VIEWS = 5  # random crops of an image, for LiDAR
QUERIES, NEIGHBOURS = 8, 8  # of the figure of neighbours


class Features(NamedTuple):
    """Features, labels and positions in their sets of both splits' images."""

    train_nD: torch.Tensor
    label_n: torch.Tensor
    test_mD: torch.Tensor
    test_label_m: torch.Tensor
    index_n: torch.Tensor

    @property
    def vectors(self) -> linear.Vectors:
        return self[:4]


def scores(vectors: linear.Vectors, k: int, temperature: float) -> dict[str, float]:
    """Percent of the test images that kNN and the three probes name rightly."""
    k = min(k, len(vectors[0]))  # an image may have turned out unreadable
    tops = knn.both(*vectors, k=k, temperature=temperature, device=default_device())
    width = vectors[0].shape[1]
    (lars,) = linear.sweep(vectors, [width], ProbePlan("lars"))
    return {
        **tops,
        "ridge": linear.percent(linear.ridge(*vectors[:3]), vectors[3]),
        "logistic": linear.top1(*vectors),
        "lars": lars["top1"],
    }


def chance(label_n: torch.Tensor, test_label_m: torch.Tensor) -> dict[str, float]:
    """Percent right of whoever always names the training images' commonest class."""
    right = linear.percent(label_n.mode().values.expand(len(test_label_m)), test_label_m)
    return dict.fromkeys(("top1", "top1_centred", "ridge", "logistic", "lars"), right)


def features_of(encoder: Encoder, splits, args: argparse.Namespace, cache: Path) -> Features:
    """One reading of each split."""
    (train, train_keep), (test, test_keep) = splits
    reading = {
        "crop": args.crop, "bf16": args.bf16, "batch_size": args.batch_size, "cache": cache,
        "threads": args.threads, "device": default_device(),
    }  # fmt: skip
    train_nD, index_n = extract(encoder, train, keep=train_keep, **reading)
    test_mD, index_m = extract(encoder, test, keep=test_keep, **reading)
    return Features(train_nD, train.labels[index_n], test_mD, test.labels[index_m], index_n)


def signs_of_collapse(encoder: Encoder, found: Features, splits, args) -> dict:
    """`collapse.measure` of training images, whose features are known."""
    chosen = spread_over(found.index_n, args.count)
    return collapse.measure(
        encoder, splits[0][0], keep=found.index_n[chosen], clean_nD=found.train_nD[chosen],
        views=VIEWS, seed=args.seed, crop=args.crop, device=default_device(), bf16=args.bf16,
        batch_size=args.batch_size, threads=args.threads,
    )  # fmt: skip


def rows_of(encoders: dict[str, Encoder], splits, args: argparse.Namespace, cache: Path):
    """Chance, raw pixels and each encoder."""
    (train, train_keep), (test, test_keep) = splits
    first = next(iter(encoders.values()))
    widest = max(knn.pixel_values(first), first.width)
    require_memory(splits, widest, max(linear.BYTES.values()))
    pixels = knn.pixel_vectors(
        train, test, train_keep=train_keep, test_keep=test_keep, crop=args.crop,
        image_size=with_short_side(first.image_size, knn.PIXELS), channels=first.channels,
        threads=args.threads,
    )  # fmt: skip
    ways = args.k, args.temperature
    counts = {"train_images": len(pixels[1]), "test_images": len(pixels[3])}
    yield {"encoder": "chance", **counts, **chance(pixels[1], pixels[3])}
    named = distributed.broadcast_from_rank_0(partial(scores, pixels, *ways))
    yield {"encoder": "raw pixels", **counts, **named}
    for name, encoder in encoders.items():
        found = features_of(encoder, splits, args, cache)
        counts = {"train_images": len(found.label_n), "test_images": len(found.test_label_m)}
        signs = signs_of_collapse(encoder, found, splits, args)
        encoder.cpu()
        named = distributed.broadcast_from_rank_0(partial(scores, found.vectors, *ways))
        yield {"encoder": name, **counts, **named, **signs}


def draw(encoders, rows, splits, args: argparse.Namespace, cache: Path, out: Path):
    """The figures that can be drawn, by name their file; one that cannot is said and left out."""
    with _drawing("retrieve"):  # every rank computes; the features are known
        test, test_keep = splits[1]
        drawn, _ = retrieve.sheet_of(
            encoders, test, queries=QUERIES, k=min(NEIGHBOURS, len(test_keep) - 1), crop=args.crop,
            keep=test_keep, batch_size=args.batch_size, threads=args.threads, bf16=args.bf16,
            device=default_device(), cache=cache,
        )  # fmt: skip
        if distributed.rank() == 0:
            save(drawn, out / "retrieve.png")
    if distributed.rank() != 0:
        return
    with _drawing("collapse"):
        spectra = [row for row in rows if "singular_values" in row]
        collapse.draw(spectra, out / "collapse.png", f"Room that the features take: {args.data}")
    images = ["--images", args.test or args.data, "--crop", str(args.crop)]
    run = run_of(args.checkpoint)
    tasks = {
        "attention": (attention, args.checkpoint, images),
        "pca": (pca, args.checkpoint, images),
    }
    if run:
        tasks |= {"masks": (masks, run, []), "curves": (curves, run, [])}
    for name, (task, of, words) in tasks.items():
        with _drawing(name):
            parser = Parser()
            task.add_options(parser)
            asked = parser.parse_args([str(of), *words, "--out", str(out / f"{name}.png")])
            asked.limits = args.limits
            task.run(asked)


@contextlib.contextmanager
def _drawing(name: str) -> Iterator[None]:
    """A figure's own table is not printed, and what it lacks costs the others nothing."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except (ValueError, OSError) as error:
        if distributed.rank() == 0:
            print(f"{name}.png is not drawn: {error}")


def add_options(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser, untrained=False)
    add_sets(parser)
    add_features(parser)
    knn.add_votes(parser)
    parser.add_argument(
        "--count", type=positive, default=1000, help="training images of RankMe, LiDAR, shares"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="of figures and table.json; "
        "default: RUN/eval/all"
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """The table, its JSON and the figures."""
    out = args.out or _folder(args.checkpoint)
    args.json = args.json or out / "table.json"
    splits = splits_of(args)
    args.k = min(args.k, len(splits[0][1]))
    args.untrained = True
    encoders = encoders_of(args)
    with contextlib.ExitStack() as ending:
        cache = cache_of(args) or Path(ending.enter_context(tempfile.TemporaryDirectory()))
        rows = list(rows_of(encoders, splits, args, cache))
        report(args, rows, HEADINGS, SETTINGS, figure=out / "collapse.png")
        if distributed.rank() == 0:
            print(_error_of(rows))
        draw(encoders, rows, splits, args, cache, out)
    if distributed.rank() == 0:
        print(f"table and figures: {out}")


def _error_of(rows: list[Row]) -> str:
    """What the number of test images alone leaves open, at most."""
    tested = rows[-1]["test_images"]
    keys = ("top1", "ridge", "logistic", "lars")
    error = max(uncertainty.standard_error(row[key], tested) for row in rows for key in keys)
    return f"{tested:,} test images: a figure in % has a standard error of at most {error:.1f}"


def _folder(checkpoint: str) -> Path:
    if run := run_of(checkpoint):
        return run / "eval" / "all"
    raise ValueError(f"{checkpoint} belongs to no run: name a folder for the figures, --out FOLDER")
