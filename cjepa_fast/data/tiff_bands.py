"""TIFFs of any number of bands, for which Pillow has no mode: satellite and multi-spectral images.

The first picture of a file; strips or tiles, bands beside each other or one after the other,
uncompressed or by deflate, with or without horizontal differences; uint8, uint16 or floats; of any
orientation. What else there is (LZW, JPEG, ...) is refused by name. Pillow parses the tags (TIFF
6.0, sections 2, 8, 14 and 15).
"""

import io
import itertools
import math
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from cjepa_fast.data.headers import HeaderDamaged, Unusable

MAGIC = (b"II*\0", b"MM\0*", b"II+\0")
MOST_DEFLATED = 1032  # bytes that one byte can become
WIDTH, HEIGHT, BITS, COMPRESSION, SAMPLES = 256, 257, 258, 259, 277
PHOTOMETRIC, ORIENTATION, WHITE_IS_ZERO = 262, 274, 0
ROWS_A_STRIP, PLANAR, PREDICTOR, FORMAT = 278, 284, 317, 339
STRIPS, TILES = (273, 279), (324, 325)  # offsets and lengths
TILE_WIDTH, TILE_HEIGHT = 322, 323
PLAIN, DEFLATE = 1, (8, 32946)
COMPRESSIONS = {2: "CCITT", 5: "LZW", 6: "JPEG", 7: "JPEG", 32773: "PackBits", 50000: "Zstandard"}
BACKWARDS = (3, 4, 7, 8), (2, 3, 6, 7)  # orientations whose rows, whose columns run so, upright
TYPES = {(1, 8): "u1", (1, 16): "u2", (3, 16): "f2", (3, 32): "f4", (3, 64): "f8"}


class Bands(NamedTuple):
    """shape: (height, width, bands) as stored. block: height and width of a strip, which ends with
    the image, or of a tile (tiled), which does not; planes: whether each band has blocks of its
    own; spans: (offset, length) of each block, in the file's order. turn: the orientation, 1..8;
    white_is_zero: whether 0 is white, which floats and several bands have none of."""

    shape: tuple[int, int, int]
    dtype: np.dtype
    block: tuple[int, int]
    tiled: bool
    planes: bool
    deflated: bool
    differences: bool
    spans: list[tuple[int, int]]
    turn: int
    white_is_zero: bool

    @property
    def upright(self) -> tuple[int, int, int]:
        height, width, samples = self.shape
        return (width, height, samples) if self.turn >= 5 else self.shape

    @property
    def places(self) -> Iterator[tuple[int, int, int]]:
        """(band, top, left) of each block; band 0 where all bands lie in one."""
        height, width, samples = self.shape
        return itertools.product(
            range(samples if self.planes else 1),
            range(0, height, self.block[0]),
            range(0, width, self.block[1]),
        )


