"""softmax(q k^T / sqrt(d)) v by several kernels behind one function.

Shapes: B sequences, H heads, S queries, T keys, d values of a head; q (B, H, S, d), k and v
(B, H, T, d). No masks: every query sees every key of its sequence. `attend_packed` is for
sequences of different lengths, end to end.
"""

import functools
import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cjepa_fast.kernels.attention import short_attention, takes
from cjepa_fast.model.packed import Sequences
from cjepa_fast.runtime import hardware

SDPA = {"sdpa_flash": SDPBackend.FLASH_ATTENTION, "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION}
BACKENDS = ("plain", "sdpa", *SDPA, "flash_attn", "triton")
PACKED_BACKENDS = ("plain", "sdpa_flash", "flash_attn")  # those with a variable-length kernel
# Versions 4, 3 and 2 of flash-attn are packages of their own, each for some generations of GPUs
# (the first figure of the compute capability): the newest that loads and is for this one is taken.
FLASH_MODULES = {
    "flash_attn.cute": (9, 10, 11), "flash_attn_interface": (8, 9),
    "flash_attn": (8, 9, 10, 11, 12),
}  # fmt: skip


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str) -> torch.Tensor:
    """(B, H, S, d) by one of BACKENDS.

    "plain" writes the attention map: in bf16 on a CPU it is faster than SDPA. "sdpa" lets torch
    choose among its kernels, "sdpa_flash" and "sdpa_cudnn" name one, "flash_attn" is the package,
    "triton" is kernels/attention/ where that takes the shape, else sdpa.
    "auto" is sdpa on CUDA and plain elsewhere, until attention_trial.fastest has been asked.
    """
    backend = kernel_of(q, backend)
    if backend == "triton":
        return short_attention(q, k, v)
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


def kernel_of(q: torch.Tensor, backend: str) -> str:
    """Which of BACKENDS runs for these queries, where `backend` is asked for."""
    if backend == "auto" or (backend == "triton" and not takes(q)):
        return "sdpa" if q.is_cuda else "plain"
    return backend


def _plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None = None
) -> torch.Tensor:
    """By its definition; see `attention_map`. In fp32 on a CPU that multiplies no bf16: faster.

    The meta device does as this machine's CPU, for which it counts (training/cpu_micro_batch.py).
    """
    dtype, on_cpu = q.dtype, q.device.type != "cuda" and not torch.compiler.is_compiling()
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
    every other name is torch's variable-length kernel, which is flash attention, where that takes
    the queries, and plain elsewhere: see `packed_kernel_of`.
    """
    backend = packed_kernel_of(q_SHd, backend)
    lengths = queries.starts, keys.starts, queries.longest, keys.longest
    if backend == "flash_attn":
        names = "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"
        named = dict(zip(names, lengths, strict=True))  # their order differs between versions
        out = flash_attention("flash_attn_varlen_func")(q_SHd, k_THd, v_THd, **named)
        return out[0] if isinstance(out, tuple) else out
    if backend == "sdpa_flash":
        from torch.nn.attention.varlen import varlen_attn  # seconds to import

        return varlen_attn(q_SHd, k_THd, v_THd, *lengths)
    return _plain_packed(q_SHd, k_THd, v_THd, queries, keys)


def packed_kernel_of(q_SHd: torch.Tensor, backend: str) -> str:
    """Which of PACKED_BACKENDS runs for these queries, where `backend` is asked for. torch's takes
    16 bits on CUDA, and heads of a multiple of 8 values."""
    if backend in ("plain", "flash_attn"):
        return backend
    torch_takes = q_SHd.is_cuda and q_SHd.dtype.itemsize == 2 and q_SHd.shape[-1] % 8 == 0
    return "sdpa_flash" if torch_takes else "plain"


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
    generation = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else None
    for module, generations in FLASH_MODULES.items():
        if generation is not None and generation not in generations:
            errors.append(f"{module}: not for sm_{generation}x")
            continue
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            errors.append(f"{module}: {error}")
    raise ValueError(
        f'attention = "flash_attn": the package does not load ({"; ".join(errors)}): pip install '
        '--no-build-isolation flash-attn on a machine with CUDA, or take "auto"'
    )
