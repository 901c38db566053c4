"""Attention: the reference, the forward, and the public function.

    o = softmax(q k^T / sqrt(d)) v        of each sequence and head
    lse = log2 of the sum of 2^(scores of a query), saved for the backward

Shapes: q and o (B, S, H d), k and v (B, T, H d), lse (B, H, S).
Bytes that must move, with e bytes a value and L = B H d: (2 S + 2 T) L e.
"""

from typing import NamedTuple

import torch

from cjepa_fast.kernels.attention.backward import attention_backward_op
from cjepa_fast.kernels.attention.descriptor_forward import (
    BY_DESCRIPTORS,
    TMA,
    ByDescriptors,
    _attention_descriptor_kernel,
    describable,
    descriptors,
)
from cjepa_fast.kernels.attention.heads import (
    LOG2_E,
    WIDTHS,
    compiled,
    load_parts,
    program_index,
    split,
    store_parts,
    strides,
    weigh,
)
from cjepa_fast.kernels.common.dependent_launch import (
    also_dependent,
    dependent,
    wait_for_previous,
)
from cjepa_fast.kernels.common.launch import (
    TRITON_NAMES,
    Compiled,
    at_least,
    chosen,
    dot,
    last_dim_dense,
    narrow,
    on_its_device,
    use_kernel,
)
from cjepa_fast.kernels.common.maybe_triton import tl, triton
from cjepa_fast.kernels.common.operators import operator

WIDEST = 128  # values of a head


# --- the reference


def short_attention_reference(
    q_BHSd: torch.Tensor, k_BHTd: torch.Tensor, v_BHTd: torch.Tensor
) -> torch.Tensor:
    scores = (q_BHSd * q_BHSd.shape[-1] ** -0.5) @ k_BHTd.transpose(-2, -1)
    return scores.softmax(-1) @ v_BHTd


# --- the kernel


