"""The block of a ViT: attention and MLP, each behind a norm, plain and by our kernels.

Shapes: B sequences, S tokens of a sequence, D width, H heads. Packed sequences (packed.py) are one
row of S = T tokens, B = 1, of which only attention sees the cuts.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from cjepa_fast.kernels.fp8 import E4M3, quantise_gelu
from cjepa_fast.kernels.gelu import APPROXIMATE
from cjepa_fast.kernels.norm import takes
from cjepa_fast.model.attention import attend, attend_by_block, attend_packed, flash_attention
from cjepa_fast.model.cpu_linear import Linear, linear, linear_gelu
from cjepa_fast.model.fp8 import trained_linear
from cjepa_fast.model.fused_mlp import fused_mlp
from cjepa_fast.model.fused_ops import (
    NONE,
    AddNorm,
    AddNormLast,
    AddNormLinear,
    Matmul,
    Pending,
    add_norm_fp8,
    attend_heads,
    attend_last,
    matmuls_of,
)
from cjepa_fast.model.packed import Sequences
from cjepa_fast.model.recompute import RecomputePolicy

# What attention must know of a row: one sequence; or several packed; or (M, P), a context and then
# M blocks of P tokens, as attention.attend_by_block sees them.
Layout = None | Sequences | tuple[int, int]


class Norm(nn.LayerNorm):
    """LayerNorm in the dtype of the residual stream; its output has the dtype of its weights."""

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        affine = self.weight.to(x_BSD.dtype), self.bias.to(x_BSD.dtype)
        return F.layer_norm(x_BSD, self.normalized_shape, *affine, self.eps).to(self.weight.dtype)


def last_of(x_BSD: torch.Tensor, last: int, layout: Layout) -> torch.Tensor:
    """The last tokens of each sequence: (B, last, D), or packed again, (1, real * last, D)."""
    if isinstance(layout, Sequences):
        return x_BSD.index_select(1, layout.last(last))
    return x_BSD[:, -last:]


class BlockLinear(Linear):
    """in_fp8: its output and its input's gradient are matmuls in FP8 (fp8.py)."""

    in_fp8 = False

    def forward(self, x_BSC: torch.Tensor) -> torch.Tensor:
        if self.in_fp8:
            return trained_linear(x_BSC, self.weight, self.bias)
        return super().forward(x_BSC)


