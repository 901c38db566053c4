"""The operators of a fused block, each with its backward written out.

block.Block.forward says what is computed; Block.fused does the same in 16 bits, by the kernels of
norm.py, gelu.py and attention/ between cuBLAS's matmuls:

    s, qkv = x + y, Linear(norm1(x + y))      AddNormLinear
    a      = attention(qkv)                   Attention
    y      = Linear(a)                        Matmul
    s, u   = s + y, Linear(norm2(s + y))      AddNormLinear
    y      = Linear(gelu(u))                  GeluLinear, of fused_mlp.py

A block hands on the residual stream and its last branch y unadded, since the next block's first
kernel adds them as it reads them. Nothing is compiled, so a batch may have any lengths, and a block
is 8 launches forward and 16 backward.

The bias gradient is taken by the consumer. The gradient of a Linear's bias is the sum over rows of
its output's gradient. That output's consumer writes this gradient in its own backward and has it in
registers, so it sums it there, and no pass over memory is spent on it. So each operator here takes
the bias of the Linear BEFORE it and returns its gradient, and a Linear returns none for its own.
Where the consumer is no operator of ours, BiasGradientByConsumer stands between.

Shapes: B sequences, S tokens, D width, H heads; x, y, s (B, S, D), x and s in the dtype of the
residual stream, the rest in the weights'.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from cjepa_fast.kernels.attention import takes as takes_attention
from cjepa_fast.kernels.attention.backward import launch_attention_backward
from cjepa_fast.kernels.attention.forward import launch_attention
from cjepa_fast.kernels.fp8 import Rows, quantise_add_norm, quantise_norm
from cjepa_fast.kernels.norm import launch_add_norm, launch_add_norm_backward
from cjepa_fast.model import fp8
from cjepa_fast.model.attention import attend
from cjepa_fast.model.weight_stream import weight_gradient

Pending = tuple[torch.Tensor | None, torch.Tensor | None]  # a branch, and the bias of its Linear
NONE: Pending = (None, None)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    out = torch.addmm(bias, x.flatten(0, -2), weight.t())
    return out.view(*x.shape[:-1], len(weight))


def linear_gradients(
    dout: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x (..., C) and of the weight (O, C)."""
    rows = dout.reshape(-1, len(weight))
    return (rows @ weight).view(x.shape), weight_gradient(weight, (rows, x.reshape(len(rows), -1)))


