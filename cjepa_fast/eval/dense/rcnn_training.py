"""Fine-tuning of a detector, by ViTDet's recipe (arXiv 2203.16527, appendix A.2), on any number of
ranks.

What decides a step is a function of the seed and the epoch, so a training that resumes from its
last whole epoch is, on the CPU, the one that was never interrupted.
"""

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from cjepa_fast.data import rng
from cjepa_fast.data.sets.coco import Coco, TrainViews
from cjepa_fast.eval.finetuning import loop
from cjepa_fast.eval.finetuning.saved import Learner, SavedTraining
from cjepa_fast.runtime.distributed import rank, world_size

DROPS = (8 / 9, 26 / 27)  # of all steps: there the learning rate falls to a tenth


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """image_size: of the square canvas, in pixels. batch_size: images a step, of all ranks;
    micro_batch_size: images a rank has in memory at once. warmup_steps: a tenth of all at most.
    """

    image_size: int = 1024
    epochs: int = 100
    batch_size: int = 64
    micro_batch_size: int | None = None
    lr: float = 1e-4
    weight_decay: float = 0.1
    layer_decay: float = 0.7
    drop_path: float = 0.1
    warmup_steps: int = 250
    channels: int = 256
    bf16: bool = False
    seed: int = 0

    def micro_batch(self, ranks: int) -> int:
        """Raises ValueError where the batch does not divide."""
        share = self.batch_size // ranks
        micro = self.micro_batch_size or share
        if not micro or share * ranks != self.batch_size or share % micro:
            raise ValueError(
                f"batch size {self.batch_size} does not divide into micro-batches of "
                f"{micro or 1} on each of {ranks} ranks"
            )
        return micro

    def lr_factor(self, step: int, steps: int) -> float:
        warmup = min(self.warmup_steps, steps // 10)
        rise = min(1.0, (step + 1) / (warmup + 1))
        return rise * 0.1 ** sum(step >= share * steps for share in DROPS)


class Objects:
    """loop.Task of annotated images."""

    def __init__(self, train: Coco, recipe: Recipe, device: torch.device, threads: int):
        self._train, self._recipe, self._device, self._threads = train, recipe, device, threads
        self._micro, self._usable = recipe.micro_batch(world_size()), usable_images(train)
        self.steps_per_epoch = -(-len(self._usable) // recipe.batch_size)
        self.accumulation = recipe.batch_size // world_size() // self._micro

    def begin(self, step: int) -> None:
        epoch, within = divmod(step, self.steps_per_epoch)
        if within == 0:
            stream = torch.tensor([rank()])
            torch.manual_seed(rng.bits(self._recipe.seed, rng.SUBSTITUTE, epoch, stream).item())

    def batches(self, start: int) -> Iterator[tuple]:
        for epoch in range(start // self.steps_per_epoch, self._recipe.epochs):
            yield from epoch_batches(
                self._train, self._usable, self._recipe, epoch, self._micro, self._threads
            )

    def loss(self, model: Callable, batch: tuple) -> torch.Tensor:
        return loss_of(model, *batch, self._device)


def fine_tune(
    model: nn.Module,
    train: Coco,
    recipe: Recipe,
    saved: SavedTraining,
    device: torch.device,
    threads: int = 0,
) -> None:
    """Train a detector, as `rcnn.mask_rcnn` makes it over a Pyramid, in place.

    Raises ValueError where the loss is no longer finite, and as `saved` does.
    """
    model.to(device)
    learner = Learner(model, model.backbone.encoder, recipe.layer_decay, recipe.weight_decay)
    task = Objects(train, recipe, device, threads)
    steps = recipe.epochs * task.steps_per_epoch
    plan = loop.TrainingPlan(
        "fine-tuning",
        steps=steps,
        period=task.steps_per_epoch,
        unit="epoch",
        lr=lambda step: recipe.lr * recipe.lr_factor(step, steps),
        advice="a lower --lr or a longer --warmup-steps may help; the saved state is of the epoch "
        "before",
        accumulation=task.accumulation,
    )
    loop.train(learner, task, plan, saved)


def usable_images(train: Coco) -> list[int]:
    """Indices of the images that show an object to learn from. Raises ValueError if none does."""
    indices = [i for i in range(len(train)) if train.single_objects(i)]
    if not indices:
        raise ValueError(f"{train.file}: no image has an annotation that is neither crowd nor flat")
    return indices


def epoch_batches(
    train: Coco, usable: list[int], recipe: Recipe, epoch: int, micro: int, threads: int
) -> Iterator[tuple]:
    """This rank's micro-batches of an epoch, in order; the last step begins again with the
    epoch's first images where it is not full."""
    order = rng.permutation(recipe.seed, epoch, len(usable)).tolist()
    steps = -(-len(order) // recipe.batch_size)
    order = [usable[order[i % len(order)]] for i in range(steps * recipe.batch_size)]
    views = TrainViews(train, order, recipe.image_size, recipe.seed, epoch)
    share = recipe.batch_size // world_size()
    mine = [
        list(range(start + at, start + at + micro))
        for start in range(rank() * share, len(order), recipe.batch_size)
        for at in range(0, share, micro)
    ]
    return read(views, threads, batch_sampler=mine)


def read(views: Dataset, threads: int, **options) -> Iterator[tuple]:
    """A DataLoader's batches, as one tuple for each part of an item. What goes wrong in a reading
    rank is raised without that rank's traceback."""
    try:
        yield from DataLoader(views, num_workers=threads, collate_fn=_unzipped, **options)
    except ValueError as error:
        raise ValueError(str(error).splitlines()[-1].removeprefix("ValueError: ")) from error


def _unzipped(items: list[tuple]) -> tuple[tuple, ...]:
    return tuple(zip(*items, strict=True))


def loss_of(model: nn.Module, images: tuple, targets: tuple, device: torch.device) -> torch.Tensor:
    """The sum of the detector's losses over images (3, H, W) uint8 and their targets."""
    images = [as_input(image, device) for image in images]
    targets = [{name: x.to(device) for name, x in target.items()} for target in targets]
    return sum(model(images, targets).values())


def as_input(image: torch.Tensor, device: torch.device) -> torch.Tensor:
    """(3, H, W) uint8 as fp32 in [0, 1]."""
    return image.to(device, non_blocking=True).float() / 255
