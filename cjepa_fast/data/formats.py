"""What an image file holds, told from its bytes: the quick check, and conversion for the decoder.

The content decides, never the extension. The check reads a header, a JPEG's end marker and a PNG's
checksums; it decodes only what is damaged there. What it cannot see (damage in the middle of a
JPEG) the loader finds.

Measured with DALI 2.4 on the CPU against Pillow: JPEG (grayscale, 4:2:0 to 4:4:4, progressive, all
eight EXIF orientations) and PNG (grayscale, palette, alpha, 1 to 16 bits) come out as the same
upright RGB within rounding; alpha is dropped by both. What differs or fails there, or is known to
differ between CPU and GPU decoders, is CONVERTed here by Pillow, so that every device agrees:
CMYK and RGB-coded JPEG, damaged or repeated EXIF, and other formats under a .jpg or .png name.
"""

import io
import re
import struct
import sys
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from cjepa_fast.data import arrays, kinds
from cjepa_fast.data.headers import (
    JPEG_END,
    JPEG_MAGIC,
    PNG_MAGIC,
    Foreign,
    HeaderDamaged,
    JpegHeader,
    Unusable,
    jpeg_header,
    orientation,
    png_header,
)  # fmt: skip
from cjepa_fast.runtime.oom import is_out_of_memory

# How `read` treats a file: as it is, through Pillow, never, never since nobody reads its kind.
# ARRAY: by arrays.py alone.
PLAIN, CONVERT, UNUSABLE, FOREIGN, ARRAY = range(5)
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # Pillow's, by channels
CHANNELS = {"1": 1, "L": 1, "LA": 2, "La": 2, "PA": 4, "RGBA": 4, "RGBa": 4, "RGBX": 4}  # else 3
HEAD_BYTES = 1 << 16  # holds the whole header of nearly every photograph
TAIL_BYTES = 1 << 12
JUNK_BYTES = 1 << 9  # at most so many before a JPEG are passed over
MOST_UNKNOWN = 1 << 28  # bytes that are read of what has no known header: a video, an archive
MOST_SIDE = 2**31 - 1  # what index.ENTRY holds; a header that says more is corrupt
MAX_PIXELS = 89_478_485  # from there on Pillow warns of decompression bombs
OTHER_FORMATS = ("GIF", "BMP", "DIB", "WEBP", "PPM", "TIFF", "JPEG2000", "AVIF")  # of Pillow's
DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")  # one channel of more than 8 bits
# Colour of 16 bits, as Pillow unpacks it: the higher byte of each number, and no more.
DEEP_COLOUR = re.compile(r"(RGB|RGBA|RGBX);16[BLN]")
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's parsers raise on damaged bytes (UnidentifiedImageError is an OSError). AVIF's raise
# RuntimeError, which may also say that memory was short: is_out_of_memory.
PILLOW_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, struct.error,
    zlib.error, OverflowError, RuntimeError, Image.DecompressionBombError,
)  # fmt: skip


class ImageHeader(NamedTuple):
    """What a header says. Upright; kind: PLAIN, CONVERT or ARRAY; bits: of a channel or of a
    number in an array, if more than 8, else 8; there_pct: how much of a JPEG that was cut short is
    there, of its rows; channels: as stored, but three for CMYK and for a palette without alpha."""

    height: int
    width: int
    kind: int
    bits: int = 8
    there_pct: int = 100
    channels: int = 3


def inspect(read, length: int) -> ImageHeader:
    """What there is to know of an image without decoding it. Raises Unusable or OSError.

    read(offset, count) -> bytes of the file, which is `length` bytes long.
    """
    if length == 0:
        raise Unusable("empty file")
    head = read(0, min(length, HEAD_BYTES))
    if not head.strip(b"\0"):
        raise Unusable("zeros instead of an image")
    if kind := kinds.unread(head):
        raise Foreign(f"{kind}, which neither DALI nor Pillow reads")
    try:
        return _inspect_head(head, read, length)
    except HeaderDamaged as error:
        damage = error
    if length > MOST_UNKNOWN and not head.startswith(JPEG_MAGIC):
        raise Unusable(f"{damage}, in a file of {length >> 20} MiB") from damage
    whole = read(0, length)
    try:  # a header longer than HEAD_BYTES: large EXIF previews and colour profiles
        return _inspect_head(whole, read, length)
    except HeaderDamaged:
        return _tried(whole, damage)


