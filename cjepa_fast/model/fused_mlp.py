"""The second half of a fused block: norm2, fc1, GELU and fc2, with their backward.

    s, u = s + y, Linear(norm2(s + y))      AddNormLinear, of fused_ops.py
    y    = Linear(gelu(u))                  GeluLinear

GELU is a pass of its own (kernels/gelu.py) unless model.gelu is "tanh", which a GPU's matmuls can
compute on their way. Then, where a trial finds it right:
    no gradient asked   torch's matmul writes gelu(u) alone, and no u
    trained             cuBLASLt's of fc1 writes both (AddNormLinearGelu), and that of fc2's
                        backward writes du and the gradient of fc1's bias
What is recomputed must have the bits that it had. So where gelu(u) is (model.checkpointing
"norm_gelu"), GELU stays a pass of its own forward; where fc1 is ("selective", "full"), backward
too. And it is a pass of its own where the matmuls are in FP8 (model.context_precision).

Shapes: those of fused_ops.py; u (B, S, hidden).
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from cjepa_fast.kernels.gelu import launch_gelu, launch_gelu_backward
from cjepa_fast.kernels.norm import launch_add_norm
from cjepa_fast.model import cublaslt, fp8
from cjepa_fast.model.fused_ops import BF16, AddNormLinear, linear, matmuls_of
from cjepa_fast.model.recompute import RecomputePolicy
from cjepa_fast.model.weight_stream import weight_gradient


def fused_mlp(
    x: torch.Tensor,
    y: torch.Tensor,
    y_bias: torch.Tensor,
    norm: nn.Module,
    mlp: nn.Module,
    policy: RecomputePolicy,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + y, and mlp(norm(x + y)); y_bias: of the Linear that made y."""
    fc1, fc2, trained = mlp.fc1, mlp.fc2, torch.is_grad_enabled()
    args = x, y, y_bias, norm.weight, norm.bias, norm.eps, fc1.weight, fc1.bias
    tanh = mlp.gelu == "tanh" and not fc1.in_fp8
    if not trained and tanh and gelu_by_torch(x, fc1.weight):
        s, hidden = add_norm_linear_gelu(*args)
        return s, linear(hidden, fc2.weight, fc2.bias)
    recomputed = policy.recomputes("block") or policy.recomputes("mlp")
    keep_norm, keep = "hidden" not in policy, "output" not in policy
    by_matmul = trained and not recomputed and tanh and cublaslt.takes(x, fc1.weight)
    if by_matmul and keep:
        s, u, hidden = AddNormLinearGelu.apply(*args, keep_norm)
    else:
        s, u = AddNormLinear.apply(*args, keep_norm, matmuls_of(fc1))
        hidden = None
    if recomputed:
        hidden = Gelu.apply(u, fc1.bias, mlp.gelu)
        last = fp8.trained_linear if fc2.in_fp8 else F.linear
        return s, last(hidden, fc2.weight, fc2.bias.detach())
    second = fc2.weight, fc2.bias, mlp.gelu
    how = keep, trained, by_matmul, matmuls_of(fc2)
    return s, GeluLinear.apply(u, hidden, fc1.bias, *second, *how)


def describe_gelu(device: torch.device, dtype: torch.dtype) -> str:
    """Where fused blocks compute tanh's GELU on this GPU, in words."""
    if why := cublaslt.problem(device, dtype):
        return f"GELU: in training a pass of its own, not inside cuBLASLt's matmuls ({why})"
    return "GELU: inside the matmuls, by cuBLASLt"


def gelu_by_torch(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether torch._addmm_activation computes tanh's GELU here: on a CPU it is exact GELU."""
    return x.is_cuda and cublaslt.torch_is_right(x.device, weight.dtype)


def add_norm_linear_gelu(
    x: torch.Tensor,
    y: torch.Tensor,
    y_bias: torch.Tensor,
    gain: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + y, and GELU of the Linear of its norm, where no gradient is asked."""
    s, h, _ = launch_add_norm(x, y, gain, shift, eps)
    hidden = torch._addmm_activation(bias, h.flatten(0, -2), weight.t(), use_gelu=True)
    return s, hidden.view(*h.shape[:-1], -1)


class AddNormLinearGelu(Function):
    """AddNormLinear, and beside u its GELU, whose gradient GeluLinear adds to that of u."""

    @staticmethod
    def forward(ctx, x, y, y_bias, gain, shift, eps, weight, bias, keep):
        s, h = AddNormLinear.saved(ctx, x, y, gain, shift, eps, weight, keep, BF16)
        found = cublaslt.linear_gelu(h, weight, bias)
        if found is None:
            u = linear(h, weight, bias)
            found = u, launch_gelu(u, kind="tanh")
        ctx.mark_non_differentiable(found[1])
        return s, *found

    @staticmethod
    @once_differentiable
    def backward(ctx, ds, du, _):
        return AddNormLinear.backward(ctx, ds, du)[:-1]


class GeluLinear(Function):
    """The Linear of gelu(u); hidden: gelu(u), where there is one. keep: it is saved for the
    backward, else recomputed. by_matmul: that of its input writes du."""

    @staticmethod
    def forward(ctx, u, hidden, u_bias, weight, bias, kind, keep, trained, by_matmul, matmuls):
        if hidden is None:
            hidden = launch_gelu(u, None if trained else u, kind=kind)
        ctx.kind, ctx.by_matmul, ctx.matmuls = kind, by_matmul, matmuls
        ctx.save_for_backward(u, hidden if keep else None, weight)
        return matmuls.forward(hidden, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        u, hidden, weight = ctx.saved_tensors
        hidden = launch_gelu(u, kind=ctx.kind) if hidden is None else hidden
        found = cublaslt.gelu_backward(dout, weight, u) if ctx.by_matmul else None
        if found is None:
            dhidden, dweight = ctx.matmuls.gradients(dout, hidden, weight)
            du, dbias = launch_gelu_backward(dhidden, u, kind=ctx.kind)
        else:
            rows = dout.reshape(-1, len(weight))
            dweight = weight_gradient(weight, (rows, hidden.reshape(len(rows), -1)))
            du, dbias = found
        return du, None, dbias, dweight, *[None] * 6


class Gelu(Function):
    """gelu(u), for a Linear that checkpoint need not run again: torch's own, which keeps what its
    backward asks for before it computes."""

    @staticmethod
    def forward(ctx, u, u_bias, kind):
        ctx.kind = kind
        ctx.save_for_backward(u)
        return launch_gelu(u, kind=kind)

    @staticmethod
    @once_differentiable
    def backward(ctx, dhidden):
        return *launch_gelu_backward(dhidden.contiguous(), *ctx.saved_tensors, kind=ctx.kind), None
