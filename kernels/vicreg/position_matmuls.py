"""The covariance of the deviations from the positions' means, and its gradient: two matmuls.

The deviations d sum to zero at each position, so the gradient through the means vanishes, and
    dz = 4 g_cov / (D F) d O - g_std / (D F) d 1[s < gamma] / s
with s (N, D) the standard deviations at each token's position, O the covariance with a zero
diagonal, F the degrees of freedom. Both terms are of one pass.

Both operands lie in memory as they enter the matrix instructions: fp32, as tf32 in halves, or two
halves in bf16 (tiles.MATRIX_FORMS). The matrix is D x D also where T < D: contexts of a batch have
far more tokens than that.

Shapes: deviations (parts, T, D), position (T,) int32, variance (N, D), matrix (1, parts, D, D),
slopes (2,), g_std and g_cov 0-d, dz (T, D).
Bytes that must move, for b bytes an element: forward 4 T D and the matrix, backward (4 + b) T D and
the matrix. Operations, 2 a multiply-add: forward T D^2 (upper half), backward 2 T D^2; three times
that by the matmuls of halves.
"""

import torch

from cjepa_fast.kernels.common.launch import (
    KERNEL_DTYPES,
    TRITON_NAMES,
    Compiled,
    dot,
    narrow,
    on_its_device,
)
from cjepa_fast.kernels.common.maybe_triton import tl, triton
from cjepa_fast.kernels.vicreg.position_statistics import compiled
from cjepa_fast.kernels.vicreg.tiles import (
    LARGE,
    MATRIX_FORMS,
    Config,
    empty,
    in_stretches,
    matmuls_of,
)

# By the parts of the deviations and whether D is at least LARGE.
SMALL = Config(64, 32, 4, 3)
MOMENTS = {(1, True): Config(128, 16, 8, 3), (2, True): Config(128, 32, 8, 3)}
GRADS = {(2, True): Config(128, 32, 8, 3)}  # 128 x 128 of fp32 would spill on sm_80

# --- the kernels


@triton.jit
def _add_product(x, y, x_ptr, y_ptr, keep_x, keep_y, x_plane, y_plane, acc, PARTS: tl.constexpr):
    """acc + x y for tiles of fp32, or of the high halves in bf16, whose low halves are loaded."""
    if PARTS == 1:
        return tl.dot(x, y, acc, input_precision="tf32x3")
    else:
        acc = dot(tl.load(x_ptr + x_plane, mask=keep_x, other=0.0), y, acc)
        acc = dot(x, tl.load(y_ptr + y_plane, mask=keep_y, other=0.0), acc)
        return dot(x, y, acc)


