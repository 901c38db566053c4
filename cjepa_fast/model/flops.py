"""The counted work of a training step, from the sizes alone: what throughput is measured by.

Counted are the matmuls whose results the method reads, 2 operations per multiply-add,
without recomputation: linear layers, the two matmuls of attention, the patch embedding of the
patches that are embedded; of the predictor's last block the target patches alone. Norms, softmax,
GELU and the loss are left out, as is usual. What model.checkpointing runs again is counted apart.

Letters: N patches of an image, K context patches, M target blocks, P patches a block, S tokens of
a sequence, D width.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from cjepa_fast.runtime.image_size import ImageSize, patch_grid


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """What a training step's work follows from: the encoder, the predictor and the masks.

    image_size and patch_size are in pixels. context_k and targets_p may be means over batches, and
    context_k over images ("packed"; padding is no work). The heads of attention change nothing.
    """

    image_size: ImageSize
    patch_size: int
    channels: int = 3
    width: int
    depth: int
    mlp_ratio: float
    predictor_width: int
    predictor_depth: int
    predictor_mlp_ratio: float = 4.0
    predictor_mode: str = "per_target"
    context_k: float
    targets_m: int
    targets_p: float


def block_flop(
    tokens_s: float,
    width: int,
    mlp_ratio: float,
    outputs: float | None = None,
    pairs: float | None = None,
) -> float:
    """One transformer block over one sequence, forward, in FLOP; `outputs` tokens of it, or all.

    A token costs 4 D^2 in its key and value; an output 4 D^2 in its query and the projection and
    4 D * hidden in the MLP; the attention map and its matmul with v 4 D a pair of query and key
    that meet, whatever the number of heads: all S keys an output, or `pairs` in all. Together
    24 S D^2 + 4 S^2 D at MLP ratio 4.
    """
    outputs = tokens_s if outputs is None else outputs
    pairs = outputs * tokens_s if pairs is None else pairs
    each = 4 * width**2 + 4 * width * round(width * mlp_ratio)
    return tokens_s * 4 * width**2 + outputs * each + pairs * 4 * width


def recomputed_block_flop(
    checkpointing: str,
    tokens_s: float,
    width: int,
    mlp_ratio: float,
    outputs: float | None = None,
    pairs: float | None = None,
) -> float:
    """What of block_flop runs again in the backward, by the policies of recompute.py."""
    outputs = tokens_s if outputs is None else outputs
    fc1 = fc2 = 2 * outputs * width * round(width * mlp_ratio)
    whole = block_flop(tokens_s, width, mlp_ratio, outputs, pairs)
    return {"none": 0, "norm_gelu": 0, "selective": fc1, "full": whole - fc2}[checkpointing]


def predictor_blocks_flop(flop: Callable[..., float], sizes: StepSizes) -> float:
    """`flop`, block_flop or the like, over the predictor's blocks and the sequences of an image."""
    K, M, P = sizes.context_k, sizes.targets_m, sizes.targets_p
    depth, narrow = sizes.predictor_depth, (sizes.predictor_width, sizes.predictor_mlp_ratio)
    if sizes.predictor_mode == "per_target":
        block = functools.partial(flop, K + P, *narrow)
        return M * ((depth - 1) * block() + block(outputs=P))
    block, pairs = functools.partial(flop, K + M * P, *narrow), M * P * (K + P)
    return (depth - 1) * block(pairs=K**2 + pairs) + block(outputs=M * P, pairs=pairs)


def patch_embedding_flop(patches: float, patch_size: int, width: int, channels: int = 3) -> float:
    """Embedding `patches` patches, forward, in FLOP."""
    return patches * 2 * channels * patch_size**2 * width


def step_gflop(sizes: StepSizes) -> dict[str, float]:
    """GFLOP of one image in one training step: target, context, predictor and their total.

    Of a context_k that is a mean, attention's quadratic part is that of the mean length, too low by
    the share var(K) / K^2 of it, 2 % or so. The backward is twice the forward, but for the
    context's patch embedding, whose input needs no gradient.
    """
    width, depth, mlp_ratio, K = sizes.width, sizes.depth, sizes.mlp_ratio, sizes.context_k
    patches_n = math.prod(patch_grid(sizes.image_size, sizes.patch_size))
    target = depth * block_flop(patches_n, width, mlp_ratio)
    target += patch_embedding_flop(patches_n, sizes.patch_size, width, sizes.channels)
    context = 3 * depth * block_flop(K, width, mlp_ratio)
    context += 2 * patch_embedding_flop(K, sizes.patch_size, width, sizes.channels)
    predictor = predictor_blocks_flop(block_flop, sizes)
    predictor += 2 * width * sizes.predictor_width * (K + sizes.targets_m * sizes.targets_p)
    parts = {"target": target, "context": context, "predictor": 3 * predictor}
    return {name: flop / 1e9 for name, flop in (parts | {"total": sum(parts.values())}).items()}


def recomputed_gflop(checkpointing: str, sizes: StepSizes) -> float:
    """GFLOP of one image in one training step beyond step_gflop's, of the same sizes.

    They are run, but not counted as useful: see recompute.py.
    """
    again = functools.partial(recomputed_block_flop, checkpointing)
    encoder = sizes.depth * again(sizes.context_k, sizes.width, sizes.mlp_ratio)
    return (encoder + predictor_blocks_flop(again, sizes)) / 1e9
