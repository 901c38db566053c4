"""An encoder with a head that gives each pixel a class, and the ways it is asked.

Shapes: B images, D width, C classes, h x w the patches' grid.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from cjepa_fast.eval.dense.upernet import UPerHead
from cjepa_fast.model.vit import Encoder

AUXILIARY_WEIGHT = 0.4


class LinearHead(nn.Module):
    """BatchNorm and a 1 x 1 convolution on the normed outputs of the last blocks, side by side."""

    def __init__(self, width: int, layers: int, classes: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(layers * width)
        self.classify = nn.Conv2d(layers * width, classes, 1)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.zeros_(self.classify.bias)

    def forward(self, layers_BDhw: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self.classify(self.norm(torch.cat(layers_BDhw, 1)))]


class Segmenter(nn.Module):
    """head: "linear", on the last `layers` blocks, or "upernet". frozen: the encoder learns nothing
    and stays in evaluation mode."""

    def __init__(self, encoder: Encoder, head: str, classes: int, *, layers: int, frozen: bool):
        super().__init__()
        self.encoder, self.frozen, self.layers = encoder, frozen, layers
        self.quarters = None
        if head == "linear":
            self.head: nn.Module = LinearHead(encoder.width, layers, classes)
        else:
            self.head = UPerHead(encoder.width, encoder.patch_size, classes)
            self.quarters = [math.ceil(encoder.depth * q / 4) - 1 for q in range(1, 5)]
            encoder.norm.requires_grad_(False)  # blocks are read as they are, so it is not used
        if frozen:
            encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> "Segmenter":
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, images_BCHW: torch.Tensor) -> list[torch.Tensor]:
        """Logits (B, C, h, w), coarser than the images: the head's, then auxiliary ones if any."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            tokens = self._tokens(images_BCHW)
        rows = images_BCHW.shape[-2] // self.encoder.patch_size
        return self.head([x.transpose(1, 2).unflatten(2, (rows, -1)) for x in tokens])

    def _tokens(self, images_BCHW: torch.Tensor) -> list[torch.Tensor]:
        if self.quarters is None:
            return self.encoder.layers(images_BCHW, self.encoder.last(self.layers))
        x = self.encoder.embedded(images_BCHW, None)
        after = []
        for block in self.encoder.blocks:
            x = block(x)
            after.append(x)
        return [after[i] for i in self.quarters]


def loss_of(logits: Sequence[torch.Tensor], labels_BHW: torch.Tensor, ignore: int) -> torch.Tensor:
    """Cross entropy a pixel, the logits upsampled to the labels; 0 where all is ignored."""
    count = (labels_BHW != ignore).sum().clamp(min=1)
    total = labels_BHW.new_zeros((), dtype=torch.float32)
    for weight, part in zip((1.0, AUXILIARY_WEIGHT), logits, strict=False):
        fine = F.interpolate(part.float(), labels_BHW.shape[-2:], mode="bilinear")
        wrong = F.cross_entropy(fine, labels_BHW, ignore_index=ignore, reduction="sum")
        total = total + weight * wrong / count
    return total


def logits_whole(model: nn.Module, images_BCHW: torch.Tensor) -> torch.Tensor:
    """Logits in the images' size: (B, C, H, W) fp32."""
    return F.interpolate(model(images_BCHW)[0].float(), images_BCHW.shape[-2:], mode="bilinear")


def logits_sliding(
    model: nn.Module, images_BCHW: torch.Tensor, window: int, stride: int
) -> torch.Tensor:
    """The logits, averaged over square windows of that side, `stride` pixels apart; the last of a
    row or column ends with the image. The image's sides and `window` are multiples of the patch."""
    spans = [_spans(size, window, stride) for size in images_BCHW.shape[-2:]]
    total, count = 0, torch.zeros(images_BCHW.shape[-2:], device=images_BCHW.device)
    for rows in spans[0]:
        for cols in spans[1]:
            part = logits_whole(model, images_BCHW[..., rows, cols])
            if not torch.is_tensor(total):
                total = part.new_zeros((*part.shape[:2], *images_BCHW.shape[-2:]))
            total[..., rows, cols] += part
            count[rows, cols] += 1
    return total / count


def _spans(size: int, window: int, stride: int) -> list[slice]:
    if size <= window:
        return [slice(0, size)]
    starts = [*range(0, size - window, stride), size - window]
    return [slice(start, start + window) for start in starts]
