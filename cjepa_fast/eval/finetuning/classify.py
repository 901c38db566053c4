"""Fine-tuning of the whole encoder on labelled images: MAE's recipe, for B, L and H (recipe.py).

loop.py trains, on one rank or several. After each epoch all is saved, and `--resume` continues.
At the end the classifier, with the EMA of the weights, is left to be used (classifier.py).
Shapes: B images, C classes.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from cjepa_fast.checkpoint.encoders import load_encoder, run_of
from cjepa_fast.config import DataSection
from cjepa_fast.data.loader import Batch, BatchSplit, Loader
from cjepa_fast.data.sources import Subset
from cjepa_fast.eval.features import digest, image_vectors
from cjepa_fast.eval.finetuning import loop, recipe
from cjepa_fast.eval.finetuning.classifier import MEAN, keep_classifier
from cjepa_fast.eval.finetuning.layer_decay import add_drop_path
from cjepa_fast.eval.finetuning.recipe import Classifier, Recipe
from cjepa_fast.eval.finetuning.saved import Learner, SavedTraining, digest_of_labels
from cjepa_fast.eval.options import add_checkpoint, add_sets, encoders_of, positive
from cjepa_fast.eval.records import Row, report
from cjepa_fast.eval.splits import Split, class_numbers, require_classes, splits_of
from cjepa_fast.model.vit import Encoder
from cjepa_fast.runtime import json_text
from cjepa_fast.runtime.distributed import rank, world_size
from cjepa_fast.runtime.hardware import default_device
from cjepa_fast.training import optim

HEADINGS = {
    "train_images": "train",
    "test_images": "test",
    "top1": "fine-tuned %",
    "top5": "top 5 %",
    "average_top1": "EMA weights %",
    "average_top5": "top 5 %",
}
SETTINGS = (
    "data", "labels", "test", "test_labels", "max_train", "crop", "bf16", "seed", "recipe",
)  # fmt: skip
FINAL_LR = 1e-6
AnyRecipe = TypeVar("AnyRecipe")  # a dataclass
LR_BATCH = 256  # images that a recipe's learning rate is for


def tune(
    encoder: Encoder,
    train: Subset,
    label_n: torch.Tensor,
    classes: int,
    chosen: Recipe,
    args: argparse.Namespace,
    folder: Path,
) -> tuple[Classifier, nn.Module]:
    """The classifier and the EMA of its weights, trained on `train` with labels (n,).

    folder: of the checkpoints. Raises ValueError for a loss that is not finite, for a single class,
    or where `folder` holds another training.
    """
    require_classes(label_n, "fine-tuning")
    facts = {"recipe": asdict(chosen), "encoder": digest(encoder), "images": train.fingerprint}
    facts |= {"classes": classes, "seed": args.seed, "processes": world_size()}
    facts |= {"bit_depth": train.limits.bit_depth, "labels": digest_of_labels(label_n)}
    torch.manual_seed(args.seed)
    model = Classifier(encoder, classes, args.bf16).to(default_device())
    add_drop_path(encoder, chosen.drop_path)
    ema = recipe.averaged(model, chosen.average)
    learner = Learner(model, encoder, chosen.layer_decay, chosen.weight_decay, ema)
    batch, micro_batch = batches_of(len(train), chosen.batch, args.micro_batch_size)
    loader = loader_of(train, encoder, chosen, args, batch, micro_batch)
    facts |= {"batch": batch, "micro_batch": micro_batch, "bf16": args.bf16}
    saved = SavedTraining(folder, facts, resume=args.resume)
    task = Labelled(loader, label_n, classes, chosen, args.seed)
    loop.train(learner, task, plan_of(loader, chosen, batch), saved)
    return model, ema.module


def batches_of(n: int, batch: int, micro_batch: int) -> tuple[int, int]:
    """(images a step, images a micro-batch), the latter at most `micro_batch`: `batch`, or of fewer
    than so many images `n`, rounded down to parts of one size for all ranks. Says a batch that is
    not the recipe's. Raises ValueError for more ranks than images."""
    ranks, images = world_size(), min(batch, n)
    parts = -(-images // (micro_batch * ranks))
    micro_batch = images // (parts * ranks)
    if not micro_batch:
        raise ValueError(f"a batch of {images} images for {ranks} ranks: start fewer")
    found = micro_batch * parts * ranks
    if found != batch and rank() == 0:
        print(f"{found} images a step, not {batch}: {n} images, in parts of {micro_batch}")
    return found, micro_batch


def loader_of(
    train: Subset, encoder: Encoder, chosen: Recipe, args: argparse.Namespace, batch: int,
    micro_batch: int,
) -> Loader:  # fmt: skip
    data = DataSection(
        image_size=encoder.image_size, channels=encoder.channels, mean=tuple(encoder.mean),
        std=tuple(encoder.std), threads=args.threads, crop_scale=tuple(chosen.crop_scale),
        flip=True, max_skipped=train.limits.max_skipped,
    )  # fmt: skip
    return Loader(
        train, data, BatchSplit(batch, micro_batch, rank(), world_size()), seed=args.seed,
        device=default_device(), dtype=torch.float32, rand_augment=chosen.rand_augment,
    )  # fmt: skip


def plan_of(loader: Loader, chosen: Recipe, batch: int) -> loop.TrainingPlan:
    """Linear warm-up, then half a cosine, to the last step of the last epoch."""
    steps = loader.steps_per_epoch
    total, warmup = chosen.epochs * steps, min(chosen.warmup_epochs, chosen.epochs / 10) * steps
    peak = chosen.lr * batch / LR_BATCH
    return loop.TrainingPlan(
        "fine-tuning",
        steps=total,
        period=steps,
        unit="epoch",
        lr=lambda step: optim.learning_rate(step + 1, total, warmup, 0.0, peak, FINAL_LR),
        advice="lower the learning rate by --set lr=...",
        accumulation=loader.accumulation,
    )


class Labelled:
    """loop.Task of labelled images, mixed and erased as the recipe has it."""

    def __init__(
        self, loader: Loader, label_n: torch.Tensor, classes: int, chosen: Recipe, seed: int
    ):
        self._loader, self._label_n, self._classes = loader, label_n, classes
        self._recipe, self._seed = chosen, seed

    def begin(self, step: int) -> None:
        """An epoch's draws are its own: a resumed training draws as one that never ended."""
        epoch, within = divmod(step, self._loader.steps_per_epoch)
        if within == 0:
            own = (self._seed * 10_000 + epoch) * 10_000 + rank()
            torch.manual_seed(own)
            self._random = torch.Generator().manual_seed(own)

    def batches(self, start: int) -> Iterator[Batch]:
        return self._loader.iterate(start)

    def loss(self, model: Callable, batch: Batch) -> torch.Tensor:
        images_BCHW = recipe.erase(batch.images_BCHW, self._recipe.erasing, self._random)
        label_B = self._label_n[batch.index_B].to(images_BCHW.device)
        target_BC = recipe.soft_targets(label_B, self._classes, self._recipe.smoothing)
        images_BCHW, target_BC = recipe.mix(images_BCHW, target_BC, self._recipe, self._random)
        return nn.functional.cross_entropy(model(images_BCHW), target_BC)


# ------------------------------------------------------------------------------------------- test


@torch.inference_mode()
def percent(
    model: Classifier, encoder: Encoder, split: Split, args: argparse.Namespace,
    numbers_C: torch.Tensor,
) -> dict[str, int | float]:  # fmt: skip
    """{"test_images", "top1", "top5"} of the images of a split that could be read; no top 5 where
    there are not more classes. numbers_C: of the model's classes, in the split's labels."""
    images, keep = split
    model.eval()

    def best(images_BCHW: torch.Tensor) -> torch.Tensor:
        logits_BC = model(images_BCHW)
        return logits_BC.topk(min(5, logits_BC.shape[1]), 1).indices

    best_mK, index_m = image_vectors(
        images, best, image_size=encoder.image_size, mean=encoder.mean, std=encoder.std, keep=keep,
        crop=args.crop, batch_size=args.batch_size, device=default_device(), threads=args.threads,
        title="test",
    )  # fmt: skip
    right_mK = numbers_C[best_mK.long()] == images.labels[index_m][:, None]
    found = {"test_images": len(index_m), "top1": 100 * right_mK[:, 0].double().mean().item()}
    if model.head.out_features > 5:
        found["top5"] = 100 * right_mK.any(1).double().mean().item()
    return found


def tuned_row(
    name: str, encoder: Encoder, splits: tuple[Split, Split], chosen: Recipe,
    args: argparse.Namespace, folder: Path,
) -> Row:  # fmt: skip
    """A row of HEADINGS: the encoder fine-tuned on the first split, tested on the second."""
    (images, keep), test = splits
    numbers_C = class_numbers(splits)
    label_n = torch.searchsorted(numbers_C, images.labels[keep])
    train = Subset(images, keep)
    model, ema = tune(encoder, train, label_n, len(numbers_C), chosen, args, folder)
    keep_classifier(ema, MEAN, encoder, images, numbers_C, args.crop, folder)
    row = {"encoder": name, "train_images": len(keep)}
    row |= percent(model, encoder, test, args, numbers_C)
    of_ema = percent(ema, encoder, test, args, numbers_C)
    return row | {f"average_{top}": of_ema[top] for top in ("top1", "top5") if top in of_ema}


# ----------------------------------------------------------------------------------- command line


def change(text: str) -> tuple[str, object]:
    """ "lr=1e-3" -> ("lr", 0.001)."""
    name, _, value = text.partition("=")
    try:
        return name, json_text.parse(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=NUMBER, such as lr=1e-3") from None


def changed(base: AnyRecipe, changes: list[tuple[str, object]] | None) -> AnyRecipe:
    """Raises ValueError for a name that the recipe has not."""
    names = [field.name for field in fields(base)]
    for name, _ in changes or ():
        if name not in names:
            raise ValueError(f"--set {name}: a recipe has {', '.join(names)}")
    lists = {n: tuple(v) if isinstance(v, list) else v for n, v in changes or ()}
    return replace(base, **lists)


def add_tuning(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bf16", action="store_true", help="the encoder in bf16")
    parser.add_argument("--micro-batch-size", type=positive, default=64, metavar="N",
                        help="images at once on a rank")  # fmt: skip
    parser.add_argument("--set", type=change, nargs="+", metavar="NAME=VALUE",
                        help="of the recipe: epochs=3 lr=1e-3 rand_augment=null")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: RUN/TASK")
    parser.add_argument("--resume", action="store_true", help="resume from what lies in --out")


def folder_of(args: argparse.Namespace) -> Path:
    return args.out or (run_of(args.checkpoint) or Path()) / args.task


def add_options(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    add_sets(parser)
    add_tuning(parser)


def run(args: argparse.Namespace) -> None:
    """A row for each encoder."""
    splits = splits_of(args)
    chosen = changed(recipe.recipe_of(load_encoder(args.checkpoint, args.which)), args.set)
    args.recipe = asdict(chosen)
    rows = [
        tuned_row(name, encoder, splits, chosen, args, folder_of(args) / name)
        for name, encoder in encoders_of(args).items()
    ]
    report(args, rows, HEADINGS, SETTINGS)
