"""GELU, and its backward with the sum of its columns.

    gelu(u) = u Phi(u),   Phi(u) = (1 + erf(u / sqrt 2)) / 2
    du = dg * (Phi(u) + u phi(u)),   phi(u) = exp(-u^2 / 2) / sqrt(2 pi)
    du_bias = sum of du over all rows: u comes from a Linear, whose bias takes it

Phi comes from the tail Q(|u|) = poly(t) exp(-u^2 / 2) / 2, t = 1 / (1 + p |u| / sqrt 2)
(Abramowitz & Stegun 1964, 7.1.26), within 2e-7 of Phi in fp32, 10,000 times less than bf16 rounds
to. Its exponential is the one that phi needs. The device library's erf takes twice the
instructions: with it a pass is bound by them and not by its bytes.

tanh's GELU, kind "tanh", has another Phi, off by 5e-4 / |u| of the first at most:
    Phi(u) = (1 + tanh(s)) / 2 = 1 / (1 + exp(-2 s)),   s = sqrt(2 / pi) (u + 0.044715 u^3)
    phi(u) = Phi(u) (1 - Phi(u)) 2 ds/du,               ds/du = sqrt(2 / pi) (1 + 3 * 0.044715 u^2)
again by one exponential, that of -2 |s|. |u| counts as 16 at most in both, beyond which Phi is 0 or
1 in fp32 and phi is 0: so no infinite cube meets a zero. (Hendrycks & Gimpel, arXiv 1606.08415.)

Shapes: rows of C values, u of any leading dimensions. `gelu_reference` is the definition, its
automatic gradient that of the backward. The launchers serve the operators of model/fused_ops.py.

Bytes a value that must move, with e bytes a value: forward 2 e, backward 3 e.
"""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from cjepa_fast.kernels.common.dependent_launch import (
    also_dependent,
    dependent,
    wait_for_previous,
)
from cjepa_fast.kernels.common.launch import TRITON_NAMES, Compiled, chosen, narrow, on_its_device
from cjepa_fast.kernels.common.maybe_triton import tl, triton
from cjepa_fast.kernels.common.sums import share_of, sum_parts
from cjepa_fast.kernels.common.tiles import WIDE_COPIES, WIDE_LOADS

# --- the reference


# The kinds of GELU, and what torch calls them.
APPROXIMATE = {"exact": "none", "tanh": "tanh"}


def gelu_reference(u: torch.Tensor, kind: str = "exact") -> torch.Tensor:
    wide = u if u.dtype == torch.float64 else u.float()
    return F.gelu(wide, approximate=APPROXIMATE[kind]).to(u.dtype)


# --- the kernels


@triton.jit
def _normal(u):
    """Of fp32 u: Phi(u), and exp(-u^2 / 2)."""
    size = tl.abs(u)
    t = 1.0 / (1.0 + 0.23164190 * size)  # p / sqrt 2
    exponential = tl.exp2(u * u * -0.72134752)  # log2(e) / 2
    tail = 0.5 * t * (
        0.254829592
        + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    ) * exponential  # fmt: skip
    return tl.where(u >= 0, 1.0 - tail, tail), exponential


@triton.jit
def _logistic(u):
    """Of fp32 u, by tanh: Phi(u), and phi(u)."""
    size = tl.minimum(tl.abs(u), 16.0)
    square = size * size
    # exp(-2 |s|) by the constant 2 sqrt(2 / pi) log2(e); 2 ds/du by 2 sqrt(2 / pi)
    exponential = tl.exp2(-2.3022082 * size * (1.0 + 0.044715 * square))
    tail = exponential / (1.0 + exponential)
    density = tail * (1.0 - tail) * (1.5957691 + 0.21406445 * square)
    return tl.where(u >= 0, 1.0 - tail, tail), density


@triton.jit
def gelu_of(u):
    """gelu(u) of fp32 u."""
    below, _ = _normal(u)
    return u * below


@triton.jit
def tanh_gelu_of(u):
    """The same by tanh."""
    below, _ = _logistic(u)
    return u * below


