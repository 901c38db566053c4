"""Rows in 8-bit floating point: values in e4m3 and an fp32 scale a row.

    quantise_rows    values[r] = e4m3(x[r] * 448 / m[r]), scales[r] = m[r] / 448, m[r] = max |x[r]|
    quantise_norm    the same of layer_norm(x[r]) * weight + bias
                     or, given y, of s = x + y, which it also returns
    quantise_gelu    the same of gelu(x[r]) = x[r] (1 + erf(x[r] / sqrt 2)) / 2, or of tanh's

448 is e4m3's largest value, and a row below 1e-12 counts as one of 1e-12, so that zeros are safe.
values * scales is off by 1/16 of a value at most, 2.4 % of it in the mean square. All is computed
in fp32 and rounded once. A row that is not finite comes out with NaN, and so does its matmul.

`x_reference` is the definition, and the path on the CPU; on CUDA (sm_89 and newer have e4m3) one
kernel serves all three. The target's weights' rows are quantised in kernels/ema/, by `scales_of`.

Bytes a value that must move, of x in bf16: 3. Apart, the norm or GELU would move 4 more.
"""

import functools
import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from cjepa_fast.kernels.common.dependent_launch import (
    also_dependent,
    dependent,
    wait_for_previous,
)
from cjepa_fast.kernels.common.launch import (
    KERNEL_DTYPES,
    TRITON_NAMES,
    Compiled,
    narrow,
    on_its_device,
    use_kernel,
)
from cjepa_fast.kernels.common.maybe_triton import tl, triton
from cjepa_fast.kernels.common.operators import operator
from cjepa_fast.kernels.common.tiles import (
    TRADED,
    WIDEST,
    Tile,
    cuts,
    in_pieces,
    loads_of,
    row_tiles,
)
from cjepa_fast.kernels.gelu import APPROXIMATE, gelu_of, tanh_gelu_of

E4M3 = torch.float8_e4m3fn
LARGEST = tl.constexpr(448.0)
SMALLEST = tl.constexpr(1e-12)  # that a row's maximum counts as


class Rows(NamedTuple):
    """A tensor (..., C) in FP8: values (..., C) e4m3 and scales (..., 1) fp32."""

    values: torch.Tensor
    scales: torch.Tensor

    def wide(self) -> torch.Tensor:
        """What it stands for, (..., C) fp32."""
        return self.values.float() * self.scales


# --- the reference


def quantise_rows_reference(x_RC: torch.Tensor) -> Rows:
    x_RC = x_RC.float()
    largest = x_RC.abs().amax(-1, keepdim=True).clamp(min=SMALLEST.value)
    top = torch.full_like(largest, LARGEST.value)  # by a number PyTorch does not divide exactly
    return Rows((x_RC * (top / largest)).to(E4M3), largest / top)


def quantise_norm_reference(
    x_RC: torch.Tensor, weight_C: torch.Tensor, bias_C: torch.Tensor, eps: float
) -> Rows:
    x_RC, weight_C, bias_C = x_RC.float(), weight_C.float(), bias_C.float()
    return quantise_rows_reference(F.layer_norm(x_RC, weight_C.shape, weight_C, bias_C, eps))


def quantise_add_norm_reference(
    x_RC: torch.Tensor,
    y_RC: torch.Tensor,
    weight_C: torch.Tensor,
    bias_C: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, Rows]:
    s_RC = (x_RC + y_RC).to(x_RC.dtype)
    return s_RC, quantise_norm_reference(s_RC, weight_C, bias_C, eps)


def quantise_gelu_reference(x_RC: torch.Tensor, kind: str = "exact") -> Rows:
    return quantise_rows_reference(F.gelu(x_RC.float(), approximate=APPROXIMATE[kind]))


# --- the kernel


@triton.jit
def scales_of(largest):
    """By what the values of a row are multiplied, and what undoes it, from its largest."""
    largest = tl.maximum(largest, SMALLEST)
    return tl.div_rn(LARGEST, largest), tl.div_rn(largest, LARGEST)


