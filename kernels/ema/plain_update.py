"""The EMA of weights, and optionally its copy in another dtype, in one pass.

    t <- m t + (1 - m) w,   copy <- t, cast

Arrays, each a list of tensors of the same shapes: target t (fp32), online w, copies.
Bytes a parameter that must move (fp32 w, bf16 copies): 12, with a copy 14 (lerp 12, then a cast 6:
18).
"""

import itertools

import torch

from cjepa_fast.kernels.common.launch import Compiled, chosen, narrow, on_its_device
from cjepa_fast.kernels.common.maybe_triton import tl, triton
from cjepa_fast.kernels.common.operators import operator
from cjepa_fast.kernels.ema.lists import (
    CHUNKS,
    TABLES,
    TYPES,
    WIDE_LOADS,
    Number,
    Tensors,
    address,
    check_same_shapes,
    chunk_of_program,
    chunked,
    kernel_takes,
    lerp,
    on_device,
    tables,
    type_of,
)

# --- the reference


def ema_update_reference(
    target: Tensors, online: Tensors, momentum: Number, copies: Tensors = ()
) -> None:
    if not target:
        return
    online = [w.to(t.dtype) for w, t in zip(online, target, strict=True)]
    torch._foreach_lerp_(target, online, 1 - float(momentum))
    if copies:
        torch._foreach_copy_(copies, target)


# --- the kernel


@triton.jit
def _ema_chunk(
    target, online, copy, weight, keep, COPY: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    at = tl.arange(0, CHUNK)
    value = tl.load(target + at, mask=keep)
    value = lerp(value, tl.load(online + at, mask=keep).to(tl.float32), tl.load(weight))
    tl.store(target + at, value, mask=keep)
    if COPY:
        tl.store(copy + at, narrow(value, copy.dtype.element_ty), mask=keep)


@triton.jit
def _ema_kernel(
    pointers,  # (arrays + 2, tensors) int64, see lists.tables
    owners,  # (programs,) int32
    tensors,
    weight,  # (1,) fp32
    ONLINE: tl.constexpr, COPY: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Arrays: target (fp32), online (of dtype ONLINE), the copy (of dtype COPY, None without).

    A whole chunk is loaded without a mask, 16 bytes at a time; the end of a tensor with one.
    """
    arrays: tl.constexpr = 2 if COPY is None else 3
    tensor, start, rest = chunk_of_program(pointers, owners, arrays, tensors, CHUNK)
    target = address(pointers, 0, tensor, tensors, start, tl.float32, ALIGNED)
    online = address(pointers, 1, tensor, tensors, start, ONLINE, ALIGNED)
    copy = target
    if COPY is not None:
        copy = address(pointers, 2, tensor, tensors, start, COPY, ALIGNED)
    if rest >= CHUNK:
        keep = tl.full((CHUNK,), 1, tl.int1)
        _ema_chunk(target, online, copy, weight, keep, COPY is not None, CHUNK)
    else:
        keep = tl.arange(0, CHUNK) < rest
        _ema_chunk(target, online, copy, weight, keep, COPY is not None, CHUNK)


# --- the launcher


@on_its_device
def launch_ema(
    target: Tensors,
    online: Tensors,
    copies: Tensors,
    weight: torch.Tensor,
    chunk: int | None = None,
) -> None:
    chunk = chunk or chosen("ema_update", CHUNKS, target[0].device)
    pointers, owners, aligned = tables(target, online, copies, chunk=chunk)
    if len(owners):
        _ema_kernel[(len(owners),)](
            pointers, owners, len(target), weight,
            ONLINE=type_of(online), COPY=type_of(copies), ALIGNED=aligned, CHUNK=chunk,
        )  # fmt: skip


# --- the operator


@operator(
    "ema_update",
    mutates=("target", "copies"),
)
def ema_update_op(target: Tensors, online: Tensors, copies: Tensors, weight: torch.Tensor) -> None:
    launch_ema(target, online, copies, weight)


@torch.library.register_fake(ema_update_op)
def _(target, online, copies, weight):
    return None


# --- public


@torch.no_grad()
def ema_update(target: Tensors, online: Tensors, momentum: Number, copies: Tensors = ()) -> None:
    """target <- momentum * target + (1 - momentum) * online, in place; copies <- target, cast.

    Lists of equal length and shapes, on one device; target is fp32, online of any float dtype,
    copies (none, or one for each target) of any. On CUDA lists that the kernel cannot take, not
    dense or of mixed dtypes, go by the reference. Raises ValueError for shapes that differ.
    """
    target, online, copies = list(target), list(online), list(copies)
    check_same_shapes(target, online, copies)
    if target and not online:
        raise ValueError(f"{len(target)} EMA tensors of no weights")
    if target and kernel_takes([target], [online, copies]):
        ema_update_op(target, online, copies, on_device([1 - momentum], target[0].device))
    else:
        ema_update_reference(target, online, momentum, copies)


# --- ahead of time


def ahead_of_time() -> list[Compiled]:
    """The kernel, aligned and not, with and without copies, for fp32 and bf16 weights."""
    cases = itertools.product(
        CHUNKS, (True, False), (None, *TYPES), (torch.float32, torch.bfloat16)
    )
    return [
        Compiled(
            f"ema_update {chunked(dtype, chunk, aligned, copy)}", _ema_kernel,
            TABLES | {"weight": "*fp32"},
            {"ONLINE": TYPES[dtype], "COPY": TYPES.get(copy), "ALIGNED": aligned, "CHUNK": chunk},
            must_have=WIDE_LOADS if aligned else (),
        )
        for chunk, aligned, copy, dtype in cases
    ]  # fmt: skip
