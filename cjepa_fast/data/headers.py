"""What the headers of JPEG and PNG files and EXIF blocks say, read from their bytes.

Here rather than by Pillow, which warns of large pictures and of damaged EXIF, and looks for an
orientation in XMP too, which DALI does not.
"""

import struct
import zlib
from dataclasses import dataclass, field
from typing import NamedTuple

JPEG_MAGIC = b"\xff\xd8"
JPEG_END = b"\xff\xd9"
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}  # by colour type


class Unusable(Exception):
    """The file is no image that can be trained on; the message says why."""


class Foreign(Unusable):
    """An image, of a kind that nobody here reads."""


class HeaderDamaged(Exception):
    """The header does not parse; more of the file may help."""


@dataclass
class JpegHeader:
    """What the segments before the pixels say. exif: where each of its segments starts and ends;
    exif_block: of the first, which counts."""

    height: int = 0
    width: int = 0
    frame: int = -1  # 0 baseline, 1 extended, 2 progressive; others few decoders read
    components: bytes = b""  # their identifiers
    adobe_transform: int | None = None
    exif: list[tuple[int, int]] = field(default_factory=list)
    exif_block: bytes | None = None
    scan: int = 0  # where the pixels begin

    @property
    def plain(self) -> bool:
        """Gray or YCbCr, in a coding that every decoder reads, and turned by at most one segment:
        of two DALI 2.4 takes the orientation of either, or ends with SIGSEGV (6, then 3)."""
        rgb_coded = self.adobe_transform == 0 or self.components == b"RGB"
        gray_or_ycc = len(self.components) == 1 or (len(self.components) == 3 and not rgb_coded)
        return gray_or_ycc and self.frame in (0, 1, 2) and len(self.exif) < 2


def jpeg_header(head: bytes) -> JpegHeader:
    """Walk the segments up to the pixels (ITU T.81, annex B)."""
    found, offset = JpegHeader(), 2
    try:
        while True:
            if head[offset] != 0xFF:
                raise HeaderDamaged("damaged header (no marker where one must stand)")
            while head[offset + 1] == 0xFF:  # fill bytes
                offset += 1
            marker = head[offset + 1]
            if marker == 0xDA:
                found.scan = offset
                break
            if marker == 0xD9:
                raise HeaderDamaged("damaged header (it ends before the pixels)")
            (size,) = struct.unpack_from(">H", head, offset + 2)
            end = offset + 2 + size
            _read_segment(found, marker, head[offset + 4 : end], (offset, end))
            offset = end
    except (IndexError, struct.error) as error:
        raise HeaderDamaged("damaged header (it is cut short)") from error
    if found.frame < 0:
        raise HeaderDamaged("damaged header (it declares no picture)")
    return found


def _read_segment(found: JpegHeader, marker: int, body: bytes, span: tuple[int, int]) -> None:
    if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
        bits, found.height, found.width, count = struct.unpack_from(">BHHB", body)
        if bits != 8:
            raise Unusable(f"a JPEG of {bits} bits")
        found.frame, found.components = marker - 0xC0, body[6 : 6 + 3 * count : 3]
    elif marker == 0xE1 and body.startswith(b"Exif\0\0"):
        found.exif.append(span)
        found.exif_block = found.exif_block or body
    elif marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
        found.adobe_transform = body[11]


class PngHeader(NamedTuple):
    """bits: of a channel, if more than 8, else 8 (of gray with alpha always); exif_block: None
    where there is none; channels: as decoded, a palette's three, or four where some of its colours
    are clear; plain: not with a second EXIF chunk, of which DALI 2.4 takes the other orientation,
    or writes where it must not."""

    height: int
    width: int
    bits: int
    exif_block: bytes | None
    channels: int
    plain: bool


def png_header(data: bytes) -> PngHeader:
    """Walk the chunks and verify every checksum, up to IEND. Raises Unusable."""
    offset, exif, shape, pixels, bits, channels, colour = len(PNG_MAGIC), None, None, False, 8, 3, 2
    plain = True
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
        if name == b"IHDR" and size >= 10:
            *sides, depth, colour = struct.unpack_from(">IIBB", data, offset + 8)
            shape, bits = sides[::-1], 16 if depth == 16 and colour in (0, 2, 6) else 8
            channels = PNG_CHANNELS.get(colour, 3)
        elif name == b"tRNS" and colour == 3:
            channels = 4
        elif name == b"eXIf":
            plain = exif is None
            exif = data[offset + 8 : body_end]
        elif name == b"IDAT":
            pixels = True
        elif name == b"IEND":
            break
        offset = body_end + 4
    if shape is None or not pixels:
        raise Unusable("damaged: a PNG without header or pixels")
    return PngHeader(*shape, bits, exif, channels, plain)


def orientation(exif: bytes | None) -> tuple[int, bool]:
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
            if tag == 0x0112 and 2 <= turn <= 8:
                found = turn
    except struct.error:
        return 1, False
    return found, True
