"""The backward of SIGReg: dz from the sums' gradients, in two launches.

    g_rk = -Im sum_q t_q p^q (dC_qk - i dS_qk),  p = exp(i step x_rk),  t_q = q step
    dz_r = sum_k g_rk a_k

The first reads z and writes g, the second is the matmul with the directions.
Shapes: z and dz (T, D), directions (D, K) fp32, rows (G, n) int64, slopes (G, 2, Q, K) fp32: dC and
dS; g (T, K) fp32. A row in no group has a gradient of 0.
Bytes that must move, for b bytes an element: 2 T D b (z and dz), 8 T K (g), the slopes.
"""

import torch

from cjepa_fast.kernels.common.launch import (
    KERNEL_DTYPES,
    TRITON_NAMES,
    Compiled,
    narrow,
    on_its_device,
)
from cjepa_fast.kernels.common.maybe_triton import tl, triton
from cjepa_fast.kernels.sigreg.tiles import TILE, WARPS, compiled, cos_sin, load_rows, projected

MATMUL = {"BLOCK_T": 64, "BLOCK_D": 64, "BLOCK_K": 32}

# --- the kernels


@triton.jit
def _slopes_kernel(
    z,  # (T, D)
    directions,  # (D, K) fp32
    rows,  # (G, n) int64
    slopes,  # (G, 2, Q, K) fp32
    g,  # (T, K) fp32
    T, n, D, K, Q, step,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """g of the rows in groups. Programs: (tiles of K, groups, stretches of BLOCK_N rows).

    Horner's rule: sum_q t_q p^q s_q = p (t_1 s_1 + p (t_2 s_2 + ...)).
    """
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    slot = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = load_rows(rows, tl.program_id(1), slot, n)
    x = projected(z, directions, row, k, T, D, K, BLOCK_N, BLOCK_K, BLOCK_D)
    cos, sin = cos_sin(x * step)
    real = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    imaginary = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    slopes += tl.program_id(1).to(tl.int64) * 2 * Q * K + k
    for back in range(0, Q):
        q = Q - 1 - back
        t = (q + 1) * step
        dcos = t * tl.load(slopes + q * K, mask=k < K, other=0.0)[None, :]
        dsin = t * tl.load(slopes + (Q + q) * K, mask=k < K, other=0.0)[None, :]
        turned = real * sin + imaginary * cos
        real = real * cos - imaginary * sin + dcos
        imaginary = turned - dsin
    keep = ((row >= 0) & (row < T))[:, None] & (k < K)[None, :]
    tl.store(g + row[:, None] * K + k[None, :], -(real * sin + imaginary * cos), mask=keep)


@triton.jit
def _rows_kernel(
    g,  # (T, K) fp32
    directions,  # (D, K) fp32
    dz,  # (T, D)
    T, D, K,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of dz = g directions^T. Programs: (tiles of T, tiles of D)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        keep = (row < T)[:, None] & (k < K)[None, :]
        slope = tl.load(g + row[:, None] * K + k[None, :], mask=keep, other=0.0)
        keep = (k < K)[:, None] & (d < D)[None, :]
        a = tl.load(directions + d[None, :] * K + k[:, None], mask=keep, other=0.0)
        acc = tl.dot(slope, a, acc, input_precision="tf32x3")
    keep = (row < T)[:, None] & (d < D)[None, :]
    tl.store(dz + row[:, None] * D + d[None, :], narrow(acc, dz.dtype.element_ty), mask=keep)


# --- the launcher


@on_its_device
def launch_grad(
    z: torch.Tensor, directions: torch.Tensor, rows: torch.Tensor, slopes: torch.Tensor, step: float
) -> torch.Tensor:
    """dz (T, D) in z's dtype, of dense tensors."""
    (T, D), (G, n), K, Q = z.shape, rows.shape, directions.shape[1], slopes.shape[2]
    g = torch.zeros(T, K, dtype=torch.float32, device=z.device)
    grid = (triton.cdiv(K, TILE["BLOCK_K"]), G, triton.cdiv(n, TILE["BLOCK_N"]))
    _slopes_kernel[grid](
        z, directions, rows, slopes, g, T, n, D, K, Q, step, num_warps=WARPS, **TILE
    )
    dz = torch.empty_like(z)
    grid = (triton.cdiv(T, MATMUL["BLOCK_T"]), triton.cdiv(D, MATMUL["BLOCK_D"]))
    _rows_kernel[grid](g, directions, dz, T, D, K, num_warps=WARPS, **MATMUL)
    return dz


# --- ahead of time


def ahead_of_time() -> list[Compiled]:
    found = []
    for dtype in KERNEL_DTYPES:
        name = TRITON_NAMES[dtype]
        found.append(compiled(f"sigreg slopes {name}", _slopes_kernel, dtype, TILE))
        found.append(compiled(f"sigreg rows {name}", _rows_kernel, dtype, MATMUL))
    return found
