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

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from cjepa_fast.kernels.common.dependent_launch import (
    also_dependent,
    dependent,
    wait_for_previous,
)
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
from cjepa_fast.kernels.common.tiles import TRADED, WIDE_COPIES, cuts, in_pieces, loads_of

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
    ADD: tl.constexpr, FULL: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """ROWS whole rows, each in PIECES pieces of WIDTH values, FULL where nothing is left over.

    s is written with ADD alone.
    """
    wait_for_previous(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    col = tl.arange(0, WIDTH)
    values = ()
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for piece in tl.static_range(PIECES):
        here = piece * WIDTH + col
        keep = live[:, None] & (FULL | (here < D))[None, :]
        at = row.to(tl.int64)[:, None] * D + here[None, :]
        value = tl.load(x + at, mask=keep, other=0.0).to(tl.float32)
        if ADD:
            added = tl.load(y + at, mask=keep, other=0.0).to(tl.float32)
            rounded = narrow(value + added, s.dtype.element_ty)
            tl.store(s + at, rounded, mask=keep)
            value = rounded.to(tl.float32)
        total += value
        values = values + (value,)
    mean = tl.sum(total, 1) / D
    spread = tl.zeros((ROWS, WIDTH), tl.float32)
    for piece in tl.static_range(PIECES):
        value = values[piece] - mean[:, None]
        value = value if FULL else tl.where((piece * WIDTH + col < D)[None, :], value, 0.0)
        spread += value * value
    rstd = 1.0 / tl.sqrt(tl.sum(spread, 1) / D + eps)
    for piece in tl.static_range(PIECES):
        here = piece * WIDTH + col
        real = FULL | (here < D)
        gain = tl.load(weight + here, mask=real, other=0.0).to(tl.float32)
        shift = tl.load(bias + here, mask=real, other=0.0).to(tl.float32)
        value = (values[piece] - mean[:, None]) * rstd[:, None] * gain[None, :] + shift[None, :]
        at = row.to(tl.int64)[:, None] * D + here[None, :]
        tl.store(h + at, narrow(value, h.dtype.element_ty), mask=live[:, None] & real[None, :])
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
    LATER: tl.constexpr, STAGES: tl.constexpr, FULL: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """`each` rows, ROWS at a time; parts (programs, 3, D): dweight, dbias, dy_bias of these rows.

    Pieces as in the forward. ds is read with LATER alone. dy_bias sums d as it is written, rounded.
    What lies beyond D or the last row has no gradient, and what is made of it there is not stored.
    """
    wait_for_previous(PDL)
    col = tl.arange(0, WIDTH)
    gains, dweight = (), ()
    for piece in tl.static_range(PIECES):
        here = piece * WIDTH + col
        gains = gains + (tl.load(weight + here, mask=FULL | (here < D), other=0.0),)
        dweight = dweight + (tl.zeros((ROWS, WIDTH), tl.float32),)
    dbias, dy_bias = dweight, dweight
    begin = tl.program_id(0) * each
    for start in tl.range(begin, tl.minimum(begin + each, rows), ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        live = row < rows
        mean = tl.load(stats + row, mask=live, other=0.0)[:, None]
        rstd = tl.load(stats + rows + row, mask=live, other=0.0)[:, None]
        normed, grads, weighted, plain = (), (), (), ()
        along = tl.zeros((ROWS, WIDTH), tl.float32)
        total = tl.zeros((ROWS, WIDTH), tl.float32)
        for piece in tl.static_range(PIECES):
            here = piece * WIDTH + col
            keep = live[:, None] & (FULL | (here < D))[None, :]
            at = row.to(tl.int64)[:, None] * D + here[None, :]
            value = tl.load(s + at, mask=keep, other=0.0).to(tl.float32)
            grad = tl.load(dh + at, mask=keep, other=0.0).to(tl.float32)
            value = (value - mean) * rstd
            weighted = weighted + (dweight[piece] + grad * value,)
            plain = plain + (dbias[piece] + grad,)
            grad *= gains[piece].to(tl.float32)[None, :]
            along += grad * value
            total += grad
            normed, grads = normed + (value,), grads + (grad,)
        dweight, dbias = weighted, plain
        along = tl.sum(along, 1) / D
        total = tl.sum(total, 1) / D
        written = ()
        for piece in tl.static_range(PIECES):
            here = piece * WIDTH + col
            keep = live[:, None] & (FULL | (here < D))[None, :]
            at = row.to(tl.int64)[:, None] * D + here[None, :]
            result = (grads[piece] - total[:, None] - normed[piece] * along[:, None]) * rstd
            if LATER:
                result += tl.load(ds + at, mask=keep, other=0.0).to(tl.float32)
            rounded = narrow(result, d.dtype.element_ty)
            tl.store(d + at, rounded, mask=keep)
            written = written + (dy_bias[piece] + rounded.to(tl.float32),)
        dy_bias = written
    for piece in tl.static_range(PIECES):
        here = piece * WIDTH + col
        real = FULL | (here < D)
        pointer = parts + tl.program_id(0) * 3 * D + here
        tl.store(pointer, tl.sum(dweight[piece], 0), mask=real)
        tl.store(pointer + D, tl.sum(dbias[piece], 0), mask=real)
        tl.store(pointer + 2 * D, tl.sum(dy_bias[piece], 0), mask=real)


# --- launchers


class Rows(NamedTuple):
    """What a program takes at a time: rows, in pieces of `width` values, by that many warps.

    Of the backward alone: how many programs share the rows (a constant, so that the order of the
    sums does not follow the GPU's size), and how many steps' loads are under way at once.
    """

    rows: int
    width: int
    warps: int
    programs: int
    stages: int


@functools.cache
def tiles(width: int) -> tuple[Rows, ...]:
    """Candidates for the backward of rows of `width` values; none beyond WIDEST.

    It holds a thread's values, their gradients and three sums in registers, so that 24 are many.
    """
    if width > WIDEST:
        return ()
    many, few = in_pieces(width, 24), in_pieces(width, 12)
    pieces = [Rows(*many, 396, 1)] if many else []
    pieces += [Rows(*few, 660, 1)] if few and few != many else []
    wide = max(128, triton.next_power_of_2(width))
    shares = ((4, 528, 1), (8, 528, 1), (8, 396, 3), (4, 396, 3))  # of 132 multiprocessors
    whole = [Rows(2048 // wide, wide, *share) for share in shares]
    return (*pieces, *(tile for tile in whole if tile.warps == 8 or not pieces))


@functools.cache
def forward_tiles(width: int) -> tuple[Rows, ...]:
    """Candidates for the forward, which holds the values alone."""
    others = [tile for tile in tiles(width) if tile.stages == 1]
    pieces = in_pieces(width, 44) if others else None
    found = [Rows(*pieces, 396, 1), *others] if pieces else others
    return tuple(dict.fromkeys(found))


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
        ADD=y is not None, **cuts(tile, D), num_warps=tile.warps, **dependent(x.device),
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
        LATER=ds is not None, STAGES=tile.stages, **cuts(tile, D), num_warps=tile.warps,
        **dependent(s.device),
    )  # fmt: skip
    return d, sum_parts(parts, weight.dtype).split(D)


def takes(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether the kernels take rows of x, and the others' dtypes."""
    return use_kernel(x, *others) and x.shape[-1] <= WIDEST


# --- ahead of time

# Of the models and the predictors; and of rows that are not cut in pieces.
WIDTHS = (96, 192, 384, 768, 1024, 1280, 1408, 80, 208, 400, 976)


def ahead_of_time() -> list[Compiled]:
    """Both kernels in every tile, for branches of 16 bits, and residual streams of 16 or 32."""
    half, whole = torch.bfloat16, torch.float32
    kinds = (half, half), (half, whole), (torch.float16, torch.float16)
    return also_dependent(
        one
        for width in WIDTHS
        for dtype, stream in kinds
        for one in _compiled(width, f"*{TRITON_NAMES[dtype]}", f"*{TRITON_NAMES[stream]}")
    )


def _compiled(width: int, low: str, high: str) -> list[Compiled]:
    """For branches in `low` and a residual stream in `high`."""
    kinds = {"x": high, "s": high, "ds": high, "d": high, "y": low, "h": low, "dh": low}
    kinds |= {"weight": low, "bias": low, "stats": "*fp32", "parts": "*fp32"}
    kinds |= dict.fromkeys(("rows", "D", "each"), "i32") | {"eps": "fp32"}
    forward = [("", _add_norm_kernel, {"ADD": True}, tile) for tile in forward_tiles(width)]
    backward = [
        ("backward ", _add_norm_backward_kernel, {"LATER": True, "STAGES": tile.stages}, tile)
        for tile in tiles(width)
    ]
    found = []
    for which, kernel, flags, tile in forward + backward:
        must = WIDE_COPIES if tile.stages > 1 else loads_of(tile)
        staged = f" {tile.stages}" * bool(which)
        found.append(
            Compiled(
                f"add_norm {which}{low[1:]} {high[1:]} {width} "
                f"{tile.rows}x{tile.width} {tile.warps}{staged}",
                kernel, {a: kinds[a] for a in kernel.arg_names if a in kinds},
                flags | cuts(tile, width), tile.warps, must_have=must,
                may_spill=TRADED, divisible=("D",),
            )
        )  # fmt: skip
    return found
