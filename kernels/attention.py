"""Attention over short sequences, forward and backward, straight from and to the projections.

    o = softmax(q k^T / sqrt(d)) v        of each sequence and head; no mask, no dropout
With P the softmax and do the gradient of o:
    dv = P^T do,   dS = P * (do v^T - rowsum(do * o)) / sqrt(d),   dq = dS k,   dk = dS^T q

Shapes: B sequences, S queries, T keys, H heads of d values; rows of all heads lie side by side, as
the projections write them, so q, k and v may be parts of one (B, T, 3 H d) tensor, and their
gradients then are parts of one too. For 16-bit types; what is summed is fp32, P and dS are rounded
once to the inputs' type, as in FlashAttention-2 (Dao 2023, arXiv 2307.08691).

What is short about it: the backward holds all queries of a sequence and head in one program and
passes once over the keys, so that q, k, v, o and do are read once, dq, dk and dv written once, and
nothing is added up between programs. It also sums the gradients' rows for the projections' biases
(parts, see sums.py).

Heads of 80 or 88 values are taken as 64 and 16 or 32, of 24 as 32: never as 128.

Bytes that must move, with e bytes a value and L = B H d: forward (2 S + 2 T) L e, backward
(4 S + 4 T) L e: q, o, do, dq; k, v, dk, dv. Operations: 4 S T L forward, 10 S T L backward.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from cjepa_fast.kernels.launch import (
    INTERPRET,
    TRITON_NAMES,
    Compiled,
    chosen,
    narrow,
    roomy,
    use_kernel,
)
from cjepa_fast.kernels.sums import sum_parts

WIDEST = 128  # values of a head
LOG2_E = 1.4426950408889634


def attention_reference(
    q_BHSd: torch.Tensor, k_BHTd: torch.Tensor, v_BHTd: torch.Tensor
) -> torch.Tensor:
    scores = (q_BHSd * q_BHSd.shape[-1] ** -0.5) @ k_BHTd.transpose(-2, -1)
    return scores.softmax(-1) @ v_BHTd


# --- the kernels: a head's values are two parts of D0 and D1 columns, D1 = 0 being none


@triton.jit
def _part(base, row, live, stride, FIRST: tl.constexpr, d: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of values FIRST.. of a head, zero beyond it: (rows, WIDTH)."""
    col = FIRST + tl.arange(0, WIDTH)
    keep = live[:, None] & (col < d)[None, :]
    return tl.load(base + row.to(tl.int64)[:, None] * stride + col[None, :], mask=keep, other=0.0)