@triton.jit
def _position_moment_kernel(
    deviations,  # (PARTS, T, D)
    partial,  # (splits, tiles, BLOCK, BLOCK) fp32
    T, D, per_split, area,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tile (i <= j) of d^T d over one stretch of tokens. Programs: (i, j, stretches)."""
    i, j, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if i > j:
        return
    side = tl.num_programs(0)
    a = (i * BLOCK + tl.arange(0, BLOCK))[:, None]
    b = (j * BLOCK + tl.arange(0, BLOCK))[None, :]
    begin = split * per_split
    end = tl.minimum(begin + per_split, T)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(begin, end, BLOCK_K):
        t = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        x_ptr, keep_x = deviations + t[None, :] * D + a, (t < end)[None, :] & (a < D)
        y_ptr, keep_y = deviations + t[:, None] * D + b, (t < end)[:, None] & (b < D)
        x = tl.load(x_ptr, mask=keep_x, other=0.0)
        y = tl.load(y_ptr, mask=keep_y, other=0.0)
        acc = _add_product(x, y, x_ptr, y_ptr, keep_x, keep_y, area, area, acc, PARTS)
    tile = split.to(tl.int64) * (side * (side + 1) // 2) + j * (j + 1) // 2 + i
    local = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(partial + tile * (BLOCK * BLOCK) + local, acc)


@triton.jit
def _position_grad_kernel(
    deviations,  # (PARTS, T, D)
    position,  # (T,) int32
    variance,  # (N, D) fp32
    matrix,  # (PARTS, D, D)
    slopes,  # (2,) fp32
    g_std,  # () fp32
    g_cov,  # () fp32
    dz,  # (T, D)
    T, D, area, gamma, eps,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of dz. Programs: (tiles of D, tiles of T).

    The sum begins with the standard deviations' part, in units of the covariance's factor: at its
    end that part would take more registers than there are. Where that factor is 0, or so small that
    the units overflow, there is no matmul.
    """
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    t = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = t[:, None] * D + d[None, :]
    keep = (t < T)[:, None] & (d < D)[None, :]
    n = tl.load(position + t, mask=t < T, other=-1).to(tl.int64)[:, None]
    value = tl.load(variance + n * D + d[None, :], mask=keep & (n >= 0), other=1.0)
    std = tl.sqrt(value + eps)
    slope_cov = tl.load(slopes + 1) * tl.load(g_cov)
    alone = tl.abs(slope_cov) < 1e-30
    unit = tl.where(alone, 1.0, slope_cov)
    slope_std = tl.load(slopes) * tl.load(g_std) / unit
    slope = tl.where(std < gamma, slope_std / std, 0.0)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for part in tl.static_range(PARTS):
        own = tl.load(deviations + part * area + at, mask=keep, other=0.0)
        acc += slope * own.to(tl.float32)
    for start in range(0, tl.where(alone, 0, D), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_ptr, keep_x = deviations + t[:, None] * D + k[None, :], (t < T)[:, None] & (k < D)
        y_ptr = matrix + k[:, None].to(tl.int64) * D + d[None, :]
        keep_y = (k < D)[:, None] & (d < D)[None, :]
        x = tl.load(x_ptr, mask=keep_x, other=0.0)
        y = tl.load(y_ptr, mask=keep_y, other=0.0)
        acc = _add_product(x, y, x_ptr, y_ptr, keep_x, keep_y, area, D * D, acc, PARTS)
    tl.store(dz + at, narrow(unit * acc, dz.dtype.element_ty), mask=keep)


# --- the launchers, of dense tensors


@on_its_device
def launch_position_moments(
    deviations: torch.Tensor, config: Config | None = None, splits: int | None = None
) -> torch.Tensor:
    """Tiles (1, splits, tiles, block, block) of d^T d, on and above the diagonal: for
    forward.launch_reduce, which sums over the splits."""
    parts, T, D = deviations.shape
    config = config or MOMENTS.get((parts, D >= LARGE), SMALL)
    side = triton.cdiv(D, config.block)
    tiles = side * (side + 1) // 2
    each, splits = in_stretches(T, tiles, config.block_k, splits)
    partial = empty(deviations, 1, splits, tiles, config.block, config.block)
    _position_moment_kernel[(side, side, splits)](
        deviations, partial, T, D, each, T * D,
        PARTS=parts, BLOCK=config.block, BLOCK_K=config.block_k,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return partial


@on_its_device
def launch_position_grad(
    deviations: torch.Tensor, position: torch.Tensor, variance: torch.Tensor, matrix: torch.Tensor,
    slopes: torch.Tensor, g_std: torch.Tensor, g_cov: torch.Tensor,
    gamma: float, eps: float, dtype: torch.dtype, config: Config | None = None,
) -> torch.Tensor:  # fmt: skip
    """dz (T, D) in `dtype`."""
    parts, T, D = deviations.shape
    config = config or GRADS.get((parts, D >= LARGE), SMALL)
    dz = empty(deviations, T, D, dtype=dtype)
    grid = (triton.cdiv(D, config.block), triton.cdiv(T, config.block))
    if T:
        _position_grad_kernel[grid](
            deviations, position, variance, matrix, slopes, g_std, g_cov, dz,
            T, D, T * D, gamma, eps, PARTS=parts, BLOCK=config.block, BLOCK_K=config.block_k,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return dz


# --- ahead of time


def every(configs: dict, parts: int) -> list[Config]:
    """Of small and of large matrices, each once."""
    return list({configs.get((parts, large), SMALL): None for large in (True, False)})


def ahead_of_time() -> list[Compiled]:
    """The moments for each form of the deviations, the gradient for each dtype."""
    made = []
    for dtype in KERNEL_DTYPES:
        if dtype != torch.float16:  # its deviations have bf16's form
            made += _in_every("moment", _position_moment_kernel, MOMENTS, dtype)
        made += _in_every("grad", _position_grad_kernel, GRADS, dtype)
    return made


def _in_every(name: str, kernel, configs: dict, dtype: torch.dtype) -> list[Compiled]:
    parts = MATRIX_FORMS[matmuls_of(dtype)][1]
    return [
        compiled(
            f"{name} {TRITON_NAMES[dtype]} {config.block}x{config.block_k}", kernel, dtype,
            {"PARTS": parts, "BLOCK": config.block, "BLOCK_K": config.block_k},
            num_warps=config.warps, num_stages=config.stages,
            must_have=(r"wgmma|mma\.sync|tcgen05\.mma",),
        )
        for config in every(configs, parts)
    ]  # fmt: skip
