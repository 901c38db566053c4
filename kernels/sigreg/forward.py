"""The forward of SIGReg: the sums of cosines and sines of each group, in one pass over its rows.

Shapes: z (T, D), directions (D, K) fp32, rows (G, n) int64; sums (G, 2, Q, K) fp32, where [g, 0, q]
is the sum of cos((q + 1) step x) over the group's rows and [g, 1, q] that of the sines.
Bytes that must move, for b bytes an element: n D b of each group, the directions, and the sums
twice where there are several stretches of rows.
"""

import torch

from cjepa_fast.kernels.common.launch import KERNEL_DTYPES, TRITON_NAMES, Compiled, on_its_device
from cjepa_fast.kernels.common.maybe_triton import tl, triton
from cjepa_fast.kernels.common.sums import sum_parts
from cjepa_fast.kernels.sigreg.tiles import TILE, WARPS, compiled, cos_sin, load_rows, projected

# --- the kernel


@triton.jit
def _sums_kernel(
    z,  # (T, D)
    directions,  # (D, K) fp32
    rows,  # (G, n) int64
    parts,  # (stretches, G, 2, Q, K) fp32
    T, n, D, K, Q, step,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Programs: (tiles of K, groups, stretches of BLOCK_N rows)."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    slot = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = load_rows(rows, tl.program_id(1), slot, n)
    x = projected(z, directions, row, k, T, D, K, BLOCK_N, BLOCK_K, BLOCK_D)
    cos1, sin1 = cos_sin(x * step)
    live = (row >= 0)[:, None]
    cos, sin = tl.where(live, cos1, 0.0), tl.where(live, sin1, 0.0)
    group = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    parts += group * 2 * Q * K + k
    for q in range(0, Q):
        tl.store(parts + q * K, tl.sum(cos, 0), mask=k < K)
        tl.store(parts + (Q + q) * K, tl.sum(sin, 0), mask=k < K)
        cos, sin = cos * cos1 - sin * sin1, sin * cos1 + cos * sin1


# --- the launcher


@on_its_device
def launch_sums(
    z: torch.Tensor, directions: torch.Tensor, rows: torch.Tensor, Q: int, step: float
) -> torch.Tensor:
    """(G, 2, Q, K) fp32, of dense tensors."""
    (T, D), (G, n), K = z.shape, rows.shape, directions.shape[1]
    stretches = triton.cdiv(n, TILE["BLOCK_N"])
    parts = torch.empty(stretches, G, 2, Q, K, dtype=torch.float32, device=z.device)
    grid = (triton.cdiv(K, TILE["BLOCK_K"]), G, stretches)
    _sums_kernel[grid](z, directions, rows, parts, T, n, D, K, Q, step, num_warps=WARPS, **TILE)
    if stretches == 1:
        return parts[0]
    return sum_parts(parts.view(stretches, -1), torch.float32).view(parts.shape[1:])


# --- ahead of time


def ahead_of_time() -> list[Compiled]:
    return [
        compiled(f"sigreg sums {TRITON_NAMES[dtype]}", _sums_kernel, dtype, TILE)
        for dtype in KERNEL_DTYPES
    ]
