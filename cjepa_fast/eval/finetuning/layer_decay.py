"""What a fine-tuning does by the depth of a block: layer decay and drop path.

Layer decay: Clark et al. 2020, arXiv 2003.10555, as in BEiT and MAE. Drop path: Huang et al. 2016,
arXiv 1603.09382.
"""

import functools

import torch
from torch import nn

from cjepa_fast.model.vit import Encoder


def layer_decay_groups(
    model: nn.Module, encoder: Encoder, decay: float, weight_decay: float
) -> list[dict]:
    """AdamW's groups of all of a model that is trained, of which the encoder is a part.

    "lr_scale", for a schedule: 1 for what follows the encoder's blocks, `decay` to the power of 1
    for the last block, of 2 for the one before, of depth + 1 for the patch embedding and learned
    positions. Those, biases and norms take no weight decay ("decays").
    """
    embedding = [encoder.pos_embed, *encoder.patch_embed.parameters()]
    level = {id(p): encoder.depth + 1 for p in embedding}
    for i, block in enumerate(encoder.blocks):
        level |= {id(p): encoder.depth - i for p in block.parameters()}
    groups: dict[tuple[int, bool], list] = {}
    for p in model.parameters():
        if p.requires_grad:
            decays = p.dim() > 1 and p is not encoder.pos_embed
            groups.setdefault((level.get(id(p), 0), decays), []).append(p)
    return [
        {
            "params": p,
            "lr_scale": decay**below,
            "decays": decays,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (below, decays), p in groups.items()
    ]


def drop_path(x_BSD: torch.Tensor, probability: float) -> torch.Tensor:
    """Each image's branch left out with that probability, the others' scaled to keep the mean."""
    kept_B11 = x_BSD.new_empty(len(x_BSD), 1, 1).bernoulli_(1 - probability)
    return x_BSD * (kept_B11 / (1 - probability))


def add_drop_path(encoder: Encoder, probability: float) -> None:
    """While training, the blocks drop branches; the probability grows from 0 to `probability`."""
    for block, own in zip(
        encoder.blocks, torch.linspace(0, probability, encoder.depth), strict=True
    ):
        if own > 0:
            hook = functools.partial(_drop_branch, float(own))
            for branch in (block.attn, block.mlp):
                branch.register_forward_hook(hook)


def _drop_branch(probability: float, branch: nn.Module, args, output: torch.Tensor):
    return drop_path(output, probability) if branch.training else output
