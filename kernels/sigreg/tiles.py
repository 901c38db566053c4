"""What SIGReg's forward and backward share: tiles, loads, projections, cosine and sine.

z is (T, D), the directions (D, K), the table of rows (G, n) with -1 where there is none.
"""

import torch

from cjepa_fast.kernels.common.launch import TRITON_NAMES, Compiled
from cjepa_fast.kernels.common.maybe_triton import tl, triton

# Rows, directions and columns of z that a program takes at a time, and its warps.
TILE = {"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_D": 32}
WARPS = 8

# pi / 2 in three parts: the first two have so few bits that their multiples are exact.
_HALF_PI_1 = tl.constexpr(1.5703125)
_HALF_PI_2 = tl.constexpr(4059 * 2.0**-23)
_HALF_PI_3 = tl.constexpr(-4.3711390063e-08)


# --- in a kernel


@triton.jit
def cos_sin(x):
    """Cosine and sine of fp32 x to 1e-7, for |x| up to some thousands; NaN stays NaN.

    The device library's own keep a stack for larger ones. x is brought to r in [-pi/4, pi/4], where
    the Taylor series are short; the quarters that were taken off exchange them and their signs.
    """
    quarters = tl.floor(x * 0.63661977 + 0.5)  # 2 / pi
    r = x - quarters * _HALF_PI_1 - quarters * _HALF_PI_2 - quarters * _HALF_PI_3
    s = r * r
    sine = r + r * s * (-1 / 6 + s * (1 / 120 + s * (-1 / 5040 + s * (1 / 362880))))
    rest = 1 / 24 + s * (-1 / 720 + s * (1 / 40320 - s * (1 / 3628800)))
    cosine = 1.0 + s * (-1 / 2 + s * rest)
    quarter = quarters - 4.0 * tl.floor(0.25 * quarters)  # 0, 1, 2, 3
    odd = (quarter == 1.0) | (quarter == 3.0)
    cos = tl.where(odd, sine, cosine)
    sin = tl.where(odd, cosine, sine)
    cos = tl.where((quarter == 1.0) | (quarter == 2.0), -cos, cos)
    return cos, tl.where(quarter >= 2.0, -sin, sin)


@triton.jit
def load_rows(rows, group, slot, n):
    """The table's entries of a group at slots, int64, -1 beyond its end."""
    return tl.load(rows + group.to(tl.int64) * n + slot, mask=slot < n, other=-1).to(tl.int64)


@triton.jit
def projected(
    z, directions, row, k, T, D, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """z[row] directions[:, k] in fp32 (BLOCK_N, BLOCK_K): 0 for row -1, NaN for one beyond T."""
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    there = (row >= 0) & (row < T)
    for start in range(0, D, BLOCK_D):
        d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        keep = there[:, None] & (d < D)[None, :]
        x = tl.load(z + row[:, None] * D + d[None, :], mask=keep, other=0.0).to(tl.float32)
        keep = (d < D)[:, None] & (k < K)[None, :]
        a = tl.load(directions + d[:, None] * K + k[None, :], mask=keep, other=0.0)
        acc = tl.dot(x, a, acc, input_precision="tf32x3")
    return tl.where((row >= T)[:, None], float("nan"), acc)


# --- ahead of time


def compiled(name: str, kernel, dtype: torch.dtype, constexprs: dict[str, int]) -> Compiled:
    """For z of a dtype; the sizes are multiples of 16, but for those of rows."""
    types = dict.fromkeys(("z", "dz"), f"*{TRITON_NAMES[dtype]}")
    types |= dict.fromkeys(("directions", "parts", "slopes", "g"), "*fp32")
    types |= {"rows": "*i64", "step": "fp32"}
    signature = {a: types.get(a, "i32") for a in kernel.arg_names if a not in constexprs}
    return Compiled(
        name, kernel, signature, constexprs, num_warps=WARPS,
        divisible=tuple(a for a in ("D", "K", "Q") if a in signature),
        must_have=(r"wgmma|mma\.sync|tcgen05\.mma",),
    )  # fmt: skip
