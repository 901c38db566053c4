"""Decoding by Pillow, where DALI cannot be installed: the same steps on threads of the CPU.

    bytes -> decode -> the window -> resize (antialiased) -> [colour] -> [RandAugment] -> [mirror]

each rounded to 8 bits, as in dali.py; the batch is then normalised on the device of the tensors.
"""

import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from cjepa_fast.data import arrays, formats, rand_augment
from cjepa_fast.data.decoder import DecodeFailed, DecodeRequest, DecodeSettings

# DALI's, of R, G, B: luma, and two differences of colour that a saturation scales.
YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
RGB_OF_YIQ = np.linalg.inv(YIQ)
HALF_RANGE = 128.0  # the level that a contrast leaves as it is


class PillowDecoder:
    """decoder.Decoder: each image is a task of a pool of settings.threads threads."""

    def __init__(self, settings: DecodeSettings):
        self._settings, self.channels = settings, settings.channels
        self._shown = shown_array if settings.arrays else shown
        self._pool = ThreadPoolExecutor(settings.threads, thread_name_prefix="decode")
        self._inside: deque[tuple[DecodeRequest, list[Future]]] = deque()
        on_gpu = settings.device.type == "cuda"
        self._stream = torch.cuda.Stream(settings.device) if on_gpu else None
        moments = (settings.mean, settings.std)
        mean, std = (torch.tensor(v).mul(255.0).view(-1, 1, 1) for v in moments)
        self._mean, self._scale = mean.to(settings.device), std.reciprocal().to(settings.device)

    def restart(self) -> None:
        for _, tasks in self._inside:
            for task in tasks:
                task.cancel()
        self._inside.clear()

    def submit(self, request: DecodeRequest) -> None:
        tasks = [
            self._pool.submit(self._shown, self._settings, request, b)
            for b in range(len(request.window_B4))
        ]
        self._inside.append((request, tasks))

    def collect(self) -> torch.Tensor:
        _, tasks = self._inside[0]
        try:
            pixels_BHWC = np.stack([task.result() for task in tasks])
        except OSError as error:
            raise DecodeFailed(str(error)) from error
        self._inside.popleft()
        if self._stream is None:
            return self._normalised(pixels_BHWC)
        with torch.cuda.stream(self._stream):
            images_BCHW = self._normalised(pixels_BHWC)
        self._stream.synchronize()  # the loader's own thread waits, the training does not
        return images_BCHW

    def _normalised(self, pixels_BHWC: np.ndarray) -> torch.Tensor:
        pixels_BCHW = torch.from_numpy(pixels_BHWC).to(self._settings.device).permute(0, 3, 1, 2)
        images_BCHW = pixels_BCHW.to(torch.float32, memory_format=torch.contiguous_format)
        return images_BCHW.sub_(self._mean).mul_(self._scale).to(self._settings.dtype)

    def decode_alone(self, request: DecodeRequest, b: int) -> bytes | None:
        known = next((tasks[b] for inside, tasks in self._inside if inside is request), None)
        try:
            known.result() if known else self._shown(self._settings, request, b)
        except OSError:
            return None
        return request.encoded[b]

    def library_messages(self) -> list[str]:
        return []  # Pillow keeps its libraries quiet


class PillowWholeDecoder:
    """decoder.WholeDecoder."""

    def __init__(self, threads: int):
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def __call__(self, encoded: list[bytes]) -> list[np.ndarray]:
        try:
            return list(self._pool.map(pixels, encoded))
        except OSError as error:
            raise DecodeFailed(str(error)) from error

    def library_messages(self) -> list[str]:
        return []


def pixels(data: bytes) -> np.ndarray:
    """Upright RGB (H, W, 3) uint8. Raises OSError if the bytes cannot be decoded."""
    return np.array(formats.decode_rgb(data))


