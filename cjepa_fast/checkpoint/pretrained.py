"""A pretrained encoder with what its images go through: features from Python, in two lines.

Images are whatever stands at hand, one or many:
    a path, or a PIL image
    a numpy array (H, W), (H, W, 3), or (n, H, W, 3): uint8, uint16, or floats from 0 to 1
    a tensor (3, H, W), (1, H, W), or (n, 3, H, W): uint8, or floats from 0 to 1
Each is seen as evaluation sees it: upright, RGB, its centred square resized to the encoder's size;
of an oblong encoder, the largest centred window of that aspect. An encoder of another number of
channels C takes (H, W, C) and (C, H, W), and the files that a training on C channels takes.
Shapes: n images, N patches, D width.
"""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from cjepa_fast.checkpoint.bands import bands_of, is_of_bands
from cjepa_fast.data import crops, formats
from cjepa_fast.data.pillow_decode import resized, resized_array, window_of
from cjepa_fast.data.sources import LIMITS, Limits
from cjepa_fast.model.vit import Encoder
from cjepa_fast.runtime.hardware import cores
from cjepa_fast.runtime.image_size import ImageSize, height_width

POOLS = ("mean", "none", "last4")
LAYERS = 4  # of "last4"
CROP = 0.875  # of the short side, where no run says its eval.crop: that key's default
THREADS = 8  # at most, that read and resize images


class Transform:
    """An image, as in the module's first lines, -> (C, H, W) fp32, normalised for the encoder."""

    def __init__(
        self, image_size: ImageSize, mean: tuple, std: tuple, crop: float, limits: Limits = LIMITS
    ):
        self.image_size, self.mean, self.std, self.crop = image_size, mean, std, crop
        self.limits = limits  # of which max_pixels and bit_depth hold here

    def __call__(self, image: Any) -> torch.Tensor:
        """Raises ValueError for what is no image of those kinds, or cannot be decoded."""
        of_bands = is_of_bands(image, len(self.mean))
        pixels_HWC = self._bands(image) if of_bands else self._rgb(image)
        mean, std = (torch.tensor(x).mul(255.0).view(-1, 1, 1) for x in (self.mean, self.std))
        return (torch.from_numpy(pixels_HWC).permute(2, 0, 1).float() - mean) * std.reciprocal()

    def _rgb(self, image: Any) -> np.ndarray:
        picture = _rgb(image, self.limits)
        window = self._window(picture.height, picture.width)
        return np.array(resized(window_of(picture, *window), height_width(self.image_size)))

    def _bands(self, image: Any) -> np.ndarray:
        pixels_HWC = bands_of(image, len(self.mean), self.limits)
        window = self._window(*pixels_HWC.shape[:2])
        return resized_array(pixels_HWC, window, height_width(self.image_size))

    def _window(self, height: int, width: int) -> list[int]:
        return crops.centre(np.array([[height, width]]), self.crop, self.image_size)[0].tolist()

    def __repr__(self) -> str:
        said = f"{self.image_size}, mean={self.mean}, std={self.std}, crop={self.crop}"
        return f"Transform({said})"


class PretrainedEncoder(Encoder):
    """An Encoder, in evaluation mode: `encoder(images)` takes normalised batches as ever.

    mean, std: the normalisation its images had; crop: the share of the largest centred
    window that evaluation keeps; limits: as its training had them, of which max_pixels and
    bit_depth hold for `embed` too; transform: what makes such an image of any other.
    """

    def __init__(self, encoder: Encoder, crop: float, limits: Limits = LIMITS):
        with torch.device("meta"):
            super().__init__(**encoder.architecture)
        self.load_state_dict(encoder.state_dict(), assign=True)
        self.mean, self.std, self.crop, self.limits = encoder.mean, encoder.std, crop, limits
        self.eval()

    @property
    def transform(self) -> Transform:
        return Transform(self.image_size, self.mean, self.std, self.crop, self.limits)

    @torch.no_grad()
    def embed(self, images: Any, pool: str = "mean", batch_size: int = 64) -> torch.Tensor:
        """Features, fp32, on the CPU; of one image as of a list of one.

        pool: "mean" over an image's patches, (n, D); "none", (n, N, D); "last4", the means of the
        last four blocks side by side, (n, 4 D). Raises ValueError for another pool, or an image
        that cannot be read, which it names.
        """
        if pool not in POOLS:
            raise ValueError(f"pool={pool!r}: must be one of {', '.join(map(repr, POOLS))}")
        wanted = self.last(LAYERS if pool == "last4" else 1)
        found = []
        for batch_BCHW in batches_of(images, self.transform, batch_size):
            batch_BCHW = batch_BCHW.to(self.norm.weight)
            layers = [x.float() for x in self.layers(batch_BCHW, wanted)]
            layers = layers if pool == "none" else [x.mean(1) for x in layers]
            found.append(torch.cat(layers, -1).cpu())
        return torch.cat(found)

    def attention(self, images: Any, batch_size: int = 16) -> torch.Tensor:
        """Attention that each patch receives in the last block, by head: (n, heads, rows, cols),
        each map summing to one."""
        batches = batches_of(images, self.transform, batch_size)
        found = [self.attention_received(x_BCHW.to(self.norm.weight)).cpu() for x_BCHW in batches]
        return torch.cat(found)


def batches_of(images: Any, transform: Transform, batch_size: int) -> Iterator[torch.Tensor]:
    """One image or many, as in the module's first lines, transformed: (B, C, H, W), on the CPU."""
    several = iter(one_by_one(images))
    with ThreadPoolExecutor(min(THREADS, cores())) as pool:
        while batch := list(islice(several, batch_size)):
            yield torch.stack(list(pool.map(transform, batch)))


def one_by_one(images: Any) -> Iterable:
    """Of one image or many, as in the module's first lines. Raises ValueError for none."""
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
