"""The backward of attention in one pass: a program holds all queries of a sequence and head.

    dv = P^T do,   dS = P * (do v^T - rowsum(do * o)) / sqrt(d),   dq = dS k,   dk = dS^T q

The program goes once over the keys, so nothing is read twice, in as many registers as that takes.

Shapes: q, o, do, dq (B, S, H d); k, v, dk, dv (B, T, H d); lse (B, H, S).
Bytes that must move, with e bytes a value and L = B H d: (4 S + 4 T) L e. Operations: 10 S T L.
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

# --- the kernel


@triton.jit
def _step(
    q0, q1, do0, do1, lse, delta, k0, k1, v0, v1, dq0, dq1, dk0, dk1, dv0, dv1, live, scale,
    D1: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """What ROWS queries and COLS keys add to each other's gradients, before 1 / sqrt(d).

    A query that is not there has lse = inf, so no weight. A key that is not there has a score of 0,
    which may be far above all that are: its weight is set to 0.
    """
    weights = tl.exp2(dot_transposed(q0, q1, k0, k1, D1, ROWS, COLS) * scale - lse[:, None])
    weights = tl.where(live[None, :], weights, 0.0)
    low = narrow(weights, q0.dtype)
    dv0 = dot(tl.trans(low), do0, dv0)
    slopes = weights * (dot_transposed(do0, do1, v0, v1, D1, ROWS, COLS) - delta[:, None])
    slopes = narrow(slopes, q0.dtype)
    dk0 = dot(tl.trans(slopes), q0, dk0)
    dq0 = dot(slopes, k0, dq0)
    if D1 > 0:
        dv1 = dot(tl.trans(low), do1, dv1)
        dk1 = dot(tl.trans(slopes), q1, dk1)
        dq1 = dot(slopes, k1, dq1)
    return dq0, dq1, dk0, dk1, dv0, dv1


@triton.jit(do_not_specialize=["S", "T"])
def _attention_backward_kernel(
    q,  # (B, S, H d)
    k,  # (B, T, H d)
    v,  # (B, T, H d), strides as k
    out,  # (B, S, H d)
    dout,  # (B, S, H d), strides as out
    lse,  # (B, H, S) fp32
    dq,  # (B, S, H d)
    dk,  # (B, T, H d)
    dv,  # (B, T, H d), strides as dk
    parts,  # (B, 3, H d) fp32, with SUMS alone
    H, S, T, q_batch, q_row, k_batch, k_row, out_batch, out_row, dq_batch, dq_row, dk_batch, dk_row,
    scale, factor,
    d: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, SUMS: tl.constexpr, ROWS0: tl.constexpr,
    ROWS1: tl.constexpr, COLS: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """One sequence and head: its S <= ROWS0 + ROWS1 queries, in two parts, or one with ROWS1 = 0.

    scale: log2(e) / sqrt(d), factor: 1 / sqrt(d). With SUMS, parts (B, 3, H d) has the sums of the
    rows of dq, dk and dv, as fp32.
    """
    wait_for_previous(PDL)
    head, _, sequence = program_index(H, 1)
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
    qa0, qa1, doa0, doa1, lse_a, delta_a = load_queries(
        q, out, dout, lse, S, q_row, out_row, 0, ROWS0, d, D0, D1
    )  # fmt: skip
    dqa0 = tl.zeros((ROWS0, D0), tl.float32)
    dqa1 = tl.zeros((ROWS0, E1), tl.float32)
    if ROWS1 > 0:
        qb0, qb1, dob0, dob1, lse_b, delta_b = load_queries(
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
        k0, k1 = load_parts(k, col, live, k_row, d, D0, D1)
        v0, v1 = load_parts(v, col, live, k_row, d, D0, D1)
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
        store_parts(dk, col, live, dk_row, dk0, dk1, d, D0, D1)
        store_parts(dv, col, live, dk_row, dv0, dv1, d, D0, D1)
        if SUMS:
            sum_k0 += tl.sum(tl.where(live[:, None], dk0, 0.0), 0)
            sum_v0 += tl.sum(tl.where(live[:, None], dv0, 0.0), 0)
            if D1 > 0:
                sum_k1 += tl.sum(tl.where(live[:, None], dk1, 0.0), 0)
                sum_v1 += tl.sum(tl.where(live[:, None], dv1, 0.0), 0)
    dqa0, dqa1 = dqa0 * factor, dqa1 * factor
    row = tl.arange(0, ROWS0)
    store_parts(dq, row, row < S, dq_row, dqa0, dqa1, d, D0, D1)
    if ROWS1 > 0:
        dqb0, dqb1 = dqb0 * factor, dqb1 * factor
        second = ROWS0 + tl.arange(0, ROWS1)
        store_parts(dq, second, second < S, dq_row, dqb0, dqb1, d, D0, D1)
    if SUMS:
        parts += sequence * 3 * H * d + head * d
        total0, total1 = tl.sum(dqa0, 0), tl.sum(dqa1, 0)
        if ROWS1 > 0:
            total0, total1 = total0 + tl.sum(dqb0, 0), total1 + tl.sum(dqb1, 0)
        store_sums(parts, total0, total1, d, D0, D1)
        store_sums(parts + H * d, sum_k0, sum_k1, d, D0, D1)
        store_sums(parts + 2 * H * d, sum_v0, sum_v1, d, D0, D1)


# --- its tiles, for the launcher in backward.py


class OnePass(NamedTuple):
    """The queries of a program, all of a sequence, in two parts, and the keys taken at a time."""

    rows0: int
    rows1: int
    cols: int
    warps: int
    stages: int = 2
    registers: int | None = None  # most of a thread, None: as many as it asks for


def one_pass(S: int, d: int, room: bool = True) -> tuple[OnePass, ...]:
    """Those that hold S queries of d values without spilling on an H100, if any.

    Just above 128 a second part of 16 queries spares half of a tile of 256. With 32 keys at a time,
    two such programs fit a multiprocessor of sm_90 or sm_100, where with 64 keys one does. By
    bench/results/aot.md that is predicted to be faster; it is not timed. On sm_80 it spills.
    room: whether a program may have 160 KiB of shared memory, which wide heads take.
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
        found[:0] = [OnePass(128, 16, 32, 8, 2, 128), OnePass(128, 16, 64, 8)]
    return tuple(found)


# --- ahead of time

LENGTHS = (60, 100, 140, 250)


def ahead_of_time() -> list[Compiled]:
    """The kernel in every tile, in bf16 for each width of heads and in fp16 for one."""
    found = []
    for dtype, d in [(torch.bfloat16, d) for d in WIDTHS] + [(torch.float16, 64)]:
        for tile in dict.fromkeys(t for S in LENGTHS for t in one_pass(S, d)):
            rows = {"ROWS0": tile.rows0, "ROWS1": tile.rows1, "SUMS": True}
            kernel, name = _attention_backward_kernel, TRITON_NAMES[dtype]
            found.append(compiled(" backward", kernel, name, d, tile, **rows))
    return also_dependent(found)
