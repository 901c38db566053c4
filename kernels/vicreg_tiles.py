"""The kernels of `vicreg`, and how they are launched: see there for the maths and the precision.

z is (M, n, D) in any strides, fp32, bf16 or fp16. What is accumulated lies in fp32.
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from cjepa_fast.kernels.common.launch import (
    INTERPRET,
    KERNEL_DTYPES,
    TRITON_NAMES,
    Compiled,
    chosen,
    narrow,
)
from cjepa_fast.kernels.common.maybe_triton import tl, triton

Terms = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# The symmetric matrix is X X^T of X = Zc^T ("moments") or X = Zc ("Gram"): its index a counts
# columns of z or rows, the summed index k the other.


@triton.jit
def _load_centred(z_ptr, rows, cols, first, rest, n, D, stride_n, stride_d):
    """(z - mean)[rows, cols] in fp32, 0 outside; rows, cols and the mean broadcast to the tile."""
    inside = (rows < n) & (cols < D)
    offsets = rows.to(tl.int64) * stride_n + cols.to(tl.int64) * stride_d
    z = tl.load(z_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, z - first - rest, 0.0)


@triton.jit
def _load_mean(mean_ptr, cols, D, plane):
    """The two parts of the columns' means, from (2, M, D)."""
    first = tl.load(mean_ptr + cols, mask=cols < D, other=0.0)
    return first, tl.load(mean_ptr + plane + cols, mask=cols < D, other=0.0)


@triton.jit
def _halves(x):
    """x as the sum of two bf16 numbers, to 2^-17."""
    high = narrow(x, tl.bfloat16)
    return high, narrow(x - high.to(tl.float32), tl.bfloat16)


