"""UPerNet's head (Xiao et al. 2018, arXiv 1807.10221) on the blocks of a plain ViT.

As MAE and BEiT use it: outputs of four blocks resampled to strides of 4, 8, 16 and 32 pixels, a
pyramid pooling of the last, a feature pyramid, and beside it a small convolutional head on the
third for an auxiliary loss.
Shapes: B images, D width of the encoder, C classes, h x w a level's grid.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

STRIDES = (4, 8, 16, 32)  # pixels
POOLED = (1, 2, 3, 6)  # sides of the pyramid pooling's grids
DROPOUT = 0.1
AUXILIARY = 2  # the level that the auxiliary head reads


def convolution(inside: int, outside: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outside),
        nn.ReLU(),
    )


def classifier(inside: int, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Dropout2d(DROPOUT), nn.Conv2d(inside, classes, 1))


def resampling(width: int, patch_size: int, stride: int) -> nn.Sequential:
    """From the patches' grid to one of about that stride, by powers of two."""
    doublings = round(math.log2(patch_size / stride))
    if doublings < 0:
        return nn.Sequential(nn.MaxPool2d(2**-doublings, ceil_mode=True))
    layers: list[nn.Module] = []
    for step in range(doublings):
        between = [nn.BatchNorm2d(width), nn.GELU()] if step else []
        layers += [*between, nn.ConvTranspose2d(width, width, 2, stride=2)]
    return nn.Sequential(*layers)


def grown(x_BDhw: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x_BDhw, like.shape[-2:], mode="bilinear", align_corners=False)


class UPerHead(nn.Module):
    """Logits from the outputs of four blocks, the earliest first."""

    def __init__(self, width: int, patch_size: int, classes: int, channels: int = 512):
        super().__init__()
        self.resample = nn.ModuleList(resampling(width, patch_size, s) for s in STRIDES)
        self.pooled = nn.ModuleList(convolution(width, channels, 1) for _ in POOLED)
        self.bottleneck = convolution(width + len(POOLED) * channels, channels, 3)
        self.lateral = nn.ModuleList(convolution(width, channels, 1) for _ in STRIDES[:-1])
        self.smooth = nn.ModuleList(convolution(channels, channels, 3) for _ in STRIDES[:-1])
        self.fuse = convolution(len(STRIDES) * channels, channels, 3)
        self.classify = classifier(channels, classes)
        self.auxiliary = nn.Sequential(
            convolution(width, channels // 2, 3), classifier(channels // 2, classes)
        )

    def forward(self, blocks_BDhw: list[torch.Tensor]) -> list[torch.Tensor]:
        """Logits (B, C, h, w) at the finest level; in training the auxiliary ones too."""
        levels = [make(x) for make, x in zip(self.resample, blocks_BDhw, strict=True)]
        merged = [lateral(x) for lateral, x in zip(self.lateral, levels[:-1], strict=True)]
        merged.append(self._pool(levels[-1]))
        for i in range(len(merged) - 2, -1, -1):
            merged[i] = merged[i] + grown(merged[i + 1], merged[i])
        smooth = [make(x) for make, x in zip(self.smooth, merged[:-1], strict=True)]
        fine = [grown(x, smooth[0]) for x in (*smooth, merged[-1])]
        logits = [self.classify(self.fuse(torch.cat(fine, 1)))]
        return [*logits, self.auxiliary(levels[AUXILIARY])] if self.training else logits

    def _pool(self, x_BDhw: torch.Tensor) -> torch.Tensor:
        pairs = zip(POOLED, self.pooled, strict=True)
        parts = [grown(make(F.adaptive_avg_pool2d(x_BDhw, side)), x_BDhw) for side, make in pairs]
        return self.bottleneck(torch.cat([x_BDhw, *parts], 1))
