"""Which part of each image is shown, and how: pure functions of uniforms and image sizes.

A window is (top, left, height, width) in pixels of the upright image; int32 (B, 4).
"""

import math

import numpy as np

from cjepa_fast.runtime.image_size import ImageSize, aspect, height_width

TRIES = 10
CROP_UNIFORMS = 2 * TRIES + 2  # area and aspect a try, then one row and one column


def random_resized(
    sizes_B2: np.ndarray,
    uniforms_BC: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    image_size: ImageSize = 1,
) -> np.ndarray:
    """Windows as torchvision's RandomResizedCrop draws them, for a whole batch at once.

    sizes_B2: (height, width); uniforms_BC: (B, CROP_UNIFORMS) in [0, 1). Each of ten tries draws an
    area share in `scale` and a log-uniform aspect (width / height) in `ratio` times that of
    image_size, which the window is shown in: so `ratio` is how far it is stretched. The first that
    fits is placed uniformly; where none fits, the largest centred window of the nearest aspect is
    taken.
    """
    ratio = tuple(limit * aspect(image_size) for limit in ratio)
    height_B, width_B = sizes_B2[:, 0].astype(np.int64), sizes_B2[:, 1].astype(np.int64)
    area_BT = scale[0] + uniforms_BC[:, :TRIES] * (scale[1] - scale[0])
    area_BT = area_BT * (height_B * width_B)[:, None]
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect_BT = np.exp(low + uniforms_BC[:, TRIES : 2 * TRIES] * (high - low))
    w_BT = np.round(np.sqrt(area_BT * aspect_BT)).astype(np.int64)
    h_BT = np.round(np.sqrt(area_BT / aspect_BT)).astype(np.int64)
    fits_BT = (w_BT > 0) & (w_BT <= width_B[:, None]) & (h_BT > 0) & (h_BT <= height_B[:, None])
    rows_B, first_B = np.arange(len(sizes_B2)), fits_BT.argmax(axis=1)
    fits_B = fits_BT[rows_B, first_B]
    fallback_B2 = _nearest_aspect(height_B, width_B, ratio)
    h_B = np.where(fits_B, h_BT[rows_B, first_B], fallback_B2[:, 0])
    w_B = np.where(fits_B, w_BT[rows_B, first_B], fallback_B2[:, 1])
    top_B = np.floor(uniforms_BC[:, 2 * TRIES] * (height_B - h_B + 1)).astype(np.int64)
    left_B = np.floor(uniforms_BC[:, 2 * TRIES + 1] * (width_B - w_B + 1)).astype(np.int64)
    top_B = np.where(fits_B, top_B, (height_B - h_B) // 2)
    left_B = np.where(fits_B, left_B, (width_B - w_B) // 2)
    return np.stack([top_B, left_B, h_B, w_B], axis=1).astype(np.int32)


def _nearest_aspect(height_B, width_B, ratio) -> np.ndarray:
    """(B, 2) height and width of the largest window whose aspect lies within `ratio`."""
    aspect_B = width_B / height_B
    h_B = np.where(aspect_B < ratio[0], np.round(width_B / ratio[0]), height_B)
    w_B = np.where(aspect_B > ratio[1], np.round(height_B * ratio[1]), width_B)
    return np.stack([np.maximum(h_B, 1), np.maximum(w_B, 1)], axis=1).astype(np.int64)


def centre(sizes_B2: np.ndarray, share: float = 1.0, image_size: ImageSize = 1) -> np.ndarray:
    """The centred window of image_size's aspect whose sides are `share` of the largest such one's:
    of a square, `share` of the short side."""
    shape_2 = np.array(height_width(image_size)) / min(height_width(image_size))
    largest_B1 = (sizes_B2 / shape_2).min(axis=1, keepdims=True)
    window_B2 = np.clip(np.round(largest_B1 * share * shape_2), 1, sizes_B2).astype(np.int64)
    return np.concatenate([(sizes_B2 - window_B2) // 2, window_B2], axis=1).astype(np.int32)


def flips(uniforms_B1: np.ndarray) -> np.ndarray:
    """int32 (B,): 1 to mirror left and right, for half of the images."""
    return (uniforms_B1[:, 0] < 0.5).astype(np.int32)


def colour_factors(uniforms_B3: np.ndarray, strength: float) -> np.ndarray:
    """float32 (B, 3): brightness, contrast, saturation factors, uniform in 1 -+ strength."""
    return np.maximum(1.0 + strength * (2.0 * uniforms_B3 - 1.0), 0.0).astype(np.float32)
