"""The predictor's input: one sequence for each target block.

    out[b M + m] = [context[b, k] + pos[context_idx[b, k]] for k,
                    mask_token + pos[target_idx[b, m, p]] for p]
The gradient of the context is the sum over its M copies, that of the mask token the sum over all
queries.

Shapes: context (B, K, W), pos (N, W), mask_token (W,), context_idx (B, K), target_idx (B, M, P),
out (B M, K + P, W).

Bytes that must move, with e bytes a value: (K + M (K + P)) B W e forward, the same backward.
"""

import torch

from cjepa_fast.kernels.common import launch
from cjepa_fast.kernels.common.launch import (
    Compiled,
    last_dim_dense,
    narrow,
    on_its_device,
    use_kernel,
)
from cjepa_fast.kernels.common.maybe_triton import tl, triton
from cjepa_fast.kernels.common.operators import operator
from cjepa_fast.kernels.common.tiles import (
    COPY_TILES,
    WIDE_LOADS,
    Tile,
    chosen_tile,
    copy_tiles,
    promoted,
)
from cjepa_fast.kernels.gather.index import (
    asserting,
    check_indices,
    check_one_each,
    check_width,
    dense_indices,
    is_constant,
    load_index,
    pointers,
)

# --- the reference


def predictor_input_reference(
    context_BKW: torch.Tensor,
    pos_NW: torch.Tensor,
    mask_token_W: torch.Tensor,
    context_idx_BK: torch.Tensor,
    target_idx_BMP: torch.Tensor,
) -> torch.Tensor:
    B, K, W = context_BKW.shape
    M, P = target_idx_BMP.shape[1:]
    context = context_BKW + pos_NW[context_idx_BK]
    context = context[:, None].expand(B, M, K, W)
    queries = mask_token_W + pos_NW[target_idx_BMP]
    return torch.cat([context, queries], dim=2).view(B * M, K + P, W)


# --- the kernels


