"""Counts, means and variances of the tokens at each position, and the tokens' deviations.

The table of rows says which token stands where, so a program has one position and a stretch of
columns, and goes over its tokens twice (the second time from a cache): for the mean, and for the
sum of squares about it with what the mean's rounding left. That rest is the mean's second part.
Deviations are written in the form in which the matmuls take them: one fp32 number, or two halves
in bf16.

Shapes: z (T, D), rows (N, B) int64 with -1 for none, position (T,) int32 with -1 for tokens in no
row, count (N,), mean (2, N, D), squares and variance (N, D), deviations (parts, T, D), hinge (N,).
Bytes that must move, for b bytes an element: T D (2 b + 4), z twice and the deviations, and 16 N D
of statistics.
"""

from typing import NamedTuple

import torch

from cjepa_fast.kernels.common.launch import (
    KERNEL_DTYPES,
    TRITON_NAMES,
    Compiled,
    narrow,
    on_its_device,
)
from cjepa_fast.kernels.common.maybe_triton import tl, triton
from cjepa_fast.kernels.sigreg.tiles import load_rows
from cjepa_fast.kernels.vicreg.tiles import MATRIX_FORMS, empty, matmuls_of

STATISTICS = {"BLOCK_B": 32, "BLOCK_D": 64}
DEVIATIONS = {"BLOCK_T": 32, "BLOCK_D": 128}
HINGE = {"BLOCK": 512}
FINISH = {"BLOCK": 256}


class Statistics(NamedTuple):
    """Of the tokens at each position: how many (N,), the mean in two parts (2, N, D), the sum of
    squares about it (N, D). And each token's position (T,)."""

    count: torch.Tensor
    mean: torch.Tensor
    squares: torch.Tensor
    position: torch.Tensor


# --- the kernels


@triton.jit
def _load_tokens(z, row, d, T, D):
    """z[row, d] in fp32: 0 for row -1, NaN for one beyond T."""
    keep = ((row >= 0) & (row < T))[:, None] & (d < D)[None, :]
    x = tl.load(z + row[:, None] * D + d[None, :], mask=keep, other=0.0).to(tl.float32)
    return tl.where((row >= T)[:, None], float("nan"), x)


