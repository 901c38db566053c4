"""The target's exponential moving average, alone or with AdamW, in one pass over all parameters.

    ema_update        t <- m t + (1 - m) w, and optionally the copy of t in another dtype
    ema_update_rows   the same of matrices, and each row of t in 8 bits with its scale (fp8.py)
    adamw_ema_step    AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) as torch.optim.AdamW
                      computes it, then the above:
        w <- (1 - lr * decay) w
        a <- beta1 a + (1 - beta1) g          v <- beta2 v + (1 - beta2) g^2
        w <- w - lr / (1 - beta1^step) * a / (sqrt(v) / sqrt(1 - beta2^step) + eps)

w, a, v, t are fp32 lists of tensors of any shapes; g is fp32 or narrower. `x_reference` is the
definition, in torch._foreach operations; a CPU averages by it too, and takes AdamW's step by
torch's fused one, in runs of values that stay in its cache. On CUDA one launch serves the
whole list: a table on the device holds the tensors' addresses, and a second one says to which
tensor each program belongs. The tables are made again only when an address changes. AdamW's numbers
(rate, bias corrections, whether to step at all) are a small tensor, so that they may be computed on
the device, and a CUDA graph that holds the launch follows the schedules.

Bytes a parameter that must move (fp32 g, bf16 copies), beside what separate passes move:
    ema_update        12, with a copy 14     (lerp 12, then a cast 6: 18)
    ema_update_rows   13                     (lerp 12, a cast 6, then quantised 3: 21)
    adamw_ema_step    36, with copies of w and t 40  (AdamW 28, lerp 12, two casts 12: 52)
All are bound by bytes. So a copy in the same pass is predicted to make ema_update 1.29 times as
fast as foreach, and adamw_ema_step 1.3 times; without a copy ema_update moves foreach's bytes.
"""

import functools
import itertools
from collections.abc import Sequence

import torch

from cjepa_fast.kernels.common.launch import (
    TRITON_NAMES,
    Compiled,
    chosen,
    narrow,
    recording,
    to_device,
    use_kernel,
)
from cjepa_fast.kernels.common.maybe_triton import tl, triton
from cjepa_fast.kernels.fp8 import E4M3, TO_E4M3, quantise_rows_reference, quantised
from cjepa_fast.kernels.gather_tiles import WIDEST, row_tiles

Tensors = Sequence[torch.Tensor]
Number = float | torch.Tensor  # or 0-d, on the tensors' device
# Values a program handles: 16 of each array in each of 128 threads, or 8; see launch.chosen.
CHUNKS = (2048, 1024)
CACHED = 2**18  # values of each array that a CPU works through at a time: a megabyte, kept near


# --- the definitions


def ema_update_reference(
    target: Tensors, online: Tensors, momentum: Number, copies: Tensors = ()
) -> None:
    if not target:
        return
    online = [w.to(t.dtype) for w, t in zip(online, target, strict=True)]
    torch._foreach_lerp_(target, online, 1 - float(momentum))
    if copies:
        torch._foreach_copy_(copies, target)


def ema_update_rows_reference(
    target: Tensors, online: Tensors, momentum: Number, values: Tensors, scales: Tensors
) -> None:
    ema_update_reference(target, online, momentum)
    for t, value, scale in zip(target, values, scales, strict=True):
        rows = quantise_rows_reference(t.bfloat16())
        value.copy_(rows.values)
        scale.copy_(rows.scales)


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


# --- the tables


