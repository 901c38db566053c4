"""The predictor: from the context's tokens and the targets' positions to the targets' tokens.

A narrow ViT. Each target block has its own sequence, the context followed by one mask token for
each of its patches (I-JEPA, arXiv 2301.08243, section 3). Parameter names are I-JEPA's.
Shapes: B images, N patches, K context patches, M target blocks, P patches a block, D encoder
width, W predictor width, T tokens of a packed context.
"""

import torch
from torch import nn

from cjepa_fast.kernels.gather import add_positions, predictor_input
from cjepa_fast.sequences import PackedContext, Sequences
from cjepa_fast.vit import Block, frozen_positions, init_weights


class Predictor(nn.Module):
    """heads follow the encoder's; grid is the encoder's (rows, cols)."""

    def __init__(
        self,
        encoder_width: int,
        grid: tuple[int, int],
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        attention: str = "auto",
    ):
        super().__init__()
        self.predictor_embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.predictor_pos_embed = frozen_positions(*grid, width)
        self.predictor_blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, attention) for _ in range(depth)
        )
        self.predictor_norm = nn.LayerNorm(width, eps=1e-6)
        self.predictor_proj = nn.Linear(width, encoder_width)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(
        self,
        context_BKD: torch.Tensor,
        context: torch.Tensor | PackedContext,
        target_idx_BMP: torch.Tensor,
    ) -> torch.Tensor:
        """Predicted tokens of every target patch: (B, M, P, D).

        context: the places of the context's tokens, int64 (B, K); packed for tokens (1, T, D).
        """
        B, M, P = target_idx_BMP.shape
        made = self._packed_input if isinstance(context, PackedContext) else self._input
        x, packed = made(self.predictor_embed(context_BKD), context, target_idx_BMP)
        for block in self.predictor_blocks[:-1]:
            x = block(x, packed=packed)
        # What becomes of the context is not read.
        queries = self.predictor_blocks[-1](x, last=P, packed=packed)
        return self.predictor_proj(self.predictor_norm(queries)).view(B, M, P, -1)

    def _input(
        self, x_BKW: torch.Tensor, context_idx_BK: torch.Tensor, target_idx_BMP: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        positions, token = self.predictor_pos_embed[0], self.mask_token[0, 0]
        return predictor_input(x_BKW, positions, token, context_idx_BK, target_idx_BMP), None

    def _packed_input(
        self, x_1TW: torch.Tensor, context: PackedContext, target_idx_BMP: torch.Tensor
    ) -> tuple[torch.Tensor, Sequences]:
        """The same sequences packed, (1, M * (T + B * P), W), and where they begin."""
        M, P = target_idx_BMP.shape[1:]
        positions, T = self.predictor_pos_embed[0], x_1TW.shape[1]
        placed_TW = add_positions(x_1TW, positions, context.idx_T[None])[0]
        queries = self.mask_token[0, 0] + positions[target_idx_BMP.flatten()]
        sequences, place = context.sequences.copied(T, M, P)
        tokens = torch.cat([placed_TW] * M + [queries])
        # Each token has one place, so the backward reads every row once and adds none by chance.
        return torch.empty_like(tokens).index_copy_(0, place, tokens)[None], sequences
