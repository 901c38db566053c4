"""softmax(q k^T / sqrt(d)) v by several kernels behind one function, and the fastest of them here.

Shapes: B sequences, H heads, S queries, T keys, d values of a head; q (B, H, S, d), k and v
(B, H, T, d). No masks: every query sees every key of its sequence. `attend_packed` is for
sequences of different lengths, end to end.
"""

import functools
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cjepa_fast.kernels.attention import short_attention, takes
from cjepa_fast.kernels.common.maybe_triton import OutOfResources
from cjepa_fast.model.packed import Sequences, evenly
from cjepa_fast.runtime import hardware

SDPA = {"sdpa_flash": SDPBackend.FLASH_ATTENTION, "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION}
BACKENDS = ("plain", "sdpa", *SDPA, "flash_attn", "triton")
PACKED_BACKENDS = ("plain", "sdpa_flash", "flash_attn")  # those with a variable-length kernel
# Versions 4, 3 and 2 of flash-attn are packages of their own; the newest that loads is taken.
FLASH_MODULES = ("flash_attn.cute", "flash_attn_interface", "flash_attn")
TURNS = 7
TRIED = 1024  # sequences of a trial: enough that kernels are timed, not their launches


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str) -> torch.Tensor:
    """(B, H, S, d) by one of BACKENDS.

    "plain" writes the attention map: in bf16 on a CPU it is faster than SDPA. "sdpa" lets torch
    choose among its kernels, "sdpa_flash" and "sdpa_cudnn" name one, "flash_attn" is the package,
    "triton" is kernels/attention/ where that takes the shape, else sdpa.
    "auto" is sdpa on CUDA and plain elsewhere, until `fastest` has been asked.
    """
    if backend == "auto":
        backend = "sdpa" if q.is_cuda else "plain"
    if backend == "triton":
        if takes(q):
            return short_attention(q, k, v)
        backend = "sdpa" if q.is_cuda else "plain"
    if backend == "sdpa":
        return _OwnLayout.apply(F.scaled_dot_product_attention(q, k, v))
    if backend in SDPA:
        with sdpa_kernel(SDPA[backend]):
            return _OwnLayout.apply(F.scaled_dot_product_attention(q, k, v))
    if backend == "flash_attn":
        out = flash_attention()(*(x.transpose(1, 2) for x in (q, k, v)))
        out = out[0] if isinstance(out, tuple) else out  # some versions add the log-sum-exp
        return out.transpose(1, 2)
    return _plain(q, k, v)


def _plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None = None
) -> torch.Tensor:
    """By its definition; see `attention_map`. In fp32 on a CPU that multiplies no bf16: faster."""
    dtype, on_cpu = q.dtype, q.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and dtype == torch.bfloat16 and not hardware.cpu_multiplies_bf16():
        q, k, v = q.float(), k.float(), v.float()
    return (attention_map(q, k, seen) @ v).to(dtype)


class _OwnLayout(torch.autograd.Function):
    """x as it is; its gradient laid out in memory as x is.

    For cuDNN: PyTorch keeps a plan of its backward by the layouts of q, k, v and the output, but
    not of the gradient. A second gradient of the same shape, but laid out otherwise, is then read
    wrongly, and dq, dk and dv are noise (seen with torch 2.11 on an H200).
    """

    @staticmethod
    def forward(ctx, x):
        ctx.stride = x.stride()
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        if grad.stride() == ctx.stride:
            return grad
        own = grad.new_empty_strided(grad.shape, ctx.stride)
        return own.copy_(grad)