@triton.jit
def _gelu_kernel(
    u,  # (size,)
    out,  # (size,)
    size,
    TANH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    wait_for_previous(PDL)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(u + at, mask=at < size, other=0.0).to(tl.float32)
    value = tanh_gelu_of(value) if TANH else gelu_of(value)
    tl.store(out + at, narrow(value, out.dtype.element_ty), mask=at < size)


@triton.jit(do_not_specialize=["rows", "each"])
def _gelu_backward_kernel(
    u,  # (rows, C)
    dg,  # (rows, C)
    du,  # (rows, C)
    parts,  # (programs of rows, C) fp32
    rows, C, each,
    TANH: tl.constexpr, STAGES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """WIDTH columns of `each` rows; parts (programs of rows, C): the sums of du, as it is rounded.

    Programs: (tiles of C, shares of the rows).
    """
    wait_for_previous(PDL)
    col = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    begin = tl.program_id(1) * each
    for start in tl.range(begin, tl.minimum(begin + each, rows), ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        keep = (row < rows)[:, None] & (col < C)[None, :]
        at = row.to(tl.int64)[:, None] * C + col[None, :]
        value = tl.load(u + at, mask=keep, other=0.0).to(tl.float32)
        grad = tl.load(dg + at, mask=keep, other=0.0).to(tl.float32)
        if TANH:
            below, density = _logistic(value)
            grad *= below + value * density
        else:
            below, exponential = _normal(value)
            grad *= below + value * exponential * 0.39894228  # 1 / sqrt(2 pi)
        rounded = narrow(grad, du.dtype.element_ty)
        tl.store(du + at, rounded, mask=keep)
        total += rounded.to(tl.float32)
    tl.store(parts + tl.program_id(1) * C + col, tl.sum(total, 0), mask=col < C)


# --- launchers

BLOCKS = ((2048, 4), (1024, 4), (4096, 8))  # values a program takes, and warps


class Tile(NamedTuple):
    """Rows and columns that a program of the backward takes at a time, by that many warps, and how
    many steps' loads are under way at once."""

    rows: int
    width: int
    warps: int
    stages: int


# Programs of a backward: 8 on each of 132 multiprocessors. A constant, so that the order of the
# sums does not follow the GPU's size.
PROGRAMS = 1056
TILES = (Tile(16, 128, 4, 1), Tile(8, 256, 4, 1), Tile(16, 128, 4, 3), Tile(8, 256, 4, 3))


@on_its_device
def launch_gelu(
    u: torch.Tensor,
    out: torch.Tensor | None = None,
    block: tuple[int, int] | None = None,
    kind: str = "exact",
) -> torch.Tensor:
    """gelu(u) of dense u, into `out` (which may be u) if given. kind: of APPROXIMATE."""
    out = torch.empty_like(u) if out is None else out
    values, warps = block or chosen("gelu", BLOCKS, u.device)
    if u.numel():
        grid = (triton.cdiv(u.numel(), values),)
        _gelu_kernel[grid](
            u, out, u.numel(), TANH=kind == "tanh", BLOCK=values, num_warps=warps,
            **dependent(u.device),
        )  # fmt: skip
    return out


@on_its_device
def launch_gelu_backward(
    dg: torch.Tensor, u: torch.Tensor, tile: Tile | None = None, kind: str = "exact"
) -> tuple[torch.Tensor, torch.Tensor]:
    """du, and its sum over the rows (C,), both in u's dtype, of dense tensors."""
    C = u.shape[-1]
    du = torch.empty_like(u)
    if u.numel() == 0:
        return du, u.new_zeros(C)
    rows, tile = u.numel() // C, tile or chosen("gelu backward", TILES, u.device)
    columns = triton.cdiv(C, tile.width)
    each, programs = share_of(rows, max(1, PROGRAMS // columns), tile.rows)
    parts = torch.empty(programs, C, device=u.device, dtype=torch.float32)
    _gelu_backward_kernel[(columns, programs)](
        u, dg, du, parts, rows, C, each,
        TANH=kind == "tanh", STAGES=tile.stages, ROWS=tile.rows, WIDTH=tile.width,
        num_warps=tile.warps, **dependent(u.device),
    )  # fmt: skip
    return du, sum_parts(parts, u.dtype)


# --- ahead of time


def ahead_of_time() -> list[Compiled]:
    """Both kernels in every size, for 16 bits and each kind."""
    found = []
    for dtype, kind in itertools.product((torch.bfloat16, torch.float16), APPROXIMATE):
        which, tanh = ("tanh " if kind == "tanh" else ""), {"TANH": kind == "tanh"}
        name = TRITON_NAMES[dtype]
        kinds = dict.fromkeys(("u", "dg", "du", "out"), f"*{name}") | {"parts": "*fp32"}
        kinds |= dict.fromkeys(("rows", "C", "each"), "i32") | {"size": "i64"}
        found += [
            Compiled(
                f"gelu {which}{name} {block} {warps}", _gelu_kernel,
                {a: kinds[a] for a in ("u", "out", "size")}, tanh | {"BLOCK": block}, warps,
                must_have=WIDE_LOADS, divisible=("size",),
            )
            for block, warps in BLOCKS
        ]  # fmt: skip
        found += [
            Compiled(
                f"gelu backward {which}{name} {tile.rows}x{tile.width} {tile.stages}",
                _gelu_backward_kernel,
                {a: kinds[a] for a in ("u", "dg", "du", "parts", "rows", "C", "each")},
                tanh | {"STAGES": tile.stages, "ROWS": tile.rows, "WIDTH": tile.width}, tile.warps,
                must_have=WIDE_COPIES if tile.stages > 1 else WIDE_LOADS, divisible=("C",),
            )
            for tile in TILES
        ]  # fmt: skip
    return also_dependent(found)
