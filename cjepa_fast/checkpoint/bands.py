"""Images of any number of channels from Python, as a training on their files reads them."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from cjepa_fast.data import arrays, formats, kinds
from cjepa_fast.data.headers import Unusable
from cjepa_fast.data.sources import Limits


def bands_of(image: Any, channels: int, limits: Limits) -> np.ndarray:
    """(H, W, C) fp32, in levels of 255, of a path, a PIL image, an array (H, W, C) or (H, W), or a
    tensor (C, H, W).

    Raises ValueError for what is none of these, cannot be read, or has not so many channels.
    """
    try:
        found_HWC = _levels(image, limits)
    except (OSError, Unusable) as error:
        raise ValueError(f"{image}: {error}" if _is_path(image) else str(error)) from error
    if found_HWC.ndim != 3 or found_HWC.shape[2] != channels:
        raise ValueError(
            f"an image of shape {found_HWC.shape}, for an encoder of {channels} channels: give a "
            f"file that has so many, an array (H, W, {channels}) or a tensor ({channels}, H, W)"
        )
    return found_HWC


def is_of_bands(image: Any, channels: int) -> bool:
    """Whether `bands_of` reads it, rather than what makes RGB of any picture."""
    return channels != 3 or (_is_path(image) and Path(image).suffix.lower() in kinds.ARRAYS)


def _is_path(image: Any) -> bool:
    return isinstance(image, (str, os.PathLike))


def _levels(image: Any, limits: Limits) -> np.ndarray:
    if _is_path(image):
        return _of_file(Path(image).read_bytes(), limits)
    if isinstance(image, Image.Image):
        return _of_picture(ImageOps.exif_transpose(image), limits.bit_depth)
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).movedim(0, -1).numpy()
    if not isinstance(image, np.ndarray):
        raise ValueError(
            f"an image must be a path, a PIL image, a numpy array or a tensor, not {type(image)}"
        )
    if image.dtype.str[1:] not in arrays.TYPES:
        raise ValueError(f"an image of {image.dtype}: must be uint8, uint16 or floats")
    return arrays.levels(np.atleast_3d(image), limits.bit_depth)


def _of_file(data: bytes, limits: Limits) -> np.ndarray:
    header = formats.inspect(lambda at, count: data[at : at + count], len(data))
    if header.kind == formats.ARRAY:
        return arrays.pixels(data, limits.bit_depth)
    picture = formats.decode_rgb(data, limits.max_pixels, limits.bit_depth, header.channels)
    return _of_picture(picture, limits.bit_depth)


def _of_picture(image: Image.Image, bits: int | None) -> np.ndarray:
    if image.mode in formats.DEEP_MODES:
        return arrays.levels(np.atleast_3d(np.asarray(image).astype(np.uint16)), bits)
    mode = formats.MODES[formats.channels_of(image)]
    return arrays.levels(np.atleast_3d(np.asarray(image.convert(mode))))
