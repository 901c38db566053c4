"""softmax(q k^T / sqrt(d)) v by several kernels behind one function, and the fastest of them here.

Shapes: B sequences, H heads, S queries, T keys, d values of a head; q (B, H, S, d), k and v
(B, H, T, d). No masks: every query sees every key.
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

SDPA = {"sdpa_flash": SDPBackend.FLASH_ATTENTION, "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION}
BACKENDS = ("plain", "sdpa", *SDPA, "flash_attn")
# Versions 4, 3 and 2 of flash-attn are packages of their own; the newest that loads is taken.
FLASH_MODULES = ("flash_attn.cute", "flash_attn_interface", "flash_attn")
TURNS = 7


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str) -> torch.Tensor:
    """(B, H, S, d) by one of BACKENDS.

    "plain" writes the attention map: in bf16 on a CPU it is faster than SDPA. "sdpa" lets torch
    choose among its kernels, "sdpa_flash" and "sdpa_cudnn" name one, "flash_attn" is the package.
    "auto" is sdpa on CUDA and plain elsewhere, until `fastest` has been asked.
    """
    if backend == "auto":
        backend = "sdpa" if q.is_cuda else "plain"
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v)
    if backend in SDPA:
        with sdpa_kernel(SDPA[backend]):
            return F.scaled_dot_product_attention(q, k, v)
    if backend == "flash_attn":
        out = flash_attention()(*(x.transpose(1, 2) for x in (q, k, v)))
        out = out[0] if isinstance(out, tuple) else out  # some versions add the log-sum-exp
        return out.transpose(1, 2)
    return attention_map(q, k) @ v


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


def attention_map(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """(B, H, S, T): each row sums to one."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1)


@functools.cache
def flash_attention() -> Callable:
    """flash-attn's function of (B, S, H, d) tensors. Raises ValueError where it is missing."""
    errors = []
    for name in FLASH_MODULES:
        try:
            return importlib.import_module(name).flash_attn_func
        except (ImportError, AttributeError) as error:
            errors.append(f"{name}: {error}")
    raise ValueError(
        f'attention = "flash_attn": the package does not load ({"; ".join(errors)}): pip install '
        '"cjepa_fast[flash]" on a machine with CUDA, or take "auto"'
    )


class Shape(NamedTuple):
    """One use of attention: B sequences of S queries and T keys, and whether it is trained."""

    sequences: int
    heads: int
    queries: int
    keys: int
    width: int  # of a head
    trained: bool


def candidates(device: torch.device) -> list[str]:
    """What may be the fastest: on a CPU plain alone, so that a run's bits do not hang on timing."""
    if device.type != "cuda":
        return ["plain"]
    return [name for name in BACKENDS if name != "flash_attn" or _flash_loads()]


def _flash_loads() -> bool:
    try:
        flash_attention()
    except ValueError:
        return False
    return True


def fastest(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[str, dict[str, float]]:
    """The fastest candidate for a shape, and the medians in milliseconds of those that can do it.

    The shape is tried with at most 64 sequences at a time, in turns, after a warm-up.
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
    """A call of each candidate that takes the shape: forward, and backward where it is trained."""
    B, heads, d = min(shape.sequences, 64), shape.heads, shape.width
    sizes = [(B, heads, length, d) for length in (shape.queries, shape.keys, shape.keys)]
    tensors = [
        torch.randn(size, device=device, dtype=dtype, requires_grad=shape.trained) for size in sizes
    ]

    def call(name: str) -> None:
        out = attend(*tensors, name)
        if shape.trained:
            torch.autograd.grad(out, tensors, out.detach())

    found = candidates(device)
    for name in found:
        if len(found) > 1:
            try:
                call(name)  # warm
            except RuntimeError:  # no kernel of that backend for this width, type or device
                continue
        yield name, functools.partial(call, name)


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
