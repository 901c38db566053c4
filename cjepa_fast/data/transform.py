"""Images from Python, one or many, as an encoder's input.

They are whatever stands at hand:
    a path, or a PIL image
    a numpy array (H, W), (H, W, 3), or (n, H, W, 3): uint8, uint16, or floats from 0 to 1
    a tensor (3, H, W), (1, H, W), or (n, 3, H, W): uint8, or floats from 0 to 1
Each is seen as evaluation sees it: upright, RGB, its centred square resized to the encoder's size;
of an oblong encoder, the largest centred window of that aspect. An encoder of another number of
channels C takes (H, W, C) and (C, H, W), and the files that a training on C channels takes.
Shapes: n images.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from cjepa_fast.data import arrays, crops, formats, kinds
from cjepa_fast.data.headers import Unusable
from cjepa_fast.data.pillow_decoder import resized, resized_array, window_of
from cjepa_fast.data.sources import LIMITS, Limits
from cjepa_fast.runtime.image_size import ImageSize, height_width


class Transform:
    """An image, as in the module's first lines, -> (C, H, W) fp32, normalised for the encoder."""

    def __init__(
        self, image_size: ImageSize, mean: tuple, std: tuple, crop: float, limits: Limits = LIMITS
    ):
        self.image_size, self.mean, self.std, self.crop = image_size, mean, std, crop
        self.limits = limits  # of which max_pixels and bit_depth hold here

    def __call__(self, image: Any) -> torch.Tensor:
        """Raises ValueError for what is no image of those kinds, or cannot be decoded."""
        multichannel = is_multichannel(image, len(self.mean))
        pixels_HWC = self._multichannel(image) if multichannel else self._rgb(image)
        mean, std = (torch.tensor(x).mul(255.0).view(-1, 1, 1) for x in (self.mean, self.std))
        return (torch.from_numpy(pixels_HWC).permute(2, 0, 1).float() - mean) * std.reciprocal()

    def _rgb(self, image: Any) -> np.ndarray:
        picture = _rgb(image, self.limits)
        window = self._window(picture.height, picture.width)
        return np.array(resized(window_of(picture, *window), height_width(self.image_size)))

    def _multichannel(self, image: Any) -> np.ndarray:
        pixels_HWC = multichannel_pixels(image, len(self.mean), self.limits)
        window = self._window(*pixels_HWC.shape[:2])
        return resized_array(pixels_HWC, window, height_width(self.image_size))

    def _window(self, height: int, width: int) -> list[int]:
        return crops.centre(np.array([[height, width]]), self.crop, self.image_size)[0].tolist()

    def __repr__(self) -> str:
        said = f"{self.image_size}, mean={self.mean}, std={self.std}, crop={self.crop}"
        return f"Transform({said})"


def one_by_one(images: Any) -> Iterable:
    """The images one by one, of one or many (see the module). Raises ValueError for none."""
    if isinstance(images, (str, os.PathLike, Image.Image)):
        return [images]
    if isinstance(images, (np.ndarray, torch.Tensor)):
        images = images if images.ndim == 4 else [images]
    if hasattr(images, "__len__") and not len(images):
        raise ValueError("no images: the list is empty")
    return images


def _rgb(image: Any, limits: Limits) -> Image.Image:
    """Upright, 8 bits. Raises ValueError."""
    if isinstance(image, (str, os.PathLike)):
        return _read(Path(image), limits)
    if isinstance(image, Image.Image):
        if image.mode in formats.DEEP_MODES:
            return _of_array(np.asarray(image), limits.bit_depth)
        return ImageOps.exif_transpose(image).convert("RGB")
    if isinstance(image, torch.Tensor):
        return _of_tensor(image.detach().cpu(), limits.bit_depth)
    if isinstance(image, np.ndarray):
        return _of_array(image, limits.bit_depth)
    raise ValueError(
        f"an image must be a path, a PIL image, a numpy array or a tensor, not {type(image)}"
    )


def _read(path: Path, limits: Limits) -> Image.Image:
    if path.is_dir():
        raise ValueError(f"{path} is a folder: `cjepa-embed` takes those; or give its files")
    try:
        return formats.decode_rgb(path.read_bytes(), limits.max_pixels, limits.bit_depth)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except OSError as error:
        raise ValueError(f"{path}: {error}") from error


def _of_tensor(image: torch.Tensor, bits: int | None) -> Image.Image:
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(
            f"a tensor of shape {tuple(image.shape)}: an image is (3, H, W) or (1, H, W), channels "
            "first; give (H, W, 3) as a numpy array"
        )
    image = image.float() if image.is_floating_point() else image
    return _of_array(image.permute(1, 2, 0).numpy(), bits)


def _of_array(image: np.ndarray, bits: int | None) -> Image.Image:
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3)):
        raise ValueError(
            f"an array of shape {image.shape}: an image is (H, W) or (H, W, 3), channels last; "
            "give (3, H, W) as a tensor"
        )
    image = _eight_bits(image.reshape(*image.shape[:2], -1), bits)
    return Image.fromarray(image.repeat(3, 2) if image.shape[2] == 1 else image)


def _eight_bits(image: np.ndarray, bits: int | None) -> np.ndarray:
    """bits: in use of more than 8, where fewer than 16. Brighter values are white, as in files."""
    if image.dtype == np.uint8:
        return image
    if image.dtype in (np.uint16, np.int32):
        shares = (image / (2**bits - 1)).clip(max=1) if bits else image / 65535
        return _rounded(shares, f"{image.dtype} values")
    if np.issubdtype(image.dtype, np.floating):
        return _rounded(image, "floats")
    raise ValueError(f"an image of {image.dtype}: must be uint8, uint16, or floats from 0 to 1")


def _rounded(image: np.ndarray, kind: str) -> np.ndarray:
    low, high = float(image.min()), float(image.max())
    if not 0 <= low <= high <= 1:
        raise ValueError(
            f"{kind} from {low:g} to {high:g}, of a range from 0 to 1: an image that is normalised "
            "already goes into the encoder as it is, encoder(images)"
        )
    return (image * 255 + 0.5).astype(np.uint8)


def multichannel_pixels(image: Any, channels: int, limits: Limits) -> np.ndarray:
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


def is_multichannel(image: Any, channels: int) -> bool:
    """Whether `multichannel_pixels` reads it, rather than what makes RGB of any picture."""
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