@triton.jit
def _normed(
    values, weight, bias, col, C, eps,
    FULL: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """layer_norm of fp32 rows in pieces, that are zero from column C on, and so is the result."""
    total = tl.zeros_like(values[0])
    for piece in tl.static_range(PIECES):
        total += values[piece]
    mean = (tl.sum(total, 1) / C)[:, None]
    spread = tl.zeros_like(values[0])
    centred = ()
    for piece in tl.static_range(PIECES):
        value = values[piece] - mean
        value = value if FULL else tl.where((piece * WIDTH + col < C)[None, :], value, 0.0)
        spread += value * value
        centred = centred + (value,)
    rstd = tl.rsqrt(tl.sum(spread, 1) / C + eps)[:, None]
    normed = ()
    for piece in tl.static_range(PIECES):
        here = piece * WIDTH + col
        gain = tl.load(weight + here, mask=FULL | (here < C), other=0.0).to(tl.float32)
        shift = tl.load(bias + here, mask=FULL | (here < C), other=0.0).to(tl.float32)
        normed = normed + (centred[piece] * rstd * gain[None, :] + shift[None, :],)
    return normed


@triton.jit
def _quantise_kernel(
    x,  # (rows, C)
    y,  # (rows, C), read with ADD alone
    s,  # (rows, C), written with ADD alone
    weight,  # (C,), of the norm
    bias,  # (C,), of the norm
    values,  # (rows, C) e4m3
    scales,  # (rows, 1) fp32
    rows, C, eps,
    FIRST: tl.constexpr, ADD: tl.constexpr, FULL: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """ROWS whole rows of x, dense, each in PIECES pieces of WIDTH values, FULL where none is left
    over. FIRST: what is done to them before, "norm", "gelu", "tanh gelu" or None. With ADD, y is
    added before that, and the sum written to s."""
    wait_for_previous(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    col = tl.arange(0, WIDTH)
    found = ()
    for piece in tl.static_range(PIECES):
        here = piece * WIDTH + col
        keep = live[:, None] & (FULL | (here < C))[None, :]
        at = row.to(tl.int64)[:, None] * C + here[None, :]
        value = tl.load(x + at, mask=keep, other=0.0).to(tl.float32)
        if ADD:
            value += tl.load(y + at, mask=keep, other=0.0).to(tl.float32)
            total = narrow(value, s.dtype.element_ty)
            tl.store(s + at, total, mask=keep)
            value = total.to(tl.float32)
        if FIRST == "gelu":
            value = gelu_of(value)
        if FIRST == "tanh gelu":
            value = tanh_gelu_of(value)
        found = found + (value,)
    if FIRST == "norm":
        found = _normed(found, weight, bias, col, C, eps, FULL, WIDTH, PIECES)
    largest = tl.abs(found[0])
    for piece in tl.static_range(1, PIECES):
        largest = tl.maximum(largest, tl.abs(found[piece]))
    factor, scale = scales_of(tl.max(largest, 1))
    for piece in tl.static_range(PIECES):
        here = piece * WIDTH + col
        keep = live[:, None] & (FULL | (here < C))[None, :]
        at = row.to(tl.int64)[:, None] * C + here[None, :]
        value = narrow(found[piece] * factor[:, None], tl.float8e4nv)
        tl.store(values + at, value, mask=keep)
    tl.store(scales + row, scale, mask=live)


# --- the launcher


@functools.cache
def tile_of(width: int) -> Tile:
    """For rows of `width` values; 6144 of them are in pieces by 48 a thread."""
    return in_pieces(width, 44) or in_pieces(width, 48) or row_tiles(width)[0]


@on_its_device
def launch_quantise(
    x: torch.Tensor,
    first: str | None = None,
    affine: tuple[torch.Tensor, torch.Tensor] | None = None,
    eps: float = 0.0,
    tile: Tile | None = None,
    added: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """values and scales; added: y, and where x + y is to be written, both dense."""
    x, C = x.contiguous(), x.shape[-1]
    values = torch.empty_like(x, dtype=E4M3)
    scales = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    rows, tile = scales.numel(), tile or tile_of(C)
    weight, bias = (w.contiguous() for w in affine or (x, x))
    if rows:
        _quantise_kernel[(triton.cdiv(rows, tile.rows),)](
            x, *(added or (x, x)), weight, bias, values, scales, rows, C, eps,
            FIRST=first, ADD=added is not None, **cuts(tile, C), num_warps=tile.warps,
            **dependent(x.device),
        )  # fmt: skip
    return values, scales


# --- the operators


@operator("quantise_rows")
def quantise_rows_op(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return launch_quantise(x)


@operator("quantise_norm")
def quantise_norm_op(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return launch_quantise(x, "norm", (weight, bias), eps)


@operator("quantise_gelu")
def quantise_gelu_op(x: torch.Tensor, tanh: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    return launch_quantise(x, "tanh gelu" if tanh else "gelu")


@torch.library.register_fake(quantise_rows_op)
@torch.library.register_fake(quantise_norm_op)
@torch.library.register_fake(quantise_gelu_op)
def _(x, *others):
    return x.new_empty(x.shape, dtype=E4M3), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


# --- public


def _takes(x: torch.Tensor, *others: torch.Tensor) -> bool:
    return use_kernel(x, *others) and x.shape[-1] <= WIDEST


def _check(x_RC: torch.Tensor, weight_C: torch.Tensor, bias_C: torch.Tensor) -> None:
    if not weight_C.shape == bias_C.shape == x_RC.shape[-1:]:
        shapes = f"{[*weight_C.shape]} and {[*bias_C.shape]}"
        raise ValueError(f"weight and bias of shapes {shapes} for rows of {x_RC.shape[-1]} values")


@torch.no_grad()
def quantise_rows(x_RC: torch.Tensor) -> Rows:
    """x in FP8 by row; it may have any leading dimensions. Takes no gradient."""
    return Rows(*quantise_rows_op(x_RC)) if _takes(x_RC) else quantise_rows_reference(x_RC)


@torch.no_grad()
def quantise_norm(
    x_RC: torch.Tensor, weight_C: torch.Tensor, bias_C: torch.Tensor, eps: float
) -> Rows:
    """layer_norm(x) * weight + bias, in FP8 by row. Takes no gradient.

    Raises ValueError where weight or bias is not (C,).
    """
    _check(x_RC, weight_C, bias_C)
    args = x_RC, weight_C, bias_C, eps
    return Rows(*quantise_norm_op(*args)) if _takes(*args[:3]) else quantise_norm_reference(*args)


@torch.no_grad()
def quantise_add_norm(
    x_RC: torch.Tensor,
    y_RC: torch.Tensor,
    weight_C: torch.Tensor,
    bias_C: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, Rows]:
    """x + y in x's dtype, and its quantise_norm. Takes no gradient.

    Raises ValueError where weight or bias is not (C,), or y has another shape than x.
    """
    _check(x_RC, weight_C, bias_C)
    if y_RC.shape != x_RC.shape:
        raise ValueError(f"y of shape {[*y_RC.shape]} to add to x of {[*x_RC.shape]}")
    if not _takes(x_RC, y_RC, weight_C):
        return quantise_add_norm_reference(x_RC, y_RC, weight_C, bias_C, eps)
    s_RC = torch.empty(x_RC.shape, device=x_RC.device, dtype=x_RC.dtype)
    added = y_RC.contiguous(), s_RC
    return s_RC, Rows(*launch_quantise(x_RC, "norm", (weight_C, bias_C), eps, added=added))


@torch.no_grad()
def quantise_gelu(x_RC: torch.Tensor, kind: str = "exact") -> Rows:
    """gelu(x) in FP8 by row; kind: of gelu.APPROXIMATE. Takes no gradient."""
    if not _takes(x_RC):
        return quantise_gelu_reference(x_RC, kind)
    return Rows(*quantise_gelu_op(x_RC, kind == "tanh"))


# --- ahead of time

WIDTHS = (192, 384, 768, 1024, 1280, 1408)  # of the models
MLPS = (768, 1536, 3072, 4096, 5120, 6144)
OTHERS = (48, 80, 208, 400, 976, 1664, 4000, 6160, 16368)  # rows that are not cut in pieces
TO_E4M3 = r"cvt\.rn\.satfinite\.e4m3x2\.f32"


def ahead_of_time() -> list[Compiled]:
    """The kernel for each dtype and width; before it nothing, norm, sum and norm, GELUs."""
    pointers = {"values": "*fp8e4nv", "scales": "*fp32", "rows": "i32", "C": "i32", "eps": "fp32"}
    before = {
        (None, False): {*WIDTHS, *MLPS}, ("norm", False): WIDTHS, ("norm", True): WIDTHS,
        ("gelu", False): MLPS, ("tanh gelu", False): MLPS,
    }  # fmt: skip
    found = []
    for dtype, (first, add) in itertools.product((TRITON_NAMES[d] for d in KERNEL_DTYPES), before):
        inputs = dict.fromkeys(("x", "y", "s", "weight", "bias"), f"*{dtype}")
        if add and dtype == "fp32":  # a residual stream in fp32, of branches in 16 bits
            inputs |= dict.fromkeys(("y", "weight", "bias"), "*bf16")
        for width in sorted({*before[first, add], *OTHERS}):
            tile = tile_of(width)
            name = f"quantise {'add ' * add}{first or 'rows'} {dtype} {width}"
            found.append(
                Compiled(
                    f"{name} {tile.rows}x{tile.width}", _quantise_kernel, inputs | pointers,
                    {"FIRST": first, "ADD": add, **cuts(tile, width)},
                    num_warps=tile.warps, must_have=(*loads_of(tile), TO_E4M3), divisible=("C",),
                    may_spill=TRADED, since=89,
                )
            )  # fmt: skip
    return also_dependent(found)