@functools.lru_cache(maxsize=8)
def _tables(
    device: torch.device,
    addresses: tuple[tuple[int, ...], ...],
    sizes: tuple[int, ...],
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """For one list of tensors an array: where each lies, which program owns what, and alignment.

    places (arrays + 2, tensors) int64: the addresses, then the number of values and the first
    program of each tensor. owners (programs,) int32: the tensor of each program. Aligned: every
    address is a multiple of 16 bytes, so that whole chunks load 16 bytes at a time.
    """
    programs = [triton.cdiv(size, chunk) for size in sizes]
    first = [0, *itertools.accumulate(programs)][:-1]
    places = torch.tensor([*addresses, sizes, first], dtype=torch.int64)
    tensors = torch.arange(len(sizes), dtype=torch.int32)
    owners = tensors.repeat_interleave(torch.tensor(programs))
    aligned = all(a % 16 == 0 for array in addresses for a in array)
    return to_device(places, device), to_device(owners, device), aligned


def tables(*arrays: Tensors, chunk: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """_tables of the lists; empty lists stand for arrays that are not there.

    Some hundred microseconds of the host a call for a thousand tensors: to read their addresses.
    """
    present = [array for array in arrays if array]
    addresses = tuple(tuple(t.data_ptr() for t in array) for array in present)
    device, sizes = arrays[0][0].device, tuple(t.numel() for t in arrays[0])
    # A recorded launch reads its own at every replay: no other call's may take their place.
    made = _tables.__wrapped__ if recording(device) else _tables
    return made(device, addresses, sizes, chunk)


def _one_kind(array: Tensors) -> bool:
    """Whether one kernel can take these: dense, on one device, of one dtype."""
    head = array[0] if array else None
    return all(
        t.is_contiguous() and t.dtype == head.dtype and t.device == head.device for t in array
    )


def _fitting(masters: Sequence[Tensors], others: Sequence[Tensors]) -> bool:
    """Whether the kernel takes these lists: the masters in fp32, the others in what it reads."""
    arrays = [*masters, *(array for array in others if array)]
    return (
        all(_one_kind(array) for array in arrays)
        and all(array[0].dtype == torch.float32 for array in masters)
        and use_kernel(*(array[0] for array in arrays))
    )


def _same_shapes(*arrays: Tensors) -> None:
    """Raise ValueError unless the lists that are there have the same shapes in turn."""
    wanted = [t.shape for t in arrays[0]]
    for array in arrays[1:]:
        shapes = [t.shape for t in array]
        if array and shapes != wanted:
            raise ValueError(f"lists of tensors of other shapes: {shapes}, not {wanted}")


# --- the kernels


@triton.jit
def _address(places, array, tensor, tensors, start, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to the value `start` of a tensor of an array."""
    address = tl.load(places + array * tensors + tensor).to(tl.pointer_type(dtype))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address + start


@triton.jit
def _lerp(old, new, weight):
    """As torch.lerp: exact at both ends."""
    return tl.where(weight < 0.5, old + weight * (new - old), new - (new - old) * (1.0 - weight))


@triton.jit
def _range(places, owners, sizes_row, tensors, CHUNK: tl.constexpr):
    """This program's tensor, its first value there, and how many values are left from it on."""
    tensor = tl.load(owners + tl.program_id(0)).to(tl.int64)
    size = tl.load(places + sizes_row * tensors + tensor)
    first = tl.load(places + (sizes_row + 1) * tensors + tensor)
    start = (tl.program_id(0) - first) * CHUNK
    return tensor, start, size - start


@triton.jit
def _ema_chunk(
    target, online, copy, weight, keep, COPY: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    at = tl.arange(0, CHUNK)
    value = tl.load(target + at, mask=keep)
    value = _lerp(value, tl.load(online + at, mask=keep).to(tl.float32), tl.load(weight))
    tl.store(target + at, value, mask=keep)
    if COPY:
        tl.store(copy + at, narrow(value, copy.dtype.element_ty), mask=keep)


@triton.jit
def _ema_kernel(
    places, owners, tensors, weight,
    ONLINE: tl.constexpr, COPY: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Arrays: target (fp32), online (of dtype ONLINE), the copy (of dtype COPY, None without).

    A whole chunk is loaded without a mask, 16 bytes at a time; the end of a tensor with one.
    """
    arrays: tl.constexpr = 2 if COPY is None else 3
    tensor, start, rest = _range(places, owners, arrays, tensors, CHUNK)
    target = _address(places, 0, tensor, tensors, start, tl.float32, ALIGNED)
    online = _address(places, 1, tensor, tensors, start, ONLINE, ALIGNED)
    copy = target
    if COPY is not None:
        copy = _address(places, 2, tensor, tensors, start, COPY, ALIGNED)
    if rest >= CHUNK:
        keep = tl.full((CHUNK,), 1, tl.int1)
        _ema_chunk(target, online, copy, weight, keep, COPY is not None, CHUNK)
    else:
        keep = tl.arange(0, CHUNK) < rest
        _ema_chunk(target, online, copy, weight, keep, COPY is not None, CHUNK)


@triton.jit
def _ema_rows_kernel(
    places, owners, tensors, weight,
    ONLINE: tl.constexpr, ALIGNED: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One row of COLS values. Arrays: target (fp32), online (ONLINE), values (e4m3), scales (fp32).

    The row is rounded to bf16 first: so are the weights of processes that complete each other's.
    """
    tensor, start, _ = _range(places, owners, 4, tensors, COLS)
    col = tl.arange(0, WIDTH)[None, :]
    keep = col < COLS
    target = _address(places, 0, tensor, tensors, start, tl.float32, ALIGNED) + col
    online = _address(places, 1, tensor, tensors, start, ONLINE, ALIGNED) + col
    new = tl.load(online, mask=keep, other=0.0).to(tl.float32)
    average = _lerp(tl.load(target, mask=keep, other=0.0), new, tl.load(weight))
    tl.store(target, average, mask=keep)
    value, scale = quantised(narrow(average, tl.bfloat16).to(tl.float32))
    values = _address(places, 2, tensor, tensors, start, tl.float8e4nv, ALIGNED)
    tl.store(values + col, value, mask=keep)
    scales = _address(places, 3, tensor, tensors, start // COLS, tl.float32, False)
    tl.store(scales + tl.arange(0, 1), scale)


@triton.jit
def _adamw_ema_chunk(
    param, grad, exp_avg, exp_avg_sq, target, copy, target_copy, keep,
    decay, lerp1, beta2, square_share, root_scale, eps, rate, weight, scale,
    TARGET: tl.constexpr, COPY: tl.constexpr, TARGET_COPY: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, CHUNK)
    g = tl.load(grad + at, mask=keep).to(tl.float32) * scale
    first = _lerp(tl.load(exp_avg + at, mask=keep), g, lerp1)
    tl.store(exp_avg + at, first, mask=keep)
    second = tl.load(exp_avg_sq + at, mask=keep) * beta2 + square_share * g * g
    tl.store(exp_avg_sq + at, second, mask=keep)
    root = tl.div_rn(tl.sqrt_rn(second), root_scale) + eps
    w = tl.load(param + at, mask=keep) * decay - rate * tl.div_rn(first, root)
    tl.store(param + at, w, mask=keep)
    if COPY:
        tl.store(copy + at, narrow(w, copy.dtype.element_ty), mask=keep)
    if TARGET:
        average = _lerp(tl.load(target + at, mask=keep), w, weight)
        tl.store(target + at, average, mask=keep)
        if TARGET_COPY:
            tl.store(target_copy + at, narrow(average, target_copy.dtype.element_ty), mask=keep)


@triton.jit
def _adamw_ema_kernel(
    places, owners, tensors, numbers,
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
    tensor, start, rest = _range(places, owners, arrays, tensors, CHUNK)
    param = _address(places, 0, tensor, tensors, start, tl.float32, ALIGNED)
    grad = _address(places, 1, tensor, tensors, start, GRAD, ALIGNED)
    exp_avg = _address(places, 2, tensor, tensors, start, tl.float32, ALIGNED)
    exp_avg_sq = _address(places, 3, tensor, tensors, start, tl.float32, ALIGNED)
    target, copy, target_copy = param, param, param
    if TARGET:
        target = _address(places, 4, tensor, tensors, start, tl.float32, ALIGNED)
    if COPY is not None:
        copy = _address(places, copies, tensor, tensors, start, COPY, ALIGNED)
    if TARGET_COPY is not None:
        target_copy = _address(places, target_copies, tensor, tensors, start, TARGET_COPY, ALIGNED)
    decay, lerp1 = tl.load(numbers), tl.load(numbers + 1)
    beta2, square_share = tl.load(numbers + 2), tl.load(numbers + 3)
    root_scale, eps, rate = tl.load(numbers + 4), tl.load(numbers + 5), tl.load(numbers + 6)
    weight, scale = tl.load(numbers + 7), tl.load(numbers + 8)
    if rest >= CHUNK:
        _adamw_ema_chunk(
            param, grad, exp_avg, exp_avg_sq, target, copy, target_copy,
            tl.full((CHUNK,), 1, tl.int1),
            decay, lerp1, beta2, square_share, root_scale, eps, rate, weight, scale,
            TARGET, COPY is not None, TARGET_COPY is not None, CHUNK,
        )  # fmt: skip
    else:
        _adamw_ema_chunk(
            param, grad, exp_avg, exp_avg_sq, target, copy, target_copy,
            tl.arange(0, CHUNK) < rest,
            decay, lerp1, beta2, square_share, root_scale, eps, rate, weight, scale,
            TARGET, COPY is not None, TARGET_COPY is not None, CHUNK,
        )  # fmt: skip


TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _type(array: Tensors):
    """The Triton type of a list's tensors, None for a list that is not there."""
    return TYPES[array[0].dtype] if array else None


def launch_ema(
    target: Tensors,
    online: Tensors,
    copies: Tensors,
    weight: torch.Tensor,
    chunk: int | None = None,
) -> None:
    chunk = chunk or chosen("ema_update", CHUNKS, target[0].device)
    places, owners, aligned = tables(target, online, copies, chunk=chunk)
    if len(owners):
        _ema_kernel[(len(owners),)](
            places, owners, len(target), weight,
            ONLINE=_type(online), COPY=_type(copies), ALIGNED=aligned, CHUNK=chunk,
        )  # fmt: skip


def on_device(values: Sequence[Number], device: torch.device) -> torch.Tensor:
    """Numbers and 0-d tensors as one fp32 tensor, without waiting for the device."""
    if not any(isinstance(value, torch.Tensor) for value in values):
        return torch.tensor(values, dtype=torch.float32).to(device, non_blocking=True)
    return torch.stack([
        value.to(torch.float32) if isinstance(value, torch.Tensor)
        else torch.full((), value, dtype=torch.float32, device=device)
        for value in values
    ])  # fmt: skip


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
    1 - momentum, scale, apply); the kernel reads them by their places.
    """
    values = [
        1 - lr * weight_decay, 1 - betas[0], betas[1], 1 - betas[1],
        (1 - betas[1] ** step) ** 0.5, eps, lr / (1 - betas[0] ** step),
        1 - momentum, scale, apply,
    ]  # fmt: skip
    return on_device(values, device)


def launch_ema_rows(
    target: Tensors, online: Tensors, values: Tensors, scales: Tensors, weight: torch.Tensor
) -> None:
    """One launch for each width of rows."""
    arrays = target, online, values, scales
    for width in {t.shape[1]: None for t in target if t.numel()}:
        which = [i for i, t in enumerate(target) if t.shape[1] == width]
        lists = [[array[i] for i in which] for array in arrays]
        places, owners, aligned = tables(*lists, chunk=width)
        tile = row_tiles(width)[0]
        _ema_rows_kernel[(len(owners),)](
            places, owners, len(which), weight,
            ONLINE=_type(online), ALIGNED=aligned, COLS=width, WIDTH=tile.width,
            num_warps=tile.warps,
        )  # fmt: skip


def launch_adamw_ema(
    arrays: Sequence[Tensors],
    copies: Tensors,
    target_copies: Tensors,
    numbers: torch.Tensor,
    chunk: int | None = None,
) -> None:
    """arrays: params, grads, exp_avgs, exp_avg_sqs, target (or none)."""
    chunk = chunk or chosen("adamw_ema_step", CHUNKS, arrays[0][0].device)
    places, owners, aligned = tables(*arrays, copies, target_copies, chunk=chunk)
    if len(owners):
        _adamw_ema_kernel[(len(owners),)](
            places, owners, len(arrays[0]), numbers,
            GRAD=_type(arrays[1]), TARGET=len(arrays[4]) > 0, COPY=_type(copies),
            TARGET_COPY=_type(target_copies), ALIGNED=aligned, CHUNK=chunk,
        )  # fmt: skip


# --- the way on a CPU


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
    """torch's fused AdamW, the average and the copies of CACHED values before the next ones."""
    if not apply:
        return
    steps = [torch.as_tensor(float(step))]
    numbers = {
        "lr": float(lr), "beta1": betas[0], "beta2": betas[1], "eps": eps,
        "weight_decay": float(weight_decay), "amsgrad": False, "maximize": False,
    }  # fmt: skip
    lists = [*arrays, copies, target_copies]
    for at in range(len(arrays[0])):
        runs = [
            array[at].detach().view(-1).split(CACHED) if array else itertools.repeat(None)
            for array in lists
        ]
        for w, g, first, second, average, low, target_low in zip(*runs, strict=False):
            g = g.float() if scale == 1 else g.float().mul_(scale)
            torch._fused_adamw_([w], [g], [first], [second], [], steps, **numbers)
            if low is not None:
                low.copy_(w)
            if average is not None:
                average.lerp_(w, 1 - float(momentum))
            if target_low is not None:
                target_low.copy_(average)


# --- the operators


@torch.library.custom_op("cjepa_fast::ema_update", mutates_args={"target", "copies"})
def ema_update_op(target: Tensors, online: Tensors, copies: Tensors, weight: torch.Tensor) -> None:
    launch_ema(target, online, copies, weight)


@ema_update_op.register_fake
def _(target, online, copies, weight):
    return None


@torch.library.custom_op("cjepa_fast::ema_update_rows", mutates_args={"target", "values", "scales"})
def ema_update_rows_op(
    target: Tensors, online: Tensors, values: Tensors, scales: Tensors, weight: torch.Tensor
) -> None:
    """values: as bytes, since PyTorch's checks of an operator do arithmetic, and e4m3 has none."""
    launch_ema_rows(target, online, values, scales, weight)


@ema_update_rows_op.register_fake
def _(target, online, values, scales, weight):
    return None


@torch.library.custom_op(
    "cjepa_fast::adamw_ema_step",
    mutates_args={"params", "exp_avgs", "exp_avg_sqs", "target", "copies", "target_copies"},
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


@adamw_ema_step_op.register_fake
def _(params, grads, exp_avgs, exp_avg_sqs, target, copies, target_copies, numbers):
    return None


@torch.no_grad()
def ema_update(target: Tensors, online: Tensors, momentum: Number, copies: Tensors = ()) -> None:
    """target <- momentum * target + (1 - momentum) * online, in place; copies <- target, cast.

    Lists of equal length and shapes, on one device; target is fp32, online of any float dtype,
    copies (none, or one for each target) of any. On CUDA lists that the kernel cannot take, not
    dense or of mixed dtypes, go by the definition. Raises ValueError for shapes that differ.
    """
    target, online, copies = list(target), list(online), list(copies)
    _same_shapes(target, online, copies)
    if target and not online:
        raise ValueError(f"{len(target)} averages of no weights")
    if target and _fitting([target], [online, copies]):
        ema_update_op(target, online, copies, on_device([1 - momentum], target[0].device))
    else:
        ema_update_reference(target, online, momentum, copies)


@torch.no_grad()
def ema_update_rows(
    target: Tensors, online: Tensors, momentum: Number, values: Tensors, scales: Tensors
) -> None:
    """ema_update of matrices, in place; values, scales <- the rows of target, rounded to bf16, in
    8 bits, as fp8.quantise_rows gives them: (rows, C) e4m3 and (rows, 1) fp32 for each matrix.

    Lists as ema_update takes them. Raises ValueError for other shapes or types of the copies.
    """
    target, online, values, scales = list(target), list(online), list(values), list(scales)
    _same_shapes(target, online, values)
    _same_shapes([t[:, :1] for t in target], scales)
    if not len(target) == len(online) == len(values) == len(scales):
        raise ValueError(f"lists of {[len(a) for a in (target, online, values, scales)]} tensors")
    if {v.dtype for v in values} - {E4M3} or {s.dtype for s in scales} - {torch.float32}:
        raise ValueError("the copies must be e4m3 values and fp32 scales")
    held = _one_kind(values) and all(t.shape[1] <= WIDEST for t in target)
    if target and held and _fitting([target, scales], [online]):
        weight = on_device([1 - momentum], target[0].device)
        ema_update_rows_op(target, online, [v.view(torch.uint8) for v in values], scales, weight)
    else:
        ema_update_rows_reference(target, online, momentum, values, scales)


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
    """AdamW's step number `step` (from 1) of params, then their average into target; in place.

    All are lists of equal length and shapes: params, exp_avgs, exp_avg_sqs and target in fp32,
    grads of any float dtype; copies and target_copies (none, or one each) take params and target,
    cast. Without target nothing is averaged; momentum is the average's. scale multiplies the
    gradients; where apply is false nothing is written. Numbers may be 0-d tensors on the device,
    which then is not waited for. One call serves one parameter group. Lists that the kernel cannot
    take go by the definition. Raises ValueError for shapes that differ or a step below 1.
    """
    if not isinstance(step, torch.Tensor) and step < 1:
        raise ValueError(f"step {step}: the first is 1")
    arrays = [list(a) for a in (params, grads, exp_avgs, exp_avg_sqs, target)]
    copies, target_copies = list(copies), list(target_copies)
    _same_shapes(*arrays, copies, target_copies)
    lengths = [len(array) for array in arrays]
    if lengths != [lengths[0]] * 4 + [lengths[0] if target else 0]:
        raise ValueError(f"lists of {lengths} tensors")
    if target_copies and not target:
        raise ValueError("copies of an average that there is not")
    numbers = {
        "step": step, "lr": lr, "momentum": momentum, "betas": tuple(betas), "eps": eps,
        "weight_decay": weight_decay, "scale": scale, "apply": apply,
    }  # fmt: skip
    masters = [arrays[i] for i in (0, 2, 3, 4) if arrays[i]]
    if arrays[0] and _fitting(masters, [arrays[1], copies, target_copies]):
        device = arrays[0][0].device
        adamw_ema_step_op(*arrays, copies, target_copies, adamw_numbers(device, **numbers))
    elif _all_dense_fp32_on_cpu(masters, arrays[1]):
        _adamw_ema_cached(arrays, copies, target_copies, **numbers)
    else:
        adamw_ema_step_reference(*arrays, **numbers, copies=copies, target_copies=target_copies)


def _all_dense_fp32_on_cpu(masters: Sequence[Tensors], grads: Tensors) -> bool:
    return all(t.is_contiguous() for t in grads) and all(
        t.is_contiguous() and t.dtype == torch.float32 and t.device.type == "cpu"
        for array in masters
        for t in array
    )


# --- ahead of time

WIDE_LOADS = (r"ld\.global[\w.:]*\.v[48]\.b32", r"st\.global[\w.:]*\.v[24]\.b32")


def ahead_of_time() -> list[Compiled]:
    """Both kernels, aligned and not, with and without copies, for fp32 and bf16 weights."""
    tables = {"places": "*i64", "owners": "*i32", "tensors": "i32"}
    found = []
    for chunk, aligned, copy in itertools.product(CHUNKS, (True, False), (None, *TYPES)):
        common = {"COPY": TYPES.get(copy), "ALIGNED": aligned, "CHUNK": chunk}
        must = WIDE_LOADS if aligned else ()
        for dtype in (torch.float32, torch.bfloat16):
            kind = "aligned" if aligned else "unaligned"
            label = f"{TRITON_NAMES[dtype]} {chunk}, {kind}, copy {TRITON_NAMES.get(copy)}"
            found.append(
                Compiled(
                    f"ema_update {label}", _ema_kernel, tables | {"weight": "*fp32"},
                    {"ONLINE": TYPES[dtype], **common}, must_have=must,
                )
            )  # fmt: skip
            found += [
                Compiled(
                    f"adamw_ema_step {label}{'' if target else ', no average'}", _adamw_ema_kernel,
                    tables | {"numbers": "*fp32"},
                    {
                        "GRAD": TYPES[dtype], "TARGET": target,
                        "TARGET_COPY": TYPES.get(copy) if target else None, **common,
                    },
                    must_have=must,
                )
                for target in (True, False)
            ]  # fmt: skip
    return found + [_rows_compiled(width, d) for width in ROWS for d in TYPES]


ROWS = (768, 1280, 5120, 6144)  # of vit_base and of the largest models


def _rows_compiled(width: int, dtype: torch.dtype) -> Compiled:
    tile = row_tiles(width)[0]
    return Compiled(
        f"ema_update_rows {TRITON_NAMES[dtype]} {width}", _ema_rows_kernel,
        {"places": "*i64", "owners": "*i32", "tensors": "i32", "weight": "*fp32"},
        {"ONLINE": TYPES[dtype], "ALIGNED": True, "COLS": width, "WIDTH": tile.width},
        num_warps=tile.warps, must_have=(*WIDE_LOADS, TO_E4M3), since=89,
    )  # fmt: skip
