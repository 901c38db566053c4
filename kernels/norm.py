"""LayerNorm with the sum before it, and all that is to be summed in its backward.

    s = x + y                                    the residual stream after a branch y, in x's dtype
    h = (s - mean(s)) * rstd(s) * weight + bias  what the next branch reads, in weight's dtype
Without y, s is x. From dh, the gradient of h, and ds, that of s from elsewhere (or none), with
n = (s - mean) * rstd and g = dh * weight:
    d = ds + rstd * (g - mean(g) - n * mean(g * n))          the gradient of x and of y alike
    dweight = sum of dh * n,   dbias = sum of dh,   dy_bias = sum of d     over all rows
y comes from a Linear, whose bias takes dy_bias: summed here, it costs no pass of its own.

Shapes: rows of D values, x of any leading dimensions. Statistics are fp32: mean and rstd of each
row, (2, rows), are kept for the backward. `add_norm_reference` is the definition of the forward,
its automatic gradient that of the backward. The launchers serve the operators of
model/fused_ops.py. Sums over rows are each program's own and then added up (common/sums.py),
in a fixed order.

Bytes a value that must move, with e bytes a value of the residual stream and of h alike:
    forward 4 e (x and y in, s and h out; 2 e without y)   backward 4 e (s, dh, ds in, d out)
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from cjepa_fast.kernels.common.launch import (
    TRITON_NAMES,
    Compiled,
    chosen,
    narrow,
    on_its_device,
    use_kernel,
)
from cjepa_fast.kernels.common.maybe_triton import tl, triton
from cjepa_fast.kernels.common.sums import share_of, sum_parts
from cjepa_fast.kernels.common.tiles import WIDE_COPIES, WIDE_LOADS

WIDEST = 2048  # values of a row that a program holds
Sums = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# --- the reference


def add_norm_reference(
    x: torch.Tensor,
    y: torch.Tensor | None,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    s = x if y is None else (x + y).to(x.dtype)
    wide = s if s.dtype == torch.float64 else s.float()
    h = F.layer_norm(wide, weight_D.shape, weight_D.to(wide.dtype), bias_D.to(wide.dtype), eps)
    return s, h.to(weight_D.dtype)


# --- the kernels


@triton.jit(do_not_specialize=["rows"])
def _add_norm_kernel(
    x,  # (rows, D)
    y,  # (rows, D), read with ADD alone
    weight,  # (D,)
    bias,  # (D,)
    s,  # (rows, D), written with ADD alone
    h,  # (rows, D)
    stats,  # (2, rows) fp32, means and rstds
    rows, D, eps,
    ADD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows; s is written with ADD alone."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, WIDTH)
    live, real = row < rows, (col < D)[None, :]
    keep = live[:, None] & real
    at = row.to(tl.int64)[:, None] * D + col[None, :]
    value = tl.load(x + at, mask=keep, other=0.0).to(tl.float32)
    if ADD:
        added = tl.load(y + at, mask=keep, other=0.0).to(tl.float32)
        total = narrow(value + added, s.dtype.element_ty)
        tl.store(s + at, total, mask=keep)
        value = total.to(tl.float32)
    mean = tl.sum(value, 1) / D
    value = tl.where(real, value - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(value * value, 1) / D + eps)
    gain = tl.load(weight + col, mask=col < D, other=0.0).to(tl.float32)
    shift = tl.load(bias + col, mask=col < D, other=0.0).to(tl.float32)
    value = value * rstd[:, None] * gain[None, :] + shift[None, :]
    tl.store(h + at, narrow(value, h.dtype.element_ty), mask=keep)
    tl.store(stats + row, mean, mask=live)
    tl.store(stats + rows + row, rstd, mask=live)


@triton.jit(do_not_specialize=["rows", "each"])
def _add_norm_backward_kernel(
    s,  # (rows, D)
    dh,  # (rows, D)
    ds,  # (rows, D), read with LATER alone
    weight,  # (D,)
    stats,  # (2, rows) fp32
    d,  # (rows, D)
    parts,  # (programs, 3, D) fp32
    rows, D, each,
    LATER: tl.constexpr, STAGES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`each` rows, ROWS at a time; parts (programs, 3, D): dweight, dbias, dy_bias of these rows.

    ds is read with LATER alone. dy_bias sums d as it is written, rounded.
    """
    col = tl.arange(0, WIDTH)
    real = (col < D)[None, :]
    gain = tl.load(weight + col, mask=col < D, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((ROWS, WIDTH), tl.float32)
    dbias = tl.zeros((ROWS, WIDTH), tl.float32)
    dy_bias = tl.zeros((ROWS, WIDTH), tl.float32)
    begin = tl.program_id(0) * each
    for start in tl.range(begin, tl.minimum(begin + each, rows), ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        live = row < rows
        keep = live[:, None] & real
        at = row.to(tl.int64)[:, None] * D + col[None, :]
        mean = tl.load(stats + row, mask=live, other=0.0)[:, None]
        rstd = tl.load(stats + rows + row, mask=live, other=0.0)[:, None]
        value = tl.load(s + at, mask=keep, other=0.0).to(tl.float32)
        grad = tl.load(dh + at, mask=keep, other=0.0).to(tl.float32)
        normed = tl.where(keep, (value - mean) * rstd, 0.0)
        dweight += grad * normed
        dbias += grad
        grad *= gain
        along = tl.sum(grad * normed, 1) / D
        result = (grad - (tl.sum(grad, 1) / D)[:, None] - normed * along[:, None]) * rstd
        if LATER:
            result += tl.load(ds + at, mask=keep, other=0.0).to(tl.float32)
        rounded = narrow(result, d.dtype.element_ty)
        tl.store(d + at, rounded, mask=keep)
        dy_bias += tl.where(keep, rounded.to(tl.float32), 0.0)
    pointer = parts + tl.program_id(0) * 3 * D + col
    tl.store(pointer, tl.sum(dweight, 0), mask=col < D)
    tl.store(pointer + D, tl.sum(dbias, 0), mask=col < D)
    tl.store(pointer + 2 * D, tl.sum(dy_bias, 0), mask=col < D)


# --- launchers


class Rows(NamedTuple):
    """What a program takes at a time: rows of up to `width` values, by that many warps.

    Of the backward alone: how many programs share the rows (a constant, so that the order of the
    sums does not follow the GPU's size), and how many steps' loads are under way at once.
    """

    rows: int
    width: int
    warps: int
    programs: int
    stages: int


def tiles(width: int) -> tuple[Rows, ...]:
    """Candidates for the backward of rows of `width` values."""
    wide = max(128, triton.next_power_of_2(width))
    shares = ((4, 528, 1), (8, 528, 1), (8, 396, 3), (4, 396, 3))  # of 132 multiprocessors
    return tuple(Rows(2048 // wide, wide, *share) for share in shares if wide <= 2048)


def forward_tiles(width: int) -> tuple[Rows, ...]:
    """Those that differ in what the forward reads of them."""
    return tuple(tile for tile in tiles(width) if tile.stages == 1)


@on_its_device
def launch_add_norm(
    x: torch.Tensor,
    y: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    tile: Rows | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """s, h and the statistics (2, rows) of dense x and y; without y, s is x."""
    D = x.shape[-1]
    rows = x.numel() // D if D else 0
    s = x if y is None else torch.empty_like(x)
    h = torch.empty(x.shape, device=x.device, dtype=weight.dtype)
    stats = torch.empty(2, rows, device=x.device, dtype=torch.float32)
    if x.numel() == 0:
        return s, h, stats
    tile = tile or chosen(f"add_norm {D}", forward_tiles(D), x.device)
    _add_norm_kernel[(triton.cdiv(rows, tile.rows),)](
        x, x if y is None else y, weight, bias, s, h, stats, rows, D, eps,
        ADD=y is not None, ROWS=tile.rows, WIDTH=tile.width, num_warps=tile.warps,
    )  # fmt: skip
    return s, h, stats


@on_its_device
def launch_add_norm_backward(
    dh: torch.Tensor,
    ds: torch.Tensor | None,
    s: torch.Tensor,
    weight: torch.Tensor,
    stats: torch.Tensor,
    tile: Rows | None = None,
) -> tuple[torch.Tensor, Sums]:
    """d in the dtype of s, and dweight, dbias, dy_bias (D,) in weight's, of dense tensors."""
    D = s.shape[-1]
    rows = stats.shape[1]
    d = torch.empty_like(s)
    if s.numel() == 0:
        return d, tuple(torch.zeros_like(weight) for _ in range(3))
    tile = tile or chosen(f"add_norm backward {D}", tiles(D), s.device)
    each, programs = share_of(rows, tile.programs, tile.rows)
    parts = torch.empty(programs, 3 * D, device=s.device, dtype=torch.float32)
    _add_norm_backward_kernel[(programs,)](
        s, dh, s if ds is None else ds, weight, stats, d, parts, rows, D, each,
        LATER=ds is not None, STAGES=tile.stages,
        ROWS=tile.rows, WIDTH=tile.width, num_warps=tile.warps,
    )  # fmt: skip
    return d, sum_parts(parts, weight.dtype).split(D)


def takes(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether the kernels take rows of x, and the others' dtypes."""
    return use_kernel(x, *others) and x.shape[-1] <= WIDEST


# --- ahead of time

WIDTHS = (192, 384, 768, 1280)  # of the models and the predictors, each of another tile


def ahead_of_time() -> list[Compiled]:
    """Both kernels in every tile, for branches of 16 bits, and residual streams of 16 or 32."""
    found = []
    every = [tile for width in WIDTHS for tile in tiles(width)]
    half, whole = torch.bfloat16, torch.float32
    for dtype, stream in ((half, half), (half, whole), (torch.float16, torch.float16)):
        low, high = f"*{TRITON_NAMES[dtype]}", f"*{TRITON_NAMES[stream]}"
        kinds = {"x": high, "s": high, "ds": high, "d": high, "y": low, "h": low, "dh": low}
        kinds |= {"weight": low, "bias": low, "stats": "*fp32", "parts": "*fp32"}
        kinds |= dict.fromkeys(("rows", "D", "each"), "i32") | {"eps": "fp32"}
        for tile in every:
            name = f"{low[1:]} {high[1:]} {tile.rows}x{tile.width} {tile.warps}"
            sizes = {"ROWS": tile.rows, "WIDTH": tile.width}
            own = {"LATER": True, "STAGES": tile.stages}
            copies = WIDE_COPIES if tile.stages > 1 else WIDE_LOADS
            cases = [(f"backward {name} {tile.stages}", _add_norm_backward_kernel, own, copies)]
            if tile.stages == 1:
                cases.append((name, _add_norm_kernel, {"ADD": True}, WIDE_LOADS))
            for label, kernel, flags, must in cases:
                signature = {a: kinds[a] for a in kernel.arg_names if a in kinds}
                found.append(
                    Compiled(
                        f"add_norm {label}", kernel, signature, flags | sizes, tile.warps,
                        must_have=must, divisible=("D",),
                    )
                )  # fmt: skip
    return found
