"""The EMA of matrices, and the rows of the result in FP8 with their scales, in one pass.

    t <- m t + (1 - m) w,   values[r], scales[r] <- quantise_rows(t[r] rounded to bf16), see fp8.py

Arrays, each a list of matrices: target t (rows, C) fp32, online w (rows, C), values (rows, C) e4m3,
scales (rows, 1) fp32.
Bytes a parameter that must move (fp32 w): 13 (lerp 12, a cast 6, then quantised 3: 21).
"""

import torch

from cjepa_fast.kernels.common.launch import TRITON_NAMES, Compiled, narrow, on_its_device
from cjepa_fast.kernels.common.maybe_triton import tl, triton
from cjepa_fast.kernels.common.operators import operator
from cjepa_fast.kernels.common.tiles import WIDEST, row_tiles
from cjepa_fast.kernels.ema.lists import (
    TYPES,
    WIDE_LOADS,
    Number,
    Tensors,
    address,
    check_same_shapes,
    chunk_of_program,
    kernel_takes,
    lerp,
    of_one_kind,
    on_device,
    tables,
    type_of,
)
from cjepa_fast.kernels.ema.plain_update import ema_update_reference
from cjepa_fast.kernels.fp8 import E4M3, TO_E4M3, quantise_rows_reference, scales_of

# --- the reference


def ema_update_rows_reference(
    target: Tensors, online: Tensors, momentum: Number, values: Tensors, scales: Tensors
) -> None:
    ema_update_reference(target, online, momentum)
    for t, value, scale in zip(target, values, scales, strict=True):
        rows = quantise_rows_reference(t.bfloat16())
        value.copy_(rows.values)
        scale.copy_(rows.scales)


# --- the kernel


@triton.jit
def _ema_rows_kernel(
    pointers,  # (6, tensors) int64, see lists.tables
    owners,  # (programs,) int32
    tensors,
    weight,  # (1,) fp32
    ONLINE: tl.constexpr, ALIGNED: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One row of COLS values. Arrays: target (fp32), online (ONLINE), values (e4m3), scales (fp32).

    The row is rounded to bf16 first: so are the weights of ranks that complete each other's.
    """
    tensor, start, _ = chunk_of_program(pointers, owners, 4, tensors, COLS)
    col = tl.arange(0, WIDTH)[None, :]
    keep = col < COLS
    target = address(pointers, 0, tensor, tensors, start, tl.float32, ALIGNED) + col
    online = address(pointers, 1, tensor, tensors, start, ONLINE, ALIGNED) + col
    new = tl.load(online, mask=keep, other=0.0).to(tl.float32)
    ema = lerp(tl.load(target, mask=keep, other=0.0), new, tl.load(weight))
    tl.store(target, ema, mask=keep)
    value = narrow(ema, tl.bfloat16).to(tl.float32)
    factor, scale = scales_of(tl.max(tl.abs(value), 1))
    values = address(pointers, 2, tensor, tensors, start, tl.float8e4nv, ALIGNED)
    tl.store(values + col, narrow(value * factor[:, None], tl.float8e4nv), mask=keep)
    scales = address(pointers, 3, tensor, tensors, start // COLS, tl.float32, False)
    tl.store(scales + tl.arange(0, 1), scale)


# --- the launcher


@on_its_device
def launch_ema_rows(
    target: Tensors, online: Tensors, values: Tensors, scales: Tensors, weight: torch.Tensor
) -> None:
    """One launch for each width of rows."""
    arrays = target, online, values, scales
    for width in {t.shape[1]: None for t in target if t.numel()}:
        which = [i for i, t in enumerate(target) if t.shape[1] == width]
        lists = [[array[i] for i in which] for array in arrays]
        pointers, owners, aligned = tables(*lists, chunk=width)
        tile = row_tiles(width)[0]
        _ema_rows_kernel[(len(owners),)](
            pointers, owners, len(which), weight,
            ONLINE=type_of(online), ALIGNED=aligned, COLS=width, WIDTH=tile.width,
            num_warps=tile.warps,
        )  # fmt: skip


# --- the operator


@operator(
    "ema_update_rows",
    mutates=("target", "values", "scales"),
)
def ema_update_rows_op(
    target: Tensors, online: Tensors, values: Tensors, scales: Tensors, weight: torch.Tensor
) -> None:
    """values: as bytes, since PyTorch's checks of an operator do arithmetic, and e4m3 has none."""
    launch_ema_rows(target, online, values, scales, weight)


@torch.library.register_fake(ema_update_rows_op)
def _(target, online, values, scales, weight):
    return None


# --- public


@torch.no_grad()
def ema_update_rows(
    target: Tensors, online: Tensors, momentum: Number, values: Tensors, scales: Tensors
) -> None:
    """ema_update of matrices, in place; values, scales <- the rows of target, rounded to bf16, in
    FP8, as fp8.quantise_rows gives them: (rows, C) e4m3 and (rows, 1) fp32 for each matrix.

    Lists as ema_update takes them. Raises ValueError for other shapes or types of the copies.
    """
    target, online, values, scales = list(target), list(online), list(values), list(scales)
    check_same_shapes(target, online, values)
    check_same_shapes([t[:, :1] for t in target], scales)
    if not len(target) == len(online) == len(values) == len(scales):
        raise ValueError(f"lists of {[len(a) for a in (target, online, values, scales)]} tensors")
    if {v.dtype for v in values} - {E4M3} or {s.dtype for s in scales} - {torch.float32}:
        raise ValueError("the copies must be e4m3 values and fp32 scales")
    held = of_one_kind(values) and all(t.shape[1] <= WIDEST for t in target)
    if target and held and kernel_takes([target, scales], [online]):
        weight = on_device([1 - momentum], target[0].device)
        ema_update_rows_op(target, online, [v.view(torch.uint8) for v in values], scales, weight)
    else:
        ema_update_rows_reference(target, online, momentum, values, scales)


# --- ahead of time

ROWS = (768, 1280, 5120, 6144)  # of vit_base and of the largest models


def _rows_compiled(width: int, dtype: torch.dtype) -> Compiled:
    tile = row_tiles(width)[0]
    return Compiled(
        f"ema_update_rows {TRITON_NAMES[dtype]} {width}", _ema_rows_kernel,
        {"pointers": "*i64", "owners": "*i32", "tensors": "i32", "weight": "*fp32"},
        {"ONLINE": TYPES[dtype], "ALIGNED": True, "COLS": width, "WIDTH": tile.width},
        num_warps=tile.warps, must_have=(*WIDE_LOADS, TO_E4M3), since=89,
    )  # fmt: skip


def ahead_of_time() -> list[Compiled]:
    """The kernel for the widths of the largest models and every dtype of the weights."""
    return [_rows_compiled(width, dtype) for width in ROWS for dtype in TYPES]
