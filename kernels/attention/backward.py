"""The backward of attention: which of its two ways, the launcher, and the operator.

One pass over the keys (one_pass_backward.py) or two (two_pass_backward.py): the choice is among the
candidates of `backward_candidates`. Nothing is added up between programs, but for the sums of the
gradients' rows, for the projections' biases (parts, see common/sums.py).

Shapes: q, o, do, dq (B, S, H d); k, v, dk, dv (B, T, H d); lse (B, H, S).
"""

import torch

from cjepa_fast.kernels.attention.heads import LOG2_E, split, strides
from cjepa_fast.kernels.attention.one_pass_backward import (
    OnePass,
    _attention_backward_kernel,
    one_pass,
)
from cjepa_fast.kernels.attention.two_pass_backward import (
    TWO_PASSES,
    TwoPasses,
    _attention_keys_kernel,
    _attention_queries_kernel,
)
from cjepa_fast.kernels.common.dependent_launch import dependent
from cjepa_fast.kernels.common.launch import chosen, on_its_device, roomy
from cjepa_fast.kernels.common.maybe_triton import triton
from cjepa_fast.kernels.common.operators import operator
from cjepa_fast.kernels.common.sums import sum_parts

# --- the launcher


def backward_candidates(
    S: int, d: int, device: torch.device
) -> tuple[str, tuple[OnePass | TwoPasses, ...]]:
    """The same of the backward, of one length from 129 to 144."""
    room = roomy(device)
    two = TWO_PASSES if room or d <= 64 else TWO_PASSES[:2]
    length = 144 if 128 < S <= 144 else max(64, triton.next_power_of_2(S))
    return f"attention backward {length}x{d}", one_pass(S, d, room) + two


@on_its_device
def launch_attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    heads: int,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    sums: bool = False,
    tile: OnePass | TwoPasses | None = None,
) -> torch.Tensor | None:
    """Fills grads, of the shapes of q, k and v; with `sums` returns the sums of their rows.

    These are (3 H d,) in q's dtype. dout must be dense, as out is.
    """
    (B, S, width), T = q.shape, k.shape[1]
    d = width // heads
    if dout.numel() == 0 or T == 0:
        for grad in grads:
            grad.zero_()
        return q.new_zeros(3 * width) if sums else None
    tile = tile or chosen(*backward_candidates(S, d, q.device), q.device)
    D0, D1 = split(d)
    dq, dk, dv = grads
    assert k.stride() == v.stride() and dk.stride() == dv.stride()
    blocks = triton.cdiv(max(S, T), tile.rows) if isinstance(tile, TwoPasses) else 1
    parts = torch.empty(B * blocks if sums else 0, 3 * width, device=q.device, dtype=torch.float32)
    own = {"scale": d**-0.5 * LOG2_E, "factor": d**-0.5, "d": d, "D0": D0, "D1": D1, "SUMS": sums}
    own |= {"COLS": tile.cols, "num_warps": tile.warps, "num_stages": tile.stages}
    own |= dependent(q.device)
    read = *strides(q), *strides(k), *strides(out)
    if isinstance(tile, OnePass):
        _attention_backward_kernel[(B * heads,)](
            q, k, v, out, dout, lse, dq, dk, dv, parts, heads, S, T,
            *read, *strides(dq), *strides(dk), ROWS0=tile.rows0, ROWS1=tile.rows1,
            maxnreg=tile.registers, **own,
        )  # fmt: skip
    else:
        delta, grid = torch.empty_like(lse), (B * blocks * heads,)
        _attention_queries_kernel[grid](
            q, k, v, out, dout, lse, delta, dq, parts, heads, S, T, blocks,
            *read, *strides(dq), ROWS=tile.rows, **own,
        )  # fmt: skip
        _attention_keys_kernel[grid](
            q, k, v, dout, lse, delta, dk, dv, parts, heads, S, T, blocks,
            *read, *strides(dk), ROWS=tile.rows, **own,
        )  # fmt: skip
    return sum_parts(parts, q.dtype) if sums else None


# --- the operator


@operator("attention_backward")
def attention_backward_op(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, heads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    grads = tuple(torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k, v))
    launch_attention_backward(dout, q, k, v, out, lse, heads, grads)
    return grads


@torch.library.register_fake(attention_backward_op)
def _(dout, q, k, v, out, lse, heads):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))
