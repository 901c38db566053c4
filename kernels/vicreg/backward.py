"""The backward of VICReg's terms: dz, in one launch.

    dz = 4 g_cov / (M D (n-1)) * Zc O  -  g_std / (M D (n-1)) * Zc diag(1[s_j < gamma] / s_j)
with O for the covariance with a zero diagonal; by the Gram matrix K where n < D: Zc O = K Zc - Zc
diag(C_jj).

Shapes: z and dz (M, n, D), mean (2, M, D), variance (M, D), matrix (M, parts, S, S), S = min(n, D),
g_std and g_cov 0-d.
Bytes that must move, for b bytes an element: 2 n D b (z and dz) and the matrix once. Operations:
2 n D S, three times that by the matmuls of halves.
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
)
from cjepa_fast.kernels.common.maybe_triton import tl, triton
from cjepa_fast.kernels.common.operators import operator
from cjepa_fast.kernels.vicreg.forward import runs_kernels
from cjepa_fast.kernels.vicreg.plain import plain_grad
from cjepa_fast.kernels.vicreg.tiles import (
    GRAD_CONFIGS,
    Config,
    Saved,
    candidates,
    compiled_in,
    empty,
    every,
    halves,
    load_centred,
    load_mean,
    matmuls_of,
    pointer_types,
)

# --- the kernel


@triton.jit
def _grad_kernel(
    z_ptr,  # (M, n, D)
    mean_ptr,  # (2, M, D) fp32
    variance_ptr,  # (M, D) fp32
    matrix_ptr,  # (M, parts, size, size)
    g_std_ptr,  # () fp32
    g_cov_ptr,  # () fp32
    dz_ptr,  # (M, n, D)
    n, D, plane, area, gamma, eps, scale, stride_m, stride_n, stride_d,
    GRAM: tl.constexpr, PRODUCTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
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
        first_p, rest_p = load_mean(mean_ptr, p, D, plane)
    acc = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
    for start in range(0, size, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if GRAM:
            x = load_centred(z_ptr, k[None, :], p, first_p, rest_p, n, D, stride_n, stride_d)
        else:
            first, rest = load_mean(mean_ptr, k[None, :], D, plane)
            x = load_centred(z_ptr, p, k[None, :], first, rest, n, D, stride_n, stride_d)
        inside = (k[:, None] < size) & (q[None, :] < size)
        pointer = matrix_ptr + k[:, None].to(tl.int64) * size + q[None, :]
        y = tl.load(pointer, mask=inside, other=0.0)
        if PRODUCTS == 0:
            acc = tl.dot(x, y, acc, input_precision="tf32x3")
        else:
            x_high, x_low = halves(x)
            y_low = tl.load(pointer + area, mask=inside, other=0.0)
            acc = dot(x_low, y, acc)
            acc = dot(x_high, y_low, acc)
            acc = dot(x_high, y, acc)
    if GRAM:
        rows, cols = q[None, :], p
    else:
        rows, cols = p, q[None, :]
    first, rest = load_mean(mean_ptr, cols, D, plane)
    x = load_centred(z_ptr, rows, cols, first, rest, n, D, stride_n, stride_d)
    variance = tl.load(variance_ptr + m * D + cols, mask=cols < D, other=0.0)
    std = tl.sqrt(variance + eps)
    slope = tl.where(std < gamma, -scale * tl.load(g_std_ptr) / std, 0.0)
    slope_cov = 4 * scale * tl.load(g_cov_ptr)
    if GRAM:
        slope -= slope_cov * variance
    dz = narrow(slope_cov * acc + slope * x, dz_ptr.dtype.element_ty)
    offsets = (m * n + rows) * D + cols
    tl.store(dz_ptr + offsets, dz, mask=(rows < n) & (cols < D))


# --- the launcher


@on_its_device
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
    dz = empty(z, M, n, D, dtype=z.dtype)
    grid = (triton.cdiv(size, config.block), triton.cdiv(D if gram else n, config.block), M)
    _grad_kernel[grid](
        z, mean, variance, matrix, g_std, g_cov, dz, n, D, M * D, size * size, gamma, eps,
        1 / (M * D * (count - 1)), *z.stride(), GRAM=gram, PRODUCTS=matmuls_of(z.dtype),
        BLOCK_P=config.block, BLOCK_Q=config.block, BLOCK_K=config.block_k,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return dz


# --- the operator: by the kernel or in plain PyTorch


def terms_grad(
    z: torch.Tensor, saved: Saved, g_std: torch.Tensor, g_cov: torch.Tensor,
    gamma: float, eps: float, count: int,
) -> torch.Tensor:  # fmt: skip
    """The gradient of g_std * std_loss + g_cov * cov_loss at z; count: the statistics' rows."""
    with torch.autocast(z.device.type, enabled=False):
        grad = launch_grad if runs_kernels(z) else plain_grad
        return grad(z, saved, g_std, g_cov, gamma, eps, count)


@operator("vicreg_grad")
def grad_op(
    z: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, matrix: torch.Tensor,
    g_std: torch.Tensor, g_cov: torch.Tensor, gamma: float, eps: float,
) -> torch.Tensor:  # fmt: skip
    return terms_grad(z, Saved(mean, variance, matrix), g_std, g_cov, gamma, eps, z.shape[1])


@torch.library.register_fake(grad_op)
def _(z, mean, variance, matrix, g_std, g_cov, gamma, eps):
    return torch.empty(z.shape, dtype=z.dtype, device=z.device)


# --- ahead of time


def ahead_of_time() -> list[Compiled]:
    """The kernel in every configuration for each dtype, at sizes that are multiples of 16."""
    made = []
    for dtype, gram in itertools.product(KERNEL_DTYPES, (False, True)):
        own = {"types": pointer_types(dtype), "GRAM": gram, "PRODUCTS": matmuls_of(dtype)}
        name, block_names = f"grad {TRITON_NAMES[dtype]}", ("BLOCK_P", "BLOCK_Q")
        made += [
            compiled_in(name, _grad_kernel, config, block_names, **own)
            for config in every(GRAD_CONFIGS, dtype, gram)
        ]
    return made
