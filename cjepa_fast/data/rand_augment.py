"""RandAugment (Cubuk et al. 2019, arXiv 1909.13719) without DALI: its changes, by Pillow and NumPy.

The list, the ranges of the magnitudes and what each change does are those that DALI 2.4 documents
for nvidia.dali.auto_aug.rand_augment: n changes in a row, each drawn from the list, all of the one
magnitude, which half of the time points the other way. DALI draws them by its own generator, this
module by uniforms that come in; so the changes are alike, and which image gets which differs.

Shapes: an image is (H, W, 3) uint8.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

from cjepa_fast.data.decoder import MOST_MAGNITUDE

FILL = (128, 128, 128)  # what comes in from outside the image
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
SHIFT = 100 / 224  # of the side


def rounded(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _warped(pixels: np.ndarray, inverse: tuple[float, ...]) -> np.ndarray:
    """inverse: a, b, c, d, e, f of the source (ax + by + c, dx + ey + f) of the point (x, y)."""
    a, b, c, d, e, f = inverse
    framed = ImageOps.expand(Image.fromarray(pixels), 1, FILL)  # so that the edge blends into FILL
    moved = framed.transform(
        pixels.shape[1::-1], Image.Transform.AFFINE, (a, b, c + 1, d, e, f + 1),
        Image.Resampling.BILINEAR, fillcolor=FILL,
    )  # fmt: skip
    return np.asarray(moved)


def translate_x(pixels: np.ndarray, share: float) -> np.ndarray:
    return _warped(pixels, (1, 0, -share * pixels.shape[1], 0, 1, 0))


def translate_y(pixels: np.ndarray, share: float) -> np.ndarray:
    return _warped(pixels, (1, 0, 0, 0, 1, -share * pixels.shape[0]))


def shear_x(pixels: np.ndarray, slope: float) -> np.ndarray:
    return _warped(pixels, (1, -slope, 0, 0, 1, 0))


def shear_y(pixels: np.ndarray, slope: float) -> np.ndarray:
    return _warped(pixels, (1, 0, 0, -slope, 1, 0))


def rotate(pixels: np.ndarray, degrees: float) -> np.ndarray:
    """Against the clock, about the middle."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    y, x = pixels.shape[0] / 2, pixels.shape[1] / 2
    return _warped(pixels, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y))


def brightness(pixels: np.ndarray, change: float) -> np.ndarray:
    return rounded(pixels * np.float32(1 + change))


def contrast(pixels: np.ndarray, change: float) -> np.ndarray:
    centre = pixels.mean((0, 1), dtype=np.float32) @ LUMA
    return rounded(centre + (pixels - centre) * np.float32(1 + change))


def colour(pixels: np.ndarray, change: float) -> np.ndarray:
    grey_HW1 = (pixels @ LUMA)[..., None]
    return rounded(grey_HW1 + (pixels - grey_HW1) * np.float32(1 + change))


def sharpness(pixels: np.ndarray, change: float) -> np.ndarray:
    """Away from, or towards, the mean of 3 x 3 pixels that counts the middle five times."""
    height, width = pixels.shape[:2]
    padded = np.pad(pixels.astype(np.float32), ((1, 1), (1, 1), (0, 0)), "reflect")
    around = sum(padded[y : y + height, x : x + width] for y in range(3) for x in range(3))
    blurred = (around + 4 * pixels.astype(np.float32)) / 13
    return rounded(pixels + (pixels - blurred) * np.float32(change))


def posterize(pixels: np.ndarray, bits: float) -> np.ndarray:
    return pixels & np.uint8(256 - 2 ** (8 - round(bits)))


def solarize(pixels: np.ndarray, threshold: float) -> np.ndarray:
    return np.where(pixels < threshold, pixels, 255 - pixels)


def equalize(pixels: np.ndarray, _: float) -> np.ndarray:
    """Each channel's histogram made even, the way of OpenCV."""
    channels = [_equalized(pixels[..., c]) for c in range(pixels.shape[2])]
    return np.stack(channels, axis=-1)


def _equalized(channel_HW: np.ndarray) -> np.ndarray:
    count_256 = np.bincount(channel_HW.ravel(), minlength=256)
    darkest = count_256[count_256.nonzero()[0][0]]
    if darkest == channel_HW.size:
        return channel_HW
    share_256 = (count_256.cumsum() - darkest) / (channel_HW.size - darkest)
    return rounded(255 * share_256)[channel_HW]


def auto_contrast(pixels: np.ndarray, _: float) -> np.ndarray:
    """Each channel stretched to 0..255."""
    low, high = pixels.min((0, 1)).astype(np.float32), pixels.max((0, 1)).astype(np.float32)
    flat = high == low
    stretched = (pixels - low) * (255 / np.where(flat, 255, high - low))
    return np.where(flat, pixels, rounded(stretched))


def identity(pixels: np.ndarray, _: float) -> np.ndarray:
    return pixels


# Each change, its values at the lowest and the highest magnitude, and whether it may point the
# other way.
CHANGES: tuple[tuple[Callable, float, float, bool], ...] = (
    (translate_x, 0.0, SHIFT, True),
    (translate_y, 0.0, SHIFT, True),
    (shear_x, 0.0, 0.3, True),
    (shear_y, 0.0, 0.3, True),
    (rotate, 0.0, 30.0, True),
    (brightness, 0.0, 0.9, True),
    (contrast, 0.0, 0.9, True),
    (colour, 0.0, 0.9, True),
    (sharpness, 0.0, 0.9, True),
    (posterize, 8.0, 4.0, False),
    (solarize, 256.0, 0.0, False),
    (equalize, 0.0, 0.0, False),
    (auto_contrast, 0.0, 0.0, False),
    (identity, 0.0, 0.0, False),
)


def changed(pixels: np.ndarray, uniform_C: np.ndarray, magnitude: int) -> np.ndarray:
    """A change for each two of the uniforms in [0, 1): the first draws it, the second its sign.

    magnitude: 0..MOST_MAGNITUDE.
    """
    for pick, sign in uniform_C.reshape(-1, 2).tolist():
        change, low, high, signed = CHANGES[int(pick * len(CHANGES))]
        value = low + (high - low) * magnitude / MOST_MAGNITUDE
        pixels = change(pixels, -value if signed and sign < 0.5 else value)
    return pixels
