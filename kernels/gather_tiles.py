"""The Triton kernels of gather.py and their launchers: what a program handles, and how many.

Shapes: B images, N patches, S indices of an image, K context patches, M target blocks, P patches a
block, D and W widths. The launchers take any strides but for the indices, which they make dense,
and a `tile` in place of the one that the shape would choose. Lengths that the masks draw anew each
step are not specialised on, or each would be compiled for once more. They also run on CPU tensors
where Triton interprets. A wrong index comes out as NaN; with launch.DEBUG_INDICES the kernels
assert.
"""

import dataclasses
import functools
from typing import NamedTuple

import torch

from cjepa_fast.kernels.common import launch
from cjepa_fast.kernels.common.launch import Compiled, narrow
from cjepa_fast.kernels.common.maybe_triton import tl, triton

Rows = torch.Tensor  # of shape (B, S, D)
SEARCH = 2048  # comparisons of a row with an index at a time, 16 for each of 128 threads


class Tile(NamedTuple):
    """What one program handles: rows x width values, by that many warps of 32 threads."""

    rows: int
    width: int
    warps: int = 4


# A copy's tile is 4096 values: each of 128 threads has four 16-byte loads of bf16 under way, on any
# architecture. It may cut a row. A layer-norm must hold whole rows, of a power of two, and two
# tensors of them: 2048 values, and more warps for the widest; or twice that for the usual widths.
COPY_TILES = {width: Tile(4096 // width, width) for width in (64, 128, 256, 512)}
ROW_TILES = {
    width: (Tile(max(2048 // width, 1), width, min(max(width // 512, 4), 16)),)
    for width in (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
}
for width in (256, 512, 1024, 2048):
    ROW_TILES[width] += (Tile(4096 // width, width, 8),)
WIDEST = max(ROW_TILES)  # values of a row that a layer-norm here can hold


def copy_tiles(width: int) -> tuple[Tile, ...]:
    """The tiles that cut `width` without a rest, the widest first, or the one that covers most."""
    exact = [tile for size, tile in COPY_TILES.items() if width % size == 0]
    most = COPY_TILES[min(512, max(64, triton.next_power_of_2(width)))]
    return tuple(exact[::-1]) or (most,)


def row_tiles(width: int) -> tuple[Tile, ...]:
    return ROW_TILES[max(64, triton.next_power_of_2(width))]


def chosen_tile(kernel: str, tiles: tuple[Tile, ...], x: torch.Tensor) -> Tile:
    """For a kernel over rows of x, by tuned.py or else the first."""
    return launch.chosen(f"{kernel} {x.shape[-1]}", tiles, x.device)


@triton.jit
def _load_index(idx, offsets, live, N, DEBUG: tl.constexpr):
    """Indices as int64, 0 where not live, and which of them lie in the table of N rows."""
    place = tl.load(idx + offsets, mask=live, other=0).to(tl.int64)
    inside = (place >= 0) & (place < N)
    if DEBUG:
        tl.device_assert(inside | (live == 0), "an index is outside 0..N-1")
    return place, inside


def _layout(x: torch.Tensor) -> torch.Tensor:
    """x with its last dimension dense: the other strides are the kernels' arguments."""
    return x if x.stride(-1) == 1 else x.contiguous()


def promoted(*tensors: torch.Tensor) -> torch.dtype:
    return functools.reduce(torch.promote_types, [t.dtype for t in tensors])


def _on_device(idx: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(B, ...) -> (B, S), dense. Raises ValueError where they are not x's, (B, ...) there too."""
    if idx.device != x.device or len(idx) != len(x):
        raise ValueError(f"indices {[*idx.shape]} {idx.device} for {[*x.shape]} {x.device}")
    return idx.flatten(1).contiguous()


# --- gather_tokens, embed_gather, add_positions


@triton.jit(do_not_specialize=["total", "S"])
def _gather_forward_kernel(
    x, pos, idx, out, total, S, N, D, x_image, x_row,
    GATHER: tl.constexpr, POSITIONS: tl.constexpr, DEBUG: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out[r] = x[image, idx[r]] (or x[image, r] without GATHER) + pos[idx[r]], r = image * S + s.

    Programs: (tiles of the B * S rows, tiles of D).
    """
    nan: tl.constexpr = float("nan")
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    live = row < total
    place, inside = _load_index(idx, row, live, N, DEBUG)
    image = row // S
    source = place if GATHER else row - image * S
    keep = (live & inside)[:, None] & (d < D)[None, :]
    start = image.to(tl.int64) * x_image + source.to(tl.int64) * x_row
    value = tl.load(x + start[:, None] + d[None, :], mask=keep, other=nan)
    if POSITIONS:
        added = tl.load(pos + place[:, None] * D + d[None, :], mask=keep, other=nan)
        value = narrow(value.to(tl.float32) + added.to(tl.float32), out.dtype.element_ty)
    there = out + row.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(there, value, mask=live[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["S"])
def _gather_backward_kernel(
    grad, idx, dx, tiles, S, N, D,
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
        place = tl.load(idx + image * S + s, mask=s < S, other=-1)
        inside = (place >= 0) & (place < N)
        place = tl.where(inside, place, -1).to(tl.int32)[None, :]  # half the registers
        match = tl.min(tl.where(place == n[:, None], s[None, :], S), 1)  # S: there is none
        while tl.min(match, 0) < S:
            keep = (match < S)[:, None] & (d < D)[None, :]
            source = grad + (image * S + match)[:, None] * D + d[None, :]
            total += tl.load(source, mask=keep, other=0.0).to(tl.float32)
            later = (place == n[:, None]) & (s[None, :] > match[:, None])
            match = tl.min(tl.where(later, s[None, :], S), 1)
    there = dx + (image * N + n)[:, None] * D + d[None, :]
    keep = (n < N)[:, None] & (d < D)[None, :]
    tl.store(there, narrow(total, dx.dtype.element_ty), mask=keep)


def launch_gather(
    x: Rows,
    pos: torch.Tensor | None,
    idx: torch.Tensor,
    gather: bool = True,
    tile: Tile | None = None,
) -> Rows:
    """(B, S, D) of the promoted dtype of x and pos; gather=False: x is (B, S, D) already."""
    x, idx = _layout(x), _on_device(idx, x)
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


def launch_gather_backward(
    grad: Rows, idx: torch.Tensor, N: int, dtype: torch.dtype, tile: Tile | None = None
) -> Rows:
    """The gradient of x, (B, N, D) in `dtype`, from that of its gathered rows.

    Beside the bytes, B N S / tile width comparisons of indices, which come from L2: few beside the
    copies at S of some hundreds, and the price of needing no atomics and no sorted table.
    """
    grad, idx = grad.contiguous(), _on_device(idx, grad)
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


# --- target_gather, prediction_loss


@triton.jit
def _target_rows(
    tokens, idx, row, live, d, S, N, D, image_stride, row_stride, eps, DEBUG: tl.constexpr
):  # fmt: skip
    """The layer-normed tokens of the indices idx[row], fp32; 0 beyond D, NaN for a wrong index."""
    nan: tl.constexpr = float("nan")
    place, inside = _load_index(idx, row, live, N, DEBUG)
    start = (row // S).to(tl.int64) * image_stride + place * row_stride
    real = (d < D)[None, :]
    keep = (live & inside)[:, None] & real
    x = tl.load(tokens + start[:, None] + d[None, :], mask=keep, other=0.0).to(tl.float32)
    mean = tl.where(inside, tl.sum(x, 1) / D, nan)
    x = tl.where(real, x - mean[:, None], 0.0)
    # The mean of large values is off by its own rounding: the rest of it shows once centred.
    x = tl.where(real, x - (tl.sum(x, 1) / D)[:, None], 0.0)
    variance = tl.sum(x * x, 1) / D
    return x * (1.0 / tl.sqrt(variance + eps))[:, None]


@triton.jit(do_not_specialize=["total", "S"])
def _target_gather_kernel(
    tokens, idx, out, total, S, N, D, image_stride, row_stride, eps,
    DEBUG: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Programs: tiles of the B * S rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    live = row < total
    x = _target_rows(
        tokens, idx, row, live, d, S, N, D, image_stride, row_stride, eps, DEBUG
    )  # fmt: skip
    there = out + row.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(there, x, mask=live[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["total", "S"])
def _prediction_loss_kernel(
    pred, tokens, idx, partial, total, S, N, D, image_stride, row_stride, eps,
    SMOOTH: tl.constexpr, DEBUG: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """partial[program] = the sum of its rows' errors. Programs: tiles of the B * S rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    live = row < total
    target = _target_rows(
        tokens, idx, row, live, d, S, N, D, image_stride, row_stride, eps, DEBUG
    )  # fmt: skip
    keep = live[:, None] & (d < D)[None, :]
    here = pred + row.to(tl.int64)[:, None] * D + d[None, :]
    error = tl.load(here, mask=keep, other=0.0).to(tl.float32) - target
    square = error * error
    if SMOOTH:
        size = tl.abs(error)
        square = tl.where(size < 1.0, 0.5 * square, size - 0.5)
    tl.store(partial + tl.program_id(0), tl.sum(tl.sum(tl.where(keep, square, 0.0), 1), 0))


@triton.jit(do_not_specialize=["total", "S"])
def _prediction_slope_kernel(
    upstream, pred, tokens, idx, dpred, total, S, N, D, image_stride, row_stride, eps, share,
    SMOOTH: tl.constexpr, DEBUG: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """dpred = upstream * share * slope of the error; share is 1 / (B S D). Programs: row tiles."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    live = row < total
    target = _target_rows(
        tokens, idx, row, live, d, S, N, D, image_stride, row_stride, eps, DEBUG
    )  # fmt: skip
    keep = live[:, None] & (d < D)[None, :]
    here = row.to(tl.int64)[:, None] * D + d[None, :]
    error = tl.load(pred + here, mask=keep, other=0.0).to(tl.float32) - target
    slope = 2.0 * error
    if SMOOTH:
        slope = tl.where(error > 1.0, 1.0, tl.where(error < -1.0, -1.0, error))
    slope *= tl.load(upstream).to(tl.float32) * share
    tl.store(dpred + here, narrow(slope, dpred.dtype.element_ty), mask=keep)


def launch_target_gather(x: Rows, idx: torch.Tensor, eps: float, tile: Tile | None = None) -> Rows:
    """(B, S, D) fp32."""
    x, idx = _layout(x), _on_device(idx, x)
    (B, S), (N, D) = idx.shape, x.shape[1:]
    out = torch.empty(B, S, D, device=x.device, dtype=torch.float32)
    if out.numel() == 0:
        return out
    tile = tile or chosen_tile("target_gather", row_tiles(D), x)
    _target_gather_kernel[(triton.cdiv(B * S, tile.rows),)](
        x, idx, out, B * S, S, N, D, x.stride(0), x.stride(1), eps, DEBUG=launch.DEBUG_INDICES,
        ROWS=tile.rows, WIDTH=tile.width, num_warps=tile.warps, debug=launch.DEBUG_INDICES,
    )  # fmt: skip
    return out


def launch_prediction_loss(
    pred: Rows, tokens: Rows, idx: torch.Tensor, kind: str, eps: float, tile: Tile | None = None
) -> torch.Tensor:
    """The mean error, 0-d fp32: partial sums, then their sum, both in a fixed order."""
    pred, tokens, idx = pred.contiguous(), _layout(tokens), _on_device(idx, tokens)
    (B, S), (N, D) = idx.shape, tokens.shape[1:]
    tile = tile or chosen_tile("prediction_loss", row_tiles(D), pred)
    programs = triton.cdiv(B * S, tile.rows) if D else 0
    partial = torch.empty(programs, device=pred.device, dtype=torch.float32)
    if programs:
        _prediction_loss_kernel[(programs,)](
            pred, tokens, idx, partial, B * S, S, N, D, tokens.stride(0), tokens.stride(1), eps,
            SMOOTH=kind == "smooth_l1", DEBUG=launch.DEBUG_INDICES,
            ROWS=tile.rows, WIDTH=tile.width, num_warps=tile.warps, debug=launch.DEBUG_INDICES,
        )  # fmt: skip
    return partial.sum() / (B * S * D)  # 0 / 0 is NaN, as the mean of nothing


def launch_prediction_slope(
    upstream: torch.Tensor,
    pred: Rows,
    tokens: Rows,
    idx: torch.Tensor,
    kind: str,
    eps: float,
    tile: Tile | None = None,
) -> Rows:
    """The gradient of pred, in its dtype. upstream: the 0-d gradient of the loss."""
    pred, tokens, idx = pred.contiguous(), _layout(tokens), _on_device(idx, tokens)
    (B, S), (N, D) = idx.shape, tokens.shape[1:]
    dpred = torch.empty(pred.shape, device=pred.device, dtype=pred.dtype)
    if dpred.numel() == 0:
        return dpred
    tile = tile or chosen_tile("prediction_loss backward", row_tiles(D), pred)
    _prediction_slope_kernel[(triton.cdiv(B * S, tile.rows),)](
        upstream, pred, tokens, idx, dpred, B * S, S, N, D, tokens.stride(0), tokens.stride(1),
        eps, 1 / dpred.numel(), SMOOTH=kind == "smooth_l1", DEBUG=launch.DEBUG_INDICES,
        ROWS=tile.rows, WIDTH=tile.width, num_warps=tile.warps, debug=launch.DEBUG_INDICES,
    )  # fmt: skip
    return dpred


# --- predictor_input


@triton.jit(do_not_specialize=["tiles", "K", "P"])
def _predictor_input_kernel(
    context, pos, mask_token, context_idx, target_idx, out, tiles, K, M, P, N, W,
    context_image, context_row,
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
    place, inside = _load_index(context_idx, image * K + row, in_context, N, DEBUG)
    keep = (in_context & inside)[:, None] & real
    start = image * context_image + row.to(tl.int64) * context_row
    copied = tl.load(context + start[:, None] + d[None, :], mask=keep, other=nan).to(tl.float32)
    copied += tl.load(pos + place[:, None] * W + d[None, :], mask=keep, other=nan).to(tl.float32)
    token = tl.load(mask_token + d, mask=d < W, other=0.0).to(tl.float32)[None, :]
    for m in range(M):
        sequence = image * M + m
        place, inside = _load_index(target_idx, sequence * P + row - K, in_query, N, DEBUG)
        keep = (in_query & inside)[:, None] & real
        query = tl.load(pos + place[:, None] * W + d[None, :], mask=keep, other=nan)
        value = tl.where(in_context[:, None], copied, token + query.to(tl.float32))
        there = out + (sequence * (K + P) + row)[:, None] * W + d[None, :]
        value = narrow(value, out.dtype.element_ty)
        tl.store(there, value, mask=(row < K + P)[:, None] & real)


@triton.jit(do_not_specialize=["tiles", "slots", "K", "P"])
def _predictor_input_backward_kernel(
    grad, dcontext, partial, tiles, slots, K, M, P, W,
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


def launch_predictor_input(
    context: torch.Tensor,
    pos: torch.Tensor,
    mask_token: torch.Tensor,
    context_idx: torch.Tensor,
    target_idx: torch.Tensor,
    tile: Tile | None = None,
) -> torch.Tensor:
    """(B * M, K + P, W), of the dtype that context, pos and mask_token promote to."""
    context, pos, mask_token = _layout(context), pos.contiguous(), mask_token.contiguous()
    B, K, W = context.shape
    M, P = target_idx.shape[1:]
    places, targets = _on_device(context_idx, context), _on_device(target_idx, context)
    dtype = promoted(context, pos, mask_token)
    out = torch.empty(B * M, K + P, W, device=context.device, dtype=dtype)
    if out.numel() == 0:
        return out
    tile = tile or chosen_tile("predictor_input", copy_tiles(W), context)
    tiles = triton.cdiv(K + P, tile.rows)
    _predictor_input_kernel[(B * tiles, triton.cdiv(W, tile.width))](
        context, pos, mask_token, places, targets, out, tiles, K, M, P, len(pos), W,
        context.stride(0), context.stride(1), DEBUG=launch.DEBUG_INDICES,
        ROWS=tile.rows, WIDTH=tile.width, num_warps=tile.warps, debug=launch.DEBUG_INDICES,
    )  # fmt: skip
    return out


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


# --- ahead of time

WIDE_LOADS = (r"ld\.global[\w.:]*\.v[48]\.b32",)  # of 16 bytes (32 on sm_100)


def _pointers(dtype: str, tensors: str, more: str = "", floats: str = "") -> dict[str, str]:
    """A signature: pointers to dtype by name, "idx" ones to int64; then integers, then floats."""
    kinds = {n: "*i64" if n.endswith("idx") else f"*{dtype}" for n in tensors.split()}
    return kinds | dict.fromkeys(more.split(), "i32") | dict.fromkeys(floats.split(), "fp32")


def _copies(dtype: str, tile: Tile) -> list[Compiled]:
    """The kernels that cut rows into tiles; `dtype` is that of every tensor."""
    sizes = {"ROWS": tile.rows, "WIDTH": tile.width}
    name = f"{dtype} {tile.rows}x{tile.width}"
    gathers = [
        Compiled(
            f"{op} {name}", _gather_forward_kernel,
            _pointers(dtype, "x pos idx out", "total S N D x_image x_row"),
            {"GATHER": gather, "POSITIONS": positions, "DEBUG": False, **sizes},
            tile.warps, must_have=WIDE_LOADS, divisible=("D", "x_image", "x_row"),
        )
        for op, gather, positions in (
            ("gather_tokens", True, False), ("embed_gather", True, True),
            ("add_positions", False, True),
        )
    ]  # fmt: skip
    return [
        *gathers,
        Compiled(
            f"gather backward {name}", _gather_backward_kernel,
            _pointers(dtype, "grad idx dx", "tiles S N D"),
            {**sizes, "BLOCK_S": SEARCH // tile.rows},
            tile.warps, must_have=WIDE_LOADS, divisible=("D",),
        ),
        Compiled(
            f"predictor_input {name}", _predictor_input_kernel,
            _pointers(
                dtype, "context pos mask_token context_idx target_idx out",
                "tiles K M P N W context_image context_row",
            ),
            {"DEBUG": False, **sizes},
            tile.warps, must_have=WIDE_LOADS, divisible=("W", "context_image", "context_row"),
        ),
        Compiled(
            f"predictor_input backward {name}", _predictor_input_backward_kernel,
            _pointers(dtype, "grad dcontext", "tiles slots K M P W") | {"partial": "*fp32"},
            sizes, tile.warps, must_have=WIDE_LOADS, divisible=("W",),
        ),
    ]  # fmt: skip


def _rows(dtype: str, tile: Tile) -> list[Compiled]:
    """The kernels that hold whole rows, for layer-norm."""
    sizes = {"DEBUG": False, "ROWS": tile.rows, "WIDTH": tile.width}
    name = f"{dtype} {tile.rows}x{tile.width}"
    shape = "total S N D image_stride row_stride"
    common = {
        "num_warps": tile.warps, "must_have": WIDE_LOADS,
        "divisible": ("D", "image_stride", "row_stride"),
    }  # fmt: skip
    smooth = {"SMOOTH": True, **sizes}
    fp32 = {"out": "*fp32", "partial": "*fp32", "upstream": "*fp32"}
    kernels = [
        ("target_gather", _target_gather_kernel, "tokens idx out", "eps", sizes),
        ("prediction_loss", _prediction_loss_kernel, "pred tokens idx partial", "eps", smooth),
        (
            "prediction_loss backward", _prediction_slope_kernel,
            "upstream pred tokens idx dpred", "eps share", smooth,
        ),
    ]  # fmt: skip
    found = []
    for op, kernel, tensors, floats, constexprs in kernels:
        kinds = _pointers(dtype, tensors, shape, floats)
        kinds |= {n: kind for n, kind in fp32.items() if n in kinds}
        found.append(Compiled(f"{op} {name}", kernel, kinds, constexprs, **common))
    return found


def _asserting() -> list[Compiled]:
    """One of each kernel that checks indices, as the debug switch compiles it."""
    chosen = [*_copies("bf16", COPY_TILES[256]), *_rows("bf16", ROW_TILES[1024][0])]
    return [
        dataclasses.replace(
            one,
            name=f"{one.name}, debug",
            constexprs={**one.constexprs, "DEBUG": True},
            must_have=("__assertfail",),
            debug=True,
        )
        for one in chosen
        if "DEBUG" in one.constexprs
    ]


def ahead_of_time() -> list[Compiled]:
    """Every kernel in every tile for each dtype, at a width that is a multiple of 16."""
    dtypes = [launch.TRITON_NAMES[d] for d in launch.KERNEL_DTYPES]
    copies = [c for t in dtypes for tile in COPY_TILES.values() for c in _copies(t, tile)]
    tiles = [tile for found in ROW_TILES.values() for tile in found]
    rows = [r for t in dtypes for tile in tiles for r in _rows(t, tile)]
    return copies + rows + _asserting()
