"""The Triton kernels of attention.py and their launchers: what a program handles, and how many.

Two ways through the backward. "One pass": a program holds all queries of a sequence and head and
goes once over the keys, so nothing is read twice, in as many registers as that takes. "Two passes":
programs that hold a block of queries go over the keys, for dq, then programs that hold a block of
keys over the queries, for dk and dv. They make 14 S T L operations for 10 and read what the one
reads twice, in a fraction of its registers, so that several work on a multiprocessor at once; and
they take sequences of any length. The way is among the candidates of `backward_candidates`.

Shapes are attention.py's. Lengths are not specialised on.
"""

from typing import NamedTuple

import torch

from cjepa_fast.kernels.common.launch import (
    INTERPRET,
    TRITON_NAMES,
    Compiled,
    chosen,
    narrow,
    roomy,
)
from cjepa_fast.kernels.common.maybe_triton import tl, triton
from cjepa_fast.kernels.common.sums import sum_parts

LOG2_E = 1.4426950408889634

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
def _write_part(
    base, row, live, stride, x, FIRST: tl.constexpr, d: tl.constexpr, WIDTH: tl.constexpr
):
    col = FIRST + tl.arange(0, WIDTH)
    there = base + row.to(tl.int64)[:, None] * stride + col[None, :]
    tl.store(there, narrow(x, base.dtype.element_ty), mask=live[:, None] & (col < d)[None, :])


