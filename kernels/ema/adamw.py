"""AdamW's step, the EMA of the new weights, and copies of both, in one pass over all parameters.

AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) as torch.optim.AdamW computes it:
    w <- (1 - lr * decay) w
    a <- beta1 a + (1 - beta1) g          v <- beta2 v + (1 - beta2) g^2
    w <- w - lr / (1 - beta1^step) * a / (sqrt(v) / sqrt(1 - beta2^step) + eps)
    t <- m t + (1 - m) w

Arrays, each a list of tensors of the same shapes: params w, exp_avgs a, exp_avg_sqs v and target t
in fp32; grads g in fp32 or narrower; copies of w and t in any dtype.

AdamW's numbers (learning rate, bias corrections, whether to step at all) are a small tensor, so
that they may be computed on the device, and a CUDA graph that holds the launch follows the
schedules. A CPU takes AdamW's step by torch's fused one, in pieces that stay in its cache.

Bytes a parameter that must move (fp32 g, bf16 copies): 36, with copies of w and t 40 (AdamW 28,
lerp 12, two casts 12: 52).
"""

import itertools
from collections.abc import Sequence

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
from cjepa_fast.kernels.ema.plain_update import ema_update_reference

# --- the reference


def adamw_ema_step_reference(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    target: Tensors,
    *,
    step: Number,
    lr: Number,
    momentum: Number,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Number = 0.01,
    scale: Number = 1.0,
    apply: bool | torch.Tensor = True,
    copies: Tensors = (),
    target_copies: Tensors = (),
) -> None:
    if not params or not apply:
        return
    grads = [g.to(p.dtype) * scale for g, p in zip(grads, params, strict=True)]
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_lerp_(exp_avgs, grads, 1 - betas[0])
    torch._foreach_mul_(exp_avg_sqs, betas[1])
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - betas[1])
    root = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(root, (1 - betas[1] ** step) ** 0.5)
    torch._foreach_add_(root, eps)
    torch._foreach_addcdiv_(params, exp_avgs, root, -lr / (1 - betas[0] ** step))
    if copies:
        torch._foreach_copy_(copies, params)
    ema_update_reference(target, params, momentum, target_copies)


# --- the kernel


@triton.jit
def _adamw_ema_chunk(
    param, grad, exp_avg, exp_avg_sq, target, copy, target_copy, keep,
    decay, lerp1, beta2, square_share, root_scale, eps, lr, weight, scale,
    TARGET: tl.constexpr, COPY: tl.constexpr, TARGET_COPY: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, CHUNK)
    g = tl.load(grad + at, mask=keep).to(tl.float32) * scale
    first = lerp(tl.load(exp_avg + at, mask=keep), g, lerp1)
    tl.store(exp_avg + at, first, mask=keep)
    second = tl.load(exp_avg_sq + at, mask=keep) * beta2 + square_share * g * g
    tl.store(exp_avg_sq + at, second, mask=keep)
    root = tl.div_rn(tl.sqrt_rn(second), root_scale) + eps
    w = tl.load(param + at, mask=keep) * decay - lr * tl.div_rn(first, root)
    tl.store(param + at, w, mask=keep)
    if COPY:
        tl.store(copy + at, narrow(w, copy.dtype.element_ty), mask=keep)
    if TARGET:
        ema = lerp(tl.load(target + at, mask=keep), w, weight)
        tl.store(target + at, ema, mask=keep)
        if TARGET_COPY:
            tl.store(target_copy + at, narrow(ema, target_copy.dtype.element_ty), mask=keep)


