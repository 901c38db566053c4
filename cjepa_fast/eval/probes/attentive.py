"""An attentive probe: cross-attention over the frozen encoder's patch tokens, then a linear layer.

V-JEPA's (Bardes et al. 2024, arXiv 2404.08471, section 4, and the configurations of its code for
ImageNet): one block, in which a learned query attends to the tokens, with as many heads as the
encoder, and an MLP of 4 times the width. AdamW for 20 epochs of 1024 images, learning rate 1e-3 and
weight decay 1e-3 to 1e-6 by half a cosine, gradients clipped at a norm of 1, random crops,
mirrored, with random erasing. Its AutoAugment is left out: RandAugment can be set instead.
The network is in attentive_probe.py.
Shapes: B images, C classes.
"""

import argparse
import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from cjepa_fast.data.loader import Batch, Loader
from cjepa_fast.data.sources import Subset
from cjepa_fast.eval.features import digest
from cjepa_fast.eval.finetuning import classify, loop, recipe
from cjepa_fast.eval.finetuning.classifier import ATTENTIVE, keep_classifier
from cjepa_fast.eval.finetuning.saved import Learner, SavedTraining, digest_of_labels
from cjepa_fast.eval.options import add_checkpoint, add_sets, encoders_of
from cjepa_fast.eval.probes.attentive_probe import AttentiveProbe
from cjepa_fast.eval.records import Row, report
from cjepa_fast.eval.splits import Split, class_numbers, require_classes, splits_of
from cjepa_fast.model.vit import Encoder
from cjepa_fast.runtime.distributed import world_size
from cjepa_fast.runtime.hardware import default_device
from cjepa_fast.training import optim

HEADINGS = {
    "train_images": "train",
    "test_images": "test",
    "top1": "attentive %",
    "top5": "top 5 %",
}
STEPS_OF_SMALL_SETS = 50  # an epoch, at least
SMALLEST_BATCH = 16


@dataclass(frozen=True)
class ProbeRecipe:
    """batch: 0 is 1024, or a 50th of a small set. lr: whatever the batch; rand_augment: n and m, as
    recipe.Recipe has them; DALI draws it anew in a training that resumes."""

    epochs: int = 20
    batch: int = 0
    lr: float = 1e-3
    weight_decay: float = 1e-3
    final_weight_decay: float = 1e-6
    clip: float = 1.0
    erasing: float = 0.25
    rand_augment: tuple[int, int] | None = None
    crop_scale: tuple[float, float] = (0.08, 1.0)

    def __post_init__(self):
        recipe.check_values({**vars(self), "batch": self.batch or 1})

    def batch_of(self, images: int) -> int:
        """Images a step; of fewer than asked for, all of them."""
        small = max(SMALLEST_BATCH, images // STEPS_OF_SMALL_SETS)
        return min(self.batch or min(1024, small), images)


class Probing(classify.Labelled):
    """loop.Task of labelled images, erased as the recipe has it."""

    def loss(self, model: Callable, batch: Batch) -> torch.Tensor:
        images_BCHW = recipe.erase(batch.images_BCHW, self._recipe.erasing, self._random)
        label_B = self._label_n[batch.index_B].to(images_BCHW.device)
        return F.cross_entropy(model(images_BCHW), label_B)


def train(
    encoder: Encoder, images: Subset, label_n: torch.Tensor, classes: int, chosen: ProbeRecipe,
    args: argparse.Namespace, folder: Path,
) -> AttentiveProbe:  # fmt: skip
    """The probe, trained on images with labels (n,). folder: of the checkpoints.

    Raises ValueError for a loss that is not finite, for a single class, or where `folder` holds
    another training.
    """
    require_classes(label_n, "an attentive probe")
    facts = {"recipe": asdict(chosen), "encoder": digest(encoder), "images": images.fingerprint}
    facts |= {"classes": classes, "seed": args.seed, "processes": world_size()}
    facts |= {"bit_depth": images.limits.bit_depth, "labels": digest_of_labels(label_n)}
    torch.manual_seed(args.seed)
    probe = AttentiveProbe(encoder, classes, args.bf16).to(default_device())
    learner = Learner(probe, encoder, 1.0, chosen.weight_decay, clip=chosen.clip)
    asked = chosen.batch_of(len(images))
    batch, micro_batch = classify.batches_of(len(images), asked, args.micro_batch_size)
    loader = classify.loader_of(images, encoder, chosen, args, batch, micro_batch)
    task = Probing(loader, label_n, classes, chosen, args.seed)
    facts |= {"batch": batch, "micro_batch": micro_batch, "bf16": args.bf16}
    saved = SavedTraining(folder, facts, resume=args.resume)
    loop.train(learner, task, plan_of(loader, chosen), saved)
    return probe


def plan_of(loader: Loader, chosen: ProbeRecipe) -> loop.TrainingPlan:
    """Half a cosine from the first step to the last, without a warm-up."""
    total = chosen.epochs * loader.steps_per_epoch
    decay = functools.partial(
        optim.weight_decay, total=total, start=chosen.weight_decay, final=chosen.final_weight_decay
    )
    return loop.TrainingPlan(
        "attentive probe",
        steps=total,
        period=loader.steps_per_epoch,
        unit="epoch",
        lr=lambda step: optim.learning_rate(step, total, 0, 0.0, chosen.lr, 0.0),
        advice="lower the learning rate by --set lr=...",
        accumulation=loader.accumulation,
        weight_decay=decay,
    )


def probed_row(
    name: str, encoder: Encoder, splits: tuple[Split, Split], chosen: ProbeRecipe,
    args: argparse.Namespace,
) -> Row:  # fmt: skip
    """A row of HEADINGS: a probe trained on the first split and tested on the second."""
    (images, keep), test = splits
    numbers_C = class_numbers(splits)
    label_n = torch.searchsorted(numbers_C, images.labels[keep])
    folder, subset = classify.folder_of(args) / name, Subset(images, keep)
    probe = train(encoder, subset, label_n, len(numbers_C), chosen, args, folder)
    keep_classifier(probe, ATTENTIVE, encoder, images, numbers_C, args.crop, folder)
    row = {"encoder": name, "train_images": len(keep)}
    return row | classify.percent(probe, encoder, test, args, numbers_C)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    add_sets(parser)
    classify.add_tuning(parser)


def run(args: argparse.Namespace) -> None:
    """A row for each encoder."""
    splits = splits_of(args)
    chosen = classify.changed(ProbeRecipe(), args.set)
    args.recipe = asdict(chosen)
    rows = [
        probed_row(name, encoder, splits, chosen, args)
        for name, encoder in encoders_of(args).items()
    ]
    report(args, rows, HEADINGS, classify.SETTINGS)