def header(file, length: int) -> Bands:
    """Read the header of a file of `length` bytes. Raises Unusable or HeaderDamaged, saying why."""
    try:
        tags, order = _tags(file)
        bits, kinds = _numbers(tags, BITS, 1), _numbers(tags, FORMAT, 1)
        shape = *(_number(tags, tag) for tag in (HEIGHT, WIDTH)), _number(tags, SAMPLES, 1)
        tiled = TILES[0] in tags
        offsets, lengths = TILES if tiled else STRIPS
        strip = min(_number(tags, ROWS_A_STRIP, shape[0]), shape[0]), shape[1]
        block = (_number(tags, TILE_HEIGHT), _number(tags, TILE_WIDTH)) if tiled else strip
        spans = list(zip(_numbers(tags, offsets), _numbers(tags, lengths), strict=True))
        planes, predictor = _number(tags, PLANAR, 1) == 2, _number(tags, PREDICTOR, 1)
        compression = _number(tags, COMPRESSION, PLAIN)
        turn, photometric = _number(tags, ORIENTATION, 1), _number(tags, PHOTOMETRIC, 1)
    except (
        KeyError,
        ValueError,
        TypeError,
        IndexError,
        SyntaxError,
        OSError,
        struct.error,
    ) as error:
        if getattr(error, "errno", None):
            raise  # of reading
        raise HeaderDamaged(f"damaged header ({error!r})") from error
    samples = shape[2]
    if min(*shape, *block) < 1:
        raise Unusable(f"declares {shape[1]} x {shape[0]} pixels of {samples} bands")
    if len({*bits}) > 1 or len({*kinds}) > 1 or (kinds[0], bits[0]) not in TYPES:
        raise Unusable(f"a TIFF of {samples} bands of {bits} bits: store uint8, uint16 or floats")
    if compression != PLAIN and compression not in DEFLATE:
        name = COMPRESSIONS.get(compression, f"method {compression}")
        raise Unusable(
            f"a TIFF of {samples} bands compressed by {name}: store it uncompressed or by deflate, "
            "or as .npy"
        )
    dtype = np.dtype(order + TYPES[kinds[0], bits[0]])
    if predictor not in (1, 2) or (predictor == 2 and dtype.kind != "u"):
        raise Unusable(f"a TIFF of {samples} bands with predictor {predictor}: store it without")
    deflated = compression != PLAIN
    blocks = -(-shape[0] // block[0]) * -(-shape[1] // block[1]) * (samples if planes else 1)
    most = min(sum(size for _, size in spans), length) * (MOST_DEFLATED if deflated else 1)
    if len(spans) != blocks or math.prod(shape) * dtype.itemsize > most:
        raise Unusable(f"truncated: {shape[1]} x {shape[0]} pixels of {samples} bands in {blocks} "
                       f"blocks, of which it has {len(spans)}")  # fmt: skip
    return Bands(
        shape, dtype, block, tiled, planes, deflated, predictor == 2, spans,
        turn=turn if 1 <= turn <= 8 else 1,
        white_is_zero=photometric == WHITE_IS_ZERO and samples == 1 and dtype.kind == "u",
    )  # fmt: skip


def _tags(file) -> tuple[ImageFileDirectory_v2, str]:
    """(the first directory, the order of bytes)."""
    file.seek(0)
    start = file.read(8)
    start += file.read(8) if start[2] == 43 or start[3] == 43 else b""
    tags = ImageFileDirectory_v2(start)
    file.seek(tags.next)
    tags.load(file)
    return tags, "<" if start.startswith(b"II") else ">"


def _numbers(tags: ImageFileDirectory_v2, tag: int, *default: int) -> list[int]:
    values = tags.get(tag, default) if default else tags[tag]
    return [int(value) for value in (values if isinstance(values, tuple) else (values,))]


def _number(tags: ImageFileDirectory_v2, tag: int, *default: int) -> int:
    return _numbers(tags, tag, *default)[0]


def read(data: bytes) -> tuple[np.ndarray, bool]:
    """(upright (H, W, bands) in the file's type, whether 0 is white). Raises Unusable,
    HeaderDamaged or ValueError."""
    bands = header(io.BytesIO(data), len(data))
    height = bands.shape[0]
    values = np.zeros(bands.shape, bands.dtype.newbyteorder("="))
    for (offset, length), (band, top, left) in zip(bands.spans, bands.places, strict=True):
        rows = bands.block[0] if bands.tiled else min(bands.block[0], height - top)
        block = _block(bands, data[offset : offset + length], rows)
        room = values[top : top + bands.block[0], left : left + bands.block[1]]
        part = room[..., band : band + 1] if bands.planes else room
        part[:] = block[: room.shape[0], : room.shape[1]]
    return _turned(values, bands.turn), bands.white_is_zero


def _turned(values: np.ndarray, turn: int) -> np.ndarray:
    """Upright, from rows and columns that begin where an orientation says (TIFF 6.0, section 8)."""
    values = values.swapaxes(0, 1) if turn >= 5 else values
    rows, columns = (slice(None, None, -1 if turn in those else 1) for those in BACKWARDS)
    return values[rows, columns]


def _block(bands: Bands, data: bytes, rows: int) -> np.ndarray:
    """(rows, block width, bands here). Raises ValueError where values are missing."""
    shape = rows, bands.block[1], 1 if bands.planes else bands.shape[2]
    wanted = math.prod(shape) * bands.dtype.itemsize
    if bands.deflated:
        try:
            data = zlib.decompressobj().decompress(data, wanted)
        except zlib.error as error:
            raise ValueError(f"a damaged block: {error}") from error
    if len(data) < wanted:
        raise ValueError(f"truncated: {len(data)} of {wanted} bytes of a block")
    block = np.frombuffer(data[:wanted], bands.dtype).reshape(shape)
    block = block.astype(bands.dtype.newbyteorder("="))
    return np.cumsum(block, axis=1, dtype=block.dtype) if bands.differences else block
