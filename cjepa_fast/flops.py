"""The counted work of a training step, from the sizes alone: what throughput is judged by.

Counted are the matrix products of the method as written, 2 operations per multiply-add, without
recomputation: linear layers, the two products of attention, the patch embedding of the patches
that are embedded. Norms, softmax, GELU and the loss are left out, as is usual.

Letters: N patches of an image, K context patches, M target blocks, P patches a block, S tokens of
a sequence, D width.
"""


def block_flop(tokens_s: float, width: int, mlp_ratio: float) -> float:
    """One transformer block over one sequence, forward, in FLOP.

    A token costs 8 D^2 in qkv and the projection and 4 D * hidden in the MLP (24 D^2 at ratio 4);
    the attention map and its product with v cost 4 S^2 D, whatever the number of heads.
    """
    hidden = round(width * mlp_ratio)
    return tokens_s * (8 * width**2 + 4 * width * hidden) + 4 * tokens_s**2 * width


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

    image_size and patch_size are in pixels. context_k and targets_p may be means over batches.
    The backward is twice the forward, but for the context's patch embedding, whose input needs no
    gradient. `heads` changes nothing; it is taken so that Encoder.architecture can be passed whole.
    """
    del heads
    patches_n = (image_size // patch_size) ** 2
    sequence = context_k + targets_p
    target = depth * block_flop(patches_n, width, mlp_ratio)
    target += patch_embedding_flop(patches_n, patch_size, width)
    context = 3 * depth * block_flop(context_k, width, mlp_ratio)
    context += 2 * patch_embedding_flop(context_k, patch_size, width)
    predictor = (
        targets_m * predictor_depth * block_flop(sequence, predictor_width, predictor_mlp_ratio)
    )
    predictor += 2 * width * predictor_width * (context_k + targets_m * targets_p)
    parts = {"target": target, "context": context, "predictor": 3 * predictor}
    return {name: flop / 1e9 for name, flop in (parts | {"total": sum(parts.values())}).items()}
