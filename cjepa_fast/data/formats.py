"""What an image file holds, told from its bytes: the quick check, and conversion for the decoder.

The content decides, never the extension. The check reads a header, a JPEG's end marker and a PNG's
checksums; it does not decode. What it cannot see (damage in the middle of a JPEG) the loader finds.

Measured with DALI 2.4 on the CPU against Pillow: JPEG (grayscale, 4:2:0 to 4:4:4, progressive, all
eight EXIF orientations) and PNG (grayscale, palette, alpha, 1 to 16 bits) come out as the same
upright RGB within rounding; alpha is dropped by both. What differs or fails there, or is known to
differ between CPU and GPU decoders, is CONVERTed here by Pillow, so that every device agrees:
CMYK and RGB-coded JPEG, damaged EXIF, and other formats under a .jpg or .png name.

JPEG and PNG headers are read here rather than by Pillow, which warns of large pictures and of
damaged EXIF, and looks for an orientation in XMP too, which DALI does not.
"""

import io
import struct
import zlib
from dataclasses import dataclass

from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

PLAIN, CONVERT, UNUSABLE = range(3)  # how `read` treats a file: as it is, through Pillow, never
EXTENSIONS = (".jpg", ".jpeg", ".png")
HEAD_BYTES = 1 << 16  # holds the whole header of nearly every photograph
TAIL_BYTES = 1 << 12
MAX_PIXELS = 2 * 89_478_485  # Pillow's own limit against decompression bombs
OTHER_FORMATS = ("GIF", "BMP", "WEBP")
DECODED_FORMATS = (*OTHER_FORMATS, "PPM", "TIFF", "JPEG2000")  # by decode_rgb, beside JPEG and PNG
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's parsers raise on damaged bytes (UnidentifiedImageError is an OSError).
PILLOW_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, struct.error,
    zlib.error, OverflowError, Image.DecompressionBombError,
)  # fmt: skip


class Unusable(Exception):
    """The file is no image that can be trained on; the message says why."""


def inspect(read, length: int) -> tuple[int, int, int]:
    """(height, width, PLAIN or CONVERT) of an image, upright. Raises Unusable or OSError.

    read(offset, count) -> bytes of the file, which is `length` bytes long.
    """
    if length == 0:
        raise Unusable("empty file")
    head = read(0, min(length, HEAD_BYTES))
    if not head.strip(b"\0"):
        raise Unusable("zeros instead of an image")
    try:
        return _inspect_head(head, read, length)
    except _HeaderDamaged as error:
        if length <= HEAD_BYTES:
            raise Unusable(str(error)) from error
    try:  # a header longer than HEAD_BYTES: large EXIF previews and colour profiles
        return _inspect_head(read(0, length), read, length)
    except _HeaderDamaged as error:
        raise Unusable(str(error)) from error


class _HeaderDamaged(Exception):
    """The header does not parse; more of the file may help."""


def _inspect_head(head: bytes, read, length: int) -> tuple[int, int, int]:
    if head.startswith(b"\xff\xd8"):
        return _inspect_jpeg(_jpeg_header(head), read, length)
    if head.startswith(_PNG_MAGIC):
        return _inspect_png(read(0, length))
    try:
        image = Image.open(io.BytesIO(head), formats=OTHER_FORMATS)
    except UnidentifiedImageError as error:
        raise _HeaderDamaged("not an image, or of an unsupported kind") from error
    except PILLOW_ERRORS as error:
        raise _HeaderDamaged(f"damaged header ({error})") from error
    turn, _ = _orientation(image.info.get("exif"))
    return *_upright(*_checked(image.height, image.width), turn), CONVERT


@dataclass
class _JpegHeader:
    """What the segments before the pixels say. exif: where its segment starts and ends, or None."""

    height: int = 0
    width: int = 0
    frame: int = -1  # 0 baseline, 1 extended, 2 progressive; others few decoders read
    components: bytes = b""  # their identifiers
    adobe_transform: int | None = None
    exif: tuple[int, int] | None = None
    exif_block: bytes | None = None
    scan: int = 0  # where the pixels begin

    @property
    def plain(self) -> bool:
        """Gray or YCbCr, in a coding that every decoder reads."""
        rgb_coded = self.adobe_transform == 0 or self.components == b"RGB"
        gray_or_ycc = len(self.components) == 1 or (len(self.components) == 3 and not rgb_coded)
        return gray_or_ycc and self.frame in (0, 1, 2)


def _jpeg_header(head: bytes) -> _JpegHeader:
    """Walk the segments up to the pixels (ITU T.81, annex B)."""
    found, offset = _JpegHeader(), 2
    try:
        while True:
            if head[offset] != 0xFF:
                raise _HeaderDamaged("damaged header (no marker where one must stand)")
            while head[offset + 1] == 0xFF:  # fill bytes
                offset += 1
            marker = head[offset + 1]
            if marker == 0xDA:
                found.scan = offset
                break
            if marker == 0xD9:
                raise _HeaderDamaged("damaged header (it ends before the pixels)")
            (size,) = struct.unpack_from(">H", head, offset + 2)
            end = offset + 2 + size
            _read_segment(found, marker, head[offset + 4 : end], (offset, end))
            offset = end
    except (IndexError, struct.error) as error:
        raise _HeaderDamaged("damaged header (it is cut short)") from error
    if found.frame < 0:
        raise _HeaderDamaged("damaged header (it declares no picture)")
    return found


def _read_segment(found: _JpegHeader, marker: int, body: bytes, span: tuple[int, int]) -> None:
    if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
        bits, found.height, found.width, count = struct.unpack_from(">BHHB", body)
        if bits != 8:
            raise Unusable(f"a JPEG of {bits} bits")
        found.frame, found.components = marker - 0xC0, body[6 : 6 + 3 * count : 3]
    elif marker == 0xE1 and body.startswith(b"Exif\0\0") and found.exif is None:
        found.exif, found.exif_block = span, body
    elif marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
        found.adobe_transform = body[11]