@triton.jit
def _adamw_ema_kernel(
    pointers,  # (arrays + 2, tensors) int64, see lists.tables
    owners,  # (programs,) int32
    tensors,
    numbers,  # (10,) fp32, see adamw_numbers
    GRAD: tl.constexpr, TARGET: tl.constexpr, COPY: tl.constexpr, TARGET_COPY: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Arrays: param, grad (dtype GRAD), exp_avg, exp_avg_sq, then of target, copy and target_copy
    those that there are. Nothing is written where the last of the numbers is 0.
    """
    if tl.load(numbers + 9) == 0.0:
        return
    copies: tl.constexpr = 5 if TARGET else 4
    target_copies: tl.constexpr = copies if COPY is None else copies + 1
    arrays: tl.constexpr = target_copies if TARGET_COPY is None else target_copies + 1
    tensor, start, rest = chunk_of_program(pointers, owners, arrays, tensors, CHUNK)
    param = address(pointers, 0, tensor, tensors, start, tl.float32, ALIGNED)
    grad = address(pointers, 1, tensor, tensors, start, GRAD, ALIGNED)
    exp_avg = address(pointers, 2, tensor, tensors, start, tl.float32, ALIGNED)
    exp_avg_sq = address(pointers, 3, tensor, tensors, start, tl.float32, ALIGNED)
    target, copy, target_copy = param, param, param
    if TARGET:
        target = address(pointers, 4, tensor, tensors, start, tl.float32, ALIGNED)
    if COPY is not None:
        copy = address(pointers, copies, tensor, tensors, start, COPY, ALIGNED)
    if TARGET_COPY is not None:
        target_copy = address(pointers, target_copies, tensor, tensors, start, TARGET_COPY, ALIGNED)
    decay, lerp1 = tl.load(numbers), tl.load(numbers + 1)
    beta2, square_share = tl.load(numbers + 2), tl.load(numbers + 3)
    root_scale, eps, lr = tl.load(numbers + 4), tl.load(numbers + 5), tl.load(numbers + 6)
    weight, scale = tl.load(numbers + 7), tl.load(numbers + 8)
    if rest >= CHUNK:
        _adamw_ema_chunk(
            param, grad, exp_avg, exp_avg_sq, target, copy, target_copy,
            tl.full((CHUNK,), 1, tl.int1),
            decay, lerp1, beta2, square_share, root_scale, eps, lr, weight, scale,
            TARGET, COPY is not None, TARGET_COPY is not None, CHUNK,
        )  # fmt: skip
    else:
        _adamw_ema_chunk(
            param, grad, exp_avg, exp_avg_sq, target, copy, target_copy,
            tl.arange(0, CHUNK) < rest,
            decay, lerp1, beta2, square_share, root_scale, eps, lr, weight, scale,
            TARGET, COPY is not None, TARGET_COPY is not None, CHUNK,
        )  # fmt: skip


# --- the launcher


def adamw_numbers(
    device: torch.device,
    step: Number,
    lr: Number,
    momentum: Number,
    betas: Sequence[float],
    eps: float,
    weight_decay: Number,
    scale: Number = 1.0,
    apply: bool | torch.Tensor = True,
) -> torch.Tensor:
    """What the kernel reads, fp32 (10,) on the device; without waiting for it.

    (1 - lr decay, 1 - beta1, beta2, 1 - beta2, sqrt(1 - beta2^step), eps, lr / (1 - beta1^step),
    1 - momentum, scale, apply); the kernel reads them by their indices.
    """
    values = [
        1 - lr * weight_decay, 1 - betas[0], betas[1], 1 - betas[1],
        (1 - betas[1] ** step) ** 0.5, eps, lr / (1 - betas[0] ** step),
        1 - momentum, scale, apply,
    ]  # fmt: skip
    return on_device(values, device)


@on_its_device
def launch_adamw_ema(
    arrays: Sequence[Tensors],
    copies: Tensors,
    target_copies: Tensors,
    numbers: torch.Tensor,
    chunk: int | None = None,
) -> None:
    """arrays: params, grads, exp_avgs, exp_avg_sqs, target (or none)."""
    chunk = chunk or chosen("adamw_ema_step", CHUNKS, arrays[0][0].device)
    pointers, owners, aligned = tables(*arrays, copies, target_copies, chunk=chunk)
    if len(owners):
        _adamw_ema_kernel[(len(owners),)](
            pointers, owners, len(arrays[0]), numbers,
            GRAD=type_of(arrays[1]), TARGET=len(arrays[4]) > 0, COPY=type_of(copies),
            TARGET_COPY=type_of(target_copies), ALIGNED=aligned, CHUNK=chunk,
        )  # fmt: skip


# --- on a CPU

CACHED = 2**18  # values of each array that a CPU works through at a time: a megabyte, kept near


def _dense_and_fp32_on_cpu(masters: Sequence[Tensors], others: Sequence[Tensors]) -> bool:
    """Whether all are dense, and the masters fp32 on a CPU."""
    return all(t.is_contiguous() for array in (*masters, *others) for t in array) and all(
        t.dtype == torch.float32 and t.device.type == "cpu" for array in masters for t in array
    )


def _adamw_ema_cached(
    arrays: Sequence[Tensors],
    copies: Tensors,
    target_copies: Tensors,
    *,
    step: Number,
    lr: Number,
    momentum: Number,
    betas: tuple[float, float],
    eps: float,
    weight_decay: Number,
    scale: Number,
    apply: bool | torch.Tensor,
) -> None:
    """torch's fused AdamW, the EMA and the copies of CACHED values before the next ones."""
    if not apply:
        return
    steps = [torch.as_tensor(float(step))]
    numbers = {
        "lr": float(lr), "beta1": betas[0], "beta2": betas[1], "eps": eps,
        "weight_decay": float(weight_decay), "amsgrad": False, "maximize": False,
    }  # fmt: skip
    lists = [*arrays, copies, target_copies]
    for at in range(len(arrays[0])):
        pieces = [
            array[at].detach().view(-1).split(CACHED) if array else itertools.repeat(None)
            for array in lists
        ]
        for w, g, first, second, ema, low, target_low in zip(*pieces, strict=False):
            g = g.float() if scale == 1 else g.float() * scale
            torch._fused_adamw_([w], [g], [first], [second], [], steps, **numbers)
            if low is not None:
                low.copy_(w)
            if ema is not None:
                ema.lerp_(w, 1 - float(momentum))
            if target_low is not None:
                target_low.copy_(ema)


# --- the operator


@operator(
    "adamw_ema_step",
    mutates=("params", "exp_avgs", "exp_avg_sqs", "target", "copies", "target_copies"),
)
def adamw_ema_step_op(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    target: Tensors,
    copies: Tensors,
    target_copies: Tensors,
    numbers: torch.Tensor,
) -> None:
    launch_adamw_ema((params, grads, exp_avgs, exp_avg_sqs, target), copies, target_copies, numbers)


@torch.library.register_fake(adamw_ema_step_op)
def _(params, grads, exp_avgs, exp_avg_sqs, target, copies, target_copies, numbers):
    return None


# --- public


@torch.no_grad()
def adamw_ema_step(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    target: Tensors = (),
    *,
    step: Number,
    lr: Number,
    momentum: Number = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Number = 0.01,
    scale: Number = 1.0,
    apply: bool | torch.Tensor = True,
    copies: Tensors = (),
    target_copies: Tensors = (),
) -> None:
    """AdamW's step number `step` (from 1) of params, then their EMA into target; in place.

    All are lists of equal length and shapes: params, exp_avgs, exp_avg_sqs and target in fp32,
    grads of any float dtype; copies and target_copies (none, or one each) take params and target,
    cast. Without target there is no EMA; momentum is the EMA's. scale multiplies the
    gradients; where apply is false nothing is written. Numbers may be 0-d tensors on the device,
    which then is not waited for. One call serves one parameter group. Lists that the kernel cannot
    take go by the reference. Raises ValueError for shapes that differ or a step below 1.
    """
    if not isinstance(step, torch.Tensor) and step < 1:
        raise ValueError(f"step {step}: the first is 1")
    arrays = [list(a) for a in (params, grads, exp_avgs, exp_avg_sqs, target)]
    copies, target_copies = list(copies), list(target_copies)
    check_same_shapes(*arrays, copies, target_copies)
    lengths = [len(array) for array in arrays]
    if lengths != [lengths[0]] * 4 + [lengths[0] if target else 0]:
        raise ValueError(f"lists of {lengths} tensors")
    if target_copies and not target:
        raise ValueError("copies of an EMA that there is not")
    numbers = {
        "step": step, "lr": lr, "momentum": momentum, "betas": tuple(betas), "eps": eps,
        "weight_decay": weight_decay, "scale": scale, "apply": apply,
    }  # fmt: skip
    masters = [arrays[i] for i in (0, 2, 3, 4) if arrays[i]]
    if arrays[0] and kernel_takes(masters, [arrays[1], copies, target_copies]):
        device = arrays[0][0].device
        adamw_ema_step_op(*arrays, copies, target_copies, adamw_numbers(device, **numbers))
    elif _dense_and_fp32_on_cpu(masters, [arrays[1], copies, target_copies]):
        _adamw_ema_cached(arrays, copies, target_copies, **numbers)
    else:
        adamw_ema_step_reference(*arrays, **numbers, copies=copies, target_copies=target_copies)


# --- ahead of time


def ahead_of_time() -> list[Compiled]:
    """The kernel, aligned and not, with and without EMA and copies, for fp32 and bf16 gradients."""
    cases = itertools.product(
        CHUNKS, (True, False), (None, *TYPES), (torch.float32, torch.bfloat16), (True, False)
    )
    return [
        Compiled(
            f"adamw_ema_step {chunked(dtype, chunk, aligned, copy)}"
            f"{'' if target else ', no EMA'}",
            _adamw_ema_kernel, TABLES | {"numbers": "*fp32"},
            {
                "GRAD": TYPES[dtype], "TARGET": target, "COPY": TYPES.get(copy),
                "TARGET_COPY": TYPES.get(copy) if target else None, "ALIGNED": aligned,
                "CHUNK": chunk,
            },
            must_have=WIDE_LOADS if aligned else (),
        )
        for chunk, aligned, copy, dtype, target in cases
    ]  # fmt: skip