def fp8_gradients(
    dout: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x and of the weight; that of x by an FP8 matmul."""
    dx, rows = fp8.input_gradient(dout, weight), dout.reshape(-1, len(weight))
    return dx, weight_gradient(weight, (rows, x.reshape(len(rows), -1)))


class LinearMatmuls(NamedTuple):
    """Those of a Linear: its output, and the gradients of its input and weight."""

    forward: Callable
    gradients: Callable


BF16 = LinearMatmuls(linear, linear_gradients)  # or fp16
FP8 = LinearMatmuls(fp8.linear, fp8_gradients)


def matmuls_of(layer: nn.Module) -> LinearMatmuls:
    """By the `in_fp8` of a block's Linear."""
    return FP8 if layer.in_fp8 else BF16


def branch_gradients(
    d: torch.Tensor, dy_bias: torch.Tensor, y_dtype: torch.dtype | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of a residual branch and of its bias; None where there is no branch."""
    return (None, None) if y_dtype is None else (d.to(y_dtype), dy_bias)


class AddNorm(Function):
    """norm(x + y)."""

    @staticmethod
    def forward(ctx, x, y, y_bias, gain, shift, eps):
        s, h, stats = launch_add_norm(x, y, gain, shift, eps)
        ctx.y_dtype = None if y is None else y.dtype
        ctx.save_for_backward(s, stats, gain)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        s, stats, gain = ctx.saved_tensors
        d, (dgain, dshift, dy_bias) = launch_add_norm_backward(
            dh.contiguous(), None, s, gain, stats
        )
        return d, *branch_gradients(d, dy_bias, ctx.y_dtype), dgain, dshift, None


class AddNormLinear(Function):
    """x + y, and the Linear of its norm. keep: the norm's output, else recomputed."""

    @staticmethod
    def forward(ctx, x, y, y_bias, gain, shift, eps, weight, bias, keep, matmuls):
        s, h = AddNormLinear.saved(ctx, x, y, gain, shift, eps, weight, keep, matmuls)
        return s, matmuls.forward(h, weight, bias)

    @staticmethod
    def saved(
        ctx, x, y, gain, shift, eps, weight, keep, matmuls
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x + y and its norm, and in ctx what the backward asks for."""
        s, h, stats = launch_add_norm(x, y, gain, shift, eps)
        ctx.y_dtype, ctx.eps = None if y is None else y.dtype, eps
        ctx.matmuls = matmuls
        ctx.save_for_backward(s, h if keep else None, stats, gain, shift, weight)
        ctx.set_materialize_grads(False)
        return s.view_as(s), h

    @staticmethod
    @once_differentiable
    def backward(ctx, ds, dout):
        s, h, stats, gain, shift, weight = ctx.saved_tensors
        if h is None:
            _, h, _ = launch_add_norm(s, None, gain, shift, ctx.eps)
        dh, dweight = ctx.matmuls.gradients(dout, h, weight)
        ds = None if ds is None else ds.contiguous()
        d, (dgain, dshift, dy_bias) = launch_add_norm_backward(dh, ds, s, gain, stats)
        branch = branch_gradients(d, dy_bias, ctx.y_dtype)
        return d, *branch, dgain, dshift, None, dweight, None, None, None


class AddNormLast(Function):
    """From x + y: its last tokens, the queries of these, and the keys and values of all."""

    @staticmethod
    def forward(ctx, x, y, y_bias, gain, shift, eps, weight, bias, last):
        s, h, stats = launch_add_norm(x, y, gain, shift, eps)
        D = x.shape[-1]
        h_last = h[:, -last:].contiguous()
        ctx.y_dtype, ctx.last = None if y is None else y.dtype, last
        ctx.save_for_backward(s, h, h_last, stats, gain, weight)
        q = linear(h_last, weight[:D], bias[:D])
        return s[:, -last:].contiguous(), q, linear(h, weight[D:], bias[D:])

    @staticmethod
    @once_differentiable
    def backward(ctx, ds_last, dq, dkv):
        s, h, h_last, stats, gain, weight = ctx.saved_tensors
        D = s.shape[-1]
        dq, dkv = dq.reshape(-1, D), dkv.reshape(-1, 2 * D)
        dh = (dkv @ weight[D:]).view(h.shape)
        dh[:, -ctx.last :] += (dq @ weight[:D]).view(h_last.shape)
        dweight = weight_gradient(weight, (dq, h_last.flatten(0, 1)), (dkv, h.flatten(0, 1)))
        ds = torch.zeros_like(s)
        ds[:, -ctx.last :] = ds_last
        d, (dgain, dshift, dy_bias) = launch_add_norm_backward(dh, ds, s, gain, stats)
        branch = branch_gradients(d, dy_bias, ctx.y_dtype)
        return d, *branch, dgain, dshift, None, dweight, None, None


class Attention(Function):
    """Attention of q, k, v side by side (B, S, 3 D), by kernels/attention/: (B, S, D)."""

    @staticmethod
    def forward(ctx, qkv, bias, heads):
        out, lse = launch_attention(*qkv.chunk(3, -1), heads)
        ctx.heads = heads
        ctx.save_for_backward(qkv, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        qkv, out, lse = ctx.saved_tensors
        dqkv = torch.empty_like(qkv)
        dbias = launch_attention_backward(
            dout.contiguous(), *qkv.chunk(3, -1), out, lse, ctx.heads, dqkv.chunk(3, -1), True
        )
        return dqkv, dbias, None


class AttentionLast(Function):
    """Attention of fewer queries than keys: q (B, last, D), kv (B, S, 2 D)."""

    @staticmethod
    def forward(ctx, q, kv, bias, heads):
        out, lse = launch_attention(q, *kv.chunk(2, -1), heads)
        ctx.heads = heads
        ctx.save_for_backward(q, kv, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, kv, out, lse = ctx.saved_tensors
        dq, dkv = torch.empty_like(q), torch.empty_like(kv)
        dbias = launch_attention_backward(
            dout.contiguous(), q, *kv.chunk(2, -1), out, lse, ctx.heads, (dq, *dkv.chunk(2, -1)),
            True,
        )  # fmt: skip
        return dq, dkv, dbias, None


class BiasGradientByConsumer(Function):
    """x as it is; its rows' gradients sum to that of the bias of the Linear before."""

    @staticmethod
    def forward(ctx, x, bias):
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx):
        return dx, dx.flatten(0, -2).sum(0)


class Matmul(Function):
    """A Linear, its bias's gradient left to who reads it."""

    @staticmethod
    def forward(ctx, x, weight, bias, matmuls):
        ctx.matmuls = matmuls
        ctx.save_for_backward(x, weight)
        return matmuls.forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        return *ctx.matmuls.gradients(dout, *ctx.saved_tensors), None, None


def add_norm_fp8(
    x: torch.Tensor, y: torch.Tensor | None, norm: nn.Module
) -> tuple[torch.Tensor, Rows]:
    args = norm.weight, norm.bias, norm.eps
    return (x, quantise_norm(x, *args)) if y is None else quantise_add_norm(x, y, *args)


def heads_of(x_BSX: torch.Tensor, parts: int, heads: int) -> list[torch.Tensor]:
    """The parts that lie side by side in x, each as (B, H, S, d)."""
    return [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in x_BSX.chunk(parts, -1)]


def attend_heads(attn: nn.Module, qkv_BSX: torch.Tensor, trained: bool) -> torch.Tensor:
    """Attention by attn.backend of q, k and v side by side, (B, S, 3 D): (B, S, D)."""
    q, k, v = heads_of(qkv_BSX, 3, attn.heads)
    if attn.backend == "triton" and takes_attention(q):
        return Attention.apply(qkv_BSX, attn.qkv.bias, attn.heads)
    if trained:
        q, k, v = heads_of(BiasGradientByConsumer.apply(qkv_BSX, attn.qkv.bias), 3, attn.heads)
    return attend(q, k, v, attn.backend).transpose(1, 2).flatten(2)


def attend_last(
    attn: nn.Module, q_BPD: torch.Tensor, kv_BSX: torch.Tensor, trained: bool
) -> torch.Tensor:
    """Attention of the last P tokens' queries to all keys and values, side by side."""
    D, bias = q_BPD.shape[-1], attn.qkv.bias
    if attn.backend == "triton" and takes_attention(*heads_of(q_BPD, 1, attn.heads)):
        return AttentionLast.apply(q_BPD, kv_BSX, bias, attn.heads)
    if trained:
        q_BPD, kv_BSX = (
            BiasGradientByConsumer.apply(q_BPD, bias[:D]),
            BiasGradientByConsumer.apply(kv_BSX, bias[D:]),
        )
    parts = *heads_of(q_BPD, 1, attn.heads), *heads_of(kv_BSX, 2, attn.heads)
    return attend(*parts, attn.backend).transpose(1, 2).flatten(2)
