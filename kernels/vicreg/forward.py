"""The forward of VICReg's terms: the symmetric matrix, its sum of squares, the terms.

After the means and variances of columns.py three launches: tiles of the symmetric matrix, S x S
with S = min(n, D), on and above its diagonal, over stretches of the other dimension; their sum,
with its sum of squares taken as it is written (mirrored, for backward; not at all where no gradient
is wanted); the two terms.

Shapes: z (M, n, D) in any strides, mean (2, M, D), variance (M, D), matrix (M, parts, S, S), terms
0-d, 0-d and (D,).
Bytes that must move, for b bytes an element: n D b twice (means, then tiles) and the matrix once.
Operations, 2 a multiply-add: n D S (upper half), three times that by the matmuls of halves.
"""

import itertools

import torch

from cjepa_fast.kernels.common.launch import (
    KERNEL_DTYPES,
    TRITON_NAMES,
    Compiled,
    chosen,
    dot,
    narrow,
    on_its_device,
    use_kernel,
)
from cjepa_fast.kernels.common.maybe_triton import tl, triton
from cjepa_fast.kernels.vicreg.columns import launch_columns
from cjepa_fast.kernels.vicreg.plain import plain_forward
from cjepa_fast.kernels.vicreg.tiles import (
    MATRIX_FORMS,
    MOMENT_CONFIGS,
    Config,
    Saved,
    Terms,
    candidates,
    compiled,
    compiled_in,
    empty,
    every,
    halves,
    in_stretches,
    load_centred,
    load_mean,
    matmuls_of,
    pointer_types,
)

REDUCED_ROWS = 16
FINISH = 1024


# --- the kernels


