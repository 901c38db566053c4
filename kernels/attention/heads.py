"""What attention's kernels share: reading, multiplying and writing the values of a head.

A head's d values are taken as two parts of D0 and D1 columns, powers of two, D1 = 0 being none: 80
or 88 values as 64 and 16 or 32, 24 as 32; never as 128.
"""

import torch

from cjepa_fast.kernels.common.launch import Compiled, dot, narrow
from cjepa_fast.kernels.common.maybe_triton import tl, triton

LOG2_E = 1.4426950408889634

# --- in a kernel


@triton.jit
def load_part(base, row, live, stride, FIRST: tl.constexpr, d: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of values FIRST.. of a head, zero beyond it: (rows, WIDTH)."""
    col = FIRST + tl.arange(0, WIDTH)
    keep = live[:, None] & (col < d)[None, :]
    return tl.load(base + row.to(tl.int64)[:, None] * stride + col[None, :], mask=keep, other=0.0)


@triton.jit
def load_parts(base, row, live, stride, d: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Both parts of a head; without a second the first twice."""
    first = load_part(base, row, live, stride, 0, d, D0)
    if D1 > 0:
        return first, load_part(base, row, live, stride, D0, d, D1)
    else:
        return first, first


@triton.jit
def store_part(
    base, row, live, stride, x, FIRST: tl.constexpr, d: tl.constexpr, WIDTH: tl.constexpr
):
    col = FIRST + tl.arange(0, WIDTH)
    there = base + row.to(tl.int64)[:, None] * stride + col[None, :]
    tl.store(there, narrow(x, base.dtype.element_ty), mask=live[:, None] & (col < d)[None, :])


@triton.jit
def store_parts(
    base, row, live, stride, x0, x1, d: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr
):
    """Both parts of a head."""
    store_part(base, row, live, stride, x0, 0, d, D0)
    if D1 > 0:
        store_part(base, row, live, stride, x1, D0, d, D1)


@triton.jit
def store_sums(parts, sums0, sums1, d: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    col = tl.arange(0, D0)
    tl.store(parts + col, sums0, mask=col < d)
    if D1 > 0:
        rest = D0 + tl.arange(0, D1)
        tl.store(parts + rest, sums1, mask=rest < d)


@triton.jit
def load_queries(
    q, out, dout, lse, S, q_row, out_row, first,
    ROWS: tl.constexpr, d: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """Of ROWS queries from `first` on: q, the gradient of their outputs, lse and rowsum(do * o)."""
    row = first + tl.arange(0, ROWS)
    live = row < S
    q0, q1 = load_parts(q, row, live, q_row, d, D0, D1)
    do0, do1 = load_parts(dout, row, live, out_row, d, D0, D1)
    o0, o1 = load_parts(out, row, live, out_row, d, D0, D1)
    delta = tl.sum(o0.to(tl.float32) * do0.to(tl.float32), 1)
    if D1 > 0:
        delta += tl.sum(o1.to(tl.float32) * do1.to(tl.float32), 1)
    return q0, q1, do0, do1, tl.load(lse + row, mask=live, other=float("inf")), delta


@triton.jit
def dot_transposed(x0, x1, y0, y1, D1: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """x y^T over a head's values: (ROWS, COLS) fp32."""
    out = dot(x0, tl.trans(y0), tl.zeros((ROWS, COLS), tl.float32))
    if D1 > 0:
        out = dot(x1, tl.trans(y1), out)
    return out


@triton.jit
def weigh(
    q0, q1, k0, k1, there, most, total, scale,
    D1: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Of ROWS queries and COLS keys, those that are `there`: 2^(scores - the new maximum), by what
    earlier ones shrink, the new maximum and the new sum. scale: log2(e) / sqrt(d)."""
    scores = dot_transposed(q0, q1, k0, k1, D1, ROWS, COLS) * scale
    scores = tl.where(there[None, :], scores, -float("inf"))
    new = tl.maximum(most, tl.max(scores, 1))
    weights = tl.exp2(scores - new[:, None])
    shrunk = tl.exp2(most - new)
    return weights, shrunk, new, total * shrunk + tl.sum(weights, 1)


@triton.jit
def program_index(H, blocks):
    """A program's head, block of rows and sequence.

    Heads first, which share cache lines, then blocks, which share what they go over.
    """
    head = tl.program_id(0) % H
    block = (tl.program_id(0) // H) % blocks
    return head, block, (tl.program_id(0) // H // blocks).to(tl.int64)


# --- for a launcher


def split(d: int) -> tuple[int, int]:
    """The powers of two that a head's values are taken as, the second 0 where one does."""
    whole = max(16, triton.next_power_of_2(d))
    first = whole // 2
    second = max(16, triton.next_power_of_2(max(1, d - first)))
    return (whole, 0) if d == whole or first < 16 or first + second >= whole else (first, second)


def strides(x_BSX: torch.Tensor) -> tuple[int, int]:
    return x_BSX.stride(0), x_BSX.stride(1)


# --- ahead of time

POINTERS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
RAGGED = {"H", "S", "T", "blocks"}
# Heads of the models and predictors, and the queries of a sequence: contexts, predictors, images.
WIDTHS = (24, 32, 64, 80, 88, 128)


def compiled(label: str, kernel, dtype: str, d: int, tile: tuple, **own) -> Compiled:
    D0, D1 = split(d)
    kinds = dict.fromkeys(POINTERS, f"*{dtype}")
    kinds |= dict.fromkeys(("lse", "delta", "parts"), "*fp32")
    constexprs = {"d": d, "D0": D0, "D1": D1, "COLS": tile.cols, "PDL": False, **own}
    others = [a for a in kernel.arg_names if a not in kinds and a not in constexprs]
    kinds |= {a: "fp32" if a in ("scale", "factor") else "i32" for a in others}
    sizes = "x".join(str(n) for n in tile)
    return Compiled(
        f"attention{label} {dtype} {d} {sizes}", kernel,
        {a: kinds[a] for a in kernel.arg_names if a in kinds}, constexprs, tile.warps, tile.stages,
        must_have=(r"wgmma|mma\.sync|tcgen05\.mma",), may_spill=float("inf"),
        maxnreg=getattr(tile, "registers", None),
        divisible=tuple(a for a in others if kinds[a] == "i32" and a not in RAGGED),
    )  # fmt: skip