def attention_map(
    q: torch.Tensor, k: torch.Tensor, seen: torch.Tensor | None = None
) -> torch.Tensor:
    """(B, H, S, T): each row sums to one. seen: bool, broadcast to it; the other keys weigh 0."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if seen is not None:
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return scores.softmax(-1)


def attend_packed(
    q_SHd: torch.Tensor,
    k_THd: torch.Tensor,
    v_THd: torch.Tensor,
    queries: Sequences,
    keys: Sequences,
    backend: str,
) -> torch.Tensor:
    """(S, H, d): the queries of each sequence see the keys of the same sequence alone.

    Here S and T count over all sequences. "flash_attn" is the package, "plain" pads to the longest;
    every other name is torch's variable-length kernel, which is flash attention, on CUDA and in
    half precision, which is all that it takes, and plain elsewhere.
    """
    lengths = queries.starts, keys.starts, queries.longest, keys.longest
    if backend == "flash_attn":
        names = "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"
        named = dict(zip(names, lengths, strict=True))  # their order differs between versions
        out = flash_attention("flash_attn_varlen_func")(q_SHd, k_THd, v_THd, **named)
        return out[0] if isinstance(out, tuple) else out
    whole = q_SHd.shape[-1] % 8 == 0  # it takes no other heads
    if backend != "plain" and q_SHd.is_cuda and q_SHd.dtype.itemsize == 2 and whole:
        from torch.nn.attention.varlen import varlen_attn  # seconds to import

        return varlen_attn(q_SHd, k_THd, v_THd, *lengths)
    return _plain_packed(q_SHd, k_THd, v_THd, queries, keys)


def _plain_packed(q_SHd, k_THd, v_THd, queries: Sequences, keys: Sequences) -> torch.Tensor:
    """By (sequence, head, longest, d); a sequence without keys must have no queries either."""
    q = queries.padded(q_SHd).transpose(1, 2)
    k, v = (keys.padded(x).transpose(1, 2) for x in (k_THd, v_THd))
    out = _plain(q, k, v, keys.live()[:, None, None])
    return queries.packed(out.transpose(1, 2), len(q_SHd))


def attend_by_block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, M: int, P: int, backend: str
) -> torch.Tensor:
    """As `attend`, where a sequence is a context and then the tokens of M blocks of P.

    A token of the context sees the context, one of a block the context and its own block. k and v
    are (B, H, K + M P, d); q is as long, or of the M P tokens of the blocks alone. No mask is made:
    the context's keys are repeated for each block, so that every backend serves.
    """
    K = k.shape[2] - M * P

    def by_block(x: torch.Tensor) -> torch.Tensor:
        return x[:, :, -M * P :].unflatten(2, (M, P)).transpose(1, 2)  # (B, M, H, P, d)

    def seen(x: torch.Tensor) -> torch.Tensor:
        context = x[:, None, :, :K].expand(-1, M, -1, -1, -1)
        return torch.cat([context, by_block(x)], 3).flatten(0, 1)

    blocks = attend(by_block(q).flatten(0, 1), seen(k), seen(v), backend)
    blocks = blocks.unflatten(0, (-1, M)).transpose(1, 2).flatten(2, 3)
    if q.shape[2] == M * P:
        return blocks
    return torch.cat([attend(*(x[:, :, :K] for x in (q, k, v)), backend), blocks], 2)


@functools.cache
def flash_attention(name: str = "flash_attn_func") -> Callable:
    """flash-attn's function of that name: of (B, S, H, d) tensors, or of packed ones, "varlen".

    Raises ValueError where it is missing.
    """
    errors = []
    for module in FLASH_MODULES:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            errors.append(f"{module}: {error}")
    raise ValueError(
        f'attention = "flash_attn": the package does not load ({"; ".join(errors)}): pip install '
        '".[flash]" on a machine with CUDA, or take "auto"'
    )


class Shape(NamedTuple):
    """One use of attention: B sequences of S queries and T keys, and whether it is trained.

    packed: the lengths are means of sequences that lie end to end.
    """

    sequences: int
    heads: int
    queries: int
    keys: int
    width: int  # of a head
    trained: bool
    packed: bool = False


def candidates(device: torch.device) -> list[str]:
    """What may be the fastest: on a CPU plain alone, so that a run's bits do not hang on timing."""
    return installed() if device.type == "cuda" else ["plain"]


def installed() -> list[str]:
    """Every backend whose package is here; whether its kernel takes a shape is seen by trial."""
    return [name for name in BACKENDS if name != "flash_attn" or _flash_loads()]


def _flash_loads() -> bool:
    try:
        flash_attention()
    except ValueError:
        return False
    return True


def fastest(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[str, dict[str, float]]:
    """The fastest candidate for a shape, and the medians in milliseconds of those that can do it.

    The shape is tried with at most TRIED sequences at a time, in turns, after a warm-up.
    """
    calls = dict(_calls(shape, device, dtype))
    if len(calls) == 1:
        return next(iter(calls)), {}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(TURNS):
        for name, call in calls.items():
            times[name].append(_timed_ms(call, device))
    medians = {name: statistics.median(found) for name, found in times.items()}
    return min(medians, key=medians.__getitem__), medians


def _calls(
    shape: Shape, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], object]]]:
    """A call of each candidate that takes the shape."""
    found = [n for n in candidates(device) if not shape.packed or n in PACKED_BACKENDS]
    call = _call_by_name(shape, device, dtype)
    for name in found:
        if len(found) == 1 or not _failure(call, name):  # that warmed it
            yield name, functools.partial(call, name)


def problem(shape: Shape, device: torch.device, dtype: torch.dtype, name: str) -> str:
    """Why a backend cannot be used for a shape here, in words, "" where it can: it is tried."""
    few = shape._replace(sequences=min(shape.sequences, 2))
    return _failure(_call_by_name(few, device, dtype), name)


def _failure(call: Callable[[str], None], name: str) -> str:
    """What a backend says that has no kernel for this width, type or device."""
    try:
        call(name)
        return ""
    except (RuntimeError, ValueError, OutOfResources) as error:
        return str(error).strip().split("\n")[0] or type(error).__name__


def _call_by_name(shape: Shape, device: torch.device, dtype: torch.dtype) -> Callable[[str], None]:
    """Attention by a backend's name: forward, and backward where it is trained."""
    B, heads, d = min(shape.sequences, TRIED), shape.heads, shape.width
    lengths = shape.queries, shape.keys, shape.keys
    kind = {"device": device, "dtype": dtype}
    if shape.packed:
        tensors = [torch.randn(B * n, heads, d, **kind) for n in lengths]
    else:  # the heads of a token side by side, as the projections write them
        tensors = [torch.randn(B, n, heads, d, **kind).transpose(1, 2) for n in lengths]
    tensors = [x.requires_grad_(shape.trained) for x in tensors]
    packing = [evenly(B, n, device) for n in lengths[:2]] if shape.packed else []
    function = attend_packed if shape.packed else attend

    def call(name: str) -> None:
        out = function(*tensors, *packing, name)
        if shape.trained:
            torch.autograd.grad(out, tensors, out.detach())

    return call


def _timed_ms(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end)
