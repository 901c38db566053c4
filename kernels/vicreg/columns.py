"""The mean and the variance of each column of z, in two launches.

Of each stretch of rows, then of all: the squares about each stretch's mean plus the means' squares
about theirs, so that nothing cancels. The mean is kept in two parts, the first row and the mean
distance from it.

Shapes: z (M, n, D) in any strides, mean (2, M, D), variance (M, D).
Bytes that must move, for b bytes an element: M n D b.
"""

import torch

from cjepa_fast.kernels.common.launch import KERNEL_DTYPES, TRITON_NAMES, Compiled, on_its_device
from cjepa_fast.kernels.common.maybe_triton import tl, triton
from cjepa_fast.kernels.vicreg.tiles import (
    compiled,
    empty,
    in_stretches,
    load_centred,
    pointer_types,
)

COLUMNS = {"BLOCK_N": 32, "BLOCK_D": 64}
COMBINE = {"BLOCK_S": 16, "BLOCK_D": 64}


# --- the kernels


@triton.jit
def _column_kernel(
    z_ptr,  # (M, n, D)
    stretch_ptr,  # (2, M, splits, D) fp32
    n, D, per_split, plane, stride_m, stride_n, stride_d,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """For each stretch of `per_split` rows the mean of z - z[0], and the sum of squares about it.

    Writes (2, M, splits, D). The stretch is read twice, the second time from a cache.
    """
    cols = (tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    begin = tl.program_id(1) * per_split
    end = tl.minimum(begin + per_split, n)
    m = tl.program_id(2).to(tl.int64)
    z_ptr += m * stride_m
    first = tl.load(z_ptr + cols.to(tl.int64) * stride_d, mask=cols < D, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_N):
        rows = (start + tl.arange(0, BLOCK_N))[:, None]
        total += load_centred(z_ptr, rows, cols, first, 0.0, end, D, stride_n, stride_d)
    rest = (tl.sum(total, 0) / (end - begin))[None, :]
    squares = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_N):
        rows = (start + tl.arange(0, BLOCK_N))[:, None]
        x = load_centred(z_ptr, rows, cols, first, rest, end, D, stride_n, stride_d)
        squares += x * x
    stretch_ptr += (m * tl.num_programs(1) + tl.program_id(1)) * D + cols
    tl.store(stretch_ptr, rest, mask=cols < D)
    tl.store(stretch_ptr + plane, tl.sum(squares, 0)[None, :], mask=cols < D)


@triton.jit
def _combine_kernel(
    z_ptr,  # (M, n, D)
    stretch_ptr,  # (2, M, splits, D) fp32
    mean_ptr,  # (2, M, D) fp32
    variance_ptr,  # (M, D) fp32
    n, D, splits, per_split, plane, stride_m, stride_d,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The mean's two parts (2, M, D), z[0] and the mean of z - z[0], and the variances (M, D).

    The squares about each stretch's mean plus the means' squares about theirs (Chan et al. 1983):
    nothing cancels, wherever z[0] lies.
    """
    cols = (tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    m = tl.program_id(1).to(tl.int64)
    stretch_ptr += m * splits * D + cols
    total = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for start in range(0, splits, BLOCK_S):
        split = (start + tl.arange(0, BLOCK_S))[:, None]
        rows = tl.minimum(per_split, n - split * per_split)
        inside = (split < splits) & (cols < D)
        total += rows * tl.load(stretch_ptr + split * D, mask=inside, other=0.0)
    rest = (tl.sum(total, 0) / n)[None, :]
    squares = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for start in range(0, splits, BLOCK_S):
        split = (start + tl.arange(0, BLOCK_S))[:, None]
        rows = tl.minimum(per_split, n - split * per_split)
        inside = (split < splits) & (cols < D)
        away = tl.load(stretch_ptr + split * D, mask=inside, other=0.0) - rest
        within = tl.load(stretch_ptr + plane + split * D, mask=inside, other=0.0)
        squares += tl.where(inside, within + rows * away * away, 0.0)
    first = tl.load(z_ptr + m * stride_m + cols.to(tl.int64) * stride_d, mask=cols < D, other=0.0)
    offset = m * D + cols
    tl.store(mean_ptr + offset, first.to(tl.float32), mask=cols < D)
    tl.store(mean_ptr + tl.num_programs(1) * D + offset, rest, mask=cols < D)
    tl.store(variance_ptr + offset, (tl.sum(squares, 0) / (n - 1))[None, :], mask=cols < D)


# --- the launcher


@on_its_device
def launch_columns(z: torch.Tensor, splits: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean's two parts (2, M, D) and the variances (M, D) of z (M, n, D); NaN for n = 1."""
    M, n, D = z.shape
    blocks = triton.cdiv(D, COLUMNS["BLOCK_D"])
    each, splits = in_stretches(n, blocks * M, COLUMNS["BLOCK_N"], splits)
    stretches = empty(z, 2, M, splits, D)
    mean, variance = empty(z, 2, M, D), empty(z, M, D)
    _column_kernel[(blocks, splits, M)](
        z, stretches, n, D, each, M * splits * D, *z.stride(), **COLUMNS
    )
    _combine_kernel[(triton.cdiv(D, COMBINE["BLOCK_D"]), M)](
        z, stretches, mean, variance, n, D, splits, each, M * splits * D,
        z.stride(0), z.stride(2), **COMBINE,
    )  # fmt: skip
    return mean, variance


# --- ahead of time


def ahead_of_time() -> list[Compiled]:
    """Both kernels for each dtype of z, at sizes that are multiples of 16."""
    found = []
    for dtype in KERNEL_DTYPES:
        name, types = TRITON_NAMES[dtype], pointer_types(dtype)
        found += [
            compiled(f"vicreg column {name}", _column_kernel, types, COLUMNS),
            compiled(f"vicreg combine {name}", _combine_kernel, types, COMBINE),
        ]
    return found