class QueryKeyValue(BlockLinear):
    """The three projections of attention as one Linear of width D -> 3 D."""

    def forward(
        self, x_BSD: torch.Tensor, last: int | None = None, layout: Layout = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v, each (B, S, D); q of the last tokens alone if asked, (B, last, D)."""
        D = x_BSD.shape[-1]
        if last is None:
            return super().forward(x_BSD).split(D, -1)
        q = linear(last_of(x_BSD, last, layout), self.weight[:D], self.bias[:D])
        return q, *linear(x_BSD, self.weight[D:], self.bias[D:]).split(D, -1)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, backend: str = "auto"):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        if backend == "flash_attn":
            flash_attention()  # to fail here, not in the first step
        self.heads = heads
        self.backend = backend
        self.qkv = QueryKeyValue(width, 3 * width)
        self.proj = BlockLinear(width, width)

    def heads_of(
        self, x_BSD: torch.Tensor, last: int | None = None, layout: Layout = None
    ) -> list[torch.Tensor]:
        """q, k and v, each (B, H, S, d); q of the last tokens alone if asked."""
        parts = self.qkv(x_BSD, last, layout)
        return [x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in parts]

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        last: int | None = None,
        layout: Layout = None,
    ) -> torch.Tensor:
        """(B, S, D) from what `heads_of` gave, asked for the same."""
        if isinstance(layout, Sequences):
            queries = layout if last is None else layout.of_last(last)
            rows = (x_1HSd[0].transpose(0, 1) for x_1HSd in (q, k, v))
            return self.proj(attend_packed(*rows, queries, layout, self.backend).flatten(1)[None])
        if layout is None:
            x_BHSd = attend(q, k, v, self.backend)
        else:
            x_BHSd = attend_by_block(q, k, v, *layout, self.backend)
        return self.proj(x_BHSd.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """gelu: a kind of kernels/gelu.py, "exact" or "tanh"."""

    def __init__(self, width: int, hidden: int, gelu: str = "exact"):
        super().__init__()
        self.gelu = gelu
        self.fc1 = BlockLinear(width, hidden)
        self.fc2 = BlockLinear(hidden, width)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        if self.fc1.in_fp8:
            return self.output(self.fc1(x_BSD))
        return self.fc2(linear_gelu(x_BSD, self.fc1.weight, self.fc1.bias, self.gelu))

    def output(self, hidden_BSX: torch.Tensor) -> torch.Tensor:
        """What follows fc1."""
        return self.fc2(F.gelu(hidden_BSX, approximate=APPROXIMATE[self.gelu]))


class Block(nn.Module):
    """x + attention(norm1(x)), and to that the MLP of its norm2; sums in the dtype of x.

    checkpointing: see recompute.py. `forward` is the definition, for any dtype and device; `fused`
    and `fp8` compute the same from our kernels, and hand on the last branch unadded.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        backend: str = "auto",
        checkpointing: str = "none",
        gelu: str = "exact",
    ):
        super().__init__()
        self.norm1 = Norm(width, eps=1e-6)
        self.attn = Attention(width, heads, backend)
        self.norm2 = Norm(width, eps=1e-6)
        self.mlp = MLP(width, round(width * mlp_ratio), gelu)
        self.policy = RecomputePolicy(checkpointing)

    def forward(
        self,
        x_BSD: torch.Tensor,
        last: int | None = None,
        layout: Layout = None,
    ) -> torch.Tensor:
        """All tokens, or the last of each sequence alone, (B, last, D), having attended to all."""
        return self.policy.run("block", self._forward, x_BSD, last, layout)

    def _forward(self, x_BSD: torch.Tensor, last: int | None, layout: Layout) -> torch.Tensor:
        heads = self.policy.run("heads", self._heads, x_BSD, last, layout)
        x_BSD = x_BSD if last is None else last_of(x_BSD, last, layout)
        x_BSD = x_BSD + self.attn(*heads, last, layout)
        return x_BSD + self.policy.run("mlp", self._mlp, x_BSD)

    def _heads(self, x_BSD: torch.Tensor, last: int | None, layout: Layout) -> list[torch.Tensor]:
        return self.attn.heads_of(self.norm1(x_BSD), last, layout)

    def _mlp(self, x_BSD: torch.Tensor) -> torch.Tensor:
        if not self.policy.recomputes("hidden"):
            return self.mlp(self.norm2(x_BSD))
        return self.policy.run(
            "output", self.mlp.output, self.policy.run("hidden", self._hidden, x_BSD)
        )

    def _hidden(self, x_BSD: torch.Tensor) -> torch.Tensor:
        return self.mlp.fc1(self.norm2(x_BSD))

    def fused(
        self, x_BSD: torch.Tensor, pending: Pending = NONE, last: int | None = None
    ) -> tuple[torch.Tensor, Pending]:
        """The residual stream and the branch still to be added to it, after this block.

        last: of the last tokens alone, (B, last, D).
        """
        return self.policy.run("block", self._fused, x_BSD, pending, last)

    def _fused(
        self, x: torch.Tensor, pending: Pending, last: int | None
    ) -> tuple[torch.Tensor, Pending]:
        attn, mlp, trained = self.attn, self.mlp, torch.is_grad_enabled()
        one, two = self.norm1, self.norm2
        args = x, *pending, one.weight, one.bias, one.eps, attn.qkv.weight, attn.qkv.bias
        if last is None:
            keep = "heads" not in self.policy
            s, qkv = AddNormLinear.apply(*args, keep, matmuls_of(attn.qkv))
            a = attend_heads(attn, qkv, trained)
        else:
            s, q, kv = AddNormLast.apply(*args, last)
            a = attend_last(attn, q, kv, trained)
        y = Matmul.apply(a, attn.proj.weight, attn.proj.bias, matmuls_of(attn.proj))

        s, y = self.policy.run("mlp", fused_mlp, s, y, attn.proj.bias, two, mlp, self.policy)
        return s, (y, mlp.fc2.bias)

    def fp8(
        self, x_BSD: torch.Tensor, y_BSD: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The block's forward with FP8 linear layers (fp8.py), without gradients; y: the branch."""
        x, rows = add_norm_fp8(x_BSD, y_BSD, self.norm1)
        a = attend_heads(self.attn, self.attn.qkv.side_by_side(rows), False)
        x, rows = add_norm_fp8(x, self.attn.proj(a), self.norm2)
        return x, self.mlp.fc2(quantise_gelu(self.mlp.fc1(rows), self.mlp.gelu))


def supports(blocks: Sequence[nn.Module], x: torch.Tensor) -> bool:
    """Whether the kernels take this residual stream and these blocks, in 16 bits (or FP8)."""
    weight = blocks[0].norm1.weight
    return takes(x, weight) and weight.dtype.itemsize == 2 and not torch.compiler.is_compiling()


def run_fused(
    blocks: Sequence[nn.Module], norm: nn.Module, x: torch.Tensor, last: int | None = None
) -> torch.Tensor:
    """All blocks, then the norm: (B, S, D); last: of the last tokens alone, (B, last, D).

    Equal to the blocks called one by one up to where sums are rounded.
    """
    x, pending = x.contiguous(), NONE
    if blocks[0].mlp.fc1.weight.dtype == E4M3:
        y = None
        for block in blocks:
            x, y = block.fp8(x, y)
        return AddNorm.apply(x, y, None, norm.weight, norm.bias, norm.eps)
    for block in blocks[:-1]:
        x, pending = block.fused(x, pending)
    x, pending = blocks[-1].fused(x, pending, last)
    return AddNorm.apply(x, *pending, norm.weight, norm.bias, norm.eps)
