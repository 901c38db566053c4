"""The micro-batch that fits a machine without a GPU: where the memory does not suffice, the system
ends a process without a word.

What a step saves for its backward is counted by running the networks on torch's meta device, which
computes nothing. data.batch_size stays: a step takes more micro-batches.
"""

import math

import torch

from cjepa_fast import config as configuration
from cjepa_fast.config import Config
from cjepa_fast.runtime import distributed, launchers, memory
from cjepa_fast.runtime.image_size import patch_grid
from cjepa_fast.training.build import build_networks, compute_dtype, first_masks
from cjepa_fast.training.sizes import gflop_of, meta_batch, model_sizes

SHARE = 0.8  # of what is free: the rest is for batches made ahead and for what else runs here
# What lives for a moment within a step, beside what is saved for the backward, as a factor.
MOMENTARY = 1.5
# Of a trained parameter in fp32: weight, gradient, Adam's moments, EMA and its copy (24), and
# the copy that a checkpoint is written from (16).
PARAMETER_BYTES = 40
COUNTED = 2  # images on the meta device


def fitted(
    config: Config,
    device: torch.device,
    saved: Config | None,
    accepted: bool = False,
    asked_before: int | None = None,
) -> Config:
    """The configuration with data.micro_batch_size cut to what fits, on a CPU; the same on all
    ranks. saved: of the checkpoint that is resumed from: where the micro-batch decides more than
    rounding (`_decides`), its cut stays unless changes are accepted, and nothing is cut that was
    not. asked_before: data.micro_batch_size before that cut, None where the checkpoint, an
    earlier version's, does not say. config: its run.precision resolved."""
    if device.type != "cpu":
        return config
    asked, world_size = config.data.micro_batch_size, distributed.world_size()
    if saved and _decides(config, asked_before):
        begun = saved.data.micro_batch_size
        if begun >= asked:
            return config
        if not accepted:
            return _with(config, begun)
    fits = min(distributed.all_gather_objects(most_images(config)))
    times = configuration.micro_batches(config.data.batch_size, world_size, asked)
    if times[0] <= fits:
        return config
    smallest = config.loss.smallest_micro_batch(world_size)
    images, _ = configuration.micro_batches(config.data.batch_size, world_size, max(fits, smallest))
    return _with(config, max(images, min(smallest, times[0])))


def _decides(config: Config, asked_before: int | None) -> bool:
    """Whether a resume would train otherwise with another micro-batch than the checkpoint's.

    A regulariser's statistics are of a micro-batch, and all contexts but "fixed" are cut by it. For
    the contexts alone, who now asks for another micro-batch than before gets it.
    """
    if config.loss.active_regulariser.beta > 0:
        return True
    asks_the_same = asked_before in (None, config.data.micro_batch_size)
    return config.mask.context != "fixed" and asks_the_same


def _with(config: Config, micro_batch: int) -> Config:
    data = config.data.model_copy(update={"micro_batch_size": micro_batch})
    return config.model_copy(update={"data": data})


def most_images(config: Config) -> int:
    """Images a micro-batch that fit what this process may take; all where nobody says what."""
    free, asked = memory.free_bytes(), config.data.micro_batch_size
    if free is None:
        return asked
    room = SHARE * free / launchers.ranks_here()
    fixed, image = at_most(config)
    if fixed + asked * image <= room:
        return asked
    fixed, image = needed(config)
    return max(0, int((room - fixed) // image))


def at_most(config: Config) -> tuple[float, float]:
    """A bound on `needed` from the sizes alone: the meta device takes a second to load.

    A weight multiplies N tokens or more, 2 FLOP each, and biases and norms are fewer than weights.
    A token saves at most 24 widths of fp32 in a block whose products take 24 width^2 FLOP, and a
    pair of tokens that meet 8 bytes a head in products of 4 width FLOP.
    """
    N = math.prod(patch_grid(config.data.image_size, config.model.patch_size))
    gflop = gflop_of(config, N, config.mask.targets, N)
    encoder, predictor = model_sizes(config), config.predictor
    width = min(encoder["width"], predictor.width)
    head = min(
        encoder["width"] // encoder["heads"],
        predictor.width // (predictor.heads or encoder["heads"]),
    )
    flop = 1e9 * (gflop["context"] + gflop["predictor"]) / 3  # of the forward
    return PARAMETER_BYTES * flop / N, MOMENTARY * flop * (4 / width + 2 / head)


def needed(config: Config) -> tuple[float, float]:
    """Bytes that a process holds whatever the micro-batch, and for each of its images."""
    with torch.device("meta"):
        networks = build_networks(config)
    trained = sum(p.numel() for p in networks.parameters() if p.requires_grad)
    networks.to(compute_dtype(config))
    images, context, target_idx, _ = meta_batch(config, first_masks(config, COUNTED))
    saved = memory.SavedActivations(networks)
    with saved.counting():  # what the loss saves is little
        networks.predictor(networks.encoder(images, context), context, target_idx)
    return float(PARAMETER_BYTES * trained), MOMENTARY * saved.bytes / COUNTED


def messages(asked: Config, config: Config, begun: int | None = None) -> list[str]:
    """What the user must know of a cut, one line each; asked: the configuration before it; begun:
    the micro-batch of the checkpoint that is resumed from."""
    before, now = asked.data.micro_batch_size, config.data.micro_batch_size
    if now >= before:
        return []
    free = (memory.free_bytes() or 0) / 2**30
    memory_cut = f"for this machine's memory ({free:.0f} GiB free)"
    why = "as the run began" if now == begun else memory_cut
    lines = [
        f"micro-batch: {now} images instead of {before}, {why}; a step still takes "
        f"{config.data.batch_size} images"
    ]
    fixed = needed(config)[0] / 2**30
    if fixed > free:
        lines.append(
            f"WARNING: weights and optimiser alone take about {fixed:.0f} GiB, of {free:.0f} free: "
            "the system may end this training without a word. Take a smaller model, or a GPU"
        )
    return lines
