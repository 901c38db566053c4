"""Attention, forward and backward, straight from and to the projections; made for short sequences.

    o = softmax(q k^T / sqrt(d)) v        of each sequence and head; no mask, no dropout
With P the softmax and do the gradient of o:
    dv = P^T do,   dS = P * (do v^T - rowsum(do * o)) / sqrt(d),   dq = dS k,   dk = dS^T q

Shapes: B sequences, S queries, T keys, H heads of d values; rows of all heads lie side by side, as
the projections write them, so q, k and v may be parts of one (B, T, 3 H d) tensor, and their
gradients then are parts of one too. For 16-bit types; what is summed is fp32, P and dS are rounded
once to the inputs' type, as in FlashAttention-2 (Dao 2023, arXiv 2307.08691).

The backward passes once over the keys where a program can hold all queries of a sequence and head,
so that q, k, v, o and do are read once, dq, dk and dv written once; of longer sequences, or where
that is faster, it makes two passes. Nothing is added up between programs, but for the sums of the
gradients' rows, for the projections' biases (parts, see sums.py).

Heads of 80 or 88 values are taken as 64 and 16 or 32, of 24 as 32: never as 128.

Bytes that must move, with e bytes a value and L = B H d: forward (2 S + 2 T) L e, backward
(4 S + 4 T) L e: q, o, do, dq; k, v, dk, dv. Operations: 4 S T L forward, 10 S T L backward.

The kernels are in attention_tiles.py.
"""

import torch

from cjepa_fast.kernels.attention_tiles import launch_attention, launch_attention_backward
from cjepa_fast.kernels.common.launch import use_kernel

WIDEST = 128  # values of a head


def attention_reference(
    q_BHSd: torch.Tensor, k_BHTd: torch.Tensor, v_BHTd: torch.Tensor
) -> torch.Tensor:
    scores = (q_BHSd * q_BHSd.shape[-1] ** -0.5) @ k_BHTd.transpose(-2, -1)
    return scores.softmax(-1) @ v_BHTd


def takes(q_BHSd: torch.Tensor) -> bool:
    """Whether the kernels take these queries: of 16 bits, not too narrow, not too wide."""
    d = q_BHSd.shape[-1]
    return use_kernel(q_BHSd) and q_BHSd.dtype.itemsize == 2 and 8 <= d <= WIDEST


# --- the operator


@torch.library.custom_op("cjepa_fast::attention", mutates_args=())
def attention_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return launch_attention(q, k, v, heads)


@torch.library.custom_op("cjepa_fast::attention_backward", mutates_args=())
def attention_backward_op(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, heads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    grads = tuple(torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k, v))
    launch_attention_backward(dout, q, k, v, out, lse, heads, grads)
    return grads


@attention_op.register_fake
def _(q, k, v, heads):
    B, S, width = q.shape
    return q.new_empty(B, S, width), q.new_empty(B, heads, S, dtype=torch.float32)


@attention_backward_op.register_fake
def _(dout, q, k, v, out, lse, heads):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _keep(ctx, inputs, output):
    *tensors, ctx.heads = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradient(ctx, dout, _):
    return *attention_backward_op(dout.contiguous(), *ctx.saved_tensors, ctx.heads), None


attention_op.register_autograd(_gradient, setup_context=_keep)


def _side_by_side(x_BHSd: torch.Tensor) -> torch.Tensor:
    """(B, S, H d): as it lies, where it is a part of what a projection wrote."""
    return x_BHSd.transpose(1, 2).flatten(2)


def attention(q_BHSd: torch.Tensor, k_BHTd: torch.Tensor, v_BHTd: torch.Tensor) -> torch.Tensor:
    """(B, H, S, d), the heads of a token side by side in memory.

    float64 and fp32, and on the CPU all, go by the definition. Raises RuntimeError for what the
    kernels do not take, as torch does for its own: see `takes`.
    """
    if not use_kernel(q_BHSd, k_BHTd, v_BHTd) or q_BHSd.dtype == torch.float32:
        return attention_reference(q_BHSd, k_BHTd, v_BHTd)
    if not takes(q_BHSd):
        raise RuntimeError(f"no kernel for queries of shape {tuple(q_BHSd.shape)}")
    q, k, v = (_side_by_side(x) for x in (q_BHSd, k_BHTd, v_BHTd))
    if k.stride() != v.stride():
        k, v = k.contiguous(), v.contiguous()
    H = q_BHSd.shape[1]
    return attention_op(q, k, v, H)[0].unflatten(-1, (H, -1)).transpose(1, 2)
