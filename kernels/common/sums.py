"""Sums over rows in two steps, in a fixed order: each program's own part, then the parts.

    sum_parts    out[c] = sum_p parts[p, c]

The backward kernels of norm.py, gelu.py and attention/ read a gradient anyway, and sum its
columns as they go: the gradients of biases and of LayerNorm's weights. That leaves one row of sums
a program. Those are added here, so that no atomics are needed and the same input gives the same
bits.

Bytes that must move: P C 4 and C b, little beside what the programs read.
"""

import torch

from cjepa_fast.kernels.common.dependent_launch import (
    also_dependent,
    dependent,
    wait_for_previous,
)
from cjepa_fast.kernels.common.launch import (
    KERNEL_DTYPES,
    TRITON_NAMES,
    Compiled,
    narrow,
    on_its_device,
    use_kernel,
)
from cjepa_fast.kernels.common.maybe_triton import tl, triton

TILE = {"ROWS": 128, "WIDTH": 32}  # a LayerNorm's 3 D columns are then 120 programs at D = 1280


def sum_parts_reference(parts_PC: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return parts_PC.sum(0).to(dtype)


@triton.jit(do_not_specialize=["P"])
def _sum_parts_kernel(
    parts,  # (P, C) fp32
    out,  # (C,)
    P, C,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Programs: tiles of the columns."""
    wait_for_previous(PDL)
    col = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, P, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)  # of parts with 2^31 values and more
        keep = (row < P)[:, None] & (col < C)[None, :]
        total += tl.load(parts + row[:, None] * C + col[None, :], mask=keep, other=0.0)
    tl.store(out + col, narrow(tl.sum(total, 0), out.dtype.element_ty), mask=col < C)


@on_its_device
def sum_parts(parts_PC: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(C,) in `dtype` from fp32 parts (P, C)."""
    if not use_kernel(parts_PC):
        return sum_parts_reference(parts_PC, dtype)
    P, C = parts_PC.shape
    out = torch.empty(C, device=parts_PC.device, dtype=dtype)
    if C:
        grid = (triton.cdiv(C, TILE["WIDTH"]),)
        _sum_parts_kernel[grid](parts_PC, out, P, C, **TILE, **dependent(out.device))
    return out


def share_of(rows: int, programs: int, step: int) -> tuple[int, int]:
    """(rows a program, programs): whole steps of rows, so that at most `programs` take them all."""
    each = triton.cdiv(triton.cdiv(rows, programs), step) * step
    return each, triton.cdiv(rows, max(each, 1))


# --- ahead of time


def ahead_of_time() -> list[Compiled]:
    return also_dependent(
        Compiled(
            f"sum_parts {TRITON_NAMES[dtype]}", _sum_parts_kernel,
            {"parts": "*fp32", "out": f"*{TRITON_NAMES[dtype]}", "P": "i32", "C": "i32"},
            TILE, divisible=("C",),
        )
        for dtype in KERNEL_DTYPES
    )  # fmt: skip