@triton.jit
def _bf16_dot(x, y, acc):
    if INTERPRET:  # its own product of bf16 is wrong
        return tl.dot(x.to(tl.float32), y.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(x, y, acc)


@triton.jit
def _column_kernel(
    z_ptr, stretch_ptr, n, D, per_split, plane, stride_m, stride_n, stride_d,
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
        total += _load_centred(z_ptr, rows, cols, first, 0.0, end, D, stride_n, stride_d)
    rest = (tl.sum(total, 0) / (end - begin))[None, :]
    squares = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_N):
        rows = (start + tl.arange(0, BLOCK_N))[:, None]
        x = _load_centred(z_ptr, rows, cols, first, rest, end, D, stride_n, stride_d)
        squares += x * x
    stretch_ptr += (m * tl.num_programs(1) + tl.program_id(1)) * D + cols
    tl.store(stretch_ptr, rest, mask=cols < D)
    tl.store(stretch_ptr + plane, tl.sum(squares, 0)[None, :], mask=cols < D)


@triton.jit
def _combine_kernel(
    z_ptr, stretch_ptr, mean_ptr, variance_ptr, n, D, splits, per_split, plane, stride_m, stride_d,
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
    place = m * D + cols
    tl.store(mean_ptr + place, first.to(tl.float32), mask=cols < D)
    tl.store(mean_ptr + tl.num_programs(1) * D + place, rest, mask=cols < D)
    tl.store(variance_ptr + place, (tl.sum(squares, 0) / (n - 1))[None, :], mask=cols < D)


@triton.jit
def _moment_kernel(
    z_ptr, mean_ptr, partial_ptr, n, D, splits, per_split, plane, stride_m, stride_n, stride_d,
    GRAM: tl.constexpr, PRODUCTS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tile (i <= j) of X X^T over one stretch of k: (M, splits, tiles, BLOCK, BLOCK)."""
    i, j = tl.program_id(0), tl.program_id(1)
    if i > j:
        return
    side = tl.num_programs(0)
    m, split = (tl.program_id(2) // splits).to(tl.int64), tl.program_id(2) % splits
    z_ptr += m * stride_m
    mean_ptr += m * D
    a = (i * BLOCK + tl.arange(0, BLOCK))[:, None]
    b = (j * BLOCK + tl.arange(0, BLOCK))[None, :]
    if not GRAM:
        first_a, rest_a = _load_mean(mean_ptr, a, D, plane)
        first_b, rest_b = _load_mean(mean_ptr, b, D, plane)
    begin = split * per_split
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(begin, tl.minimum(begin + per_split, D if GRAM else n), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if GRAM:
            first, rest = _load_mean(mean_ptr, k[None, :], D, plane)
            x = _load_centred(z_ptr, a, k[None, :], first, rest, n, D, stride_n, stride_d)
            first, rest = _load_mean(mean_ptr, k[:, None], D, plane)
            y = _load_centred(z_ptr, b, k[:, None], first, rest, n, D, stride_n, stride_d)
        else:
            x = _load_centred(z_ptr, k[None, :], a, first_a, rest_a, n, D, stride_n, stride_d)
            y = _load_centred(z_ptr, k[:, None], b, first_b, rest_b, n, D, stride_n, stride_d)
        if PRODUCTS == 0:
            acc = tl.dot(x, y, acc, input_precision="tf32x3")
        else:
            x_high, x_low = _halves(x)
            y_high, y_low = _halves(y)
            acc = _bf16_dot(x_low, y_high, acc)
            acc = _bf16_dot(x_high, y_low, acc)
            acc = _bf16_dot(x_high, y_high, acc)
    tile = (m * splits + split) * (side * (side + 1) // 2) + j * (j + 1) // 2 + i
    local = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(partial_ptr + tile * (BLOCK * BLOCK) + local, acc)


@triton.jit
def _reduce_kernel(
    partial_ptr, matrix_ptr, squares_ptr, size, area, splits, scale,
    KEEP_DIAGONAL: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows of tile (i <= j): sums the stretches and scales.

    Writes the sum of squares (M, tiles * subtiles), and the tile and its mirror image into the
    matrix (M, PARTS, size, size; PARTS 0: not, 2: two halves). The diagonal is 0 in both unless
    KEEP_DIAGONAL.
    """
    subtiles: tl.constexpr = BLOCK // BLOCK_R
    i, sub, j = tl.program_id(0) // subtiles, tl.program_id(0) % subtiles, tl.program_id(1)
    if i > j:
        return
    m = tl.program_id(2).to(tl.int64)
    side = tl.num_programs(1)
    tiles = side * (side + 1) // 2
    tile = j * (j + 1) // 2 + i
    local = (sub * BLOCK_R + tl.arange(0, BLOCK_R))[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    acc = tl.zeros((BLOCK_R, BLOCK), tl.float32)
    for split in range(splits):
        place = ((m * splits + split) * tiles + tile) * (BLOCK * BLOCK)
        acc += tl.load(partial_ptr + place + local)
    acc *= scale
    a = i * BLOCK + sub * BLOCK_R + tl.arange(0, BLOCK_R)
    b = (j * BLOCK + tl.arange(0, BLOCK))[None, :]
    if not KEEP_DIAGONAL:
        acc = tl.where(a[:, None] == b, 0.0, acc)
    inside = (a[:, None] < size) & (b < size)
    squares = tl.sum(tl.where(inside, acc * acc, 0.0)) * tl.where(i == j, 1.0, 2.0)
    tl.store(squares_ptr + (m * tiles + tile) * subtiles + sub, squares)
    if PARTS > 0:
        kind: tl.constexpr = matrix_ptr.dtype.element_ty
        matrix_ptr += m * PARTS * area
        above = a[:, None].to(tl.int64) * size + b
        below = b.to(tl.int64) * size + a[:, None]
        for part in tl.static_range(PARTS):
            value = narrow(acc, kind)
            tl.store(matrix_ptr + part * area + above, value, mask=inside)
            tl.store(matrix_ptr + part * area + below, value, mask=inside & (i != j))
            acc -= value.to(tl.float32)


@triton.jit
def _finish_kernel(
    squares_ptr, variance_ptr, std_ptr, cov_ptr, per_dim_ptr, pieces, M, D, gamma, eps,
    GRAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The terms from the square sums and the variances (M, D). NaN stays NaN."""
    lane = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, pieces, BLOCK):
        squares += tl.load(squares_ptr + start + lane, mask=start + lane < pieces, other=0.0)
    hinge = tl.zeros((BLOCK,), tl.float32)
    diagonal = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        col = start + lane
        total = tl.zeros((BLOCK,), tl.float32)
        for m in range(M):
            variance = tl.load(variance_ptr + m * D + col, mask=col < D, other=0.0)
            std = tl.sqrt(variance + eps)
            total += std
            diagonal += variance * variance
            hinge += tl.where((std >= gamma) | (col >= D), 0.0, gamma - std)
        tl.store(per_dim_ptr + col, total / M, mask=col < D)
    cov = tl.sum(squares)
    if GRAM:
        cov -= tl.sum(diagonal)
        cov = tl.where(cov < 0, 0.0, cov)
    tl.store(std_ptr, tl.sum(hinge) / (M * D))
    tl.store(cov_ptr, cov / (M * D))


@triton.jit
def _grad_kernel(
    z_ptr, mean_ptr, variance_ptr, matrix_ptr, g_std_ptr, g_cov_ptr, dz_ptr,
    n, D, plane, area, gamma, eps, scale, stride_m, stride_n, stride_d,
    GRAM: tl.constexpr, PRODUCTS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of dz, contiguous (M, n, D): X[p, k] matrix[k, q], and the diagonal's part.

    p counts rows and q columns ("moments"), or the reverse. scale = 1 / (M D (count - 1)).
    """
    q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    p = (tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P))[:, None]
    m = tl.program_id(2).to(tl.int64)
    size = n if GRAM else D
    parts: tl.constexpr = 2 if PRODUCTS == 3 else 1
    matrix_ptr += m * parts * area
    z_ptr += m * stride_m
    mean_ptr += m * D
    if GRAM:
        first_p, rest_p = _load_mean(mean_ptr, p, D, plane)
    acc = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
    for start in range(0, size, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if GRAM:
            x = _load_centred(z_ptr, k[None, :], p, first_p, rest_p, n, D, stride_n, stride_d)
        else:
            first, rest = _load_mean(mean_ptr, k[None, :], D, plane)
            x = _load_centred(z_ptr, p, k[None, :], first, rest, n, D, stride_n, stride_d)
        inside = (k[:, None] < size) & (q[None, :] < size)
        place = matrix_ptr + k[:, None].to(tl.int64) * size + q[None, :]
        y = tl.load(place, mask=inside, other=0.0)
        if PRODUCTS == 0:
            acc = tl.dot(x, y, acc, input_precision="tf32x3")
        else:
            x_high, x_low = _halves(x)
            y_low = tl.load(place + area, mask=inside, other=0.0)
            acc = _bf16_dot(x_low, y, acc)
            acc = _bf16_dot(x_high, y_low, acc)
            acc = _bf16_dot(x_high, y, acc)
    if GRAM:
        rows, cols = q[None, :], p
    else:
        rows, cols = p, q[None, :]
    first, rest = _load_mean(mean_ptr, cols, D, plane)
    x = _load_centred(z_ptr, rows, cols, first, rest, n, D, stride_n, stride_d)
    variance = tl.load(variance_ptr + m * D + cols, mask=cols < D, other=0.0)
    std = tl.sqrt(variance + eps)
    slope = tl.where(std < gamma, -scale * tl.load(g_std_ptr) / std, 0.0)
    slope_cov = 4 * scale * tl.load(g_cov_ptr)
    if GRAM:
        slope -= slope_cov * variance
    dz = narrow(slope_cov * acc + slope * x, dz_ptr.dtype.element_ty)
    offsets = (m * n + rows) * D + cols
    tl.store(dz_ptr + offsets, dz, mask=(rows < n) & (cols < D))


# --- launchers


class Saved(NamedTuple):
    """What backward needs: the mean in two parts (2, M, D), the variances (M, D), the matrix.

    The matrix (M, parts, S, S): C with a zero diagonal (S = D), or K (S = n < D), as a sum of its
    parts; without elements where no gradient is wanted.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    matrix: torch.Tensor


@dataclass(frozen=True)
class Config:
    """Tiles: `block` of the matrix (and of dz), `block_k` of the summed index."""

    block: int
    block_k: int
    warps: int
    stages: int


# Candidates by (products, Gram, whether the matrix has at least LARGE rows), see products_of; the
# first unless tuned.py names another. Each fits the registers and the shared memory of sm_80, 90
# and 100.
LARGE = 512
MOMENT_CONFIGS = {
    (0, False, True): (Config(128, 16, 8, 3), Config(64, 32, 4, 3)),
    (0, False, False): (Config(64, 32, 4, 3), Config(128, 16, 8, 3)),
    (0, True, True): (Config(64, 32, 4, 3),),
    (0, True, False): (Config(64, 32, 4, 3),),
    (3, False, True): (Config(128, 32, 8, 3), Config(64, 32, 4, 3)),
    (3, False, False): (Config(64, 32, 4, 3), Config(128, 32, 8, 3)),
    (3, True, True): (Config(128, 32, 8, 3), Config(64, 64, 4, 3)),
    (3, True, False): (Config(64, 64, 4, 3), Config(128, 32, 8, 3)),
}
GRAD_CONFIGS = {
    (products, gram, large): wide_first if large else wide_first[::-1]
    for products, wide_first in (
        (0, (Config(128, 16, 8, 3), Config(64, 32, 4, 3))),
        (3, (Config(128, 32, 8, 3), Config(64, 32, 4, 3))),
    )
    for gram in (False, True)
    for large in (False, True)
}
# The type and the number of parts in which the matrix is kept, by the number of products.
MATRIX_FORMS = {0: (torch.float32, 1), 3: (torch.bfloat16, 2)}
COLUMNS = {"BLOCK_N": 32, "BLOCK_D": 64}
COMBINE = {"BLOCK_S": 16, "BLOCK_D": 64}
REDUCED_ROWS = 16
FINISH = 1024
# Enough programs for two on each multiprocessor of the largest GPU at hand (132). A constant, so
# that the order of the sums, and with it the last bits, does not follow the GPU's size.
PROGRAMS = 264


def products_of(dtype: torch.dtype) -> int:
    """0: tf32 halves; 3: bf16 halves. The docstring of vicreg says why."""
    return 0 if dtype == torch.float32 else 3


def candidates(kernel: str, z: torch.Tensor, gram: bool) -> tuple[str, tuple[Config, ...]]:
    """For the "moment" or the "grad" kernel of z: tuned.py's key, and the configurations."""
    size = z.shape[1] if gram else z.shape[2]
    shape = products_of(z.dtype), gram, size >= LARGE
    found = {"moment": MOMENT_CONFIGS, "grad": GRAD_CONFIGS}[kernel][shape]
    kind = f"{TRITON_NAMES[z.dtype]}{' gram' if gram else ''} {'large' if shape[2] else 'small'}"
    return f"vicreg {kernel} {kind}", found


def every(configs: dict, dtype: torch.dtype, gram: bool) -> list[Config]:
    """The candidates for z of a dtype, of small and of large matrices, each once."""
    both = (configs[products_of(dtype), gram, large] for large in (True, False))
    return list(dict.fromkeys(itertools.chain(*both)))


def _stretches(length: int, programs: int, step: int, count: int | None) -> tuple[int, int]:
    """(how long each, how many) stretches of whole steps, at about PROGRAMS programs in all.

    A stretch takes at least four steps. `count` asks for another number.
    """
    count = count or min(triton.cdiv(PROGRAMS, programs), triton.cdiv(length, 4 * step))
    each = triton.cdiv(triton.cdiv(length, count), step) * step
    return each, triton.cdiv(length, each)


def _empty(like: torch.Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Memory for a kernel to fill; tests fill it with NaN first."""
    return torch.empty(shape, dtype=dtype, device=like.device)


def launch_columns(z: torch.Tensor, splits: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean's two parts (2, M, D) and the variances (M, D) of z (M, n, D); NaN for n = 1."""
    M, n, D = z.shape
    blocks = triton.cdiv(D, COLUMNS["BLOCK_D"])
    each, splits = _stretches(n, blocks * M, COLUMNS["BLOCK_N"], splits)
    stretches = _empty(z, 2, M, splits, D)
    mean, variance = _empty(z, 2, M, D), _empty(z, M, D)
    _column_kernel[(blocks, splits, M)](
        z, stretches, n, D, each, M * splits * D, *z.stride(), **COLUMNS
    )
    _combine_kernel[(triton.cdiv(D, COMBINE["BLOCK_D"]), M)](
        z, stretches, mean, variance, n, D, splits, each, M * splits * D,
        z.stride(0), z.stride(2), **COMBINE,
    )  # fmt: skip
    return mean, variance


def launch_moments(
    z: torch.Tensor, mean: torch.Tensor, gram: bool, config: Config | None = None,
    splits: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Tiles (M, splits, tiles, block, block) of Zc^T Zc, or of Zc Zc^T, on and above the diagonal.

    They sum over the splits to the matrix. mean: (2, M, D).
    """
    M, n, D = z.shape
    size, length = (n, D) if gram else (D, n)
    config = config or chosen(*candidates("moment", z, gram), z.device)
    side = triton.cdiv(size, config.block)
    tiles = side * (side + 1) // 2
    each, splits = _stretches(length, tiles * M, config.block_k, splits)
    partial = _empty(z, M, splits, tiles, config.block, config.block)
    _moment_kernel[(side, side, M * splits)](
        z, mean, partial, n, D, splits, each, M * D, *z.stride(), GRAM=gram,
        PRODUCTS=products_of(z.dtype),
        BLOCK=config.block, BLOCK_K=config.block_k,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return partial


def launch_reduce(
    partial: torch.Tensor, size: int, scale: float, keep_diagonal: bool, matrix: torch.Tensor
) -> torch.Tensor:
    """Sums of squares (M, any: their sum counts) of the matrix, its diagonal only if it is kept.

    Fills the matrix (M, parts, size, size) with the sum of the partial tiles times `scale`.
    """
    M, splits, tiles, block, _ = partial.shape
    side, subtiles = triton.cdiv(size, block), block // REDUCED_ROWS
    squares = _empty(partial, M, tiles * subtiles)
    _reduce_kernel[(side * subtiles, side, M)](
        partial, matrix, squares, size, size * size, splits, scale,
        KEEP_DIAGONAL=keep_diagonal, PARTS=matrix.shape[1] if matrix.numel() else 0,
        BLOCK=block, BLOCK_R=REDUCED_ROWS,
    )  # fmt: skip
    return squares


def launch_finish(
    squares: torch.Tensor, variance: torch.Tensor, gamma: float, eps: float, gram: bool
) -> Terms:
    M, D = variance.shape
    std, cov, per_dim = _empty(variance), _empty(variance), _empty(variance, D)
    _finish_kernel[(1,)](
        squares, variance, std, cov, per_dim, squares.numel(), M, D, gamma, eps,
        GRAM=gram, BLOCK=FINISH,
    )  # fmt: skip
    return std, cov, per_dim


def launch_grad(
    z: torch.Tensor, saved: Saved, g_std: torch.Tensor, g_cov: torch.Tensor,
    gamma: float, eps: float, count: int, config: Config | None = None,
) -> torch.Tensor:  # fmt: skip
    """dz (M, n, D), contiguous, in z's dtype; count: the rows that the statistics are of."""
    M, n, D = z.shape
    mean, variance, matrix = saved
    size = matrix.shape[-1]
    gram = size != D
    config = config or chosen(*candidates("grad", z, gram), z.device)
    dz = _empty(z, M, n, D, dtype=z.dtype)
    grid = (triton.cdiv(size, config.block), triton.cdiv(D if gram else n, config.block), M)
    _grad_kernel[grid](
        z, mean, variance, matrix, g_std, g_cov, dz, n, D, M * D, size * size, gamma, eps,
        1 / (M * D * (count - 1)), *z.stride(), GRAM=gram, PRODUCTS=products_of(z.dtype),
        BLOCK_P=config.block, BLOCK_Q=config.block, BLOCK_K=config.block_k,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return dz


def empty_matrix(z: torch.Tensor, gram: bool, need_grad: bool) -> torch.Tensor:
    if not need_grad:
        return _empty(z, 0)
    size = min(z.shape[1:]) if gram else z.shape[2]
    dtype, parts = MATRIX_FORMS[products_of(z.dtype)]
    return _empty(z, z.shape[0], parts, size, size, dtype=dtype)


def fused_forward(
    z: torch.Tensor, gamma: float, eps: float, need_grad: bool
) -> tuple[Terms, Saved]:
    """The kernels' forward of z (M, n, D)."""
    _, n, D = z.shape
    gram = n < D
    mean, variance = launch_columns(z)
    partial = launch_moments(z, mean, gram)
    matrix = empty_matrix(z, gram, need_grad)
    squares = launch_reduce(partial, min(n, D), 1 / (n - 1), gram, matrix)
    terms = launch_finish(squares, variance, gamma, eps, gram)
    return terms, Saved(mean, variance, matrix)


# --- ahead of time


def _compiled(name: str, kernel, types: dict[str, str], constexprs: dict, **options) -> Compiled:
    """Pointers by `types`, sizes and strides as multiples of 16, the rest as the launchers pass."""
    floats = {"gamma", "eps", "scale"}
    ragged = {"n", "splits", "pieces", "M"}
    constexprs = {"stride_d": 1, **constexprs} if "stride_d" in kernel.arg_names else constexprs
    signature = {
        argument: types.get(argument) or ("fp32" if argument in floats else "i32")
        for argument in kernel.arg_names
        if argument not in constexprs
    }
    whole = {a for a, kind in signature.items() if kind == "i32"} - ragged
    return Compiled(name, kernel, signature, constexprs, divisible=tuple(sorted(whole)), **options)


def _of_config(
    name: str, kernel, config: Config, sides: tuple[str, ...], types: dict[str, str], **constexprs
) -> Compiled:
    constexprs |= dict.fromkeys(sides, config.block) | {"BLOCK_K": config.block_k}
    gram = " gram" if constexprs["GRAM"] else ""
    return _compiled(
        f"vicreg {name}{gram} {config.block}x{config.block_k}", kernel, types, constexprs,
        num_warps=config.warps, num_stages=config.stages,
        must_have=(r"wgmma|mma\.sync|tcgen05\.mma",),
    )  # fmt: skip


def _of_dtype(dtype: torch.dtype) -> list[Compiled]:
    """What reads z or writes dz in `dtype`."""
    name = TRITON_NAMES[dtype]
    fp32 = ("stretch_ptr", "mean_ptr", "variance_ptr", "partial_ptr", "g_std_ptr", "g_cov_ptr")
    types = {"z_ptr": f"*{name}", "dz_ptr": f"*{name}"} | dict.fromkeys(fp32, "*fp32")
    made = [
        _compiled(f"vicreg column {name}", _column_kernel, types, COLUMNS),
        _compiled(f"vicreg combine {name}", _combine_kernel, types, COMBINE),
    ]
    types["matrix_ptr"] = f"*{TRITON_NAMES[MATRIX_FORMS[products_of(dtype)][0]]}"
    for gram in (False, True):
        common = {"types": types, "GRAM": gram, "PRODUCTS": products_of(dtype)}
        made += [
            _of_config(f"moment {name}", _moment_kernel, config, ("BLOCK",), **common)
            for config in every(MOMENT_CONFIGS, dtype, gram)
        ]
        made += [
            _of_config(f"grad {name}", _grad_kernel, config, ("BLOCK_P", "BLOCK_Q"), **common)
            for config in every(GRAD_CONFIGS, dtype, gram)
        ]
    return made


def ahead_of_time() -> list[Compiled]:
    """Every kernel in every configuration for each dtype, at sizes that are multiples of 16."""
    made = [c for dtype in KERNEL_DTYPES for c in _of_dtype(dtype)]
    blocks = sorted({c.block for configs in MOMENT_CONFIGS.values() for c in configs})
    for dtype, parts in sorted({*MATRIX_FORMS.values()}, key=str):
        types = {"matrix_ptr": f"*{TRITON_NAMES[dtype]}"}
        types |= dict.fromkeys(("partial_ptr", "squares_ptr"), "*fp32")
        for block in blocks:
            for keep in (False, True):
                constexprs = {"KEEP_DIAGONAL": keep, "PARTS": parts}
                constexprs |= {"BLOCK": block, "BLOCK_R": REDUCED_ROWS}
                name = f"vicreg reduce {types['matrix_ptr'][1:]} x {parts} {block}"
                name += " keep" if keep else ""
                made.append(_compiled(name, _reduce_kernel, types, constexprs))
    pointers = [a for a in _finish_kernel.arg_names if a.endswith("_ptr")]
    for gram in (False, True):
        name = "vicreg finish" + (" gram" if gram else "")
        constexprs = {"GRAM": gram, "BLOCK": FINISH}
        types = dict.fromkeys(pointers, "*fp32")
        made.append(_compiled(name, _finish_kernel, types, constexprs))
    return made