def _tried(data: bytes, damage: Exception) -> ImageHeader:
    """Decode once: of a damaged header Pillow may read more than we do."""
    try:
        image = decode_rgb(data)
        channels = channels_of(_opened(data, MAX_PIXELS)[0])
    except OSError:
        raise Unusable(str(damage)) from damage
    return ImageHeader(image.height, image.width, CONVERT, channels=channels)


def _inspect_head(head: bytes, read, length: int) -> ImageHeader:
    if head.startswith(JPEG_MAGIC):
        return _inspect_jpeg(jpeg_header(head), read, length)
    if head.startswith(PNG_MAGIC):
        header = png_header(read(0, length))
        turn, sound = orientation(header.exif_block)
        shape = _upright(*_checked(header.height, header.width), turn)
        kind = PLAIN if sound and header.plain else CONVERT
        return ImageHeader(*shape, kind, header.bits, channels=header.channels)
    file = io.BufferedReader(_File(read, length))
    if head.startswith(arrays.NPY_MAGIC):
        return _of_array(arrays.inspect(file, head, length))
    try:
        image = _open_other(file, head)
    except PILLOW_ERRORS as error:
        if getattr(error, "errno", None) or is_out_of_memory(error):
            raise  # of reading
        if arrays.is_array(head):
            return _of_array(arrays.inspect(file, head, length))
        raise HeaderDamaged(f"damaged header ({error})") from error
    # Of bands Pillow drops those it cannot name, and of floats it does not know the white.
    if image.format == "TIFF" and (image.tag_v2.get(277, 1) > 4 or image.mode == "F"):
        return _of_array(arrays.inspect(file, head, length))
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        raise Unusable("of 32-bit numbers, whose black and white nobody knows")
    if image.format == "TIFF" and 2 in image.tag_v2.get(339, ()):  # SampleFormat
        raise Unusable("a TIFF of signed numbers: store uint8, uint16 or floats")
    turn, _ = orientation(image.info.get("exif"))  # none of a TIFF, which Pillow itself turns
    bits = _depth(image) if image.mode in DEEP_MODES or _deep_tiles(image) else 8
    shape = _upright(*_checked(image.height, image.width), turn)
    return ImageHeader(*shape, CONVERT, bits, channels=channels_of(image))


def _of_array(shape: arrays.Shape) -> ImageHeader:
    return ImageHeader(
        *_checked(shape.height, shape.width), ARRAY, shape.bits, channels=shape.channels
    )


def channels_of(image: Image.Image) -> int:
    """How many a picture of Pillow's has; of CMYK and the like, those of the RGB it becomes."""
    if image.mode == "P":
        return 4 if "transparency" in image.info else 3
    return 1 if image.mode in DEEP_MODES else CHANNELS.get(image.mode, 3)


class _File(io.RawIOBase):
    """A file of `length` bytes behind read(offset, count): of a large one only parts are read."""

    def __init__(self, read, length: int):
        self._read, self._length, self._at = read, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_CUR: self._at, io.SEEK_END: self._length}.get(whence, 0)
        return self._at

    def readinto(self, buffer) -> int:
        count = max(0, min(len(buffer), self._length - self._at))
        buffer[:count] = self._read(self._at, count) if count else b""
        self._at += count
        return count


def _depth(image: Image.Image) -> int:
    """Bits of a channel, as its format has them: a TIFF's may be 12."""
    tag = getattr(image, "tag_v2", {}).get(258, (16,))  # BitsPerSample
    return int(tag[0])


def _inspect_jpeg(header: JpegHeader, read, length: int) -> ImageHeader:
    # Searched from the pixels on: previews inside the header have end markers of their own.
    start = max(header.scan, length - TAIL_BYTES)
    channels = 1 if len(header.components) == 1 else 3
    ended = JPEG_END in read(start, length - start)
    turn, sound = orientation(header.exif_block)
    height, width = _upright(*_checked(header.height, header.width), turn)
    if ended or JPEG_END in read(header.scan, length - header.scan):
        kind = PLAIN if sound and header.plain else CONVERT
        return ImageHeader(height, width, kind, channels=channels)
    there_pct = _there_pct(read(0, length))
    if not there_pct:
        raise Unusable("truncated: no end marker")
    return ImageHeader(height, width, CONVERT, there_pct=there_pct, channels=channels)