@triton.jit(do_not_specialize=["tiles", "K", "P"])
def _predictor_input_kernel(
    context,  # (B, K, W)
    pos,  # (N, W)
    mask_token,  # (W,)
    context_idx,  # (B, K)
    target_idx,  # (B, M, P)
    out,  # (B M, K + P, W)
    tiles, K, M, P, N, W, context_image, context_row,
    DEBUG: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A program reads its rows of an image's context once and writes them to all M sequences.

    Programs: (B * tiles of the K + P rows of a sequence, tiles of W).
    """
    nan: tl.constexpr = float("nan")
    image = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    real = (d < W)[None, :]
    in_context, in_query = row < K, (row >= K) & (row < K + P)
    index, inside = load_index(context_idx, image * K + row, in_context, N, DEBUG)
    keep = (in_context & inside)[:, None] & real
    start = image * context_image + row.to(tl.int64) * context_row
    copied = tl.load(context + start[:, None] + d[None, :], mask=keep, other=nan).to(tl.float32)
    copied += tl.load(pos + index[:, None] * W + d[None, :], mask=keep, other=nan).to(tl.float32)
    token = tl.load(mask_token + d, mask=d < W, other=0.0).to(tl.float32)[None, :]
    for m in range(M):
        sequence = image * M + m
        index, inside = load_index(target_idx, sequence * P + row - K, in_query, N, DEBUG)
        keep = (in_query & inside)[:, None] & real
        query = tl.load(pos + index[:, None] * W + d[None, :], mask=keep, other=nan)
        value = tl.where(in_context[:, None], copied, token + query.to(tl.float32))
        there = out + (sequence * (K + P) + row)[:, None] * W + d[None, :]
        value = narrow(value, out.dtype.element_ty)
        tl.store(there, value, mask=(row < K + P)[:, None] & real)


@triton.jit(do_not_specialize=["tiles", "slots", "K", "P"])
def _predictor_input_backward_kernel(
    grad,  # (B M, K + P, W)
    dcontext,  # (B, K, W)
    partial,  # (B slots, W) fp32
    tiles, slots, K, M, P, W,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sums the M copies of its rows of an image; partial: the sum of those that are queries.

    partial has `slots` rows an image, one for each tile that holds a query. Programs as forward.
    """
    image = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    row = tile * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    keep = (row < K + P)[:, None] & (d < W)[None, :]
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for m in range(M):
        here = ((image * M + m) * (K + P) + row)[:, None] * W + d[None, :]
        total += tl.load(grad + here, mask=keep, other=0.0).to(tl.float32)
    there = dcontext + (image * K + row)[:, None] * W + d[None, :]
    tl.store(there, narrow(total, dcontext.dtype.element_ty), mask=keep & (row < K)[:, None])
    slot = tile - (tiles - slots)
    queries = tl.sum(tl.where((row >= K)[:, None], total, 0.0), 0)
    tl.store(partial + (image * slots + slot) * W + d, queries, mask=(d < W) & (slot >= 0))


# --- launchers


@on_its_device
def launch_predictor_input(
    context: torch.Tensor,
    pos: torch.Tensor,
    mask_token: torch.Tensor,
    context_idx: torch.Tensor,
    target_idx: torch.Tensor,
    tile: Tile | None = None,
) -> torch.Tensor:
    """(B * M, K + P, W), of the dtype that context, pos and mask_token promote to."""
    context, pos, mask_token = last_dim_dense(context), pos.contiguous(), mask_token.contiguous()
    B, K, W = context.shape
    M, P = target_idx.shape[1:]
    contexts, targets = dense_indices(context_idx, context), dense_indices(target_idx, context)
    dtype = promoted(context, pos, mask_token)
    out = torch.empty(B * M, K + P, W, device=context.device, dtype=dtype)
    if out.numel() == 0:
        return out
    tile = tile or chosen_tile("predictor_input", copy_tiles(W), context)
    tiles = triton.cdiv(K + P, tile.rows)
    _predictor_input_kernel[(B * tiles, triton.cdiv(W, tile.width))](
        context, pos, mask_token, contexts, targets, out, tiles, K, M, P, len(pos), W,
        context.stride(0), context.stride(1), DEBUG=launch.DEBUG_INDICES,
        ROWS=tile.rows, WIDTH=tile.width, num_warps=tile.warps, debug=launch.DEBUG_INDICES,
    )  # fmt: skip
    return out


@on_its_device
def launch_predictor_input_backward(
    grad: torch.Tensor,
    B: int,
    K: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of context (B, K, W) and mask_token (W,), in their dtypes."""
    grad = grad.contiguous()
    sequences, L, W = grad.shape
    if grad.numel() == 0:
        return grad.new_zeros(B, K, W, dtype=dtypes[0]), grad.new_zeros(W, dtype=dtypes[1])
    tile = tile or chosen_tile("predictor_input backward", copy_tiles(W), grad)
    tiles = triton.cdiv(L, tile.rows)
    slots = tiles - K // tile.rows
    dcontext = torch.empty(B, K, W, device=grad.device, dtype=dtypes[0])
    partial = torch.empty(B * slots, W, device=grad.device, dtype=torch.float32)
    _predictor_input_backward_kernel[(B * tiles, triton.cdiv(W, tile.width))](
        grad, dcontext, partial, tiles, slots, K, sequences // B, L - K, W,
        ROWS=tile.rows, WIDTH=tile.width, num_warps=tile.warps,
    )  # fmt: skip
    return dcontext, partial.sum(0).to(dtypes[1])


# --- the operators


@operator("predictor_input")
def predictor_input_op(
    context: torch.Tensor,
    pos: torch.Tensor,
    mask_token: torch.Tensor,
    context_idx: torch.Tensor,
    target_idx: torch.Tensor,
) -> torch.Tensor:
    return launch_predictor_input(context, pos, mask_token, context_idx, target_idx)


@torch.library.register_fake(predictor_input_op)
def _(context, pos, mask_token, context_idx, target_idx):
    (B, K, W), (M, P) = context.shape, target_idx.shape[1:]
    return context.new_empty(B * M, K + P, W, dtype=promoted(context, pos, mask_token))


@operator("predictor_input_backward")
def predictor_input_backward_op(
    grad: torch.Tensor, B: int, K: int, context_dtype: torch.dtype, token_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    return launch_predictor_input_backward(grad, B, K, (context_dtype, token_dtype))


@torch.library.register_fake(predictor_input_backward_op)
def _(grad, B, K, context_dtype, token_dtype):
    W = grad.shape[-1]
    return grad.new_empty(B, K, W, dtype=context_dtype), grad.new_empty(W, dtype=token_dtype)


def _save_shapes(ctx, inputs, output):
    context, _, mask_token, _, _ = inputs
    ctx.shapes = (*context.shape[:2], context.dtype, mask_token.dtype)


def _predictor_input_gradient(ctx, grad):
    dcontext, dtoken = predictor_input_backward_op(grad, *ctx.shapes)
    return dcontext, None, dtoken, None, None


torch.library.register_autograd(
    predictor_input_op, _predictor_input_gradient, setup_context=_save_shapes
)


# --- public


def predictor_input(
    context_BKW: torch.Tensor,
    pos_NW: torch.Tensor,
    mask_token_W: torch.Tensor,
    context_idx_BK: torch.Tensor,
    target_idx_BMP: torch.Tensor,
) -> torch.Tensor:
    """One sequence for each target block: [context + position, mask token + position].

    Returns (B*M, K+P, W), image-major: sequence b*M + m holds block m of image b. Raises
    ValueError for other than one context index a token, or for another width, IndexError (on the
    CPU) for an index outside 0..N-1.
    """
    check_one_each(context_BKW, context_idx_BK)
    check_width(context_BKW, positions=pos_NW, mask_token=mask_token_W)
    for idx in (context_idx_BK, target_idx_BMP):
        check_indices(idx, len(pos_NW))
    args = context_BKW, pos_NW, mask_token_W, context_idx_BK, target_idx_BMP
    if not (use_kernel(*args[:3]) and is_constant(pos_NW)):
        return predictor_input_reference(*args)
    return predictor_input_op(*args)


# --- ahead of time


def _compiled(dtype: str, tile: Tile) -> list[Compiled]:
    """`dtype` is that of every tensor."""
    sizes = {"ROWS": tile.rows, "WIDTH": tile.width}
    name = f"{dtype} {tile.rows}x{tile.width}"
    return [
        Compiled(
            f"predictor_input {name}", _predictor_input_kernel,
            pointers(
                dtype, "context pos mask_token context_idx target_idx out",
                "tiles K M P N W context_image context_row",
            ),
            {"DEBUG": False, **sizes},
            tile.warps, must_have=WIDE_LOADS, divisible=("W", "context_image", "context_row"),
        ),
        Compiled(
            f"predictor_input backward {name}", _predictor_input_backward_kernel,
            pointers(dtype, "grad dcontext", "tiles slots K M P W") | {"partial": "*fp32"},
            sizes, tile.warps, must_have=WIDE_LOADS, divisible=("W",),
        ),
    ]  # fmt: skip


def ahead_of_time() -> list[Compiled]:
    """Both kernels in every tile for each dtype, at a width that is a multiple of 16."""
    dtypes = [launch.TRITON_NAMES[d] for d in launch.KERNEL_DTYPES]
    found = [c for t in dtypes for tile in COPY_TILES.values() for c in _compiled(t, tile)]
    return found + asserting(_compiled("bf16", COPY_TILES[256]))
