"""The views of an image that a segmenter learns from, as mmsegmentation's recipes make them.

Scaled, cropped to a square that no class fills, flipped or not, in other colours. A view is a
function of its draws.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from cjepa_fast.data.sets.pairs import IGNORE
from cjepa_fast.eval.dense.resize import normalised, resized
from cjepa_fast.model.vit import Encoder

SCALES = (0.5, 2.0)  # of the image before a crop
TRIES, MOST = 10, 0.75  # crops that are looked at until one class has a smaller share of the pixels
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32, 0.5, 0.5, math.radians(36)  # at most, of 255 levels
DRAWS = 2 + 2 * TRIES + 8  # of a view
GREY = torch.full((3, 3), 1 / 3)  # projects a colour onto the greys
AROUND = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / 3**0.5


class View(NamedTuple):
    """A square of C pixels a side of an image scaled to `size`: labels_CC (C, C) uint8, not flipped
    yet and IGNORE beyond the image; colours: what `recoloured` draws on."""

    size: tuple[int, int]
    rows: slice
    columns: slice
    labels_CC: torch.Tensor
    flip: bool
    colours: list[float]


def chosen_view(
    labels_HW: torch.Tensor, uniforms: Sequence[float], short_side: int, crop_size: int
) -> View:
    """The view that is drawn of an image with these labels, uint8 on the CPU.

    uniforms: DRAWS in [0, 1): of the scale, the flip, the crops' rows and columns, the colours.
    short_side: in pixels, at scale 1.
    """
    scale, flip, *rest = uniforms
    factor = SCALES[0] + scale * (SCALES[1] - SCALES[0])
    factor *= short_side / min(labels_HW.shape)
    size = tuple(max(1, round(side * factor)) for side in labels_HW.shape)
    labels = F.interpolate(labels_HW[None, None], size, mode="nearest-exact")[0, 0]
    free = [max(0, side - crop_size) for side in size]
    # the first of the drawn windows in which no class has MOST of what counts, else the last
    for draws in zip(rest[: 2 * TRIES : 2], rest[1 : 2 * TRIES : 2], strict=True):
        starts = [int(u * (most + 1)) for u, most in zip(draws, free, strict=True)]
        window = tuple(slice(start, start + crop_size) for start in starts)
        counts = labels[window].flatten().bincount(minlength=IGNORE)[:IGNORE]
        if counts.max() < MOST * counts.sum():
            break
    labels = filled(labels[window], crop_size, IGNORE)
    return View(size, *window, labels, flip < 0.5, rest[2 * TRIES :])


def shown(
    image_3HW: torch.Tensor, view: View, plain_colours: bool, encoder: Encoder,
    device: torch.device | str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Normalised (3, C, C) fp32 and labels (C, C) uint8, both on the device, of an image."""
    image = resized(image_3HW.to(device), view.size)[:, view.rows, view.columns]
    if not plain_colours:
        image = recoloured(image, view.colours)
    image = filled(normalised(image, encoder), len(view.labels_CC))
    labels = view.labels_CC.to(device)
    return (image.flip(-1), labels.flip(-1)) if view.flip else (image, labels)


def filled(x_hw: torch.Tensor, side: int, value: float = 0) -> torch.Tensor:
    """(..., side, side): what is smaller is filled up below and on the right."""
    return F.pad(x_hw, (0, side - x_hw.shape[-1], 0, side - x_hw.shape[-2]), value=value)


def recoloured(image_3HW: torch.Tensor, uniforms: Sequence[float]) -> torch.Tensor:
    """A picture of 0..255 with its brightness, contrast, saturation and hue changed, each half of
    the time: the ranges of SSD's photometric distortion (Liu et al. 2016, arXiv 1512.02325). Hue
    and saturation turn and stretch colours around the axis of greys; HSV's own are not linear.

    uniforms: eight, of whether and how much for each of the four.
    """
    ranges = (BRIGHTNESS, CONTRAST, SATURATION, HUE)
    brightness, contrast, saturation, hue = (
        most * (2 * u - 1) if whether < 0.5 else 0.0
        for most, whether, u in zip(ranges, uniforms[:4], uniforms[4:], strict=True)
    )
    cos, sin = ((1 + saturation) * turn(hue) for turn in (math.cos, math.sin))
    matrix = (1 + contrast) * (GREY + cos * (torch.eye(3) - GREY) + sin * AROUND)
    image = torch.einsum("ij,jhw->ihw", matrix.to(image_3HW), image_3HW)
    return (image + (1 + contrast) * brightness).clamp(0, 255)
