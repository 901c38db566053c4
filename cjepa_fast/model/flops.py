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

from cjepa_fast.runtime.image_size import ImageSize, patch_grid


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


def predictor_blocks_flop(
    flop: Callable[..., float],
    mode: str,
    width: int,
    mlp_ratio: float,
    depth: int,
    context_k: float,
    targets_m: int,
    targets_p: float,
) -> float:
    """`flop`, block_flop or the like, over the predictor's blocks and the sequences of an image."""
    K, M, P = context_k, targets_m, targets_p
    if mode == "per_target":
        block = functools.partial(flop, K + P, width, mlp_ratio)
        return M * ((depth - 1) * block() + block(outputs=P))
    block, pairs = functools.partial(flop, K + M * P, width, mlp_ratio), M * P * (K + P)
    return (depth - 1) * block(pairs=K**2 + pairs) + block(outputs=M * P, pairs=pairs)


def patch_embedding_flop(patches: float, patch_size: int, width: int, channels: int = 3) -> float:
    """Embedding `patches` patches, forward, in FLOP."""
    return patches * 2 * channels * patch_size**2 * width


def step_gflop(
    *,
    image_size: ImageSize,
    patch_size: int,
    width: int,
    depth: int,
    heads: int,
    mlp_ratio: float,
    predictor_width: int,
    predictor_depth: int,
    context_k: float,
    targets_m: int,
    targets_p: float,
    predictor_mlp_ratio: float = 4.0,
    predictor_mode: str = "per_target",
    init: str = "ijepa",
    channels: int = 3,
    learned_positions: bool = False,
    gelu: str = "exact",
) -> dict[str, float]:
    """GFLOP of one image in one training step: target, context, predictor and their total.

    image_size and patch_size are in pixels. context_k and targets_p may be means over batches, and
    context_k over images ("packed"; padding is no work): attention's quadratic part is then that of
    the mean length, too low by the share var(K) / K^2 of it, 2 % or so.
    The backward is twice the forward, but for the context's patch embedding, whose input needs no
    gradient. `heads`, `init`, `learned_positions` and `gelu` change nothing; they are taken so
    that Encoder.architecture can be passed whole.
    """
    del heads, init, learned_positions, gelu
    patches_n = math.prod(patch_grid(image_size, patch_size))
    target = depth * block_flop(patches_n, width, mlp_ratio)
    target += patch_embedding_flop(patches_n, patch_size, width, channels)
    context = 3 * depth * block_flop(context_k, width, mlp_ratio)
    context += 2 * patch_embedding_flop(context_k, patch_size, width, channels)
    narrow = predictor_width, predictor_mlp_ratio, predictor_depth
    masks = context_k, targets_m, targets_p
    predictor = predictor_blocks_flop(block_flop, predictor_mode, *narrow, *masks)
    predictor += 2 * width * predictor_width * (context_k + targets_m * targets_p)
    parts = {"target": target, "context": context, "predictor": 3 * predictor}
    return {name: flop / 1e9 for name, flop in (parts | {"total": sum(parts.values())}).items()}


def recomputed_gflop(
    checkpointing: str,
    *,
    width: int,
    depth: int,
    mlp_ratio: float,
    predictor_width: int,
    predictor_depth: int,
    context_k: float,
    targets_m: int,
    targets_p: float,
    predictor_mlp_ratio: float = 4.0,
    predictor_mode: str = "per_target",
    **_,
) -> float:
    """GFLOP of one image in one training step beyond step_gflop's, of the same sizes.

    They are run, but not counted as useful: see recompute.py.
    """
    again = functools.partial(recomputed_block_flop, checkpointing)
    narrow = predictor_width, predictor_mlp_ratio, predictor_depth
    masks = context_k, targets_m, targets_p
    predictor = predictor_blocks_flop(again, predictor_mode, *narrow, *masks)
    return (depth * again(context_k, width, mlp_ratio) + predictor) / 1e9
