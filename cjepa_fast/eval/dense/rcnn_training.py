"""Fine-tuning of a detector, by ViTDet's recipe (arXiv 2203.16527, appendix A.2), on any number of
processes.

What decides a step is a function of the seed and the epoch, so a training that resumes from its
last whole epoch is, on the CPU, the one that was never interrupted.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from cjepa_fast.data import rng
from cjepa_fast.data.sets.coco import Coco, TrainViews
from cjepa_fast.runtime.distributed import mean_over_ranks, rank, world_size
from cjepa_fast.telemetry.progress import shown_bar

DROPS = (8 / 9, 26 / 27)  # of all steps: there the learning rate falls to a tenth


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """image_size: of the square canvas, in pixels. batch_size: images a step, of all processes;
    micro_batch_size: images a process has in memory at once. warmup_steps: a tenth of all at most.
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

    def micro_batch(self, processes: int) -> int:
        """Raises ValueError where the batch does not divide."""
        share = self.batch_size // processes
        micro = self.micro_batch_size or share
        if not micro or share * processes != self.batch_size or share % micro:
            raise ValueError(
                f"batch size {self.batch_size} does not divide into micro-batches of "
                f"{micro or 1} on each of {processes} processes"
            )
        return micro

    def lr_factor(self, step: int, steps: int) -> float:
        warmup = min(self.warmup_steps, steps // 10)
        rise = min(1.0, (step + 1) / (warmup + 1))
        return rise * 0.1 ** sum(step >= share * steps for share in DROPS)


class Kept:
    """The state of a training after each epoch: a file that the next start resumes from.

    facts: what decides the training. Raises ValueError where the file is of another one.
    """

    def __init__(self, file: Path, facts: dict):
        self.file, self.facts = file, facts

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """How many epochs are done."""
        if not self.file.is_file():
            return 0
        state = torch.load(self.file, map_location="cpu", weights_only=True)
        for name in self.facts:
            if state["facts"].get(name) != self.facts[name]:
                raise ValueError(
                    f"{self.file} is of a training with {name} {state['facts'].get(name)}, not "
                    f"{self.facts[name]}: remove it, or give another --out"
                )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if rank() == 0:
            print(f"{self.file}: {state['epochs']} epochs are done")
        return state["epochs"]

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, epochs: int) -> None:
        if rank() != 0:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "epochs": epochs, "facts": self.facts}, partial)
        partial.replace(self.file)


def fine_tune(
    model: nn.Module,
    groups: list[dict],
    train: Coco,
    recipe: Recipe,
    kept: Kept,
    device: torch.device,
    threads: int = 0,
) -> None:
    """Train a detector, as `rcnn.mask_rcnn` makes it, in place. groups: by_depth's.

    Raises ValueError where the loss is no longer finite.
    """
    model.to(device).train()
    optimizer = torch.optim.AdamW(groups)
    micro, usable = recipe.micro_batch(world_size()), usable_images(train)
    steps = -(-len(usable) // recipe.batch_size)
    done = kept.load(model, optimizer)
    spread = DistributedDataParallel(model) if world_size() > 1 else model
    for epoch in range(done, recipe.epochs):
        stream = torch.tensor([rank()])
        torch.manual_seed(rng.bits(recipe.seed, rng.SUBSTITUTE, epoch, stream).item())
        batches = epoch_batches(train, usable, recipe, epoch, micro, threads)
        total = torch.zeros((), device=device)
        accumulated = recipe.batch_size // world_size() // micro
        with shown_bar(steps, f"epoch {epoch + 1} of {recipe.epochs}", "step") as bar:
            for step in range(steps):
                rate = recipe.lr * recipe.lr_factor(epoch * steps + step, recipe.epochs * steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["lr_scale"]
                optimizer.zero_grad()
                for _ in range(accumulated):
                    loss = loss_of(spread, *next(batches), device) / accumulated
                    loss.backward()
                    total += loss.detach() / steps
                optimizer.step()
                bar.update()
        mean = mean_over_ranks({"loss": total})["loss"].item()
        if rank() == 0:
            print(f"epoch {epoch + 1} of {recipe.epochs}: loss {mean:.4f}", flush=True)
        if not torch.isfinite(torch.tensor(mean)):
            raise ValueError(
                f"the loss is {mean} in epoch {epoch + 1}: a lower --lr or a longer "
                f"--warmup-steps may help; {kept.file} resumes from the epoch before"
            )
        kept.save(model, optimizer, epoch + 1)


def usable_images(train: Coco) -> list[int]:
    """Places of the images that show an object to learn from. Raises ValueError if none does."""
    places = [i for i in range(len(train)) if train.single_objects(i)]
    if not places:
        raise ValueError(f"{train.file}: no image has an annotation that is neither crowd nor flat")
    return places


def epoch_batches(
    train: Coco, usable: list[int], recipe: Recipe, epoch: int, micro: int, threads: int
) -> Iterator[tuple]:
    """This process's micro-batches of an epoch, in order; the last step begins again with the
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
    process is raised without that process's traceback."""
    try:
        yield from DataLoader(views, num_workers=threads, collate_fn=_unzipped, **options)
    except ValueError as error:
        raise ValueError(str(error).splitlines()[-1].removeprefix("ValueError: ")) from error


def _unzipped(items: list[tuple]) -> tuple[tuple, ...]:
    return tuple(zip(*items, strict=True))


def loss_of(
    model: nn.Module, pictures: tuple, targets: tuple, device: torch.device
) -> torch.Tensor:
    """The sum of the detector's losses over pictures (3, H, W) uint8 and their targets."""
    pictures = [as_input(picture, device) for picture in pictures]
    targets = [{name: x.to(device) for name, x in target.items()} for target in targets]
    return sum(model(pictures, targets).values())


def as_input(picture: torch.Tensor, device: torch.device) -> torch.Tensor:
    """(3, H, W) uint8 as fp32 in [0, 1]."""
    return picture.to(device, non_blocking=True).float() / 255