@triton.jit
def _position_statistics_kernel(
    z,  # (T, D)
    rows,  # (N, B) int64
    count,  # (N,) fp32
    mean,  # (2, N, D) fp32
    squares,  # (N, D) fp32
    position,  # (T,) int32, -1 everywhere
    T, B, D, plane,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Programs: (tiles of D, positions). Position: by the programs of the first tile."""
    d = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.program_id(1)
    total = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    seen = tl.zeros((BLOCK_B,), tl.float32)
    for start in range(0, B, BLOCK_B):
        row = load_rows(rows, n, start + tl.arange(0, BLOCK_B), B)
        total += _load_tokens(z, row, d, T, D)
        seen += tl.where(row >= 0, 1.0, 0.0)
        own = (row >= 0) & (row < T) & (tl.program_id(0) == 0)
        tl.store(position + row, n + tl.zeros((BLOCK_B,), tl.int32), mask=own)
    tokens = tl.sum(seen)
    divisor = tl.maximum(tokens, 1.0)
    first = tl.sum(total, 0) / divisor
    total = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    about = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for start in range(0, B, BLOCK_B):
        row = load_rows(rows, n, start + tl.arange(0, BLOCK_B), B)
        x = _load_tokens(z, row, d, T, D) - first[None, :]
        x = tl.where((row >= 0)[:, None], x, 0.0)
        total += x
        about += x * x
    rest = tl.sum(total, 0) / divisor
    left = tl.sum(about, 0) - tokens * rest * rest
    at = n.to(tl.int64) * D + d
    tl.store(mean + at, first, mask=d < D)
    tl.store(mean + plane + at, rest, mask=d < D)
    tl.store(squares + at, tl.where(left < 0, 0.0, left), mask=d < D)
    tl.store(count + n, tokens, mask=tl.program_id(0) == 0)


@triton.jit
def _position_deviations_kernel(
    z,  # (T, D)
    mean,  # (2, N, D) fp32
    position,  # (T,) int32
    deviations,  # (PARTS, T, D)
    T, D, plane, area,
    PARTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """z minus its position's mean, 0 for tokens without one. Programs: (tiles of T, of D)."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.load(position + t, mask=t < T, other=-1).to(tl.int64)[:, None]
    inside = (t < T)[:, None] & (d < D)[None, :]
    live = inside & (n >= 0)
    at = t[:, None] * D + d[None, :]
    x = tl.load(z + at, mask=live, other=0.0).to(tl.float32)
    first = tl.load(mean + n * D + d[None, :], mask=live, other=0.0)
    rest = tl.load(mean + plane + n * D + d[None, :], mask=live, other=0.0)
    x = x - first - rest
    for part in tl.static_range(PARTS):
        value = narrow(x, deviations.dtype.element_ty)
        tl.store(deviations + part * area + at, value, mask=inside)
        x -= value.to(tl.float32)


@triton.jit
def _position_hinge_kernel(
    count,  # (N,) fp32
    squares,  # (N, D) fp32
    variance,  # (N, D) fp32
    hinge,  # (N,) fp32
    D, gamma, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The variances, and (count - 1) times the sum over D of the hinge. Programs: positions.

    A position of one token has the variance 0 and counts for nothing. NaN stays NaN.
    """
    n = tl.program_id(0).to(tl.int64)
    free = tl.maximum(tl.load(count + n) - 1.0, 0.0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        value = tl.load(squares + n * D + d, mask=d < D, other=0.0) / tl.maximum(free, 1.0)
        tl.store(variance + n * D + d, value, mask=d < D)
        std = tl.sqrt(value + eps)
        total += tl.where((std >= gamma) | (d >= D), 0.0, gamma - std)
    tl.store(hinge + n, free * tl.sum(total))


@triton.jit
def _position_finish_kernel(
    count,  # (N,) fp32
    hinge,  # (N,) fp32
    squares,  # (pieces,) fp32
    std,  # () fp32
    cov,  # () fp32
    slopes,  # (2,) fp32
    N, pieces, D, unit,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The terms, and what their gradients are multiplied by; the matrix is divided by `unit`."""
    lane = tl.arange(0, BLOCK)
    free = tl.zeros((BLOCK,), tl.float32)
    hinges = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        n = start + lane
        free += tl.maximum(tl.load(count + n, mask=n < N, other=0.0) - 1.0, 0.0)
        hinges += tl.load(hinge + n, mask=n < N, other=0.0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, pieces, BLOCK):
        total += tl.load(squares + start + lane, mask=start + lane < pieces, other=0.0)
    freedom = tl.maximum(tl.sum(free), 1.0)
    scale = unit / freedom
    tl.store(std, tl.sum(hinges) / (freedom * D))
    tl.store(cov, tl.sum(total) * scale * scale / D)
    tl.store(slopes, -1.0 / (freedom * D))
    tl.store(slopes + 1, 4.0 * scale / (freedom * D))


# --- the launchers, of dense tensors


@on_its_device
def launch_statistics(z: torch.Tensor, rows: torch.Tensor) -> Statistics:
    """Of z (T, D) with the table (N, B)."""
    (T, D), (N, B) = z.shape, rows.shape
    position = torch.full((T,), -1, dtype=torch.int32, device=z.device)
    count, mean, squares = empty(z, N), empty(z, 2, N, D), empty(z, N, D)
    grid = (triton.cdiv(D, STATISTICS["BLOCK_D"]), N)
    _position_statistics_kernel[grid](
        z, rows, count, mean, squares, position, T, B, D, N * D, **STATISTICS
    )
    return Statistics(count, mean, squares, position)


def empty_deviations(z: torch.Tensor) -> torch.Tensor:
    dtype, parts = MATRIX_FORMS[matmuls_of(z.dtype)]
    return empty(z, parts, *z.shape, dtype=dtype)


@on_its_device
def launch_deviations(z: torch.Tensor, mean: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """(parts, T, D), whose sum is z minus its position's mean."""
    T, D = z.shape
    deviations = empty_deviations(z)
    grid = (triton.cdiv(T, DEVIATIONS["BLOCK_T"]), triton.cdiv(D, DEVIATIONS["BLOCK_D"]))
    if T:
        _position_deviations_kernel[grid](
            z, mean, position, deviations, T, D, mean[0].numel(), T * D,
            PARTS=len(deviations), **DEVIATIONS,
        )  # fmt: skip
    return deviations


@on_its_device
def launch_hinge(
    count: torch.Tensor, squares: torch.Tensor, gamma: float, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The variances (N, D), and each position's share of the hinge (N,)."""
    variance, hinge = torch.empty_like(squares), torch.empty_like(count)
    N, D = squares.shape
    _position_hinge_kernel[(N,)](count, squares, variance, hinge, D, gamma, eps, **HINGE)
    return variance, hinge


@on_its_device
def launch_finish(
    count: torch.Tensor, hinge: torch.Tensor, squares: torch.Tensor, D: int, unit: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """std and cov, 0-d, and the factors of their gradients (2,).

    squares: their sum is that of the matrix off its diagonal, of the deviations' products divided
    by `unit`.
    """
    std, cov, slopes = empty(count), empty(count), empty(count, 2)
    _position_finish_kernel[(1,)](
        count, hinge, squares, std, cov, slopes, len(count), squares.numel(), D, unit, **FINISH
    )
    return std, cov, slopes


# --- ahead of time


def compiled(name: str, kernel, dtype: torch.dtype, constexprs: dict, **options) -> Compiled:
    """For z of a dtype; D and what it is a factor of are multiples of 16."""
    kind = f"*{TRITON_NAMES[MATRIX_FORMS[matmuls_of(dtype)][0]]}"
    types = dict.fromkeys(("z", "dz"), f"*{TRITON_NAMES[dtype]}")
    types |= dict.fromkeys(("deviations", "matrix"), kind)
    types |= {"rows": "*i64", "position": "*i32"}
    types |= dict.fromkeys(("gamma", "eps", "unit"), "fp32")
    sizes = ("T", "B", "N", "D", "plane", "area", "splits", "per_split", "pieces")
    types |= dict.fromkeys(sizes, "i32")
    signature = {a: types.get(a, "*fp32") for a in kernel.arg_names if a not in constexprs}
    whole = tuple(a for a in ("D", "plane", "area", "per_split") if a in signature)
    name = f"vicreg position {name}"
    return Compiled(name, kernel, signature, constexprs, divisible=whole, **options)


def ahead_of_time() -> list[Compiled]:
    fp32 = torch.float32
    found = [
        compiled("hinge", _position_hinge_kernel, fp32, HINGE),
        compiled("finish", _position_finish_kernel, fp32, FINISH),
    ]
    for dtype in KERNEL_DTYPES:
        name, parts = TRITON_NAMES[dtype], MATRIX_FORMS[matmuls_of(dtype)][1]
        found += [
            compiled(f"statistics {name}", _position_statistics_kernel, dtype, STATISTICS),
            compiled(
                f"deviations {name}", _position_deviations_kernel, dtype,
                {"PARTS": parts, **DEVIATIONS},
            ),
        ]  # fmt: skip
    return found