@triton.jit(do_not_specialize=["S", "T", "blocks"])
def _attention_kernel(
    q,  # (B, S, H d)
    k,  # (B, T, H d)
    v,  # (B, T, H d), strides as k
    out,  # (B, S, H d)
    lse,  # (B, H, S) fp32
    H, S, T, blocks, q_batch, q_row, k_batch, k_row, out_batch, out_row, scale,
    d: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """ROWS queries of one sequence and head, COLS keys at a time, with a running maximum.

    lse (B, H, S): log2 of the sum of 2^scores. scale: log2(e) / sqrt(d).
    """
    wait_for_previous(PDL)
    head, block, sequence = program_index(H, blocks)
    row = block * ROWS + tl.arange(0, ROWS)
    live = row < S
    q += sequence * q_batch + head * d
    k += sequence * k_batch + head * d
    v += sequence * k_batch + head * d
    q0, q1 = load_parts(q, row, live, q_row, d, D0, D1)
    most = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out0 = tl.zeros((ROWS, D0), tl.float32)
    out1 = tl.zeros((ROWS, D1 if D1 > 0 else D0), tl.float32)
    for start in range(0, T, COLS):
        col = start + tl.arange(0, COLS)
        k0, k1 = load_parts(k, col, col < T, k_row, d, D0, D1)
        weights, shrunk, most, total = weigh(
            q0, q1, k0, k1, col < T, most, total, scale, D1, ROWS, COLS
        )  # fmt: skip
        v0, v1 = load_parts(v, col, col < T, k_row, d, D0, D1)
        low = narrow(weights, v.dtype.element_ty)
        out0 = dot(low, v0, out0 * shrunk[:, None])
        if D1 > 0:
            out1 = dot(low, v1, out1 * shrunk[:, None])
    out += sequence * out_batch + head * d
    store_parts(out, row, live, out_row, out0 / total[:, None], out1 / total[:, None], d, D0, D1)
    tl.store(lse + (sequence * H + head) * S + row, most + tl.log2(total), mask=live)


# --- the launcher


class Tile(NamedTuple):
    """Queries and keys that a program takes at a time (forward), by that many warps."""

    rows: int
    cols: int
    warps: int
    stages: int = 2


TILES = (Tile(64, 64, 4), Tile(128, 64, 8), Tile(64, 32, 4), Tile(32, 32, 2))


def forward_candidates(S: int, d: int, tma: bool) -> tuple[str, tuple[Tile | ByDescriptors, ...]]:
    """tuned.py's key for S queries of d values, and the tiles to choose from. tma: whether the GPU
    has the tensor memory accelerator."""
    described = BY_DESCRIPTORS if tma and d % 8 == 0 else ()
    return f"attention {triton.next_power_of_2(S)}x{d}", TILES + described


@on_its_device
def launch_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    tile: Tile | ByDescriptors | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """o (B, S, H d), dense, and lse (B, H, S), of q (B, S, H d) and k, v (B, T, H d).

    Their last dimension must be dense, and the strides of k and v the same. What no descriptor can
    hold is read without.
    """
    assert q.stride(-1) == k.stride(-1) == 1, (q.stride(), k.stride())
    assert k.stride() == v.stride(), (k.stride(), v.stride())
    (B, S, width), T = q.shape, k.shape[1]
    d = width // heads
    out = torch.empty(B, S, width, device=q.device, dtype=q.dtype)
    lse = torch.empty(B, heads, S, device=q.device, dtype=torch.float32)
    if out.numel() == 0 or T == 0:
        return out.zero_(), lse.fill_(float("inf"))
    tile = tile or chosen(*forward_candidates(S, d, at_least(TMA, q.device)), q.device)
    described = isinstance(tile, ByDescriptors) and all(describable(x, d) for x in (q, k, v))
    if isinstance(tile, ByDescriptors) and not described:
        tile = TILES[0]
    D0, D1 = split(d)
    blocks = triton.cdiv(S, tile.rows)
    own = {"d": d, "D0": D0, "D1": D1, "ROWS": tile.rows, "COLS": tile.cols}
    own |= {"num_warps": tile.warps, "num_stages": tile.stages, **dependent(q.device)}
    if described:
        _attention_descriptor_kernel[(B * blocks * heads,)](
            *descriptors(q, k, v, heads, tile), out, lse, heads, S, T, blocks, *strides(out),
            d**-0.5 * LOG2_E, **own,
        )  # fmt: skip
    else:
        _attention_kernel[(B * blocks * heads,)](
            q, k, v, out, lse, heads, S, T, blocks, *strides(q), *strides(k), *strides(out),
            d**-0.5 * LOG2_E, **own,
        )  # fmt: skip
    return out, lse


# --- the operator


@operator("attention")
def attention_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return launch_attention(q, k, v, heads)


@torch.library.register_fake(attention_op)
def _(q, k, v, heads):
    B, S, width = q.shape
    return q.new_empty(B, S, width), q.new_empty(B, heads, S, dtype=torch.float32)


def _keep(ctx, inputs, output):
    *tensors, ctx.heads = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradient(ctx, dout, _):
    return *attention_backward_op(dout.contiguous(), *ctx.saved_tensors, ctx.heads), None


torch.library.register_autograd(attention_op, _gradient, setup_context=_keep)


# --- public


def takes(q_BHSd: torch.Tensor) -> bool:
    """Whether the kernels take these queries: of 16 bits, not too narrow, not too wide."""
    d = q_BHSd.shape[-1]
    return use_kernel(q_BHSd) and q_BHSd.dtype.itemsize == 2 and 8 <= d <= WIDEST


def _side_by_side(x_BHSd: torch.Tensor) -> torch.Tensor:
    """(B, S, H d), its last dimension dense: as it lies, where a projection wrote it."""
    return last_dim_dense(x_BHSd.transpose(1, 2).flatten(2))


def short_attention(
    q_BHSd: torch.Tensor, k_BHTd: torch.Tensor, v_BHTd: torch.Tensor
) -> torch.Tensor:
    """(B, H, S, d), the heads of a token side by side in memory.

    float64 and fp32, and on the CPU all, go by the reference. Raises RuntimeError for what the
    kernels do not take, as torch does for its own: see `takes`.
    """
    if not use_kernel(q_BHSd, k_BHTd, v_BHTd) or q_BHSd.dtype == torch.float32:
        return short_attention_reference(q_BHSd, k_BHTd, v_BHTd)
    if not takes(q_BHSd):
        raise RuntimeError(f"no kernel for queries of shape {tuple(q_BHSd.shape)}")
    (B, H, _, d), T = q_BHSd.shape, k_BHTd.shape[2]
    if not k_BHTd.shape == v_BHTd.shape == (B, H, T, d):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q_BHSd, k_BHTd, v_BHTd))
        raise RuntimeError(f"no kernel for queries, keys and values of shapes {shapes}")
    q, k, v = (_side_by_side(x) for x in (q_BHSd, k_BHTd, v_BHTd))
    if k.stride() != v.stride():
        k, v = k.contiguous(), v.contiguous()
    return attention_op(q, k, v, H)[0].unflatten(-1, (H, -1)).transpose(1, 2)


# --- ahead of time


def ahead_of_time() -> list[Compiled]:
    """The kernel in every tile, in bf16 for each width of heads and in fp16 for one."""
    cases = [(torch.bfloat16, d) for d in WIDTHS] + [(torch.float16, 64)]
    return also_dependent(
        compiled("", _attention_kernel, TRITON_NAMES[dtype], d, tile, ROWS=tile.rows)
        for dtype, d in cases
        for tile in TILES
    )
