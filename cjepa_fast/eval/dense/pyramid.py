"""A ViT as a detector's backbone: the simple feature pyramid (ViTDet: Li et al. 2022, arXiv
2203.16527, section 3).

Only the last tokens of the ViT are used. Four branches bring their map to a quarter, half, once and
twice the stride of a patch, and the fifth level is every second cell of the coarsest.
Shapes: B images, H x W pixels, D width of the ViT, C channels of the pyramid, p patch size.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from cjepa_fast.model.vit import Encoder, PatchEmbed


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each cell: (B, C, H, W) to the same."""

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return super().forward(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Pyramid(nn.Module):
    """Images (B, 3, H, W) to five maps (B, C, H / s, W / s), one for each stride s, in fp32.

    All blocks attend globally. H and W are multiples of the coarsest stride. The strides are whole
    pixels, so a ViT whose patch is no multiple of 4 gets the next larger one that is (14: 16).
    bf16: the ViT and the branches compute in it; anchors, boxes and losses need more digits.
    """

    def __init__(self, encoder: Encoder, channels: int = 256, bf16: bool = False):
        super().__init__()
        self.encoder = enlarge_patches(encoder, -(-encoder.patch_size // 4) * 4)
        self.out_channels, self.bf16 = channels, bf16
        patch, D = self.encoder.patch_size, encoder.width
        self.strides = (patch // 4, patch // 2, patch, 2 * patch, 4 * patch)
        quarter = (_doubled(D, D // 2), ChannelNorm(D // 2), nn.GELU(), _doubled(D // 2, D // 4))
        branches = [(quarter, D // 4), ((_doubled(D, D // 2),), D // 2), ((), D)]
        branches.append(((nn.MaxPool2d(2),), D))
        self.branches = nn.ModuleList(
            nn.Sequential(*resize, *_smooth(width, channels)) for resize, width in branches
        )

    def forward(self, images_BCHW: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        """The maps by level, "0" (the finest) to "4"."""
        grid = [size // self.encoder.patch_size for size in images_BCHW.shape[-2:]]
        with torch.autocast(images_BCHW.device.type, torch.bfloat16, enabled=self.bf16):
            tokens_BND = self.encoder(images_BCHW)
            map_BDhw = tokens_BND.transpose(1, 2).unflatten(-1, grid)
            maps = [branch(map_BDhw) for branch in self.branches]
        maps.append(maps[-1][..., ::2, ::2])
        return OrderedDict((str(level), found.float()) for level, found in enumerate(maps))


def _doubled(width: int, out: int) -> nn.Module:
    return nn.ConvTranspose2d(width, out, kernel_size=2, stride=2)


def _smooth(width: int, channels: int) -> tuple[nn.Module, ...]:
    one = nn.Conv2d(width, channels, 1, bias=False)
    three = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    return one, ChannelNorm(channels), three, ChannelNorm(channels)


def enlarge_patches(encoder: Encoder, size: int) -> Encoder:
    """The encoder, changed in place, with patches of `size` pixels, no fewer than it has.

    Its kernel becomes the one that gives an enlarged (bilinear) patch the token which the patch
    had (FlexiViT: Beyer et al. 2023, arXiv 2212.08013, section 3.4).
    """
    old = encoder.patch_size
    if size == old:
        return encoder
    units = torch.eye(old**2, dtype=torch.float64).view(-1, 1, old, old)
    enlarged = F.interpolate(units, size=(size, size), mode="bilinear").flatten(1)
    before, embed = encoder.patch_embed.proj, PatchEmbed(size, encoder.width, encoder.channels)
    with torch.no_grad():
        kernel = before.weight.flatten(2).double() @ torch.linalg.pinv(enlarged).T
        embed.proj.weight.copy_(kernel.view_as(embed.proj.weight))
        embed.proj.bias.copy_(before.bias)
    encoder.patch_embed, encoder.patch_size = embed, size
    return encoder