@triton.jit
def _parts(base, row, live, stride, d: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Both parts of a head; without a second the first twice."""
    first = _part(base, row, live, stride, 0, d, D0)
    if D1 > 0:
        return first, _part(base, row, live, stride, D0, d, D1)
    else:
        return first, first


@triton.jit
def _write(base, row, live, stride, x, FIRST: tl.constexpr, d: tl.constexpr, WIDTH: tl.constexpr):
    col = FIRST + tl.arange(0, WIDTH)
    there = base + row.to(tl.int64)[:, None] * stride + col[None, :]
    tl.store(there, narrow(x, base.dtype.element_ty), mask=live[:, None] & (col < d)[None, :])


@triton.jit
def _dot(x, y, acc):
    if INTERPRET:  # its own product of bf16 is wrong
        return tl.dot(x.to(tl.float32), y.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(x, y, acc)


@triton.jit
def _product(x0, x1, y0, y1, D1: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """x y^T over a head's values: (ROWS, COLS) fp32."""
    out = _dot(x0, tl.trans(y0), tl.zeros((ROWS, COLS), tl.float32))
    if D1 > 0:
        out = _dot(x1, tl.trans(y1), out)
    return out


@triton.jit(do_not_specialize=["S", "T", "blocks"])
def _attention_kernel(
    q, k, v, out, lse, H, S, T, blocks, q_batch, q_row, k_batch, k_row, out_batch, out_row, scale,
    d: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """ROWS queries of one sequence and head, COLS keys at a time, with a running maximum.

    Programs: heads, which share cache lines, then the blocks of queries, which share keys, then
    sequences. lse (B, H, S): log2 of the sum of 2^scores. scale: log2(e) / sqrt(d).
    """
    head = tl.program_id(0) % H
    block = (tl.program_id(0) // H) % blocks
    sequence = (tl.program_id(0) // H // blocks).to(tl.int64)
    row = block * ROWS + tl.arange(0, ROWS)
    live = row < S
    q += sequence * q_batch + head * d
    k += sequence * k_batch + head * d
    v += sequence * k_batch + head * d
    q0, q1 = _parts(q, row, live, q_row, d, D0, D1)
    most = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out0 = tl.zeros((ROWS, D0), tl.float32)
    out1 = tl.zeros((ROWS, D1 if D1 > 0 else D0), tl.float32)
    for start in range(0, T, COLS):
        col = start + tl.arange(0, COLS)
        k0, k1 = _parts(k, col, col < T, k_row, d, D0, D1)
        scores = _product(q0, q1, k0, k1, D1, ROWS, COLS) * scale
        scores = tl.where((col < T)[None, :], scores, -float("inf"))
        new = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp2(scores - new[:, None])
        shrunk = tl.exp2(most - new)
        total = total * shrunk + tl.sum(weights, 1)
        most = new
        v0, v1 = _parts(v, col, col < T, k_row, d, D0, D1)
        low = narrow(weights, v.dtype.element_ty)
        out0 = _dot(low, v0, out0 * shrunk[:, None])
        if D1 > 0:
            out1 = _dot(low, v1, out1 * shrunk[:, None])
    out += sequence * out_batch + head * d
    _write(out, row, live, out_row, out0 / total[:, None], 0, d, D0)
    if D1 > 0:
        _write(out, row, live, out_row, out1 / total[:, None], D0, d, D1)
    tl.store(lse + (sequence * H + head) * S + row, most + tl.log2(total), mask=live)


@triton.jit
def _queries(
    q, out, dout, lse, S, q_row, out_row,
    FIRST: tl.constexpr, ROWS: tl.constexpr,
    d: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """Of ROWS queries from FIRST on: q, the gradient of their outputs, lse and rowsum(do * o)."""
    row = FIRST + tl.arange(0, ROWS)
    live = row < S
    q0, q1 = _parts(q, row, live, q_row, d, D0, D1)
    do0, do1 = _parts(dout, row, live, out_row, d, D0, D1)
    o0, o1 = _parts(out, row, live, out_row, d, D0, D1)
    delta = tl.sum(o0.to(tl.float32) * do0.to(tl.float32), 1)
    if D1 > 0:
        delta += tl.sum(o1.to(tl.float32) * do1.to(tl.float32), 1)
    return q0, q1, do0, do1, tl.load(lse + row, mask=live, other=float("inf")), delta


@triton.jit
def _step(
    q0, q1, do0, do1, lse, delta, k0, k1, v0, v1, dq0, dq1, dk0, dk1, dv0, dv1, live, scale,
    D1: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """What ROWS queries and COLS keys add to each other's gradients, before 1 / sqrt(d).

    A query that is not there has lse = inf, so no weight. A key that is not there has a score of 0,
    which may be far above all that are: its weight is set to 0.
    """
    weights = tl.exp2(_product(q0, q1, k0, k1, D1, ROWS, COLS) * scale - lse[:, None])
    weights = tl.where(live[None, :], weights, 0.0)
    low = narrow(weights, q0.dtype)
    dv0 = _dot(tl.trans(low), do0, dv0)
    slopes = weights * (_product(do0, do1, v0, v1, D1, ROWS, COLS) - delta[:, None])
    slopes = narrow(slopes, q0.dtype)
    dk0 = _dot(tl.trans(slopes), q0, dk0)
    dq0 = _dot(slopes, k0, dq0)
    if D1 > 0:
        dv1 = _dot(tl.trans(low), do1, dv1)
        dk1 = _dot(tl.trans(slopes), q1, dk1)
        dq1 = _dot(slopes, k1, dq1)
    return dq0, dq1, dk0, dk1, dv0, dv1


@triton.jit
def _write_queries(
    dq, S, q_row, dq0, dq1,
    FIRST: tl.constexpr, ROWS: tl.constexpr,
    d: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    row = FIRST + tl.arange(0, ROWS)
    _write(dq, row, row < S, q_row, dq0, 0, d, D0)
    if D1 > 0:
        _write(dq, row, row < S, q_row, dq1, D0, d, D1)


@triton.jit
def _write_sums(parts, sums, FIRST: tl.constexpr, d: tl.constexpr, WIDTH: tl.constexpr):
    col = FIRST + tl.arange(0, WIDTH)
    tl.store(parts + col, sums, mask=col < d)


@triton.jit(do_not_specialize=["S", "T"])
def _attention_backward_kernel(
    q, k, v, out, dout, lse, dq, dk, dv, parts, H, S, T,
    q_batch, q_row, k_batch, k_row, out_batch, out_row,
    dq_batch, dq_row, dk_batch, dk_row, scale, factor,
    d: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, SUMS: tl.constexpr,
    ROWS0: tl.constexpr, ROWS1: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One sequence and head: its S <= ROWS0 + ROWS1 queries, in two parts, or one with ROWS1 = 0.

    scale: log2(e) / sqrt(d), factor: 1 / sqrt(d). With SUMS, parts (B, 3, H d) has the sums of the
    rows of dq, dk and dv, as fp32.
    """
    head = tl.program_id(0) % H
    sequence = (tl.program_id(0) // H).to(tl.int64)
    q += sequence * q_batch + head * d
    k += sequence * k_batch + head * d
    v += sequence * k_batch + head * d
    out += sequence * out_batch + head * d
    dout += sequence * out_batch + head * d
    dq += sequence * dq_batch + head * d
    dk += sequence * dk_batch + head * d
    dv += sequence * dk_batch + head * d
    lse += (sequence * H + head) * S
    E1: tl.constexpr = D1 if D1 > 0 else D0
    qa0, qa1, doa0, doa1, lse_a, delta_a = _queries(
        q, out, dout, lse, S, q_row, out_row, 0, ROWS0, d, D0, D1
    )  # fmt: skip
    dqa0 = tl.zeros((ROWS0, D0), tl.float32)
    dqa1 = tl.zeros((ROWS0, E1), tl.float32)
    if ROWS1 > 0:
        qb0, qb1, dob0, dob1, lse_b, delta_b = _queries(
            q, out, dout, lse, S, q_row, out_row, ROWS0, ROWS1, d, D0, D1
        )  # fmt: skip
        dqb0 = tl.zeros((ROWS1, D0), tl.float32)
        dqb1 = tl.zeros((ROWS1, E1), tl.float32)
    if SUMS:
        sum_k0, sum_v0 = tl.zeros((D0,), tl.float32), tl.zeros((D0,), tl.float32)
        sum_k1, sum_v1 = tl.zeros((E1,), tl.float32), tl.zeros((E1,), tl.float32)
    for start in range(0, T, COLS):
        col = start + tl.arange(0, COLS)
        live = col < T
        k0, k1 = _parts(k, col, live, k_row, d, D0, D1)
        v0, v1 = _parts(v, col, live, k_row, d, D0, D1)
        dk0 = tl.zeros((COLS, D0), tl.float32)
        dk1 = tl.zeros((COLS, E1), tl.float32)
        dv0 = tl.zeros((COLS, D0), tl.float32)
        dv1 = tl.zeros((COLS, E1), tl.float32)
        dqa0, dqa1, dk0, dk1, dv0, dv1 = _step(
            qa0, qa1, doa0, doa1, lse_a, delta_a, k0, k1, v0, v1,
            dqa0, dqa1, dk0, dk1, dv0, dv1, live, scale, D1, ROWS0, COLS,
        )  # fmt: skip
        if ROWS1 > 0:
            dqb0, dqb1, dk0, dk1, dv0, dv1 = _step(
                qb0, qb1, dob0, dob1, lse_b, delta_b, k0, k1, v0, v1,
                dqb0, dqb1, dk0, dk1, dv0, dv1, live, scale, D1, ROWS1, COLS,
            )  # fmt: skip
        dk0 *= factor
        _write(dk, col, live, dk_row, dk0, 0, d, D0)
        _write(dv, col, live, dk_row, dv0, 0, d, D0)
        if D1 > 0:
            dk1 *= factor
            _write(dk, col, live, dk_row, dk1, D0, d, D1)
            _write(dv, col, live, dk_row, dv1, D0, d, D1)
        if SUMS:
            sum_k0 += tl.sum(tl.where(live[:, None], dk0, 0.0), 0)
            sum_v0 += tl.sum(tl.where(live[:, None], dv0, 0.0), 0)
            if D1 > 0:
                sum_k1 += tl.sum(tl.where(live[:, None], dk1, 0.0), 0)
                sum_v1 += tl.sum(tl.where(live[:, None], dv1, 0.0), 0)
    dqa0, dqa1 = dqa0 * factor, dqa1 * factor
    _write_queries(dq, S, q_row=dq_row, dq0=dqa0, dq1=dqa1, FIRST=0, ROWS=ROWS0, d=d, D0=D0, D1=D1)
    if ROWS1 > 0:
        dqb0, dqb1 = dqb0 * factor, dqb1 * factor
        _write_queries(
            dq, S, q_row=dq_row, dq0=dqb0, dq1=dqb1, FIRST=ROWS0, ROWS=ROWS1, d=d, D0=D0, D1=D1
        )
    if SUMS:
        parts += sequence * 3 * H * d + head * d
        total0, total1 = tl.sum(dqa0, 0), tl.sum(dqa1, 0)
        if ROWS1 > 0:
            total0, total1 = total0 + tl.sum(dqb0, 0), total1 + tl.sum(dqb1, 0)
        _write_sums(parts, total0, 0, d, D0)
        _write_sums(parts + H * d, sum_k0, 0, d, D0)
        _write_sums(parts + 2 * H * d, sum_v0, 0, d, D0)
        if D1 > 0:
            _write_sums(parts, total1, D0, d, D1)
            _write_sums(parts + H * d, sum_k1, D0, d, D1)
            _write_sums(parts + 2 * H * d, sum_v1, D0, d, D1)


# --- launchers


class Tile(NamedTuple):
    """Queries and keys that a program takes at a time (forward), by that many warps."""

    rows: int
    cols: int
    warps: int
    stages: int = 2


class BackwardTile(NamedTuple):
    """The queries of a program, in two parts, and the keys it takes at a time."""

    rows0: int
    rows1: int
    cols: int
    warps: int
    stages: int = 2
    registers: int | None = None  # most of a thread, None: as many as it asks for


TILES = (Tile(64, 64, 4), Tile(128, 64, 8), Tile(64, 32, 4), Tile(32, 32, 2))


def split(d: int) -> tuple[int, int]:
    """The powers of two that a head's values are taken as, the second 0 where one does."""
    whole = max(16, triton.next_power_of_2(d))
    first = whole // 2
    second = max(16, triton.next_power_of_2(max(1, d - first)))
    return (whole, 0) if d == whole or first < 16 or first + second >= whole else (first, second)


def backward_tiles(S: int, d: int) -> tuple[BackwardTile, ...]:
    """Candidates for S queries of d values.

    Just above 128 a second part of 16 queries spares half of a tile of 256.
    """
    whole = max(64, triton.next_power_of_2(S))
    found = [BackwardTile(whole, 0, 64, 8)]
    if whole == 128 and d <= 32:  # in half of the registers, or of the warps, two programs at once
        found += [BackwardTile(128, 0, 64, 8, 2, 128), BackwardTile(128, 0, 64, 4)]
    if whole == 64:
        found += [BackwardTile(64, 0, 64, 4), BackwardTile(64, 0, 32, 4)] if d <= 64 else []
    if 128 < S <= 144:
        found.insert(0, BackwardTile(128, 16, 64, 8))
    return tuple(found)


def longest(d: int) -> int:
    """Queries of d values that the backward holds without spilling on an H100."""
    return 256 if d <= 32 else 128


def forward_candidates(S: int, d: int) -> tuple[str, tuple[Tile, ...]]:
    """tuned.py's key for S queries of d values, and the tiles to choose from."""
    return f"attention {triton.next_power_of_2(S)}x{d}", TILES


def backward_candidates(S: int, d: int) -> tuple[str, tuple[BackwardTile, ...]]:
    tiles = backward_tiles(S, d)
    return f"attention backward {tiles[0].rows0 + tiles[0].rows1}x{d}", tiles


def _strides(x_BSX: torch.Tensor) -> tuple[int, int]:
    return x_BSX.stride(0), x_BSX.stride(1)


def launch_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, tile: Tile | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """o (B, S, H d), dense, and lse (B, H, S), of q (B, S, H d) and k, v (B, T, H d).

    Their last dimension must be dense, and the strides of k and v the same.
    """
    assert k.stride() == v.stride(), (k.stride(), v.stride())
    (B, S, width), T = q.shape, k.shape[1]
    d = width // heads
    out = torch.empty(B, S, width, device=q.device, dtype=q.dtype)
    lse = torch.empty(B, heads, S, device=q.device, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    tile = tile or chosen(*forward_candidates(S, d), q.device)
    D0, D1 = split(d)
    blocks = triton.cdiv(S, tile.rows)
    _attention_kernel[(B * blocks * heads,)](
        q, k, v, out, lse, heads, S, T, blocks, *_strides(q), *_strides(k), *_strides(out),
        d**-0.5 * LOG2_E, d=d, D0=D0, D1=D1, ROWS=tile.rows, COLS=tile.cols,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, lse


def launch_attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    heads: int,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    sums: bool = False,
    tile: BackwardTile | None = None,
) -> torch.Tensor | None:
    """Fills grads, of the shapes of q, k and v; with `sums` returns the sums of their rows.

    These are (3 H d,) in q's dtype. dout must be dense, as out is.
    """
    (B, S, width), T = q.shape, k.shape[1]
    d = width // heads
    if dout.numel() == 0:
        for grad in grads:
            grad.zero_()
        return q.new_zeros(3 * width) if sums else None
    tile = tile or chosen(*backward_candidates(S, d), q.device)
    D0, D1 = split(d)
    dq, dk, dv = grads
    assert k.stride() == v.stride() and dk.stride() == dv.stride()
    parts = torch.empty(B if sums else 0, 3 * width, device=q.device, dtype=torch.float32)
    _attention_backward_kernel[(B * heads,)](
        q, k, v, out, dout, lse, dq, dk, dv, parts, heads, S, T,
        *_strides(q), *_strides(k), *_strides(out), *_strides(dq), *_strides(dk),
        d**-0.5 * LOG2_E, d**-0.5, d=d, D0=D0, D1=D1, SUMS=sums,
        ROWS0=tile.rows0, ROWS1=tile.rows1, COLS=tile.cols,
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip
    return sum_parts(parts, q.dtype) if sums else None


def takes(q_BHSd: torch.Tensor, trained: bool) -> bool:
    """Whether the kernels take these queries: of 16 bits, not too wide; to train, not too many,
    nor wide ones where a program has less than 160 KiB of shared memory (an RTX 4090, say)."""
    S, d = q_BHSd.shape[-2:]
    fit = not trained or (longest(d) >= S and (d <= 64 or roomy(q_BHSd.device)))
    return use_kernel(q_BHSd) and q_BHSd.dtype.itemsize == 2 and 8 <= d <= WIDEST and fit


# --- the operator


@torch.library.custom_op("cjepa_fast::attention", mutates_args=())
def attention_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return launch_attention(q, k, v, heads)


@torch.library.custom_op("cjepa_fast::attention_backward", mutates_args=())
def attention_backward_op(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, heads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    grads = tuple(torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k, v))
    launch_attention_backward(dout, q, k, v, out, lse, heads, grads)
    return grads


@attention_op.register_fake
def _(q, k, v, heads):
    B, S, width = q.shape
    return q.new_empty(B, S, width), q.new_empty(B, heads, S, dtype=torch.float32)


@attention_backward_op.register_fake
def _(dout, q, k, v, out, lse, heads):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _keep(ctx, inputs, output):
    *tensors, ctx.heads = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradient(ctx, dout, _):
    return *attention_backward_op(dout.contiguous(), *ctx.saved_tensors, ctx.heads), None


attention_op.register_autograd(_gradient, setup_context=_keep)


def _side_by_side(x_BHSd: torch.Tensor) -> torch.Tensor:
    """(B, S, H d): as it lies, where it is a part of what a projection wrote."""
    return x_BHSd.transpose(1, 2).flatten(2)


def attention(q_BHSd: torch.Tensor, k_BHTd: torch.Tensor, v_BHTd: torch.Tensor) -> torch.Tensor:
    """(B, H, S, d), the heads of a token side by side in memory.

    float64 and fp32, and on the CPU all, go by the definition. Raises RuntimeError for what the
    kernels do not take, as torch does for its own: see `takes`.
    """
    if not use_kernel(q_BHSd, k_BHTd, v_BHTd) or q_BHSd.dtype == torch.float32:
        return attention_reference(q_BHSd, k_BHTd, v_BHTd)
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q_BHSd, k_BHTd, v_BHTd))
    if not takes(q_BHSd, trained):
        raise RuntimeError(f"no kernel for queries of shape {tuple(q_BHSd.shape)}")
    q, k, v = (_side_by_side(x) for x in (q_BHSd, k_BHTd, v_BHTd))
    if k.stride() != v.stride():
        k, v = k.contiguous(), v.contiguous()
    H = q_BHSd.shape[1]
    return attention_op(q, k, v, H)[0].unflatten(-1, (H, -1)).transpose(1, 2)


# --- ahead of time

POINTERS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
RAGGED = {"H", "S", "T", "blocks"}
# Heads of the models and predictors, and the queries of a sequence: contexts, predictors, images.
WIDTHS = (24, 32, 64, 80, 88, 128)
LENGTHS = (60, 100, 140, 250)


def _compiled(label: str, kernel, dtype: str, d: int, tile: Tile | BackwardTile, **own) -> Compiled:
    D0, D1 = split(d)
    kinds = dict.fromkeys(POINTERS, f"*{dtype}") | {"lse": "*fp32", "parts": "*fp32"}
    constexprs = {"d": d, "D0": D0, "D1": D1, "COLS": tile.cols, **own}
    others = [a for a in kernel.arg_names if a not in kinds and a not in constexprs]
    kinds |= {a: "fp32" if a in ("scale", "factor") else "i32" for a in others}
    sizes = "x".join(str(n) for n in tile)
    return Compiled(
        f"attention{label} {dtype} {d} {sizes}", kernel,
        {a: kinds[a] for a in kernel.arg_names if a in kinds}, constexprs, tile.warps, tile.stages,
        must_have=(r"wgmma|mma\.sync|tcgen05\.mma",), may_spill=True,
        maxnreg=getattr(tile, "registers", None),
        divisible=tuple(a for a in others if kinds[a] == "i32" and a not in RAGGED),
    )  # fmt: skip


def ahead_of_time() -> list[Compiled]:
    """Both kernels in every tile, in bf16 for each width of heads and in fp16 for one."""
    found = []
    for dtype, d in [(torch.bfloat16, d) for d in WIDTHS] + [(torch.float16, 64)]:
        name = TRITON_NAMES[dtype]
        found += [_compiled("", _attention_kernel, name, d, tile, ROWS=tile.rows) for tile in TILES]
        lengths = [S for S in LENGTHS if longest(d) >= S]
        for tile in dict.fromkeys(t for S in lengths for t in backward_tiles(S, d)):
            rows = {"ROWS0": tile.rows0, "ROWS1": tile.rows1, "SUMS": True}
            kernel = _attention_backward_kernel
            found.append(_compiled(" backward", kernel, name, d, tile, **rows))
    return found
