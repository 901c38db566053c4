"""The sizes of a configuration's networks, as numbers and as a batch without values."""

import math

import torch

from cjepa_fast.config import Config
from cjepa_fast.data.masks import Masks
from cjepa_fast.model.flops import StepSizes, step_gflop
from cjepa_fast.model.vit import MODELS
from cjepa_fast.runtime.image_size import height_width, patch_grid
from cjepa_fast.training.engines.base import DTYPES


def model_sizes(config: Config) -> dict:
    """The encoder's width, depth, heads and mlp_ratio: its name's, but for what the file sets."""
    sizes = {**MODELS[config.model.name]}
    own = {key: getattr(config.model, key) for key in sizes}
    return sizes | {key: value for key, value in own.items() if value is not None}


def counted_sizes(config: Config, context_k: float, targets_m: int, targets_p: float) -> StepSizes:
    """What the work of a step follows from, at the masks' sizes given (they may be means)."""
    encoder, predictor = model_sizes(config), config.predictor
    return StepSizes(
        image_size=config.data.image_size,
        patch_size=config.model.patch_size,
        channels=config.data.channels,
        width=encoder["width"],
        depth=encoder["depth"],
        mlp_ratio=encoder["mlp_ratio"],
        predictor_width=predictor.width,
        predictor_depth=predictor.depth,
        predictor_mlp_ratio=predictor.mlp_ratio,
        predictor_mode=predictor.mode,
        context_k=context_k,
        targets_m=targets_m,
        targets_p=targets_p,
    )


def gflop_of(
    config: Config, context_k: float, targets_m: int, targets_p: float
) -> dict[str, float]:
    """flops.step_gflop of a configuration; arguments as in `counted_sizes`."""
    return step_gflop(counted_sizes(config, context_k, targets_m, targets_p))


def meta_batch(config: Config, masks: Masks) -> tuple:
    """One micro-batch without values, of the sizes of these masks: images (B, C, H, W), the context
    and target indices, and the target's tokens (B, N, D), all on torch's meta device."""
    images = len(masks.target_idx_BMP)
    size, width = config.data.image_size, model_sizes(config)["width"]
    N = math.prod(patch_grid(size, config.model.patch_size))
    shapes = (images, config.data.channels, *height_width(size)), (images, N, width)
    images_BCHW, tokens = (
        torch.empty(shape, dtype=DTYPES[config.run.precision], device="meta") for shape in shapes
    )
    return images_BCHW, masks.context.to("meta"), masks.target_idx_BMP.to("meta"), tokens
