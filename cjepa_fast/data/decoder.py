"""The seam between the loader and what decodes: what goes in, and how it is shown."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from cjepa_fast.data import formats
from cjepa_fast.runtime.image_size import ImageSize, height_width

DEPTH = 2  # batches inside a decoder at once, so that its threads and the GPU never wait
MOST_MAGNITUDE = 30  # of RandAugment: there the changes are strongest


@dataclass(frozen=True)
class DecodeSettings:
    """How images are shown. image_size: a square's side, or (height, width), in pixels. mean, std:
    of each channel in 0..1. dtype: of the tensors that come out.

    rand_augment: how many changes an image gets, their magnitude, DALI's seed. max_pixels: of an
    image that Pillow decodes. arrays: whether the images are arrays, whose bits in use are
    bit_depth's.
    """

    image_size: ImageSize
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device
    dtype: torch.dtype
    threads: int
    flip: bool = False
    colour: bool = False
    hw_decoder_load: float = 0.65
    rand_augment: tuple[int, int, int] | None = None
    max_pixels: int = formats.MAX_PIXELS
    arrays: bool = False
    bit_depth: int | None = None

    @property
    def height_width(self) -> tuple[int, int]:
        return height_width(self.image_size)

    @property
    def channels(self) -> int:
        return len(self.mean)

    def __post_init__(self):
        """Raises ValueError for a RandAugment that there is none of, and for colours to change
        where there is no RGB."""
        if (self.colour or self.rand_augment) and (self.channels != 3 or self.arrays):
            what = "rand_augment" if self.rand_augment else "data.colour"
            raise ValueError(
                f"{what}: it changes the colours of RGB pictures, and these are "
                f"{'arrays' if self.arrays else 'images'} of {self.channels} channels; set it to "
                f"{'null' if self.rand_augment else 0}"
            )
        count, magnitude, _ = self.rand_augment or (0, 0, 0)
        if not (isinstance(count, int) and isinstance(magnitude, int)):
            raise ValueError(f"rand_augment = [{count}, {magnitude}]: must be whole numbers")
        if count < 0 or not 0 <= magnitude <= MOST_MAGNITUDE:
            raise ValueError(
                f"rand_augment = [{count}, {magnitude}]: must be a number of changes, and a "
                f"magnitude from 0 to {MOST_MAGNITUDE}"
            )


@dataclass
class DecodeRequest:
    """What a decoder is fed for a batch: encoded bytes and, per image, how to show it.

    window_B4: int32 top, left, height, width; flip_B: int32 0 or 1, or None; colour_B3: float32
    brightness, contrast, saturation factors, or None; augment_BC: uniforms in [0, 1) that draw the
    changes of RandAugment, two a change, or None. DALI draws those itself.
    """

    encoded: list[bytes]
    window_B4: np.ndarray
    flip_B: np.ndarray | None = None
    colour_B3: np.ndarray | None = None
    augment_BC: np.ndarray | None = None

    def rows(self, keep: list[int]) -> "DecodeRequest":
        given = (self.window_B4, self.flip_B, self.colour_B3, self.augment_BC)
        kept = (None if values is None else values[keep] for values in given)
        return DecodeRequest([self.encoded[b] for b in keep], *kept)


class DecodeFailed(RuntimeError):
    """A batch did not come out. Which image is to blame is found by asking for each alone."""


class Decoder(Protocol):
    """Works a few batches deep: submit() batches, collect() them in the same order.

    Used from one thread. After DecodeFailed it is dead: call restart(), which forgets what was
    submitted, and submit again.
    """

    channels: int

    def restart(self) -> None: ...

    def submit(self, request: DecodeRequest) -> None:
        """Raises DecodeFailed."""

    def collect(self) -> torch.Tensor:
        """The oldest submitted batch, (B, C, H, W), for any CUDA stream. Raises DecodeFailed."""

    def decode_alone(self, request: DecodeRequest, b: int) -> bytes | None:
        """The bytes by which image b of the batch decodes when it is alone, None if none do.

        They are its own, or Pillow's pixels of it where the decoder cannot read the file. The
        answer is about the window that was asked for, and depends on nothing before.
        """

    def library_messages(self) -> list[str]:
        """The lines that its libraries wrote to stderr since the last call, of all decoders."""


class WholeDecoder(Protocol):
    """Whole images in their own sizes, on the CPU."""

    def __call__(self, encoded: list[bytes]) -> list[np.ndarray]:
        """Upright RGB, each (H, W, 3) uint8. Raises DecodeFailed."""

    def library_messages(self) -> list[str]:
        """As a Decoder's."""
