"""x W^T + b, and its GELU, by oneDNN's fused call where torch itself splits it: in bf16 on CPUs.

There torch writes the bias into the output first and lets the product add to it, and takes another
pass for the GELU. oneDNN's call, which torch.compile's CPU code uses too, does both while the
product's tile is in the cache. Elsewhere these are F.linear and F.gelu.
Shapes: x (..., C), weight (D, C), bias (D,); the result is (..., D).
"""

import torch
import torch.nn.functional as F
from torch import nn

try:
    _fused = torch.ops.mkldnn._linear_pointwise.default
except AttributeError:  # a build of torch without oneDNN
    _fused = None


def _fusable(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    return (
        _fused is not None
        and bias is not None
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == bias.dtype == torch.bfloat16
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.enabled
    )


class _Linear(torch.autograd.Function):
    """The fused product with the usual gradients."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _fused(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        wanted = ctx.needs_input_grad
        return (
            grad @ weight if wanted[0] else None,
            rows.t() @ x.flatten(0, -2) if wanted[1] else None,
            rows.sum(0) if wanted[2] else None,
        )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.linear."""
    if _fusable(x, weight, bias):
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.gelu(F.linear(...)), exact GELU. Fused only where no gradient is asked: the backward needs
    what lies between."""
    if not torch.is_grad_enabled() and _fusable(x, weight, bias):
        return _fused(x, weight, bias, "gelu", [], "none")
    return F.gelu(linear(x, weight, bias))


class Linear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)
