"""Which kernel of attention is the fastest here, at a network's own lengths: by trial.

What is tried is what a block runs around the kernel too: q, k and v come side by side out of one
projection, their gradients must lie so again, and in a fused block the projection's bias gets its
gradient there.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import NamedTuple

import torch

from cjepa_fast.model.attention import (
    BACKENDS,
    PACKED_BACKENDS,
    attend,
    attend_packed,
    flash_attention,
    kernel_of,
    packed_kernel_of,
)
from cjepa_fast.model.fused_ops import attend_heads, attend_last, heads_of
from cjepa_fast.model.packed import evenly

TURNS = 7
TRIED = 1024  # sequences of a trial: enough that kernels are timed, not their launches
QUEUED_BYTES = 2**30  # written before a call is timed, 0.2 ms and more: the host gets ahead
QUEUED = 4  # times that, for a forward and a backward


class Shape(NamedTuple):
    """One use of attention: B sequences of S queries and T keys, and whether it is trained.

    packed: the lengths are means of sequences that lie end to end. fused: in a fused block.
    """

    sequences: int
    heads: int
    queries: int
    keys: int
    width: int  # of a head
    trained: bool
    packed: bool = False
    fused: bool = False


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
    except Exception as error:  # of other people's kernels: flash-attn's refuse by assert
        return str(error).strip().split("\n")[0] or type(error).__name__


def kernel_for(shape: Shape, device: torch.device, dtype: torch.dtype, name: str) -> str:
    """Which kernel runs there for a backend's name."""
    q = torch.empty(1, shape.heads, 1, shape.width, device=device, dtype=dtype)
    return packed_kernel_of(q, name) if shape.packed else kernel_of(q, name)


def _call_by_name(shape: Shape, device: torch.device, dtype: torch.dtype) -> Callable[[str], None]:
    """Attention by a backend's name, from what the projection gave: forward, and backward to there
    where it is trained."""
    B, D = min(shape.sequences, TRIED), shape.heads * shape.width
    made = {"device": device, "dtype": dtype, "requires_grad": shape.trained}
    if shape.queries == shape.keys:
        projected = [torch.randn(B, shape.keys, 3 * D, **made)]
    else:
        projected = [torch.randn(B, n, k * D, **made) for n, k in
                     ((shape.queries, 1), (shape.keys, 2))]  # fmt: skip
    bias = torch.zeros(3 * D, **made)
    attention = _packed if shape.packed else _fused if shape.fused else _plain

    def call(name: str) -> None:
        out = attention(shape, projected, bias, name)
        if shape.trained:
            torch.autograd.grad(out, [*projected, bias], out.detach(), allow_unused=True)

    return call


def _plain(shape: Shape, projected: list, bias: torch.Tensor, name: str) -> torch.Tensor:
    return attend(*_heads(shape, projected), name).transpose(1, 2).flatten(2)


def _fused(shape: Shape, projected: list, bias: torch.Tensor, name: str) -> torch.Tensor:
    attn = SimpleNamespace(heads=shape.heads, backend=name, qkv=SimpleNamespace(bias=bias))
    function = attend_heads if len(projected) == 1 else attend_last
    return function(attn, *projected, shape.trained)


def _packed(shape: Shape, projected: list, bias: torch.Tensor, name: str) -> torch.Tensor:
    rows = [x.transpose(1, 2).flatten(0, 1) for x in _heads(shape, projected)]
    B, device = len(projected[0]), bias.device
    packing = [evenly(B, n, device) for n in (shape.queries, shape.keys)]
    return attend_packed(*rows, *packing, name).flatten(1)


def _heads(shape: Shape, projected: list) -> list[torch.Tensor]:
    """q, k and v, each (B, H, S, d)."""
    widths = [x.shape[-1] // (shape.heads * shape.width) for x in projected]
    parts = zip(projected, widths, strict=True)
    return [x for part, count in parts for x in heads_of(part, count, shape.heads)]


def _timed_ms(call: Callable[[], object], device: torch.device) -> float:
    """The device's own time in ms: what is queued before keeps it busy until the host has launched
    all of the call. On a CPU the call's time."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)
    queued = torch.empty(QUEUED_BYTES, dtype=torch.uint8, device=device)
    for _ in range(QUEUED):
        queued.zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end)
