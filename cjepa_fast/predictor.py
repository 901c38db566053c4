"""The predictor: from the context's tokens and the targets' positions to the targets' tokens.

A narrow ViT. Each target block has its own sequence, the context followed by one mask token for
each of its patches (I-JEPA, arXiv 2301.08243, section 3), or all share one. Parameter names are
I-JEPA's.
Shapes: B images, N patches, K context patches, M target blocks, P patches a block, D encoder
width, W predictor width.
"""

import torch
from torch import nn

from cjepa_fast.kernels.gather import predictor_input
from cjepa_fast.vit import Block, Norm, frozen_positions, init_weights, stream_of


class Predictor(nn.Module):
    """heads follow the encoder's; grid is the encoder's (rows, cols).

    mode "one_pass" runs the context once instead of once a target block: one sequence an image, in
    which a mask token sees the context and the mask tokens of its own block, and the context itself
    alone. With one block the outputs are those of "per_target"; with more it is other maths, since
    there the context sees the mask tokens from the second block on. Never the default without
    evidence that it learns as well. residual and checkpointing: see vit.Encoder and vit.Block.
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
    ):
        super().__init__()
        self.residual, self.mode = residual, mode
        self.predictor_embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.predictor_pos_embed = frozen_positions(*grid, width)
        self.predictor_blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, attention, checkpointing) for _ in range(depth)
        )
        self.predictor_norm = Norm(width, eps=1e-6)
        self.predictor_proj = nn.Linear(width, encoder_width)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(
        self,
        context_BKD: torch.Tensor,
        context_idx_BK: torch.Tensor,
        target_idx_BMP: torch.Tensor,
    ) -> torch.Tensor:
        """Predicted tokens of every target patch: (B, M, P, D)."""
        B, M, P = target_idx_BMP.shape
        sequences, target_blocks = target_idx_BMP, None
        if self.mode == "one_pass":
            sequences, target_blocks = target_idx_BMP.reshape(B, 1, M * P), (M, P)
        x = predictor_input(
            self.predictor_embed(context_BKD),
            stream_of(self.predictor_pos_embed[0], self.residual),
            self.mask_token[0, 0],
            context_idx_BK,
            sequences,
        )
        for block in self.predictor_blocks[:-1]:
            x = block(x, target_blocks=target_blocks)
        length = sequences.shape[-1]  # what becomes of the context is not read
        queries = self.predictor_blocks[-1](x, length, target_blocks)
        return self.predictor_proj(self.predictor_norm(queries)).view(B, M, P, -1)
