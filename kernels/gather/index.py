"""What the gathers share: the checks and the layout of indices, and loading them in a kernel.

Indices of B images into tables of N rows each: (B, ...), int32 or int64. Nothing here is of the
width of the tokens.
"""

import dataclasses

import torch

from cjepa_fast.kernels.common.launch import Compiled
from cjepa_fast.kernels.common.maybe_triton import tl, triton

Rows = torch.Tensor  # of shape (B, S, D)


def check_indices(idx: torch.Tensor, rows: int) -> None:
    """On the CPU, raise IndexError for an index outside 0..rows-1.

    In the stacked tables such an index would silently read the neighbouring image.
    """
    if idx.device.type != "cpu" or idx.numel() == 0 or torch.compiler.is_compiling():
        return
    lowest, highest = (int(extreme) for extreme in torch.aminmax(idx))
    if lowest < 0 or highest >= rows:
        wrong = lowest if lowest < 0 else highest
        raise IndexError(f"index {wrong} is outside 0..{rows - 1}: there are N = {rows} patches")


def check_one_each(x_BKD: torch.Tensor, idx_BK: torch.Tensor) -> None:
    if idx_BK.shape != x_BKD.shape[:2]:
        raise ValueError(f"indices {[*idx_BK.shape]} for tokens {[*x_BKD.shape]}")


def is_constant(pos: torch.Tensor) -> bool:
    """Positions are a constant here: the kernels take no gradient for them, the references do."""
    return not (pos.requires_grad and torch.is_grad_enabled())


def check_width(x: torch.Tensor, **others: torch.Tensor) -> None:
    """Raise ValueError unless the others have x's last dimension; a kernel reads so far."""
    for name, other in others.items():
        if other.shape[-1] != x.shape[-1]:
            raise ValueError(f"{name} of width {other.shape[-1]} for tokens of {x.shape[-1]}")


# --- in a kernel


@triton.jit
def load_index(idx, offsets, live, N, DEBUG: tl.constexpr):
    """Indices as int64, 0 where not live, and which of them lie in the table of N rows."""
    index = tl.load(idx + offsets, mask=live, other=0).to(tl.int64)
    inside = (index >= 0) & (index < N)
    if DEBUG:
        tl.device_assert(inside | (live == 0), "an index is outside 0..N-1")
    return index, inside


# --- for a launcher


def dense_indices(idx: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(B, ...) -> (B, S), dense. Raises ValueError where they are not x's, (B, ...) there too."""
    if idx.device != x.device or len(idx) != len(x):
        raise ValueError(f"indices {[*idx.shape]} {idx.device} for {[*x.shape]} {x.device}")
    return idx.flatten(1).contiguous()


# --- ahead of time


def pointers(dtype: str, tensors: str, more: str = "", floats: str = "") -> dict[str, str]:
    """A signature: pointers to dtype by name, "idx" ones to int64; then integers, then floats."""
    kinds = {n: "*i64" if n.endswith("idx") else f"*{dtype}" for n in tensors.split()}
    return kinds | dict.fromkeys(more.split(), "i32") | dict.fromkeys(floats.split(), "fp32")


def asserting(kernels: list[Compiled]) -> list[Compiled]:
    """Those of the kernels that check indices, as the debug switch compiles them."""
    return [
        dataclasses.replace(
            one,
            name=f"{one.name}, debug",
            constexprs={**one.constexprs, "DEBUG": True},
            must_have=("__assertfail",),
            debug=True,
        )
        for one in kernels
        if "DEBUG" in one.constexprs
    ]
