"""Gathering tokens by index, with or without their positions; the context of an image.

    gather_tokens   out[b, k] = x[b, idx[b, k]]
    embed_gather    out[b, k] = x[b, idx[b, k]] + pos[idx[b, k]]
    add_positions   out[b, k] = x[b, k] + pos[idx[b, k]]
The gradient of x is that of its rows, summed where an index is repeated, in ascending order.

Shapes: x (B, N, D), or (B, K, D) in add_positions; pos (N, D); idx (B, K); out (B, K, D).

Bytes that must move, with e bytes a value (indices and positions are small and stay in L2):
    gather_tokens, embed_gather   forward 2 B K D e      backward (K + N) B D e
    add_positions                 forward 2 B K D e      backward none
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
    Rows,
    asserting,
    check_indices,
    check_one_each,
    check_width,
    dense_indices,
    is_constant,
    load_index,
    pointers,
)

SEARCH = 2048  # comparisons of a row with an index at a time, 16 for each of 128 threads


# --- the reference


def _flat_rows(idx: torch.Tensor, rows: int) -> torch.Tensor:
    """Indices (B, ...) into each of B tables of `rows` rows -> flat rows of the stacked tables."""
    offsets = torch.arange(idx.shape[0], device=idx.device) * rows
    return (idx + offsets.view(-1, *[1] * (idx.dim() - 1))).flatten()


def gather_tokens_reference(x_BND: torch.Tensor, idx_BK: torch.Tensor) -> torch.Tensor:
    B, N, D = x_BND.shape
    return x_BND.reshape(B * N, D).index_select(0, _flat_rows(idx_BK, N)).view(*idx_BK.shape, D)


def embed_gather_reference(
    patches_BND: torch.Tensor, pos_ND: torch.Tensor, idx_BK: torch.Tensor
) -> torch.Tensor:
    return gather_tokens_reference(patches_BND, idx_BK) + pos_ND[idx_BK]


def add_positions_reference(
    x_BKD: torch.Tensor, pos_ND: torch.Tensor, idx_BK: torch.Tensor
) -> torch.Tensor:
    return x_BKD + pos_ND[idx_BK]


# --- the kernels


@triton.jit(do_not_specialize=["total", "S"])
def _gather_forward_kernel(
    x,  # (B, N, D), or (B, S, D) without GATHER
    pos,  # (N, D)
    idx,  # (B, S)
    out,  # (B, S, D)
    total, S, N, D, x_image, x_row,
    GATHER: tl.constexpr, POSITIONS: tl.constexpr, DEBUG: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """out[r] = x[image, idx[r]] (or x[image, r] without GATHER) + pos[idx[r]], r = image * S + s.

    Programs: (tiles of the B * S rows, tiles of D).
    """
    nan: tl.constexpr = float("nan")
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    live = row < total
    index, inside = load_index(idx, row, live, N, DEBUG)
    image = row // S
    source = index if GATHER else row - image * S
    keep = (live & inside)[:, None] & (d < D)[None, :]
    start = image.to(tl.int64) * x_image + source.to(tl.int64) * x_row
    value = tl.load(x + start[:, None] + d[None, :], mask=keep, other=nan)
    if POSITIONS:
        added = tl.load(pos + index[:, None] * D + d[None, :], mask=keep, other=nan)
        value = narrow(value.to(tl.float32) + added.to(tl.float32), out.dtype.element_ty)
    there = out + row.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(there, value, mask=live[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["S"])
def _gather_backward_kernel(
    grad,  # (B, S, D)
    idx,  # (B, S)
    dx,  # (B, N, D)
    tiles, S, N, D,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dx[image, n] = sum of grad[image, s] over the s with idx[image, s] = n, in ascending order.

    A program owns ROWS rows n and looks for each of them in the image's S indices, so every row is
    written once and none needs zeroing first. Programs: (B * tiles of N, tiles of D).
    """
    image = (tl.program_id(0) // tiles).to(tl.int64)
    n = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        index = tl.load(idx + image * S + s, mask=s < S, other=-1)
        inside = (index >= 0) & (index < N)
        index = tl.where(inside, index, -1).to(tl.int32)[None, :]  # half the registers
        match = tl.min(tl.where(index == n[:, None], s[None, :], S), 1)  # S: there is none
        while tl.min(match, 0) < S:
            keep = (match < S)[:, None] & (d < D)[None, :]
            source = grad + (image * S + match)[:, None] * D + d[None, :]
            total += tl.load(source, mask=keep, other=0.0).to(tl.float32)
            later = (index == n[:, None]) & (s[None, :] > match[:, None])
            match = tl.min(tl.where(later, s[None, :], S), 1)
    there = dx + (image * N + n)[:, None] * D + d[None, :]
    keep = (n < N)[:, None] & (d < D)[None, :]
    tl.store(there, narrow(total, dx.dtype.element_ty), mask=keep)


# --- launchers


@on_its_device
def launch_gather(
    x: Rows,
    pos: torch.Tensor | None,
    idx: torch.Tensor,
    gather: bool = True,
    tile: Tile | None = None,
) -> Rows:
    """(B, S, D) of the promoted dtype of x and pos; gather=False: x is (B, S, D) already."""
    x, idx = last_dim_dense(x), dense_indices(idx, x)
    (B, S), D = idx.shape, x.shape[-1]
    dtype = x.dtype if pos is None else promoted(x, pos)
    out = torch.empty(B, S, D, device=x.device, dtype=dtype)
    if out.numel() == 0:
        return out
    pos = x if pos is None else pos.contiguous()
    tile = tile or chosen_tile("gather", copy_tiles(D), x)
    grid = (triton.cdiv(B * S, tile.rows), triton.cdiv(D, tile.width))
    N = x.shape[1] if gather else len(pos)
    _gather_forward_kernel[grid](
        x, pos, idx, out, B * S, S, N, D, x.stride(0), x.stride(1),
        GATHER=gather, POSITIONS=pos is not x, DEBUG=launch.DEBUG_INDICES,
        ROWS=tile.rows, WIDTH=tile.width, num_warps=tile.warps, debug=launch.DEBUG_INDICES,
    )  # fmt: skip
    return out


@on_its_device
def launch_gather_backward(
    grad: Rows, idx: torch.Tensor, N: int, dtype: torch.dtype, tile: Tile | None = None
) -> Rows:
    """The gradient of x, (B, N, D) in `dtype`, from that of its gathered rows.

    Beside the bytes, B N S / tile width comparisons of indices, which come from L2: few beside the
    copies at S of some hundreds, and the price of needing no atomics and no sorted table.
    """
    grad, idx = grad.contiguous(), dense_indices(idx, grad)
    B, S, D = grad.shape
    dx = torch.empty(B, N, D, device=grad.device, dtype=dtype)
    if dx.numel() == 0:
        return dx
    tile = tile or chosen_tile("gather backward", copy_tiles(D), grad)
    tiles = triton.cdiv(N, tile.rows)
    _gather_backward_kernel[(B * tiles, triton.cdiv(D, tile.width))](
        grad, idx, dx, tiles, S, N, D,
        ROWS=tile.rows, WIDTH=tile.width, BLOCK_S=SEARCH // tile.rows, num_warps=tile.warps,
    )  # fmt: skip
    return dx


# --- the operators


@operator("gather")
def gather_op(x: torch.Tensor, pos: torch.Tensor | None, idx: torch.Tensor) -> torch.Tensor:
    return launch_gather(x, pos, idx)


@torch.library.register_fake(gather_op)
def _(x, pos, idx):
    dtype = x.dtype if pos is None else promoted(x, pos)
    return x.new_empty(*idx.shape, x.shape[-1], dtype=dtype)


@operator("gather_backward")
def gather_backward_op(
    grad: torch.Tensor, idx: torch.Tensor, N: int, dtype: torch.dtype
) -> torch.Tensor:
    return launch_gather_backward(grad, idx, N, dtype)


@torch.library.register_fake(gather_backward_op)
def _(grad, idx, N, dtype):
    return grad.new_empty(grad.shape[0], N, grad.shape[-1], dtype=dtype)


def _save_gather(ctx, inputs, output):
    x, _, idx = inputs
    ctx.save_for_backward(idx)
    ctx.N, ctx.dtype = x.shape[1], x.dtype


def _gather_gradient(ctx, grad):
    return gather_backward_op(grad, ctx.saved_tensors[0], ctx.N, ctx.dtype), None, None


torch.library.register_autograd(gather_op, _gather_gradient, setup_context=_save_gather)


@operator("add_positions")
def add_positions_op(x: torch.Tensor, pos: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    return launch_gather(x, pos, idx, gather=False)


@torch.library.register_fake(add_positions_op)
def _(x, pos, idx):
    return x.new_empty(x.shape, dtype=promoted(x, pos))


def _save_dtype(ctx, inputs, output):
    ctx.dtype = inputs[0].dtype


torch.library.register_autograd(
    add_positions_op, lambda ctx, grad: (grad.to(ctx.dtype), None, None), setup_context=_save_dtype
)


# --- public


def gather_tokens(x_BND: torch.Tensor, idx_BK: torch.Tensor) -> torch.Tensor:
    """x[b, idx[b, k]] for all b, k: (B, K, D); idx may have any further shape, as (B, M, P).

    Raises IndexError (on the CPU) for an index outside 0..N-1.
    """
    check_indices(idx_BK, x_BND.shape[1])
    if not use_kernel(x_BND):
        return gather_tokens_reference(x_BND, idx_BK)
    return gather_op(x_BND, None, idx_BK.flatten(1)).view(*idx_BK.shape, x_BND.shape[-1])


def embed_gather(
    patches_BND: torch.Tensor, pos_ND: torch.Tensor, idx_BK: torch.Tensor
) -> torch.Tensor:
    """patches[b, idx[b, k]] + pos[idx[b, k]]: (B, K, D), of the dtype that the sum promotes to.

    For tokens that are embedded already. Where they are not, gathering the raw patches, embedding
    those alone and `add_positions` is cheaper. Raises ValueError unless there are N positions of
    width D, IndexError (on the CPU) for an index outside 0..N-1.
    """
    N = patches_BND.shape[1]
    if len(pos_ND) != N:
        raise ValueError(f"{len(pos_ND)} positions for {N} patches")
    check_width(patches_BND, positions=pos_ND)
    check_indices(idx_BK, N)
    if not (use_kernel(patches_BND, pos_ND) and is_constant(pos_ND)):
        return embed_gather_reference(patches_BND, pos_ND, idx_BK)
    return gather_op(patches_BND, pos_ND, idx_BK)


def add_positions(x_BKD: torch.Tensor, pos_ND: torch.Tensor, idx_BK: torch.Tensor) -> torch.Tensor:
    """x[b, k] + pos[idx[b, k]]: (B, K, D), of the dtype that the sum promotes to.

    Raises ValueError for other than one index a token or positions of another width, IndexError
    (on the CPU) for an index outside 0..N-1.
    """
    check_one_each(x_BKD, idx_BK)
    check_width(x_BKD, positions=pos_ND)
    check_indices(idx_BK, len(pos_ND))
    if not (use_kernel(x_BKD, pos_ND) and is_constant(pos_ND)):
        return add_positions_reference(x_BKD, pos_ND, idx_BK)
    return add_positions_op(x_BKD, pos_ND, idx_BK)


# --- ahead of time


def _compiled(dtype: str, tile: Tile) -> list[Compiled]:
    """`dtype` is that of every tensor."""
    sizes = {"ROWS": tile.rows, "WIDTH": tile.width}
    name = f"{dtype} {tile.rows}x{tile.width}"
    gathers = [
        Compiled(
            f"{op} {name}", _gather_forward_kernel,
            pointers(dtype, "x pos idx out", "total S N D x_image x_row"),
            {"GATHER": gather, "POSITIONS": positions, "DEBUG": False, **sizes},
            tile.warps, must_have=WIDE_LOADS, divisible=("D", "x_image", "x_row"),
        )
        for op, gather, positions in (
            ("gather_tokens", True, False), ("embed_gather", True, True),
            ("add_positions", False, True),
        )
    ]  # fmt: skip
    backward = Compiled(
        f"gather backward {name}", _gather_backward_kernel,
        pointers(dtype, "grad idx dx", "tiles S N D"),
        {**sizes, "BLOCK_S": SEARCH // tile.rows},
        tile.warps, must_have=WIDE_LOADS, divisible=("D",),
    )  # fmt: skip
    return [*gathers, backward]


def ahead_of_time() -> list[Compiled]:
    """Both kernels in every tile for each dtype, at a width that is a multiple of 16."""
    dtypes = [launch.TRITON_NAMES[d] for d in launch.KERNEL_DTYPES]
    found = [c for t in dtypes for tile in COPY_TILES.values() for c in _compiled(t, tile)]
    return found + asserting(_compiled("bf16", COPY_TILES[256]))
