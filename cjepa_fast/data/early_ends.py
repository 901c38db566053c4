"""JPEGs whose pixels end before the picture does, though they have an end marker.

A decoder paints what is missing gray, and says nothing: half an image trains as an empty wall. To
look for it in every file would cost as much as half its decoding. So the images that come out of
the decoder are looked at: one with an edge of that gray is a suspect. Its file is decoded twice, at
an eighth of its size, once with more bits before the end marker. Only a decoder that lacks pixels
reads them, so the picture changes exactly if it ended early, and from where.

An image is bad where too much of what is shown of it is missing: that follows from the file and the
window alone, so that a resumed run judges as the one before it. Seen are files of one scan (JPEG's
baseline). A progressive file that ends early is only less sharp, and is not seen.
"""

import io
import re
from typing import NamedTuple

import numpy as np
import torch
from PIL.JpegImagePlugin import JpegImageFile

from cjepa_fast.data import formats
from cjepa_fast.data.decoder import DecodeRequest, DecodeSettings
from cjepa_fast.data.headers import (
    JPEG_END,
    JPEG_MAGIC,
    HeaderDamaged,
    Unusable,
    jpeg_header,
    orientation,
)
from cjepa_fast.data.sources import ReadableImages

GRAY = 128.0  # the level of what is missing, in all channels
CLOSE = 2.0  # levels
EVERY = 8  # pixels of an edge one is looked at
SCALE = 8  # of the pictures that are compared: a pixel is a block of 8 x 8
MOST_ROWS = 2  # of those pixels, that the last row of blocks may be high where it is cut
MORE_BITS = bytes((37 * i) % 251 for i in range(256))  # no 0xFF, which would begin a marker
MARKER = re.compile(rb"\xff+[\x01-\xcf\xd8-\xfe]")
RESTART = re.compile(rb"\xff[\xd0-\xd7]")
OF_MORE_SCANS = (0xC4, 0xDA, 0xDB, 0xDC, 0xDD)


class Gap(NamedTuple):
    """What is missing of an upright image: rows (axis 0) or columns (axis 1) start to stop."""

    axis: int
    start: int
    stop: int
    there_pct: int  # of the whole image

    @property
    def why(self) -> str:
        return f"truncated: its pixels end early, {self.there_pct} % of it is there"

    def share(self, window_4: np.ndarray) -> float:
        """The share of a window (top, left, height, width) that is missing."""
        first, length = int(window_4[self.axis]), int(window_4[self.axis + 2])
        missing = min(self.stop, first + length) - max(self.start, first)
        return max(0, missing) / length


def gap(data: bytes) -> Gap | None:
    """What is missing at the end of a JPEG of one scan; None of any other file."""
    try:
        return _gap(data) if data.startswith(JPEG_MAGIC) else None
    except (HeaderDamaged, Unusable, *formats.PILLOW_ERRORS):
        return None


def _gap(data: bytes) -> Gap | None:
    header = jpeg_header(data)
    scan = header.scan + 2 + int.from_bytes(data[header.scan + 2 : header.scan + 4], "big")
    marker = MARKER.search(data, scan)
    if header.frame not in (0, 1) or (marker and marker[0][-1] in OF_MORE_SCANS):
        return None
    end = marker.start() if marker else len(data)
    next_restart = bytes([0xFF, 0xD0 + len(RESTART.findall(data, scan, end)) % 8])
    more = MORE_BITS + next_restart + MORE_BITS  # if it was cut between restarts, it waits for one
    as_it_is, with_more = (_small(data[:end] + bits + JPEG_END) for bits in (b"", more))
    differs_h = (as_it_is != with_more).any(1)
    if not differs_h.any():
        return None
    start = min(SCALE * (int(differs_h.argmax()) + MOST_ROWS), header.height)
    turn, _ = orientation(header.exif_block)
    at_the_end = turn in (1, 2, 5, 8)
    span = (start, header.height) if at_the_end else (0, header.height - start)
    return Gap(int(turn >= 5), *span, 100 * start // header.height)


def _small(data: bytes) -> np.ndarray:
    """Its luma, an eighth as wide and high."""
    with JpegImageFile(io.BytesIO(data)) as image:
        image.draft("L", (1, 1))
        return np.asarray(image)


class EarlyEnds:
    """Looks for them among the images that a decoder shows; what it finds of a file is kept.

    settings: with None it looks at nothing, nor with RandAugment, which moves edges about.
    """

    def __init__(self, images: ReadableImages, settings: DecodeSettings | None):
        self._images, self._settings = images, settings
        blind = settings is None or settings.rand_augment
        self._most = 1.0 if blind else 1 - images.limits.min_shown
        self._gaps: dict[int, Gap | None] = {}
        on_gpu = settings is not None and settings.device.type == "cuda"
        self._stream = torch.cuda.Stream(settings.device) if on_gpu else None

    def known(self, i: int, window_4: np.ndarray) -> str:
        """Why image i is bad, as far as is known of its file; "" if nothing is."""
        found = self._gaps.get(i)
        if found is None or found.share(window_4) <= self._most:
            return ""
        return found.why

    def seen(
        self, images_BCHW: torch.Tensor, index_B: np.ndarray, request: DecodeRequest
    ) -> dict[int, str]:
        """{b: why} of the bad ones among images that have come out of the decoder."""
        if self._most >= 1:
            return {}
        with torch.cuda.stream(self._stream):
            suspects = gray_edged(images_BCHW, self._settings, request)
        found = {}
        for b in suspects:
            i = int(index_B[b])
            if i not in self._gaps:
                self._gaps[i] = self._gap_of(i)
            if why := self.known(i, request.window_B4[b]):
                found[b] = why
        return found

    def _gap_of(self, i: int) -> Gap | None:
        try:
            return gap(self._images.read_original(i))
        except OSError:
            return None


def gray_edged(
    images_BCHW: torch.Tensor, settings: DecodeSettings, request: DecodeRequest
) -> list[int]:
    """The images that have an edge of the gray that decoders paint where pixels are missing."""
    edges = [images_BCHW[:, :, at, ::EVERY] for at in (0, -1)]
    edges += [images_BCHW[:, :, ::EVERY, at] for at in (0, -1)]
    device = images_BCHW.device
    mean, std = (torch.tensor(v, device=device).view(-1, 1) for v in (settings.mean, settings.std))
    gray_B = np.full(len(images_BCHW), GRAY, np.float32)
    if settings.colour:  # of gray, brightness alone changes the level
        gray_B = (gray_B * request.colour_B3[:, 0]).clip(0, 255)
    gray_B11 = torch.from_numpy(gray_B).to(device, torch.float32).view(-1, 1, 1)
    far = [((x.float() * std + mean) * 255 - gray_B11).abs().amax((1, 2)) for x in edges]
    return (torch.stack(far, 1) < CLOSE).any(1).nonzero().flatten().tolist()
