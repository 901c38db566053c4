"""The backward of attention in two passes, for sequences of any length.

    dv = P^T do,   dS = P * (do v^T - rowsum(do * o)) / sqrt(d),   dq = dS k,   dk = dS^T q

Programs that hold a block of queries go over the keys, for dq, then programs that hold a block of
keys over the queries, for dk and dv. They make 14 S T L operations where one pass makes 10, and
read twice what it reads once, in a fraction of its registers, so that several programs work on a
multiprocessor at once.

Shapes: q, o, do, dq (B, S, H d); k, v, dk, dv (B, T, H d); lse, delta (B, H, S).
Bytes that move, with e bytes a value and L = B H d: (6 S + 6 T) L e.
"""

from typing import NamedTuple

import torch

from cjepa_fast.kernels.attention.heads import (
    WIDTHS,
    compiled,
    dot_transposed,
    load_parts,
    load_queries,
    program_index,
    store_parts,
    store_sums,
)
from cjepa_fast.kernels.common.dependent_launch import also_dependent, wait_for_previous
from cjepa_fast.kernels.common.launch import TRITON_NAMES, Compiled, dot, narrow
from cjepa_fast.kernels.common.maybe_triton import tl, triton

# --- the kernels


@triton.jit(do_not_specialize=["S", "T", "blocks"])
def _attention_queries_kernel(
    q,  # (B, S, H d)
    k,  # (B, T, H d)
    v,  # (B, T, H d), strides as k
    out,  # (B, S, H d)
    dout,  # (B, S, H d), strides as out
    lse,  # (B, H, S) fp32
    delta,  # (B, H, S) fp32
    dq,  # (B, S, H d)
    parts,  # (B, blocks, 3, H d) fp32, with SUMS alone
    H, S, T, blocks, q_batch, q_row, k_batch, k_row, out_batch, out_row, dq_batch, dq_row, scale,
    factor,
    d: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """The first of two passes: dq of ROWS queries, COLS keys at a time.

    blocks: as many as the longer of queries and keys has. Leaves delta (B, H, S), rowsum(do * o),
    and with SUMS in parts (B, blocks, 3, H d), at 0, the sums of the rows of dq.
    """
    wait_for_previous(PDL)
    head, block, sequence = program_index(H, blocks)
    row = block * ROWS + tl.arange(0, ROWS)
    live = row < S
    k += sequence * k_batch + head * d
    v += sequence * k_batch + head * d
    q0, q1, do0, do1, lse_r, delta_r = load_queries(
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
        k0, k1 = load_parts(k, col, there, k_row, d, D0, D1)
        v0, v1 = load_parts(v, col, there, k_row, d, D0, D1)
        weights = tl.exp2(dot_transposed(q0, q1, k0, k1, D1, ROWS, COLS) * scale - lse_r[:, None])
        weights = tl.where(there[None, :], weights, 0.0)  # as in _step
        slopes = weights * (dot_transposed(do0, do1, v0, v1, D1, ROWS, COLS) - delta_r[:, None])
        slopes = narrow(slopes, q.dtype.element_ty)
        dq0 = dot(slopes, k0, dq0)
        if D1 > 0:
            dq1 = dot(slopes, k1, dq1)
    dq0, dq1 = dq0 * factor, dq1 * factor
    dq += sequence * dq_batch + head * d
    store_parts(dq, row, live, dq_row, dq0, dq1, d, D0, D1)
    if SUMS:
        parts += (sequence * blocks + block) * 3 * H * d + head * d
        store_sums(parts, tl.sum(dq0, 0), tl.sum(dq1, 0), d, D0, D1)


@triton.jit(do_not_specialize=["S", "T", "blocks"])
def _attention_keys_kernel(
    q,  # (B, S, H d)
    k,  # (B, T, H d)
    v,  # (B, T, H d), strides as k
    dout,  # (B, S, H d)
    lse,  # (B, H, S) fp32
    delta,  # (B, H, S) fp32
    dk,  # (B, T, H d)
    dv,  # (B, T, H d), strides as dk
    parts,  # (B, blocks, 3, H d) fp32, with SUMS alone
    H, S, T, blocks, q_batch, q_row, k_batch, k_row, out_batch, out_row, dk_batch, dk_row, scale,
    factor,
    d: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """The second: dk and dv of ROWS keys, COLS queries at a time, and their sums at 1 and 2.

    All is the other way up, (keys, queries), so that a matmul's left is what was just computed.
    """
    wait_for_previous(PDL)
    head, block, sequence = program_index(H, blocks)
    row = block * ROWS + tl.arange(0, ROWS)
    live = row < T
    q += sequence * q_batch + head * d
    dout += sequence * out_batch + head * d
    lse += (sequence * H + head) * S
    delta += (sequence * H + head) * S
    k0, k1 = load_parts(k + sequence * k_batch + head * d, row, live, k_row, d, D0, D1)
    v0, v1 = load_parts(v + sequence * k_batch + head * d, row, live, k_row, d, D0, D1)
    E1: tl.constexpr = D1 if D1 > 0 else D0
    dk0, dk1 = tl.zeros((ROWS, D0), tl.float32), tl.zeros((ROWS, E1), tl.float32)
    dv0, dv1 = tl.zeros((ROWS, D0), tl.float32), tl.zeros((ROWS, E1), tl.float32)
    for start in range(0, tl.where(block * ROWS < T, S, 0), COLS):
        col = start + tl.arange(0, COLS)
        there = col < S
        q0, q1 = load_parts(q, col, there, q_row, d, D0, D1)
        do0, do1 = load_parts(dout, col, there, out_row, d, D0, D1)
        lse_c = tl.load(lse + col, mask=there, other=float("inf"))
        delta_c = tl.load(delta + col, mask=there, other=0.0)
        weights = tl.exp2(dot_transposed(k0, k1, q0, q1, D1, ROWS, COLS) * scale - lse_c[None, :])
        weights = tl.where(live[:, None], weights, 0.0)
        low = narrow(weights, q.dtype.element_ty)
        dv0 = dot(low, do0, dv0)
        slopes = weights * (dot_transposed(v0, v1, do0, do1, D1, ROWS, COLS) - delta_c[None, :])
        slopes = narrow(slopes, q.dtype.element_ty)
        dk0 = dot(slopes, q0, dk0)
        if D1 > 0:
            dv1 = dot(low, do1, dv1)
            dk1 = dot(slopes, q1, dk1)
    dk0, dk1 = dk0 * factor, dk1 * factor
    dk += sequence * dk_batch + head * d
    dv += sequence * dk_batch + head * d
    store_parts(dk, row, live, dk_row, dk0, dk1, d, D0, D1)
    store_parts(dv, row, live, dk_row, dv0, dv1, d, D0, D1)
    if SUMS:
        parts += (sequence * blocks + block) * 3 * H * d + head * d
        store_sums(parts + H * d, tl.sum(dk0, 0), tl.sum(dk1, 0), d, D0, D1)
        store_sums(parts + 2 * H * d, tl.sum(dv0, 0), tl.sum(dv1, 0), d, D0, D1)


# --- their tiles, for the launcher in backward.py


class TwoPasses(NamedTuple):
    """Queries that a program holds and keys it takes at a time, then the other way about."""

    rows: int
    cols: int
    warps: int
    stages: int = 2


TWO_PASSES = (TwoPasses(64, 64, 4), TwoPasses(64, 32, 4), TwoPasses(128, 64, 8))


# --- ahead of time


def ahead_of_time() -> list[Compiled]:
    """Both kernels in every tile, in bf16 for each width of heads and in fp16 for one."""
    passes = {
        " backward, queries": _attention_queries_kernel,
        " backward, keys": _attention_keys_kernel,
    }
    return also_dependent(
        compiled(label, kernel, TRITON_NAMES[dtype], d, tile, ROWS=tile.rows, SUMS=True)
        for dtype, d in [(torch.bfloat16, d) for d in WIDTHS] + [(torch.float16, 64)]
        for tile in TWO_PASSES
        for label, kernel in passes.items()
    )
