"""The forward of attention, its loads by the tensor memory accelerator (TMA; sm_90 and newer).

The kernel of forward.py, but for the loads: one thread asks for a whole tile of q, k or v, by a
descriptor of the tensor, and the accelerator copies it into shared memory, where the matmuls read
it. So no thread computes addresses, and none holds what is on its way in registers. It is a
candidate for the tuner (bench/tune.py); nothing chooses it otherwise.

A descriptor is of shape (B, H, S, d): what lies beyond S or d comes as zeros. The launcher makes it
on the host, and it is passed by value, as a kernel's argument: a CUDA graph records it as one, and
no memory on the device is needed, where a descriptor made by the kernel needs some for every
program. It costs the host some microseconds more a launch.

Shapes: q (B, S, H d), k and v (B, T, H d), of addresses and strides that are multiples of 16 bytes.
"""

import dataclasses
from typing import NamedTuple

import torch

from cjepa_fast.kernels.attention.heads import (
    WIDTHS,
    compiled,
    program_index,
    split,
    store_parts,
    strides,
    weigh,
)
from cjepa_fast.kernels.common.dependent_launch import also_dependent, wait_for_previous
from cjepa_fast.kernels.common.launch import TRITON_NAMES, Compiled, dot, narrow
from cjepa_fast.kernels.common.maybe_triton import TensorDescriptor, tl, triton

ALIGNED = 16  # bytes, of what a descriptor holds
TMA = 90  # sm_90, the first architecture with the accelerator

# --- the kernel


@triton.jit
def _load(x, sequence, head, row, FIRST: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """ROWS rows of values FIRST.. of a head, zero beyond it: (ROWS, WIDTH)."""
    return x.load([sequence, head, row, FIRST]).reshape(ROWS, WIDTH)


@triton.jit(do_not_specialize=["S", "T", "blocks"])
def _attention_descriptor_kernel(
    q,  # descriptors of (B, H, S, d): tiles (ROWS, D0) and
    q1,  # (ROWS, D1); without a second part the first again
    k,  # of (B, H, T, d): tiles (COLS, D0)
    k1,
    v,
    v1,
    out,  # (B, S, H d)
    lse,  # (B, H, S) fp32
    H, S, T, blocks, out_batch, out_row, scale,
    d: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """ROWS queries of one sequence and head, COLS keys at a time: as _attention_kernel."""
    wait_for_previous(PDL)
    head, block, sequence = program_index(H, blocks)
    image = sequence.to(tl.int32)
    row = block * ROWS + tl.arange(0, ROWS)
    q0 = _load(q, image, head, block * ROWS, 0, ROWS, D0)
    q1 = _load(q1, image, head, block * ROWS, D0, ROWS, D1) if D1 > 0 else q0
    most = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out0 = tl.zeros((ROWS, D0), tl.float32)
    out1 = tl.zeros((ROWS, D1 if D1 > 0 else D0), tl.float32)
    for start in range(0, T, COLS):
        there = start + tl.arange(0, COLS) < T
        keys = _load(k, image, head, start, 0, COLS, D0)
        rest = _load(k1, image, head, start, D0, COLS, D1) if D1 > 0 else keys
        weights, shrunk, most, total = weigh(
            q0, q1, keys, rest, there, most, total, scale, D1, ROWS, COLS
        )  # fmt: skip
        low = narrow(weights, out.dtype.element_ty)
        out0 = dot(low, _load(v, image, head, start, 0, COLS, D0), out0 * shrunk[:, None])
        if D1 > 0:
            out1 = dot(low, _load(v1, image, head, start, D0, COLS, D1), out1 * shrunk[:, None])
    out += sequence * out_batch + head * d
    live = row < S
    store_parts(out, row, live, out_row, out0 / total[:, None], out1 / total[:, None], d, D0, D1)
    tl.store(lse + (sequence * H + head) * S + row, most + tl.log2(total), mask=live)


# --- for the launcher in forward.py


class ByDescriptors(NamedTuple):
    """As forward.Tile, of this kernel."""

    rows: int
    cols: int
    warps: int
    stages: int = 2
    tma: bool = True  # the numbers of a Tile are others


BY_DESCRIPTORS = (ByDescriptors(64, 64, 4), ByDescriptors(128, 64, 8), ByDescriptors(64, 64, 4, 3))


def describable(x_BSX: torch.Tensor, d: int) -> bool:
    """Whether its address, its strides and those of its heads of d values are multiples."""
    sizes = (step * x_BSX.itemsize for step in (*strides(x_BSX), d))
    return x_BSX.data_ptr() % ALIGNED == 0 and not any(size % ALIGNED for size in sizes)


def descriptors(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, tile: ByDescriptors
) -> list:
    """The kernel's first six arguments."""
    found = []
    for x, rows in ((q, tile.rows), (k, tile.cols), (v, tile.cols)):
        B, S, width = x.shape
        d = width // heads
        shape, steps = [B, heads, S, d], [x.stride(0), d, x.stride(1), 1]
        for columns in split(d):
            block = [1, 1, rows, columns or split(d)[0]]
            found.append(TensorDescriptor(x, shape, steps, block))
    return found


# --- ahead of time


def ahead_of_time() -> list[Compiled]:
    """The kernel in every tile, in bf16 for each width of heads and in fp16 for one."""
    cases = [(torch.bfloat16, d) for d in WIDTHS] + [(torch.float16, 64)]
    return also_dependent(
        _compiled(TRITON_NAMES[dtype], d, tile) for dtype, d in cases for tile in BY_DESCRIPTORS
    )


def _compiled(dtype: str, d: int, tile: ByDescriptors) -> Compiled:
    made = compiled("", _attention_descriptor_kernel, dtype, d, tile, ROWS=tile.rows)
    kinds = {}
    for name, rows in (("q", tile.rows), ("k", tile.cols), ("v", tile.cols)):
        for suffix, columns in zip(("", "1"), split(d), strict=True):
            kinds[name + suffix] = f"tensordesc<{dtype}[1, 1, {rows}, {columns or split(d)[0]}]>"
    return dataclasses.replace(
        made, signature=made.signature | kinds, since=TMA,
        must_have=(*made.must_have, r"cp\.async\.bulk\.tensor\.4d[\w.]*"),
    )  # fmt: skip