def _inspect_jpeg(header: _JpegHeader, read, length: int) -> tuple[int, int, int]:
    # Searched from the pixels on: previews inside the header have end markers of their own.
    start = max(header.scan, length - TAIL_BYTES)
    ended = b"\xff\xd9" in read(start, length - start)
    if not ended and b"\xff\xd9" not in read(header.scan, length - header.scan):
        raise Unusable("truncated: no end marker")
    turn, sound = _orientation(header.exif_block)
    shape = _upright(*_checked(header.height, header.width), turn)
    return *shape, PLAIN if sound and header.plain else CONVERT


def _inspect_png(data: bytes) -> tuple[int, int, int]:
    """Walk the chunks and verify every checksum, up to IEND."""
    offset, exif, shape, pixels = len(_PNG_MAGIC), None, None, False
    while True:
        if offset + 12 > len(data):
            raise Unusable("truncated: no IEND chunk")
        size, name = struct.unpack_from(">I4s", data, offset)
        body_end = offset + 8 + size
        if body_end + 4 > len(data):
            raise Unusable("truncated: a chunk is cut short")
        (checksum,) = struct.unpack_from(">I", data, body_end)
        if zlib.crc32(memoryview(data)[offset + 4 : body_end]) != checksum:
            raise Unusable(f"damaged: wrong checksum in chunk {name.decode('latin1')}")
        if name == b"IHDR" and size >= 8:
            shape = struct.unpack_from(">II", data, offset + 8)[::-1]
        elif name == b"eXIf":
            exif = data[offset + 8 : body_end]
        elif name == b"IDAT":
            pixels = True
        elif name == b"IEND":
            break
        offset = body_end + 4
    if shape is None or not pixels:
        raise Unusable("damaged: a PNG without header or pixels")
    turn, sound = _orientation(exif)
    return *_upright(*_checked(*shape), turn), PLAIN if sound else CONVERT


def _checked(height: int, width: int) -> tuple[int, int]:
    if height < 1 or width < 1:
        raise Unusable(f"declares {width} x {height} pixels")
    if height * width > MAX_PIXELS:
        raise Unusable(f"declares {width} x {height} pixels, over the limit of {MAX_PIXELS}")
    return height, width


def _upright(height: int, width: int, turn: int) -> tuple[int, int]:
    return (width, height) if turn >= 5 else (height, width)


def _orientation(exif: bytes | None) -> tuple[int, bool]:
    """(EXIF orientation 1..8, whether the EXIF block could be read): one tag of the first folder.

    Every tag must be there, since DALI takes a folder that is cut short for none at all.
    Source: EXIF 2.32, 4.6.2 to 4.6.4, in its TIFF clothes.
    """
    if exif is None:
        return 1, True
    found = 1
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1, False
    try:
        (folder,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, folder)
        for offset in range(folder + 2, folder + 2 + 12 * count, 12):
            tag, kind, values, turn, _ = struct.unpack_from(f"{order}HHIHH", tiff, offset)
            if tag == 0x0112 and (kind, values) != (3, 1):  # one 16-bit number
                return 1, False
            if tag == 0x0112 and turn in _TRANSPOSE:
                found = turn
    except struct.error:
        return 1, False
    return found, True


def _opened(data: bytes) -> tuple[ImageFile.ImageFile, bytes | None]:
    """(Pillow's image, not yet decoded; its EXIF block). Image.open would warn of large pictures,
    and a JPEG's EXIF is cut out since Pillow would parse it and warn of damage."""
    if data.startswith(b"\xff\xd8"):
        header = _jpeg_header(data)
        if header.exif is not None:
            data = data[: header.exif[0]] + data[header.exif[1] :]
        return JpegImageFile(io.BytesIO(data)), header.exif_block
    if data.startswith(_PNG_MAGIC):
        image = PngImageFile(io.BytesIO(data))
        _checked(image.height, image.width)
        image.load()  # the EXIF chunk may follow the pixels
        return image, image.info.get("exif")
    Image.init()
    for name in DECODED_FORMATS:
        opens, accepts = Image.OPEN[name]
        accepted = accepts(data[:16])
        if isinstance(accepted, str):  # of this kind, but Pillow was built without it
            raise Unusable(accepted)
        if accepted:
            image = opens(io.BytesIO(data), "")
            return image, image.info.get("exif")  # none of a TIFF, which Pillow itself turns
    raise Unusable("not an image, or of an unsupported kind")


def decode_rgb(data: bytes) -> Image.Image:
    """Upright RGB by Pillow. Raises OSError if the bytes cannot be decoded."""
    try:
        image, exif = _opened(data)
        _checked(image.height, image.width)
        image.load()
        if image.mode.startswith("I"):  # Pillow clips 16 bits at 255 instead of scaling
            image = image.point(lambda v: v / 257 + 0.5).convert("L")
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # straight to RGB warns; alpha is dropped either way
        image = image.convert("RGB")
    except (*PILLOW_ERRORS, _HeaderDamaged, Unusable) as error:
        raise OSError(f"cannot be decoded ({error})") from error
    turn, _ = _orientation(exif)
    return image.transpose(_TRANSPOSE[turn]) if turn in _TRANSPOSE else image


def as_ppm(image: Image.Image) -> bytes:
    """Uncompressed PPM: lossless, costs nothing to write, and both of DALI's devices read it."""
    buffer = io.BytesIO()
    image.save(buffer, "PPM")
    return buffer.getvalue()
