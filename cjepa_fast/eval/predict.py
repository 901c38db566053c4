"""The classes of a folder or shards of images by a trained classifier, in a file with their names.

`cjepa-eval predict FOLDER IMAGES --out classes.csv`, or .parquet, .npz. FOLDER is the --out of
`cjepa-eval finetune` or `attentive`. Images are read, cropped and resized as those were tested;
torchrun spreads them over its ranks.
Shapes: n images, B images of a batch, k classes told of each image.
"""

import argparse
import csv
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cjepa_fast.data import left_out
from cjepa_fast.data.sources import ImageSet, open_images
from cjepa_fast.eval.embed import as_text, writer_of
from cjepa_fast.eval.features import image_vectors
from cjepa_fast.eval.finetuning.classifier import ImageClassifier, load_classifier
from cjepa_fast.eval.options import positive
from cjepa_fast.runtime import distributed
from cjepa_fast.runtime.hardware import default_device
from cjepa_fast.runtime.printable import printable


class Predictions(NamedTuple):
    """The names of n images, and of each the k most probable classes, the best first, by name, with
    their probabilities (n, k) fp32."""

    names: list[str]
    classes: list[list[str]]
    probabilities_nk: np.ndarray


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("classifier", metavar="FOLDER", help="--out of finetune or attentive")
    parser.add_argument("images", metavar="IMAGES", help="a folder, shards, a list, or 'shapes'")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="by its ending: "
                        + ", ".join(WRITERS))  # fmt: skip
    parser.add_argument("--top", type=positive, default=1, metavar="K", help="the K most "
                        "probable classes of each image")  # fmt: skip
    parser.add_argument("--batch-size", type=positive, default=128, help="images at once")
    parser.add_argument("--threads", type=positive, default=2, help="decoding threads")
    parser.add_argument("--bf16", action="store_true", help="the encoder in bf16")


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for an ending without a writer, a file that is there, what is no
    classifier, and where no image could be read."""
    write = writer_of(args.out, WRITERS)
    if args.out.suffix == ".parquet":
        _pyarrow()
    classifier = load_classifier(args.classifier).to(default_device())
    classifier.network.bf16 = args.bf16
    images = open_images(args.images, limits=classifier.limits)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    bad: list[dict] = []
    best_n2k, index_n = _best(classifier, images, args, bad)
    bad = [row for own in distributed.all_gather_objects(bad) for row in own]
    if distributed.rank() != 0:
        return
    found = predictions_of(best_n2k, map(images.name, index_n.tolist()), classifier.classes)
    partial = args.out.with_name(f".{args.out.stem}.partial{args.out.suffix}")
    write(partial, found)
    partial.rename(args.out)
    unusable = [*images.skipped, *((row["name"], row["why"]) for row in bad)]
    left = told_of(unusable, args.out.with_name(f"{args.out.name}.{left_out.FILE}"))
    print(f"{printable(args.out)}: classes of {len(found.names)} images{left}")


@torch.inference_mode()
def _best(
    classifier: ImageClassifier, images: ImageSet, args: argparse.Namespace, bad: list[dict]
) -> tuple[torch.Tensor, torch.Tensor]:
    """On the first rank (n, 2 k): the k largest probabilities, the best first, then their classes'
    numbers; and on all the positions (n,) of the images read. bad: takes this rank's others."""
    k = min(args.top, len(classifier.classes))

    def best(images_BCHW: torch.Tensor) -> torch.Tensor:
        return torch.cat(classifier(images_BCHW).float().softmax(1).topk(k, 1), 1)

    return image_vectors(
        images, best, image_size=classifier.image_size, mean=classifier.mean, std=classifier.std,
        keep=None, crop=classifier.crop, batch_size=args.batch_size, device=default_device(),
        threads=args.threads, title="classes", record=bad.append, everywhere=False,
    )  # fmt: skip


def predictions_of(best_n2k: torch.Tensor, names: Iterable[str], classes: list[str]) -> Predictions:
    """Of what `_best` finds. Raises ValueError for probabilities that are not finite."""
    if not best_n2k.isfinite().all():
        raise ValueError("the classifier's outputs are not finite: its weights are of no use")
    probabilities_nk, number_nk = best_n2k.chunk(2, 1)
    words = [as_text(name) for name in classes]
    told = [[words[c] for c in row] for row in number_nk.long().tolist()]
    return Predictions([as_text(name) for name in names], told, probabilities_nk.numpy())


def told_of(unusable: list[tuple[str, str]], report: Path) -> str:
    """The end of a sentence that counts the images left out; `report` names each with its reason,
    and is removed where there are none."""
    where = left_out.write(unusable, report) or f"all are named in {printable(report)}"
    if not unusable:
        return ""
    return f"; {len(unusable)} left out ({left_out.counted(unusable)}); {where}"


# ------------------------------------------------------------------------------------------- write


def headings(k: int) -> list[str]:
    """class, probability, class_2, probability_2, ..."""
    ends = ["", *(f"_{i}" for i in range(2, k + 1))]
    return [f"{word}{end}" for end in ends for word in ("class", "probability")]


def write_csv(path: Path, found: Predictions) -> None:
    """name, class, probability, class_2, probability_2, ..."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["name", *headings(found.probabilities_nk.shape[1])])
        for name, classes, shares in zip(*found, strict=True):
            pairs = zip(classes, map(repr, shares.tolist()), strict=True)
            rows.writerow([name, *(cell for pair in pairs for cell in pair)])


def write_parquet(path: Path, found: Predictions) -> None:
    """The columns of `write_csv`."""
    pa, pq = _pyarrow()
    pairs = zip(zip(*found.classes, strict=True), found.probabilities_nk.T, strict=True)
    columns = [column for pair in pairs for column in pair]
    kinds = [pa.string(), pa.float32()] * (len(columns) // 2)
    arrays = [pa.array(x, kind) for x, kind in zip(columns, kinds, strict=True)]
    names = ["name", *headings(len(columns) // 2)]
    pq.write_table(pa.table([pa.array(found.names, pa.string()), *arrays], names), path)


def _pyarrow():
    """pyarrow and its parquet. Raises ValueError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(".parquet needs pyarrow: pip install pyarrow, or take .csv") from None
    return pyarrow, pyarrow.parquet


def write_npz(path: Path, found: Predictions) -> None:
    """names (n,), classes (n, k), probabilities (n, k): without pickles."""
    np.savez(path, names=np.array(found.names), classes=np.array(found.classes),
             probabilities=found.probabilities_nk)  # fmt: skip


WRITERS = {".csv": write_csv, ".parquet": write_parquet, ".npz": write_npz}
