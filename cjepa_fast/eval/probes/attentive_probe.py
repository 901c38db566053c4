"""The network of an attentive probe: a learned query attends to the patch tokens of an encoder.

V-JEPA's, as attentive.py says, which trains it.
Shapes: B images, N patches, D width, H heads, d width of a head, C classes.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from cjepa_fast.model.block import MLP
from cjepa_fast.model.vit import Encoder


class AttentiveProbe(nn.Module):
    """Images to logits (B, C). The encoder is frozen; what is trained begins at `query`."""

    def __init__(self, encoder: Encoder, classes: int, bf16: bool = False):
        super().__init__()
        D = encoder.width
        self.encoder, self.bf16 = encoder.requires_grad_(False), bf16
        self.query = nn.Parameter(torch.empty(1, 1, D))
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.q, self.kv, self.proj = nn.Linear(D, D), nn.Linear(D, 2 * D), nn.Linear(D, D)
        self.mlp = MLP(D, 4 * D)
        self._initialise()
        self.head = nn.Linear(D, classes)

    def _initialise(self) -> None:
        """Normal of std 0.02; what ends a branch divided by the root of 2."""
        nn.init.normal_(self.query, std=0.02)
        for layer in (self.q, self.kv, self.proj, self.mlp.fc1, self.mlp.fc2):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        for layer in (self.proj, self.mlp.fc2):
            layer.weight.data.div_(math.sqrt(2))

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), torch.autocast(
            images_BCHW.device.type, torch.bfloat16, enabled=self.bf16
        ):  # fmt: skip
            tokens_BND = self.encoder(images_BCHW)
        return self.head(self.pool(tokens_BND.float()))

    def pool(self, tokens_BND: torch.Tensor) -> torch.Tensor:
        """What the query makes of the tokens: (B, D)."""
        k, v = self.kv(self.norm1(tokens_BND)).chunk(2, -1)
        q = self.q(self.query).expand(len(tokens_BND), -1, -1)
        q_BH1d, *kv_BHNd = (
            x.unflatten(-1, (self.encoder.heads, -1)).transpose(1, 2) for x in (q, k, v)
        )
        found = F.scaled_dot_product_attention(q_BH1d, *kv_BHNd).transpose(1, 2).flatten(2)
        x_B1D = self.query + self.proj(found)
        return (x_B1D + self.mlp(self.norm2(x_B1D)))[:, 0]
