"""How a segmenter is trained: the batches, the schedule, the saved state to resume from.

A batch is a function of the seed and the step, so a training that was stopped resumes as if it had
not been, on any number of ranks; each takes its share of a batch.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from cjepa_fast.data import rng
from cjepa_fast.data.sets.pairs import IGNORE, Classes, Pairs
from cjepa_fast.data.whole_images import WholeImages, ahead
from cjepa_fast.eval.dense.segment_views import DRAWS, View, chosen_view, shown
from cjepa_fast.eval.dense.segmenter import Segmenter, loss_of
from cjepa_fast.eval.features import digest
from cjepa_fast.eval.finetuning import loop
from cjepa_fast.eval.finetuning.layer_decay import add_drop_path
from cjepa_fast.eval.finetuning.saved import Learner, SavedTraining
from cjepa_fast.model.vit import Encoder
from cjepa_fast.runtime.distributed import broadcast_from_rank_0, rank, world_size
from cjepa_fast.runtime.files import sha256


@dataclasses.dataclass(frozen=True)
class Recipe:
    """batch_size: images a step, of all ranks; lr: of the head; drop_path: of the last block;
    short_side and crop_size: in pixels, of an image at scale 1 and of the square that is learnt
    from."""

    steps: int
    warmup: int
    batch_size: int
    lr: float
    weight_decay: float
    layer_decay: float
    drop_path: float
    short_side: int
    crop_size: int
    plain_colours: bool
    seed: int
    bf16: bool


def share_of_peak(step: int, total: int, warmup: int) -> float:
    """The learning rate over its peak: linear warm-up, then linear down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return (total - step) / (total - warmup)


def train(
    model: Segmenter,
    pairs: Pairs,
    classes: Classes,
    recipe: Recipe,
    *,
    threads: int = 2,
    save_to: Path | None = None,
    save_every: int = 1000,
    resume: bool = False,
    title: str = "segment",
) -> None:
    """Train in place, on the device that the model is on.

    save_to: a folder for all that is needed to resume, written every so many steps and at the end;
    resume: resume from it, if it is there. Raises ValueError where it is another training's, or is
    not to be resumed, and for a loss that is no longer finite.
    """
    device = next(model.parameters()).device
    if world_size() > 1 and device.type == "cuda":
        model.head = nn.SyncBatchNorm.convert_sync_batchnorm(model.head)
    add_drop_path(model.encoder, recipe.drop_path)
    facts = _facts(model, pairs, classes, recipe)
    if save_to:
        facts["label_maps_sha256"] = broadcast_from_rank_0(lambda: digest_of_files(pairs.masks))
    plan = loop.TrainingPlan(
        title,
        steps=recipe.steps,
        period=save_every,
        unit="step",
        lr=lambda step: recipe.lr * share_of_peak(step, recipe.steps, recipe.warmup),
        advice="try a smaller --lr",
    )
    loop.train(
        Learner(model, model.encoder, recipe.layer_decay, recipe.weight_decay),
        Crops(model.encoder, pairs, classes, recipe, threads, device),
        plan,
        SavedTraining(save_to, facts, resume=resume, option="--save"),
    )


class Crops:
    """loop.Task of crops of images and of their labels."""

    def __init__(
        self, encoder: Encoder, pairs: Pairs, classes: Classes, recipe: Recipe, threads: int,
        device: torch.device,
    ):  # fmt: skip
        self._encoder, self._recipe, self._device = encoder, recipe, device
        self._of = pairs, classes, recipe
        self._threads = threads

    def begin(self, step: int) -> None:
        torch.manual_seed(self._recipe.seed + step * world_size() + rank())  # of the dropout

    def batches(self, start: int) -> Iterator[list[tuple[torch.Tensor, View]]]:
        return ahead(_batches(*self._of, start, self._threads))

    def loss(self, model: Callable, batch: list[tuple[torch.Tensor, View]]) -> torch.Tensor:
        plain = self._recipe.plain_colours
        views = [shown(image, view, plain, self._encoder, self._device) for image, view in batch]
        images_B3CC, labels_BCC = (torch.stack(parts) for parts in zip(*views, strict=True))
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._recipe.bf16):
            logits = model(images_B3CC)
        return loss_of(logits, labels_BCC.long(), IGNORE)


# ---------------------------------------------------------------------------------------- batches


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    return rng.permutation(seed, epoch, count).tolist()


def _batches(
    pairs: Pairs, classes: Classes, recipe: Recipe, start: int, threads: int
) -> Iterator[list[tuple[torch.Tensor, View]]]:
    """This rank's share of each step from `start` on: images (3, H, W) uint8 and what is to be
    shown of them."""
    decode = WholeImages(recipe.batch_size, threads)
    for step in range(start, recipe.steps):
        first = step * recipe.batch_size
        indices = range(first + rank(), first + recipe.batch_size, world_size())
        keys = [divmod(index, len(pairs)) for index in indices]
        chosen = [_order(recipe.seed, epoch, len(pairs))[at] for epoch, at in keys]
        images = decode([pairs.images.read(i) for i in chosen], list(map(pairs.image_name, chosen)))
        yield [
            (image, _view(torch.from_numpy(pairs.labels(i, classes)), recipe, *key))
            for image, i, key in zip(images, chosen, keys, strict=True)
        ]


def _view(labels_HW: torch.Tensor, recipe: Recipe, epoch: int, at: int) -> View:
    uniforms = rng.uniforms(recipe.seed, rng.CROP, epoch, torch.tensor([at]), DRAWS)[0]
    return chosen_view(labels_HW, uniforms.tolist(), recipe.short_side, recipe.crop_size)


def digest_of_files(paths: Iterable[Path]) -> str:
    """SHA-256 of the files' bytes, in their order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(sha256(path).encode())
    return digest.hexdigest()


def _facts(model: Segmenter, pairs: Pairs, classes: Classes, recipe: Recipe) -> dict:
    """What must be the same for a training to be resumed."""
    return {
        **dataclasses.asdict(recipe),
        "head": type(model.head).__name__,
        "layers": model.layers,
        "frozen": model.frozen,
        "encoder": digest(model.encoder),
        "images": pairs.images.fingerprint,
        "bit_depth": pairs.images.limits.bit_depth,
        "classes": list(classes.names),
    }