@triton.jit
def _moment_kernel(
    z_ptr,  # (M, n, D)
    mean_ptr,  # (2, M, D) fp32
    partial_ptr,  # (M, splits, tiles, BLOCK, BLOCK) fp32
    n, D, splits, per_split, plane, stride_m, stride_n, stride_d,
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
        first_a, rest_a = load_mean(mean_ptr, a, D, plane)
        first_b, rest_b = load_mean(mean_ptr, b, D, plane)
    begin = split * per_split
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(begin, tl.minimum(begin + per_split, D if GRAM else n), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if GRAM:
            first, rest = load_mean(mean_ptr, k[None, :], D, plane)
            x = load_centred(z_ptr, a, k[None, :], first, rest, n, D, stride_n, stride_d)
            first, rest = load_mean(mean_ptr, k[:, None], D, plane)
            y = load_centred(z_ptr, b, k[:, None], first, rest, n, D, stride_n, stride_d)
        else:
            x = load_centred(z_ptr, k[None, :], a, first_a, rest_a, n, D, stride_n, stride_d)
            y = load_centred(z_ptr, k[:, None], b, first_b, rest_b, n, D, stride_n, stride_d)
        if PRODUCTS == 0:
            acc = tl.dot(x, y, acc, input_precision="tf32x3")
        else:
            x_high, x_low = halves(x)
            y_high, y_low = halves(y)
            acc = dot(x_low, y_high, acc)
            acc = dot(x_high, y_low, acc)
            acc = dot(x_high, y_high, acc)
    tile = (m * splits + split) * (side * (side + 1) // 2) + j * (j + 1) // 2 + i
    local = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(partial_ptr + tile * (BLOCK * BLOCK) + local, acc)


@triton.jit
def _reduce_kernel(
    partial_ptr,  # (M, splits, tiles, BLOCK, BLOCK) fp32
    matrix_ptr,  # (M, PARTS, size, size)
    squares_ptr,  # (M, tiles * subtiles) fp32
    size, area, splits, scale,
    KEEP_DIAGONAL: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
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
        offset = ((m * splits + split) * tiles + tile) * (BLOCK * BLOCK)
        acc += tl.load(partial_ptr + offset + local)
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
    squares_ptr,  # (pieces,) fp32
    variance_ptr,  # (M, D) fp32
    std_ptr,  # () fp32
    cov_ptr,  # () fp32
    per_dim_ptr,  # (D,) fp32
    pieces, M, D, gamma, eps,
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


# --- launchers


@on_its_device
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
    each, splits = in_stretches(length, tiles * M, config.block_k, splits)
    partial = empty(z, M, splits, tiles, config.block, config.block)
    _moment_kernel[(side, side, M * splits)](
        z, mean, partial, n, D, splits, each, M * D, *z.stride(), GRAM=gram,
        PRODUCTS=matmuls_of(z.dtype),
        BLOCK=config.block, BLOCK_K=config.block_k,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return partial


@on_its_device
def launch_reduce(
    partial: torch.Tensor, size: int, scale: float, keep_diagonal: bool, matrix: torch.Tensor
) -> torch.Tensor:
    """Sums of squares (M, any: their sum counts) of the matrix, its diagonal only if it is kept.

    Fills the matrix (M, parts, size, size) with the sum of the partial tiles times `scale`.
    """
    M, splits, tiles, block, _ = partial.shape
    side, subtiles = triton.cdiv(size, block), block // REDUCED_ROWS
    squares = empty(partial, M, tiles * subtiles)
    _reduce_kernel[(side * subtiles, side, M)](
        partial, matrix, squares, size, size * size, splits, scale,
        KEEP_DIAGONAL=keep_diagonal, PARTS=matrix.shape[1] if matrix.numel() else 0,
        BLOCK=block, BLOCK_R=REDUCED_ROWS,
    )  # fmt: skip
    return squares


@on_its_device
def launch_finish(
    squares: torch.Tensor, variance: torch.Tensor, gamma: float, eps: float, gram: bool
) -> Terms:
    M, D = variance.shape
    std, cov, per_dim = empty(variance), empty(variance), empty(variance, D)
    _finish_kernel[(1,)](
        squares, variance, std, cov, per_dim, squares.numel(), M, D, gamma, eps,
        GRAM=gram, BLOCK=FINISH,
    )  # fmt: skip
    return std, cov, per_dim


def empty_matrix(z: torch.Tensor, gram: bool, need_grad: bool) -> torch.Tensor:
    if not need_grad:
        return empty(z, 0)
    size = min(z.shape[1:]) if gram else z.shape[2]
    dtype, parts = MATRIX_FORMS[matmuls_of(z.dtype)]
    return empty(z, z.shape[0], parts, size, size, dtype=dtype)


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


# --- by the kernels or in plain PyTorch


def runs_kernels(z: torch.Tensor) -> bool:
    return use_kernel(z) and z.numel() > 0


def terms_forward(
    z: torch.Tensor, gamma: float, eps: float, need_grad: bool
) -> tuple[Terms, Saved]:
    with torch.autocast(z.device.type, enabled=False):
        return (fused_forward if runs_kernels(z) else plain_forward)(z, gamma, eps, need_grad)


# --- ahead of time


def ahead_of_time() -> list[Compiled]:
    """Every kernel in every configuration for each dtype, at sizes that are multiples of 16."""
    made = []
    for dtype, gram in itertools.product(KERNEL_DTYPES, (False, True)):
        own = {"types": pointer_types(dtype), "GRAM": gram, "PRODUCTS": matmuls_of(dtype)}
        name = f"moment {TRITON_NAMES[dtype]}"
        made += [
            compiled_in(name, _moment_kernel, config, ("BLOCK",), **own)
            for config in every(MOMENT_CONFIGS, dtype, gram)
        ]
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
                made.append(compiled(name, _reduce_kernel, types, constexprs))
    pointers = [a for a in _finish_kernel.arg_names if a.endswith("_ptr")]
    for gram in (False, True):
        name = "vicreg finish" + (" gram" if gram else "")
        constexprs = {"GRAM": gram, "BLOCK": FINISH}
        types = dict.fromkeys(pointers, "*fp32")
        made.append(compiled(name, _finish_kernel, types, constexprs))
    return made
