"""What VICReg's forward and backward share: configurations, what is saved, centred loads.

z is (M, n, D) in any strides, fp32, bf16 or fp16. What is accumulated lies in fp32. The symmetric
matrix is X X^T of X = Zc^T ("moments") or X = Zc ("Gram"): its index a counts columns of z or rows,
the summed index k the other.
"""

import itertools
from typing import NamedTuple

import torch

from cjepa_fast.kernels.common.launch import TRITON_NAMES, Compiled, narrow
from cjepa_fast.kernels.common.maybe_triton import tl, triton

Terms = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Saved(NamedTuple):
    """What backward needs: the mean in two parts (2, M, D), the variances (M, D), the matrix.

    The matrix (M, parts, S, S): C with a zero diagonal (S = D), or K (S = n < D), as a sum of its
    parts; without elements where no gradient is wanted.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    matrix: torch.Tensor


class Config(NamedTuple):
    """Tiles: `block` of the matrix (and of dz), `block_k` of the summed index."""

    block: int
    block_k: int
    warps: int
    stages: int


# Candidates by (matmuls, Gram, whether the matrix has at least LARGE rows), see matmuls_of; the
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
    (matmuls, gram, large): wide_first if large else wide_first[::-1]
    for matmuls, wide_first in (
        (0, (Config(128, 16, 8, 3), Config(64, 32, 4, 3))),
        (3, (Config(128, 32, 8, 3), Config(64, 32, 4, 3))),
    )
    for gram in (False, True)
    for large in (False, True)
}
# The type and the number of parts in which the matrix is kept, by the number of matmuls.
MATRIX_FORMS = {0: (torch.float32, 1), 3: (torch.bfloat16, 2)}
# Enough programs for two on each multiprocessor of the largest GPU at hand (132). A constant, so
# that the order of the sums, and with it the last bits, does not follow the GPU's size.
PROGRAMS = 264


def matmuls_of(dtype: torch.dtype) -> int:
    """0: tf32 halves; 3: bf16 halves. The docstring of vicreg says why."""
    return 0 if dtype == torch.float32 else 3


def candidates(kernel: str, z: torch.Tensor, gram: bool) -> tuple[str, tuple[Config, ...]]:
    """For the "moment" or the "grad" kernel of z: tuned.py's key, and the configurations."""
    size = z.shape[1] if gram else z.shape[2]
    shape = matmuls_of(z.dtype), gram, size >= LARGE
    found = {"moment": MOMENT_CONFIGS, "grad": GRAD_CONFIGS}[kernel][shape]
    kind = f"{TRITON_NAMES[z.dtype]}{' gram' if gram else ''} {'large' if shape[2] else 'small'}"
    return f"vicreg {kernel} {kind}", found


def every(configs: dict, dtype: torch.dtype, gram: bool) -> list[Config]:
    """The candidates for z of a dtype, of small and of large matrices, each once."""
    both = (configs[matmuls_of(dtype), gram, large] for large in (True, False))
    return list(dict.fromkeys(itertools.chain(*both)))


def in_stretches(length: int, programs: int, step: int, count: int | None) -> tuple[int, int]:
    """(how long each, how many) stretches of whole steps, at about PROGRAMS programs in all.

    A stretch takes at least four steps. `count` asks for another number.
    """
    count = count or min(triton.cdiv(PROGRAMS, programs), triton.cdiv(length, 4 * step))
    each = triton.cdiv(triton.cdiv(length, count), step) * step
    return each, triton.cdiv(length, each)


def empty(like: torch.Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Memory for a kernel to fill; tests fill it with NaN first."""
    return torch.empty(shape, dtype=dtype, device=like.device)


# --- in a kernel


@triton.jit
def load_centred(z_ptr, rows, cols, first, rest, n, D, stride_n, stride_d):
    """(z - mean)[rows, cols] in fp32, 0 outside; rows, cols and the mean broadcast to the tile."""
    inside = (rows < n) & (cols < D)
    offsets = rows.to(tl.int64) * stride_n + cols.to(tl.int64) * stride_d
    z = tl.load(z_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, z - first - rest, 0.0)


@triton.jit
def load_mean(mean_ptr, cols, D, plane):
    """The two parts of the columns' means, from (2, M, D)."""
    first = tl.load(mean_ptr + cols, mask=cols < D, other=0.0)
    return first, tl.load(mean_ptr + plane + cols, mask=cols < D, other=0.0)


@triton.jit
def halves(x):
    """x as the sum of two bf16 numbers, to 2^-17."""
    high = narrow(x, tl.bfloat16)
    return high, narrow(x - high.to(tl.float32), tl.bfloat16)


# --- ahead of time


def compiled(name: str, kernel, types: dict[str, str], constexprs: dict, **options) -> Compiled:
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


def compiled_in(
    name: str,
    kernel,
    config: Config,
    block_names: tuple[str, ...],
    types: dict[str, str],
    **constexprs,
) -> Compiled:
    constexprs |= dict.fromkeys(block_names, config.block) | {"BLOCK_K": config.block_k}
    gram = " gram" if constexprs["GRAM"] else ""
    return compiled(
        f"vicreg {name}{gram} {config.block}x{config.block_k}", kernel, types, constexprs,
        num_warps=config.warps, num_stages=config.stages,
        must_have=(r"wgmma|mma\.sync|tcgen05\.mma",),
    )  # fmt: skip


def pointer_types(dtype: torch.dtype) -> dict[str, str]:
    """Of the kernels' pointers, where z and dz are of `dtype`."""
    name = TRITON_NAMES[dtype]
    fp32 = ("stretch_ptr", "mean_ptr", "variance_ptr", "partial_ptr", "g_std_ptr", "g_cov_ptr")
    matrix = TRITON_NAMES[MATRIX_FORMS[matmuls_of(dtype)][0]]
    types = {"z_ptr": f"*{name}", "dz_ptr": f"*{name}", "matrix_ptr": f"*{matrix}"}
    return types | dict.fromkeys(fp32, "*fp32")