@triton.jit
def _write(base, row, live, stride, x0, x1, d: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Both parts of a head."""
    _write_part(base, row, live, stride, x0, 0, d, D0)
    if D1 > 0:
        _write_part(base, row, live, stride, x1, D0, d, D1)


@triton.jit
def _write_sums(parts, sums0, sums1, d: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    col = tl.arange(0, D0)
    tl.store(parts + col, sums0, mask=col < d)
    if D1 > 0:
        rest = D0 + tl.arange(0, D1)
        tl.store(parts + rest, sums1, mask=rest < d)


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


@triton.jit
def _place(H, blocks):
    """A program's head, block of rows and sequence.

    Heads first, which share cache lines, then blocks, which share what they go over.
    """
    head = tl.program_id(0) % H
    block = (tl.program_id(0) // H) % blocks
    return head, block, (tl.program_id(0) // H // blocks).to(tl.int64)


@triton.jit(do_not_specialize=["S", "T", "blocks"])
def _attention_kernel(
    q, k, v, out, lse, H, S, T, blocks, q_batch, q_row, k_batch, k_row, out_batch, out_row, scale,
    d: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """ROWS queries of one sequence and head, COLS keys at a time, with a running maximum.

    lse (B, H, S): log2 of the sum of 2^scores. scale: log2(e) / sqrt(d).
    """
    head, block, sequence = _place(H, blocks)
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
    _write(out, row, live, out_row, out0 / total[:, None], out1 / total[:, None], d, D0, D1)
    tl.store(lse + (sequence * H + head) * S + row, most + tl.log2(total), mask=live)


@triton.jit
def _queries(
    q, out, dout, lse, S, q_row, out_row, first,
    ROWS: tl.constexpr, d: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """Of ROWS queries from `first` on: q, the gradient of their outputs, lse and rowsum(do * o)."""
    row = first + tl.arange(0, ROWS)
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
    head, _, sequence = _place(H, 1)
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
        dk0, dk1 = dk0 * factor, dk1 * factor
        _write(dk, col, live, dk_row, dk0, dk1, d, D0, D1)
        _write(dv, col, live, dk_row, dv0, dv1, d, D0, D1)
        if SUMS:
            sum_k0 += tl.sum(tl.where(live[:, None], dk0, 0.0), 0)
            sum_v0 += tl.sum(tl.where(live[:, None], dv0, 0.0), 0)
            if D1 > 0:
                sum_k1 += tl.sum(tl.where(live[:, None], dk1, 0.0), 0)
                sum_v1 += tl.sum(tl.where(live[:, None], dv1, 0.0), 0)
    dqa0, dqa1 = dqa0 * factor, dqa1 * factor
    row = tl.arange(0, ROWS0)
    _write(dq, row, row < S, dq_row, dqa0, dqa1, d, D0, D1)
    if ROWS1 > 0:
        dqb0, dqb1 = dqb0 * factor, dqb1 * factor
        second = ROWS0 + tl.arange(0, ROWS1)
        _write(dq, second, second < S, dq_row, dqb0, dqb1, d, D0, D1)
    if SUMS:
        parts += sequence * 3 * H * d + head * d
        total0, total1 = tl.sum(dqa0, 0), tl.sum(dqa1, 0)
        if ROWS1 > 0:
            total0, total1 = total0 + tl.sum(dqb0, 0), total1 + tl.sum(dqb1, 0)
        _write_sums(parts, total0, total1, d, D0, D1)
        _write_sums(parts + H * d, sum_k0, sum_k1, d, D0, D1)
        _write_sums(parts + 2 * H * d, sum_v0, sum_v1, d, D0, D1)


@triton.jit(do_not_specialize=["S", "T", "blocks"])
def _attention_queries_kernel(
    q, k, v, out, dout, lse, delta, dq, parts, H, S, T, blocks,
    q_batch, q_row, k_batch, k_row, out_batch, out_row, dq_batch, dq_row, scale, factor,
    d: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, SUMS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The first of two passes: dq of ROWS queries, COLS keys at a time.

    blocks: as many as the longer of queries and keys has. Leaves delta (B, H, S), rowsum(do * o),
    and with SUMS in parts (B, blocks, 3, H d), at 0, the sums of the rows of dq.
    """
    head, block, sequence = _place(H, blocks)
    row = block * ROWS + tl.arange(0, ROWS)
    live = row < S
    k += sequence * k_batch + head * d
    v += sequence * k_batch + head * d
    q0, q1, do0, do1, lse_r, delta_r = _queries(
        q + sequence * q_batch + head * d, out + sequence * out_batch + head * d,
        dout + sequence * out_batch + head * d, lse + (sequence * H + head) * S, S, q_row, out_row,
        block * ROWS, ROWS, d, D0, D1,
    )  # fmt: skip
    tl.store(delta + (sequence * H + head) * S + row, delta_r, mask=live)
    dq0 = tl.zeros((ROWS, D0), tl.float32)
    dq1 = tl.zeros((ROWS, D1 if D1 > 0 else D0), tl.float32)
    for start in range(0, tl.where(block * ROWS < S, T, 0), COLS):
        col = start + tl.arange(0, COLS)
        there = col < T
        k0, k1 = _parts(k, col, there, k_row, d, D0, D1)
        v0, v1 = _parts(v, col, there, k_row, d, D0, D1)
        weights = tl.exp2(_product(q0, q1, k0, k1, D1, ROWS, COLS) * scale - lse_r[:, None])
        weights = tl.where(there[None, :], weights, 0.0)  # as in _step
        slopes = weights * (_product(do0, do1, v0, v1, D1, ROWS, COLS) - delta_r[:, None])
        slopes = narrow(slopes, q.dtype.element_ty)
        dq0 = _dot(slopes, k0, dq0)
        if D1 > 0:
            dq1 = _dot(slopes, k1, dq1)
    dq0, dq1 = dq0 * factor, dq1 * factor
    dq += sequence * dq_batch + head * d
    _write(dq, row, live, dq_row, dq0, dq1, d, D0, D1)
    if SUMS:
        parts += (sequence * blocks + block) * 3 * H * d + head * d
        _write_sums(parts, tl.sum(dq0, 0), tl.sum(dq1, 0), d, D0, D1)


@triton.jit(do_not_specialize=["S", "T", "blocks"])
def _attention_keys_kernel(
    q, k, v, dout, lse, delta, dk, dv, parts, H, S, T, blocks,
    q_batch, q_row, k_batch, k_row, out_batch, out_row, dk_batch, dk_row, scale, factor,
    d: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, SUMS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The second: dk and dv of ROWS keys, COLS queries at a time, and their sums at 1 and 2.

    All is the other way up, (keys, queries), so that what was just computed is a product's left.
    """
    head, block, sequence = _place(H, blocks)
    row = block * ROWS + tl.arange(0, ROWS)
    live = row < T
    q += sequence * q_batch + head * d
    dout += sequence * out_batch + head * d
    lse += (sequence * H + head) * S
    delta += (sequence * H + head) * S
    k0, k1 = _parts(k + sequence * k_batch + head * d, row, live, k_row, d, D0, D1)
    v0, v1 = _parts(v + sequence * k_batch + head * d, row, live, k_row, d, D0, D1)
    E1: tl.constexpr = D1 if D1 > 0 else D0
    dk0, dk1 = tl.zeros((ROWS, D0), tl.float32), tl.zeros((ROWS, E1), tl.float32)
    dv0, dv1 = tl.zeros((ROWS, D0), tl.float32), tl.zeros((ROWS, E1), tl.float32)
    for start in range(0, tl.where(block * ROWS < T, S, 0), COLS):
        col = start + tl.arange(0, COLS)
        there = col < S
        q0, q1 = _parts(q, col, there, q_row, d, D0, D1)
        do0, do1 = _parts(dout, col, there, out_row, d, D0, D1)
        lse_c = tl.load(lse + col, mask=there, other=float("inf"))
        delta_c = tl.load(delta + col, mask=there, other=0.0)
        weights = tl.exp2(_product(k0, k1, q0, q1, D1, ROWS, COLS) * scale - lse_c[None, :])
        weights = tl.where(live[:, None], weights, 0.0)
        low = narrow(weights, q.dtype.element_ty)
        dv0 = _dot(low, do0, dv0)
        slopes = weights * (_product(v0, v1, do0, do1, D1, ROWS, COLS) - delta_c[None, :])
        slopes = narrow(slopes, q.dtype.element_ty)
        dk0 = _dot(slopes, q0, dk0)
        if D1 > 0:
            dv1 = _dot(low, do1, dv1)
            dk1 = _dot(slopes, q1, dk1)
    dk0, dk1 = dk0 * factor, dk1 * factor
    dk += sequence * dk_batch + head * d
    dv += sequence * dk_batch + head * d
    _write(dk, row, live, dk_row, dk0, dk1, d, D0, D1)
    _write(dv, row, live, dk_row, dv0, dv1, d, D0, D1)
    if SUMS:
        parts += (sequence * blocks + block) * 3 * H * d + head * d
        _write_sums(parts + H * d, tl.sum(dk0, 0), tl.sum(dk1, 0), d, D0, D1)
        _write_sums(parts + 2 * H * d, tl.sum(dv0, 0), tl.sum(dv1, 0), d, D0, D1)


# --- launchers


class Tile(NamedTuple):
    """Queries and keys that a program takes at a time (forward), by that many warps."""

    rows: int
    cols: int
    warps: int
    stages: int = 2


class OnePass(NamedTuple):
    """The queries of a program, all of a sequence, in two parts, and the keys taken at a time."""

    rows0: int
    rows1: int
    cols: int
    warps: int
    stages: int = 2
    registers: int | None = None  # most of a thread, None: as many as it asks for


class TwoPasses(NamedTuple):
    """Queries that a program holds and keys it takes at a time, then the other way about."""

    rows: int
    cols: int
    warps: int
    stages: int = 2


TILES = (Tile(64, 64, 4), Tile(128, 64, 8), Tile(64, 32, 4), Tile(32, 32, 2))
TWO_PASSES = (TwoPasses(64, 64, 4), TwoPasses(64, 32, 4), TwoPasses(128, 64, 8))


def split(d: int) -> tuple[int, int]:
    """The powers of two that a head's values are taken as, the second 0 where one does."""
    whole = max(16, triton.next_power_of_2(d))
    first = whole // 2
    second = max(16, triton.next_power_of_2(max(1, d - first)))
    return (whole, 0) if d == whole or first < 16 or first + second >= whole else (first, second)


def one_pass(S: int, d: int, room: bool = True) -> tuple[OnePass, ...]:
    """Those that hold S queries of d values without spilling on an H100, if any.

    Just above 128 a second part of 16 queries spares half of a tile of 256. room: whether a program
    may have 160 KiB of shared memory, which wide heads take.
    """
    if (256 if d <= 32 else 128) < S or (d > 64 and not room):
        return ()
    whole = max(64, triton.next_power_of_2(S))
    found = [OnePass(whole, 0, 64, 8)]
    if whole == 128 and d <= 32:  # in half of the registers, or of the warps, two programs at once
        found += [OnePass(128, 0, 64, 8, 2, 128), OnePass(128, 0, 64, 4)]
    if whole == 64:
        found += [OnePass(64, 0, 64, 4), OnePass(64, 0, 32, 4)] if d <= 64 else []
    if 128 < S <= 144:
        found.insert(0, OnePass(128, 16, 64, 8))
    return tuple(found)


def forward_candidates(S: int, d: int) -> tuple[str, tuple[Tile, ...]]:
    """tuned.py's key for S queries of d values, and the tiles to choose from."""
    return f"attention {triton.next_power_of_2(S)}x{d}", TILES


def backward_candidates(
    S: int, d: int, device: torch.device
) -> tuple[str, tuple[OnePass | TwoPasses, ...]]:
    """The same of the backward, of one length from 129 to 144."""
    room = roomy(device)
    two = TWO_PASSES if room or d <= 64 else TWO_PASSES[:2]
    length = 144 if 128 < S <= 144 else max(64, triton.next_power_of_2(S))
    return f"attention backward {length}x{d}", one_pass(S, d, room) + two


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
    tile: OnePass | TwoPasses | None = None,
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
    tile = tile or chosen(*backward_candidates(S, d, q.device), q.device)
    D0, D1 = split(d)
    dq, dk, dv = grads
    assert k.stride() == v.stride() and dk.stride() == dv.stride()
    blocks = triton.cdiv(max(S, T), tile.rows) if isinstance(tile, TwoPasses) else 1
    parts = torch.empty(B * blocks if sums else 0, 3 * width, device=q.device, dtype=torch.float32)
    own = {"scale": d**-0.5 * LOG2_E, "factor": d**-0.5, "d": d, "D0": D0, "D1": D1, "SUMS": sums}
    own |= {"COLS": tile.cols, "num_warps": tile.warps, "num_stages": tile.stages}
    read = *_strides(q), *_strides(k), *_strides(out)
    if isinstance(tile, OnePass):
        _attention_backward_kernel[(B * heads,)](
            q, k, v, out, dout, lse, dq, dk, dv, parts, heads, S, T,
            *read, *_strides(dq), *_strides(dk), ROWS0=tile.rows0, ROWS1=tile.rows1,
            maxnreg=tile.registers, **own,
        )  # fmt: skip
    else:
        delta, grid = torch.empty_like(lse), (B * blocks * heads,)
        _attention_queries_kernel[grid](
            q, k, v, out, dout, lse, delta, dq, parts, heads, S, T, blocks,
            *read, *_strides(dq), ROWS=tile.rows, **own,
        )  # fmt: skip
        _attention_keys_kernel[grid](
            q, k, v, dout, lse, delta, dk, dv, parts, heads, S, T, blocks,
            *read, *_strides(dk), ROWS=tile.rows, **own,
        )  # fmt: skip
    return sum_parts(parts, q.dtype) if sums else None


# --- ahead of time

POINTERS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
RAGGED = {"H", "S", "T", "blocks"}
# Heads of the models and predictors, and the queries of a sequence: contexts, predictors, images.
WIDTHS = (24, 32, 64, 80, 88, 128)
LENGTHS = (60, 100, 140, 250)


def _compiled(label: str, kernel, dtype: str, d: int, tile: tuple, **own) -> Compiled:
    D0, D1 = split(d)
    kinds = dict.fromkeys(POINTERS, f"*{dtype}")
    kinds |= dict.fromkeys(("lse", "delta", "parts"), "*fp32")
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
    """All kernels in every tile, in bf16 for each width of heads and in fp16 for one."""
    found = []
    for dtype, d in [(torch.bfloat16, d) for d in WIDTHS] + [(torch.float16, 64)]:
        name = TRITON_NAMES[dtype]
        found += [_compiled("", _attention_kernel, name, d, tile, ROWS=tile.rows) for tile in TILES]
        for tile in dict.fromkeys(t for S in LENGTHS for t in one_pass(S, d)):
            rows = {"ROWS0": tile.rows0, "ROWS1": tile.rows1, "SUMS": True}
            kernel = _attention_backward_kernel
            found.append(_compiled(" backward", kernel, name, d, tile, **rows))
        passes = {
            " backward, queries": _attention_queries_kernel,
            " backward, keys": _attention_keys_kernel,
        }
        found += [_compiled(label, kernel, name, d, tile, ROWS=tile.rows, SUMS=True)
                  for tile in TWO_PASSES for label, kernel in passes.items()]  # fmt: skip
    return found