def shown(settings: DecodeSettings, request: DecodeRequest, b: int) -> np.ndarray:
    """Image b of a batch as it is shown, (H, W, C) uint8. Raises OSError if it cannot be."""
    image = formats.decode_rgb(request.encoded[b], settings.max_pixels, channels=settings.channels)
    window = window_of(image, *map(int, request.window_B4[b]))
    pixels_HWC = np.atleast_3d(np.asarray(resized(window, settings.height_width)))
    if settings.colour:
        pixels_HWC = twisted(pixels_HWC, *map(float, request.colour_B3[b]))
    if settings.rand_augment:
        _, magnitude, _ = settings.rand_augment
        pixels_HWC = rand_augment.changed(pixels_HWC, request.augment_BC[b], magnitude)
    return pixels_HWC[:, ::-1] if settings.flip and request.flip_B[b] else pixels_HWC


def shown_array(settings: DecodeSettings, request: DecodeRequest, b: int) -> np.ndarray:
    """Image b of the request where it is an array: (H, W, C) fp32, not rounded."""
    pixels_HWC = arrays.pixels(request.encoded[b], settings.bit_depth)
    if pixels_HWC.shape[2] != settings.channels:
        raise OSError(f"has {pixels_HWC.shape[2]} channels, not {settings.channels}")
    pixels_HWC = resized_array(pixels_HWC, request.window_B4[b], settings.height_width)
    return pixels_HWC[:, ::-1] if settings.flip and request.flip_B[b] else pixels_HWC


def window_of(image: Image.Image, top: int, left: int, height: int, width: int) -> Image.Image:
    """Raises OSError for a window that reaches out of the image, which Pillow would fill."""
    if top < 0 or left < 0 or top + height > image.height or left + width > image.width:
        raise OSError(f"an image of {image.width}x{image.height} is smaller than its window")
    return image.crop((left, top, left + width, top + height))


def resized_array(
    pixels_HWC: np.ndarray, window_4: Sequence[int], size: tuple[int, int]
) -> np.ndarray:
    """A window of an fp32 array as `resized` shows it. Raises OSError as window_of."""
    bands = (Image.fromarray(pixels_HWC[..., c]) for c in range(pixels_HWC.shape[2]))
    window = tuple(map(int, window_4))
    return np.stack([np.asarray(resized(window_of(b, *window), size)) for b in bands], axis=2)


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """To (height, width), by a triangular filter that is as wide as the image shrinks.

    At the edges the filter sees the outermost pixels repeated, as DALI's does. Pillow's own would
    see nothing there, which makes noise at the edges differ by ten levels and more. Each channel is
    by itself, where Pillow would weigh colours by their alpha.
    """
    if image.mode in ("LA", "RGBA"):
        return Image.merge(image.mode, [resized(band, size) for band in image.split()])
    width, height = image.size
    frame = math.ceil(max(height / size[0], width / size[1], 1))  # the filter's reach
    box = (frame, frame, frame + width, frame + height)
    return _framed(image, frame).resize(size[::-1], Image.Resampling.BILINEAR, box)


def _framed(image: Image.Image, frame: int) -> Image.Image:
    """With the outermost pixels repeated `frame` times on each side."""
    width, height = image.size
    right, bottom = frame + width, frame + height
    framed = Image.new(image.mode, (right + frame, bottom + frame))
    framed.paste(image, (frame, frame))

    def repeat(edge: tuple[int, int, int, int], x: int, y: int, size: tuple[int, int]) -> None:
        framed.paste(framed.crop(edge).resize(size, Image.Resampling.NEAREST), (x, y))

    repeat((frame, frame, right, frame + 1), frame, 0, (width, frame))
    repeat((frame, bottom - 1, right, bottom), frame, bottom, (width, frame))
    repeat((frame, 0, frame + 1, framed.height), 0, 0, (frame, framed.height))
    repeat((right - 1, 0, right, framed.height), right, 0, (frame, framed.height))
    return framed


def twisted(
    pixels_HW3: np.ndarray, brightness: float, contrast: float, saturation: float
) -> np.ndarray:
    """DALI's colour twist: saturation, contrast, then brightness, rounded once at the end."""
    colour_33 = RGB_OF_YIQ @ np.diag([1.0, saturation, saturation]) @ YIQ
    matrix_33 = (brightness * contrast * colour_33).astype(np.float32)
    offset = np.float32(brightness * HALF_RANGE * (1 - contrast))
    return rand_augment.rounded(pixels_HW3 @ matrix_33.T + offset)
