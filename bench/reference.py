"""The plain eager I-JEPA step that `bench/throughput.py --against reference` compares ours with.

The published method (Assran et al. 2023, arXiv 2301.08243) done the published way: all patches are
embedded and then gathered by an index expanded to the width, attention writes its map, each target
block has a whole sequence in every predictor block, position tables are repeated for every image,
the target's EMA is a loop over parameters. Without its logging: the step is as fast as such a
step is. Parameter names are those of cjepa_fast, whose weights it takes.

Letters: B images, N patches, K context patches, M target blocks, P patches a block, D width.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from cjepa_fast.data.loader import Batch
from cjepa_fast.model.predictor import Predictor
from cjepa_fast.model.vit import Encoder
from cjepa_fast.training import optim
from cjepa_fast.training.trainer import Trainer


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, S, D = x.shape
        qkv = self.qkv(x).reshape(B, S, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attention = (q @ k.transpose(-2, -1)) * (D // self.heads) ** -0.5
        x = (attention.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, S, D)
        return self.proj(x)


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def chosen(x_BND: torch.Tensor, idx_BK: torch.Tensor) -> torch.Tensor:
    """(B, K, D), by an index of the tokens' own size."""
    return torch.gather(x_BND, 1, idx_BK.unsqueeze(-1).repeat(1, 1, x_BND.shape[-1]))


class ReferenceEncoder(nn.Module):
    """Takes the shapes and the weights of a cjepa_fast Encoder."""

    def __init__(self, ours: Encoder):
        super().__init__()
        size, width = ours.patch_size, ours.width
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(ours.channels, width, size, size)
        self.pos_embed = nn.Parameter(ours.pos_embed.detach().clone(), requires_grad=False)
        hidden = ours.blocks[0].mlp.fc1.out_features
        self.blocks = nn.ModuleList(Block(width, ours.heads, hidden) for _ in ours.blocks)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: torch.Tensor, context_idx_BK: torch.Tensor | None = None):
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2) + self.pos_embed
        if context_idx_BK is not None:
            x = chosen(x, context_idx_BK)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class ReferencePredictor(nn.Module):
    """Takes the shapes and the weights of a cjepa_fast Predictor."""

    def __init__(self, ours: Predictor):
        super().__init__()
        wide, width = ours.predictor_embed.in_features, ours.predictor_embed.out_features
        self.predictor_embed = nn.Linear(wide, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        table = ours.predictor_pos_embed.detach().clone()
        self.predictor_pos_embed = nn.Parameter(table, requires_grad=False)
        first = ours.predictor_blocks[0]
        hidden = first.mlp.fc1.out_features
        self.predictor_blocks = nn.ModuleList(
            Block(width, first.attn.heads, hidden) for _ in ours.predictor_blocks
        )
        self.predictor_norm = nn.LayerNorm(width, eps=1e-6)
        self.predictor_proj = nn.Linear(width, wide)

    def forward(
        self, context: torch.Tensor, context_idx_BK: torch.Tensor, target_idx_BMP: torch.Tensor
    ) -> torch.Tensor:
        """(M * B, P, D): all images of block 0, then all of block 1, ..."""
        (B, K), M = context_idx_BK.shape, target_idx_BMP.shape[1]
        x = self.predictor_embed(context)
        table = self.predictor_pos_embed.repeat(B, 1, 1)
        x = x + chosen(table, context_idx_BK)
        queries = torch.cat([chosen(table, target_idx_BMP[:, m]) for m in range(M)])
        queries = self.mask_token.repeat(queries.shape[0], queries.shape[1], 1) + queries
        x = torch.cat([x.repeat(M, 1, 1), queries], dim=1)
        for block in self.predictor_blocks:
            x = block(x)
        return self.predictor_proj(self.predictor_norm(x)[:, K:])


class ReferenceTrainer:
    """I-JEPA's step beside a Trainer's, with its weights, schedules and batches.

    autocast: whether matmuls run in bf16, as released, or all in fp32.
    """

    def __init__(self, trainer: Trainer, autocast: bool):
        self.trainer, self.autocast, self.device = trainer, autocast, trainer.device
        ours, ema = trainer.engine.module, trainer.ema.module
        self.encoder = ReferenceEncoder(ours.encoder).to(self.device)
        self.encoder.load_state_dict(ours.encoder.state_dict())
        self.predictor = ReferencePredictor(ours.predictor).to(self.device)
        self.predictor.load_state_dict(ours.predictor.state_dict())
        self.target = copy.deepcopy(self.encoder)
        self.target.load_state_dict(ema.state_dict())
        self.networks = nn.ModuleList([self.encoder, self.predictor])
        groups = optim.parameter_groups(self.networks)
        config = trainer.config.optim
        self.optimizer = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps)

    def loss(self, batch: Batch) -> torch.Tensor:
        images, masks = batch.images_BCHW.float(), batch.masks
        context_idx, target_idx = masks.context_idx_BK.long(), masks.target_idx_BMP.long()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            with torch.no_grad():
                h = self.target(images)
                h = F.layer_norm(h, (h.shape[-1],))
                h = torch.cat([chosen(h, target_idx[:, m]) for m in range(target_idx.shape[1])])
            z = self.predictor(self.encoder(images, context_idx), context_idx, target_idx)
            return F.smooth_l1_loss(z, h)

    def step(self, batches: list[Batch], index: int) -> float:
        """One update from the step's micro-batches; the loss, as a number each time."""
        lr, weight_decay, momentum = self.trainer.schedules(index)
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = lr, weight_decay if group["decay"] else 0.0
        total = 0.0
        for batch in batches:
            loss = self.loss(batch) / len(batches)
            total += loss.item()
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for q, k in zip(self.encoder.parameters(), self.target.parameters(), strict=True):
                k.mul_(momentum).add_((1.0 - momentum) * q.detach())
        return total
