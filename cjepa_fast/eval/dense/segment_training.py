"""How a segmenter is trained: the batches, the schedule, what is kept to resume from.

A batch is a function of the seed and the step, so a training that was stopped goes on as if it had
not been, on any number of processes; each takes its share of a batch.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from cjepa_fast.data import rng
from cjepa_fast.data.sets.pairs import IGNORE, Classes, Pairs
from cjepa_fast.data.whole import WholeImages, ahead
from cjepa_fast.eval.dense.segment_views import DRAWS, View, chosen_view, shown
from cjepa_fast.eval.dense.segmenter import Segmenter, loss_of
from cjepa_fast.eval.features import digest
from cjepa_fast.eval.finetuning.layer_decay import add_drop_path, layer_decay_groups
from cjepa_fast.runtime.distributed import rank, world_size
from cjepa_fast.telemetry.progress import shown_bar

LOSS_EVERY = 20  # steps between looks at the loss, each of which waits for the device


@dataclasses.dataclass(frozen=True)
class Recipe:
    """batch_size: images a step, of all processes; lr: of the head; drop_path: of the last block;
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
    """Of the learning rate: linear warm-up, then linear (polynomial of power 1) down to 0."""
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

    save_to: a file for all that is needed to go on, written every so many steps and at the end;
    resume: resume from it, if it is there. Raises ValueError where it is another training's, and
    for a loss that is no longer finite.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(
        layer_decay_groups(model, model.encoder, recipe.layer_decay, recipe.weight_decay)
    )
    add_drop_path(model.encoder, recipe.drop_path)
    facts = _facts(model, pairs, classes, recipe)
    start = _restore(save_to, model, optimizer, facts) if resume and save_to else 0
    run = _parallel(model.train(), device)
    batches = ahead(_batches(pairs, classes, recipe, start, threads))
    with shown_bar(recipe.steps, title, unit="step") as bar:
        bar.update(start)
        for step, samples in enumerate(batches, start):
            torch.manual_seed(recipe.seed + step * world_size() + rank())  # of the dropout
            rate = recipe.lr * share_of_peak(step, recipe.steps, recipe.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_scale"]
            views = [
                shown(image, view, recipe.plain_colours, model.encoder, device)
                for image, view in samples
            ]
            images_B3CC, labels_BCC = (torch.stack(parts) for parts in zip(*views, strict=True))
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
                logits = run(images_B3CC)
            loss = loss_of(logits, labels_BCC.long(), IGNORE)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.update()
            due = (step + 1) % save_every == 0 or step + 1 == recipe.steps
            if due or step % LOSS_EVERY == 0:
                bar.set_postfix(loss=_finite(loss, step))
            if due and save_to:
                _keep(save_to, model, optimizer, facts, step + 1)


def _finite(loss: torch.Tensor, step: int) -> float:
    if not (value := loss.item()) < float("inf"):
        raise ValueError(f"the loss is {value} at step {step}: try a smaller --lr")
    return value


def _parallel(model: Segmenter, device: torch.device) -> Callable:
    """The model, its gradients averaged over the processes where there are several."""
    if world_size() == 1:
        return model
    if device.type == "cuda":
        model.head = nn.SyncBatchNorm.convert_sync_batchnorm(model.head)
    ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids)


# ---------------------------------------------------------------------------------------- batches


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    return rng.permutation(seed, epoch, count).tolist()


def _batches(
    pairs: Pairs, classes: Classes, recipe: Recipe, start: int, threads: int
) -> Iterator[list[tuple[torch.Tensor, View]]]:
    """This process's share of each step from `start` on: images (3, H, W) uint8 and what is to be
    shown of them."""
    decode = WholeImages(recipe.batch_size, threads)
    for step in range(start, recipe.steps):
        first = step * recipe.batch_size
        places = range(first + rank(), first + recipe.batch_size, world_size())
        keys = [divmod(place, len(pairs)) for place in places]
        chosen = [_order(recipe.seed, epoch, len(pairs))[at] for epoch, at in keys]
        images = decode([pairs.images.read(i) for i in chosen], list(map(pairs.image_name, chosen)))
        yield [
            (image, _view(torch.from_numpy(pairs.labels(i, classes)), recipe, *key))
            for image, i, key in zip(images, chosen, keys, strict=True)
        ]


def _view(labels_HW: torch.Tensor, recipe: Recipe, epoch: int, at: int) -> View:
    uniforms = rng.uniforms(recipe.seed, rng.CROP, epoch, torch.tensor([at]), DRAWS)[0]
    return chosen_view(labels_HW, uniforms.tolist(), recipe.short_side, recipe.crop_size)


# ------------------------------------------------------------------------------------ kept on disk


def _facts(model: Segmenter, pairs: Pairs, classes: Classes, recipe: Recipe) -> dict:
    """What must be the same for a training to go on."""
    return {
        **dataclasses.asdict(recipe),
        "head": type(model.head).__name__,
        "layers": model.layers,
        "frozen": model.frozen,
        "encoder": digest(model.encoder),
        "images": pairs.images.fingerprint,
        "classes": list(classes.names),
    }


def _keep(path: Path, model: Segmenter, optimizer, facts: dict, step: int) -> None:
    if rank() != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    learnt = {"head": model.head.state_dict()}
    if not model.frozen:
        learnt["encoder"] = model.encoder.state_dict()
    state = {"facts": facts, "step": step, "learnt": learnt, "optimizer": optimizer.state_dict()}
    torch.save(state, partial)
    os.replace(partial, path)


def _restore(path: Path, model: Segmenter, optimizer, facts: dict) -> int:
    """The step to resume with: 0 where nothing was kept."""
    if not path.is_file():
        return 0
    device = next(model.parameters()).device
    state = torch.load(path, map_location=device, weights_only=True)
    different = [key for key in facts if state["facts"].get(key) != facts[key]]
    if different:
        raise ValueError(
            f"{path} is of another training, which differs in {', '.join(different)}: give the "
            "options it was begun with, or another --save"
        )
    for part, weights in state["learnt"].items():
        getattr(model, part).load_state_dict(weights)
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]