def _there_pct(data: bytes) -> int:
    """How much of a JPEG without its end is there: the rows above those that repeat the last one,
    which libjpeg fills in. 0 where it cannot be decoded, or is too large to be tried."""
    header = jpeg_header(data)
    if header.height * header.width > MAX_PIXELS:
        return 0
    try:
        with JpegImageFile(io.BytesIO(_without_exif(data, header) + JPEG_END)) as image:
            rows_HW3 = np.asarray(image.convert("RGB"))
    except PILLOW_ERRORS:
        return 0
    differs_H = (rows_HW3 != rows_HW3[-1]).any((1, 2))
    return int(100 * (np.flatnonzero(differs_H).max(initial=-1) + 1) // len(rows_HW3))


def _without_exif(data: bytes, header: JpegHeader) -> bytes:
    """Pillow would parse it, and warn of damage."""
    for start, end in reversed(header.exif):
        data = data[:start] + data[end:]
    return data


def _checked(height: int, width: int) -> tuple[int, int]:
    if not (1 <= height <= MOST_SIDE and 1 <= width <= MOST_SIDE):
        raise Unusable(f"declares {width} x {height} pixels")
    return height, width


def _upright(height: int, width: int, turn: int) -> tuple[int, int]:
    return (width, height) if turn >= 5 else (height, width)


def _opened(data: bytes, most_pixels: int) -> tuple[ImageFile.ImageFile, bytes | None]:
    """(Pillow's image, not yet decoded; its EXIF block). Image.open would warn of large ones."""
    if data.startswith(JPEG_MAGIC):
        return _opened_jpeg(data)
    if data.startswith(PNG_MAGIC):
        image = PngImageFile(io.BytesIO(data))
        _limited(image, most_pixels)
        image.load()  # the EXIF chunk may follow the pixels
        return image, image.info.get("exif")
    try:
        image = _open_other(io.BytesIO(data), data)
    except HeaderDamaged:
        at = data.find(JPEG_MAGIC + b"\xff", 0, JUNK_BYTES)
        if at < 0:
            raise
        return _opened_jpeg(data[at:])
    return image, image.info.get("exif")


def _opened_jpeg(data: bytes) -> tuple[ImageFile.ImageFile, bytes | None]:
    try:
        header = jpeg_header(data)
    except HeaderDamaged:
        image = JpegImageFile(io.BytesIO(data))
        return image, image.info.get("exif")
    return JpegImageFile(io.BytesIO(_without_exif(data, header))), header.exif_block


def _open_other(file, head: bytes) -> ImageFile.ImageFile:
    """By the first of Pillow's readers that takes it, of the formats other than JPEG and PNG."""
    Image.init()
    for name in OTHER_FORMATS:
        opens, accepts = Image.OPEN.get(name, (None, lambda head: False))
        accepted = accepts(head[:16])
        if isinstance(accepted, str):  # of this kind, but Pillow was built without it
            raise Foreign(accepted)
        if accepted:
            return opens(file, "")
    raise HeaderDamaged("not an image, or of an unsupported kind")


def _limited(image: Image.Image, most_pixels: int) -> None:
    _checked(image.height, image.width)
    if image.height * image.width > most_pixels:
        raise Unusable(over(image.height, image.width, most_pixels))


def over(height: int, width: int, most_pixels: int) -> str:
    """Why an image is too large."""
    return f"too large: {width} x {height} pixels, over data.max_pixels = {most_pixels}"


def decode_rgb(
    data: bytes, most_pixels: int = MAX_PIXELS, bits: int | None = None, channels: int | None = 3
) -> Image.Image:
    """Upright RGB by Pillow, or a picture of so many channels. Raises OSError if the bytes cannot
    be decoded.

    bits: of a channel that has more than 8, if fewer than its format says are in use. channels:
    None for as many as the file has (channels_of).
    """
    try:
        image, exif = _opened(data, most_pixels)
        _limited(image, most_pixels)
        channels = channels or channels_of(image)
        if bits and (colour_HWC := _deep_colour(data)) is not None:
            image = Image.fromarray(_eight_bits(colour_HWC, bits))
        image.load()
        if image.mode in DEEP_MODES:
            levels_HW = _eight_bits(np.asarray(image), bits or _depth(image))
            # Of 8 bits Pillow does so itself: tag PhotometricInterpretation, WhiteIsZero.
            white_is_zero = getattr(image, "tag_v2", {}).get(262) == 0
            image = Image.fromarray(255 - levels_HW if white_is_zero else levels_HW)
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # straight to RGB warns; alpha is dropped either way
        if image.mode == "RGBX" and channels == 4:
            image = Image.merge("RGBA", image.split())  # the fourth band as it is
        image = image.convert(MODES[channels])
    except (*PILLOW_ERRORS, HeaderDamaged, Unusable) as error:
        if is_out_of_memory(error):
            raise
        raise OSError(f"cannot be decoded ({error})") from error
    turn, _ = orientation(exif)
    return image.transpose(_TRANSPOSE[turn]) if turn in _TRANSPOSE else image


def _eight_bits(levels: np.ndarray, bits: int) -> np.ndarray:
    """Scaled, where Pillow itself would clip at 255."""
    scale = 255 / (2**bits - 1)
    return (levels.astype(np.float32) * scale + 0.5).clip(0, 255).astype(np.uint8)


def _deep_tiles(image: Image.Image) -> list | None:
    """Pillow's plan of reading an image, where its channels are of 16 bits and it has colour."""
    codings = [t[3] if isinstance(t[3], str) else t[3][0] for t in getattr(image, "tile", ())]
    deep = codings and all(isinstance(c, str) and DEEP_COLOUR.fullmatch(c) for c in codings)
    return image.tile if deep else None


def _deep_colour(data: bytes) -> np.ndarray | None:
    """(H, W, 3 or 4) uint16 of a PNG or TIFF with colour of 16 bits; None of what is no such file.

    Pillow gives one byte of each number, the one that stands for the higher; so it is asked twice.
    """
    if data.startswith(JPEG_MAGIC):
        return None
    halves = [_unpacked(data, low) for low in (False, True)]
    if any(half is None for half in halves):
        return None
    high_HWC, low_HWC = halves
    return high_HWC.astype(np.uint16) * 256 + low_HWC


def _unpacked(data: bytes, low: bool) -> np.ndarray | None:
    """The higher bytes of 16-bit colour, or the lower ones: those of the other order of bytes."""
    png = data.startswith(PNG_MAGIC)
    image = PngImageFile(io.BytesIO(data)) if png else _open_other(io.BytesIO(data), data)
    if not (tiles := _deep_tiles(image)):
        return None
    image.tile = [_other_order(tile) for tile in tiles] if low else tiles
    return np.asarray(image)


def _other_order(tile: tuple):
    """A step of Pillow's plan, for numbers whose bytes stand the other way around."""
    *where, said = tile
    coding, *more = [said] if isinstance(said, str) else said
    order = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}[coding[-1]]
    coding = coding[:-1] + order
    return getattr(type(tile), "_make", tuple)([*where, (coding, *more) if more else coding])


def as_plain(data: bytes) -> bytes:
    """The bytes of an image, or Pillow's pixels of a JPEG or PNG that DALI decodes differently, or
    that ends its process. Raises OSError if Pillow cannot decode it."""
    if data.startswith(JPEG_MAGIC):
        try:
            header = jpeg_header(data)
            plain = header.plain and orientation(header.exif_block)[1]
        except (HeaderDamaged, Unusable):
            plain = False
    else:
        plain = not data.startswith(PNG_MAGIC) or data.count(b"eXIf") < 2
    return data if plain else as_ppm(decode_rgb(data))


def as_ppm(image: Image.Image) -> bytes:
    """Uncompressed PPM: lossless, costs nothing to write, and both of DALI's devices read it. With
    alpha, which that has not, a PNG."""
    buffer = io.BytesIO()
    if image.mode in ("LA", "RGBA"):
        image.save(buffer, "PNG", compress_level=1)
    else:
        image.save(buffer, "PPM")
    return buffer.getvalue()
