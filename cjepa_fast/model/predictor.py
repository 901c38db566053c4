"""The predictor: from the context's tokens and the targets' positions to the targets' tokens.

A narrow ViT. Each target block has its own sequence, the context followed by one mask token for
each of its patches (I-JEPA, arXiv 2301.08243, section 3), or all share one. Parameter names are
I-JEPA's.
Shapes: B images, N patches, K context patches, M target blocks, P patches a block, D encoder
width, W predictor width, T tokens of a packed context.
"""

import functools

import torch
from torch import nn

from cjepa_fast.kernels.gather import add_positions, predictor_input
from cjepa_fast.model.block import Block, Norm, run_fused, supports
from cjepa_fast.model.cpu_linear import Linear
from cjepa_fast.model.packed import PackedContext, Sequences
from cjepa_fast.model.vit import frozen_positions, init_weights, stream_of


class Predictor(nn.Module):
    """heads follow the encoder's; grid is the encoder's (rows, cols).

    mode "one_pass" runs the context once instead of once a target block: one sequence an image, in
    which a mask token sees the context and the mask tokens of its own block, and the context itself
    alone. With one block the outputs are those of "per_target"; with more it is other maths, since
    there the context sees the mask tokens from the second block on. Never the default without
    evidence that it learns as well. residual, checkpointing, init and gelu: see vit.Encoder.
    """

    def __init__(
        self,
        encoder_width: int,
        grid: tuple[int, int],
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        attention: str = "auto",
        residual: str = "bf16",
        checkpointing: str = "none",
        mode: str = "per_target",
        init: str = "ijepa",
        gelu: str = "exact",
    ):
        super().__init__()
        self.residual, self.mode, self.fused = residual, mode, False
        self.predictor_embed = Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.predictor_pos_embed = frozen_positions(*grid, width)
        self.predictor_blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, attention, checkpointing, gelu) for _ in range(depth)
        )
        self.predictor_norm = Norm(width, eps=1e-6)
        self.predictor_proj = Linear(width, encoder_width)
        self.apply(functools.partial(init_weights, init=init))
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        context_BKD: torch.Tensor,
        context: torch.Tensor | PackedContext,
        target_idx_BMP: torch.Tensor,
    ) -> torch.Tensor:
        """Predicted tokens of every target patch: (B, M, P, D).

        context: the patch indices of the context tokens, int64 (B, K); packed for tokens (1, T, D).
        """
        B, M, P = target_idx_BMP.shape
        x = self.predictor_embed(context_BKD)
        positions = stream_of(self.predictor_pos_embed[0], self.residual)
        made = self._packed_input if isinstance(context, PackedContext) else self._input
        x, length, layout = made(x, positions, context, target_idx_BMP)
        # What becomes of the context is not read after the last block.
        if self.fused and layout is None and supports(self.predictor_blocks, x):
            queries = run_fused(self.predictor_blocks, self.predictor_norm, x, length)
        else:
            for block in self.predictor_blocks[:-1]:
                x = block(x, layout=layout)
            last = self.predictor_blocks[-1]
            queries = self.predictor_norm(last(x, last=length, layout=layout))
        return self.predictor_proj(queries).view(B, M, P, -1)

    def _input(
        self,
        x_BKW: torch.Tensor,
        positions_NW: torch.Tensor,
        context_idx_BK: torch.Tensor,
        target_idx_BMP: torch.Tensor,
    ) -> tuple[torch.Tensor, int, tuple[int, int] | None]:
        """The sequences, how many mask tokens each has, and what attention must know of them."""
        B, M, P = target_idx_BMP.shape
        layout = None
        if self.mode == "one_pass":
            target_idx_BMP, layout = target_idx_BMP.reshape(B, 1, M * P), (M, P)
        token, length = self.mask_token[0, 0], target_idx_BMP.shape[-1]
        x = predictor_input(x_BKW, positions_NW, token, context_idx_BK, target_idx_BMP)
        return x, length, layout

    def _packed_input(
        self,
        x_1TW: torch.Tensor,
        positions_NW: torch.Tensor,
        context: PackedContext,
        target_idx_BMP: torch.Tensor,
    ) -> tuple[torch.Tensor, int, Sequences]:
        """The input of packed sequences: (1, M * (T + B * P), W), P, and where they begin."""
        M, P = target_idx_BMP.shape[1:]
        context_TW = add_positions(x_1TW, positions_NW, context.idx_T[None])[0]
        queries = self.mask_token[0, 0] + positions_NW[target_idx_BMP.flatten()]
        sequences, row = context.sequences.copied(x_1TW.shape[1], M, P)
        tokens = torch.cat([context_TW] * M + [queries])
        # Each token has one row, so the backward reads every row once and adds none by chance.
        return torch.empty_like(tokens).index_copy_(0, row, tokens)[None], P, sequences
