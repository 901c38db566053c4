"""torchvision's Mask R-CNN over a ViT's pyramid, with the heads of ViTDet (arXiv 2203.16527).

Only imported by those who detect: torchvision is an extra.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from cjepa_fast.eval.dense.pyramid import ChannelNorm, Pyramid

ANCHOR_CELLS = 8  # an anchor's side in cells of its level: 32 pixels at a stride of 4
RATIOS = (0.5, 1.0, 2.0)


class Canvas(GeneralizedRCNNTransform):
    """Images laid into the corner of a square canvas of `size` pixels; the rest is mean grey.

    Views to train on come in their final size. Images to detect on get a longer side of `size`,
    and the boxes and masks found are those of the images as they came.
    """

    def __init__(self, size: int, mean: tuple, std: tuple):
        super().__init__(size, size, list(mean), list(std), size_divisible=size)

    def resize(self, image: torch.Tensor, target: dict | None = None):
        if self.training:
            return image, target
        ratio = self.max_size / max(image.shape[-2:])
        size = [max(1, round(side * ratio)) for side in image.shape[-2:]]
        return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0], target


def mask_rcnn(pyramid: Pyramid, classes: int, size: int, masks: bool = True) -> nn.Module:
    """The detector of `classes` sorts of object on a canvas of `size` pixels; without masks, Faster
    R-CNN. It takes images in [0, 1] as torchvision's does.

    Raises ValueError for a canvas that is no multiple of the coarsest stride: torchvision's anchors
    would drift from their cells.
    """
    if size % pyramid.strides[-1]:
        raise ValueError(
            f"image size {size} is not a multiple of {pyramid.strides[-1]}, the coarsest stride of "
            f"this encoder's pyramid"
        )
    C, encoder = pyramid.out_channels, pyramid.encoder
    anchors = AnchorGenerator(
        tuple((ANCHOR_CELLS * stride,) for stride in pyramid.strides), (RATIOS,) * 5
    )
    parts = {
        "rpn_anchor_generator": anchors,
        "rpn_head": RPNHead(C, len(RATIOS), conv_depth=2),
        "rpn_post_nms_top_n_train": 1000,
        "box_roi_pool": _pooling(pyramid, 7),
        "box_head": FastRCNNConvFCHead((C, 7, 7), [C] * 4, [1024], norm_layer=ChannelNorm),
        "box_predictor": FastRCNNPredictor(1024, classes + 1),
    }
    if masks:
        parts |= {
            "mask_roi_pool": _pooling(pyramid, 14),
            "mask_head": MaskRCNNHeads(C, [C] * 4, 1, norm_layer=ChannelNorm),
            "mask_predictor": MaskRCNNPredictor(C, C, classes + 1),
        }
    model = (MaskRCNN if masks else FasterRCNN)(pyramid, **parts)
    model.transform = Canvas(size, encoder.mean, encoder.std)
    return model


def _pooling(pyramid: Pyramid, cells: int) -> MultiScaleRoIAlign:
    """A box of 14 patches is read from the level of the patches, as one of 224 pixels at stride 16.

    The scales are told: torchvision would infer them from the first batch, whose images may be much
    smaller than their canvas.
    """
    levels = 4
    patch = pyramid.encoder.patch_size
    pooling = MultiScaleRoIAlign([str(i) for i in range(levels)], cells, sampling_ratio=2)
    pooling.scales = [1 / stride for stride in pyramid.strides[:levels]]
    pooling.map_levels = LevelMapper(0, levels - 1, canonical_scale=14 * patch, canonical_level=2)
    return pooling
