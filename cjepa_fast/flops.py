"""The counted work of a training step, from the sizes alone: what throughput is judged by.

Counted are the matrix products whose results the method reads, 2 operations per multiply-add,
without recomputation: linear layers, the two products of attention, the patch embedding of the
patches that are embedded; of the predictor's last block the target patches alone. Norms, softmax,
GELU and the loss are left out, as is usual.

Letters: N patches of an image, K context patches, M target blocks, P patches a block, S tokens of
a sequence, D width.
"""


def block_flop(
    tokens_s: float, width: int, mlp_ratio: float, outputs: float | None = None
) -> float:
    """One transformer block over one sequence, forward, in FLOP; `outputs` tokens of it, or all.

    A token costs 4 D^2 in its key and value; an output 4 D^2 in its query and the projection and
    4 D * hidden in the MLP; the attention map and its product with v 4 S D an output, whatever the
    number of heads. In all 24 S D^2 + 4 S^2 D at MLP ratio 4.
    """
    hidden = round(width * mlp_ratio)
    outputs = tokens_s if outputs is None else outputs
    each = 4 * width**2 + 4 * width * hidden + 4 * tokens_s * width
    return tokens_s * 4 * width**2 + outputs * each


def patch_embedding_flop(patches: float, patch_size: int, width: int) -> float:
    """Embedding `patches` patches of 3 channels, forward, in FLOP."""
    return patches * 2 * 3 * patch_size**2 * width


def step_gflop(
    *,
    image_size: int,
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
) -> dict[str, float]:
    """GFLOP of one image in one training step: target, context, predictor and their total.

    image_size and patch_size are in pixels. context_k and targets_p may be means over batches, and
    context_k over images ("packed"; padding is no work): attention's quadratic part is then that of
    the mean length, too low by the share var(K) / K^2 of it, 2 % or so.
    The backward is twice the forward, but for the context's patch embedding, whose input needs no
    gradient. `heads` changes nothing; it is taken so that Encoder.architecture can be passed whole.
    """
    del heads
    patches_n = (image_size // patch_size) ** 2
    target = depth * block_flop(patches_n, width, mlp_ratio)
    target += patch_embedding_flop(patches_n, patch_size, width)
    context = 3 * depth * block_flop(context_k, width, mlp_ratio)
    context += 2 * patch_embedding_flop(context_k, patch_size, width)
    block = context_k + targets_p, predictor_width, predictor_mlp_ratio
    predictor = (predictor_depth - 1) * block_flop(*block) + block_flop(*block, outputs=targets_p)
    predictor *= targets_m
    predictor += 2 * width * predictor_width * (context_k + targets_m * targets_p)
    parts = {"target": target, "context": context, "predictor": 3 * predictor}
    return {name: flop / 1e9 for name, flop in (parts | {"total": sum(parts.values())}).items()}
