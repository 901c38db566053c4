"""x W^T + b, and its GELU, by the fastest way that this CPU has; on a GPU F.linear and F.gelu.

torch writes the bias into the output first, lets the matmul add to it, and takes another pass for
the GELU. oneDNN's fused call, which torch.compile's CPU code uses too, does both while the tile is
in the cache. It serves bf16 wherever the processor multiplies bf16. In fp32 it competes with
torch's own library (MKL on x86), which is the slower one on some processors: `fastest` tries both.
On a processor that multiplies no bf16, bf16 values are multiplied in fp32 and the result is
rounded: 2 to 40 times as fast as torch's emulation, and no less exact.
Shapes: x (..., C), weight (D, C), bias (D,); the result is (..., D).
"""

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from cjepa_fast.kernels.gelu import APPROXIMATE
from cjepa_fast.runtime import hardware

_fused = hardware.onednn_linear()

ROUNDS = 5  # of a trial
BETTER = 0.95  # of torch's time: above it oneDNN is not worth other bits


class LinearBackends(NamedTuple):
    """Which library computes each kind of fp32 call on a CPU: "torch" or "onednn"."""

    forward: str = "torch"
    backward: str = "torch"
    gelu: str = "torch"  # a Linear and its GELU, where no gradient is asked


_fp32 = LinearBackends()


def use(ways: LinearBackends) -> None:
    """For all fp32 calls of this process from here on. Where oneDNN's call is missing: torch."""
    global _fp32
    _fp32 = ways if hardware.onednn_linear_works(torch.float32) else LinearBackends()


def in_use() -> LinearBackends:
    return _fp32


def _plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the call is one of those that F.linear is not left to."""
    return (
        bias is not None
        and x.numel() > 0
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == bias.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
    )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.linear."""
    if not _plain(x, weight, bias):
        return F.linear(x, weight, bias)
    if x.dtype == torch.float32 and _fp32 == LinearBackends():
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


def linear_gelu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kind: str = "exact"
) -> torch.Tensor:
    """F.gelu(F.linear(...)), of a kind of APPROXIMATE. Fused only where no gradient is asked: the
    backward needs what lies between."""
    form = APPROXIMATE[kind]
    fused = not torch.is_grad_enabled() and _plain(x, weight, bias) and _by_onednn(x, "gelu")
    if fused and hardware.onednn_linear_works(x.dtype, form):
        return _fused(x, weight, bias, "gelu", [], form)
    return F.gelu(linear(x, weight, bias), approximate=form)


def _by_onednn(x: torch.Tensor, kind: str) -> bool:
    if x.dtype == torch.bfloat16:
        return hardware.cpu_multiplies_bf16()
    return getattr(_fp32, kind) == "onednn"


class _Linear(torch.autograd.Function):
    """F.linear whose forward and backward go to the library chosen for each kind of call."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        if _by_onednn(x, "forward"):
            return _fused(x, weight, bias, "none", [], "")
        wide = _widened(x, weight, bias)
        return F.linear(*wide).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        dtype, wanted = grad.dtype, ctx.needs_input_grad
        grad, x, weight = _widened(grad, *ctx.saved_tensors)
        rows = grad.flatten(0, -2)
        fused = x.dtype == torch.float32 == dtype and _by_onednn(x, "backward")
        dx, dweight = _fused_gradients if fused else _gradients
        return (
            dx(grad, weight).to(dtype) if wanted[0] else None,
            dweight(rows, x.flatten(0, -2)).to(dtype) if wanted[1] else None,
            rows.sum(0).to(dtype) if wanted[2] else None,
        )


def _widened(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """In fp32 where they are bf16 and this CPU multiplies none."""
    if tensors[0].dtype != torch.bfloat16 or hardware.cpu_multiplies_bf16():
        return tensors
    return tuple(tensor.float() for tensor in tensors)


def plain_weight_gradient(dout: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The gradient (D, C) of a Linear's weight, from that of its output and from its input."""
    dtype, rows = dout.dtype, dout.flatten(0, -2)
    if dout.device.type == "cpu" and not torch.compiler.is_compiling():
        rows, x = _widened(rows, x)
    return (rows.t() @ x.flatten(0, -2)).to(dtype)


# Of the input, from the output's gradient and the weight; of the weight, from rows of both.
_gradients = (lambda grad, weight: grad @ weight, lambda rows, x: rows.t() @ x)
_fused_gradients = (
    lambda grad, weight: _fused(grad, weight.t(), None, "none", [], ""),
    lambda rows, x: _fused(x.t(), rows.t(), None, "none", [], "").t(),
)


class Linear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class LinearUse(NamedTuple):
    """A Linear of a network: rows of x, C, D, and whether it is trained."""

    rows: int
    inputs: int
    outputs: int
    trained: bool


def fastest(uses: Iterable[LinearUse]) -> LinearBackends:
    """The faster library for each kind of fp32 call, over all these Linears together, by trial."""
    if not hardware.onednn_linear_works(torch.float32):
        return LinearBackends()
    uses = list(uses)
    chosen = {}
    for kind in LinearBackends._fields:
        calls = [_trial(kind, one) for one in uses if one.trained or kind != "backward"]
        torch_s, onednn_s = (sum(_seconds(pair[i]) for pair in calls) for i in range(2))
        chosen[kind] = "onednn" if onednn_s < BETTER * torch_s else "torch"
    return LinearBackends(**chosen)


def _trial(kind: str, one: LinearUse) -> tuple[Callable[[], object], Callable[[], object]]:
    """One call, by torch and by oneDNN."""
    x = torch.randn(one.rows, one.inputs)
    weight, bias = torch.randn(one.outputs, one.inputs), torch.randn(one.outputs)
    grad = torch.randn(one.rows, one.outputs)
    if kind == "backward":
        pairs = _gradients, _fused_gradients
        return tuple(lambda p=pair: (p[0](grad, weight), p[1](grad, x)) for pair in pairs)
    activation, form = ("gelu", "none") if kind == "gelu" else ("none", "")
    after = F.gelu if kind == "gelu" else lambda y: y
    return (
        lambda: after(F.linear(x, weight, bias)),
        lambda: _fused(x, weight, bias, activation, [], form),
    )


@torch.no_grad()
def _seconds(call: Callable[[], object]) -> float:
    """The least of ROUNDS after a warm-up: what the machine's other work adds is not the call's."""
    call()
    found = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return min(found)
