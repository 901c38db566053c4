"""Images made on the spot, good and corrupt in many ways. No files are shipped for this."""

import io
import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def picture(seed: int, height: int = 60, width: int = 80) -> np.ndarray:
    """A smooth random picture, (height, width, 3) uint8: JPEG and resizing change it little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def encoded(image: Image.Image | np.ndarray, kind: str = "JPEG", **options) -> bytes:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    if kind == "JPEG":
        options.setdefault("quality", 95)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def two_exif(kind: str, first: int, second: int) -> bytes:
    """A JPEG or PNG with two EXIF blocks, which say different orientations."""
    data, blocks = encoded(picture(11, 90, 130), kind), (exif(first), exif(second))
    if kind == "PNG":
        at = data.find(b"IDAT") - 4
        more = b"".join(chunk(b"eXIf", block.removeprefix(b"Exif\0\0")) for block in blocks)
    else:
        at = 2
        sizes = [struct.pack(">H", 2 + len(block)) for block in blocks]
        more = b"".join(b"\xff\xe1" + s + block for s, block in zip(sizes, blocks, strict=True))
    return data[:at] + more + data[at:]


def png(pixels: np.ndarray) -> bytes:
    """A PNG of uint8 or uint16 (H, W), (H, W, 3) or (H, W, 4): Pillow writes no 16-bit colour."""
    bits = 8 * pixels.dtype.itemsize
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(f">u{bits // 8}").tobytes() for row in pixels)
    colour = {2: 0, 3: 2, 4: 6}[pixels.shape[2] if pixels.ndim == 3 else 2]
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return PNG_MAGIC + body


def tiff(pixels_HWC: np.ndarray, order: str) -> bytes:
    """A TIFF of uint16 colour. order: of its bytes, "little" or "big"; "packed": by zlib."""
    (height, width, count), end = pixels_HWC.shape, ">" if order == "big" else "<"
    data = pixels_HWC.astype(f"{end}u2").tobytes()
    data = zlib.compress(data) if order == "packed" else data
    tags = {  # of 32 bits, but for those of 16 that are given as a tuple of one
        256: width, 257: height, 258: None, 259: (8 if order == "packed" else 1,), 262: (2,),
        273: None, 277: (count,), 278: height, 279: len(data), 284: (1,),
    }  # fmt: skip
    tags |= {338: (2,)} if count == 4 else {}
    bits = 8 + 2 + 12 * len(tags) + 4
    tags[273] = bits + 2 * count
    head = struct.pack(f"{end}2sHIH", b"MM" if order == "big" else b"II", 42, 8, len(tags))
    for tag, value in tags.items():
        if tag == 258:
            head += struct.pack(f"{end}HHII", tag, 3, count, bits)
        elif isinstance(value, tuple):
            head += struct.pack(f"{end}HHIHH", tag, 3, 1, *value, 0)
        else:
            head += struct.pack(f"{end}HHII", tag, 4, 1, value)
    return head + struct.pack(f"{end}I{count}H", 0, *[16] * count) + data


def _patched(data: bytes, at: int, patch: bytes) -> bytes:
    return data[:at] + patch + data[at + len(patch) :]


def truncated(seed):
    data = encoded(picture(seed))
    return data[: len(data) // 2]


def corrupt_header(seed):
    return b"\xff\xd8\xff\xe0" + np.random.default_rng(seed).bytes(3000)


def huge(seed):
    data = encoded(picture(seed))
    return _patched(data, data.find(b"\xff\xc0") + 5, b"\xfe\xfe\xfe\xfe")


def damaged_tables(seed):
    """The Huffman tables count more codes than there can be: a header check does not see it."""
    data = encoded(picture(seed))
    return _patched(data, data.find(b"\xff\xc4") + 5, b"\xff" * 16)


def stray_bytes(seed):
    """Eight bytes too many after the pixels: libjpeg warns of them, and the picture is whole."""
    data = encoded(picture(seed))
    return data[:-2] + b"abcdefgh" + data[-2:]


def png_with(name: bytes, body: bytes) -> bytes:
    """A PNG with one more chunk before its pixels."""
    data = encoded(picture(1), "PNG")
    at = data.find(b"IDAT") - 4
    return data[:at] + chunk(name, body) + data[at:]


def png_wrong_checksum(seed):
    data = encoded(picture(seed), "PNG")
    at = data.find(b"IDAT") + 40
    return _patched(data, at, bytes([data[at] ^ 0x55]))


def png_truncated(seed):
    data = encoded(picture(seed), "PNG")
    return data[: len(data) // 2]


def png_damaged_pixels(seed):
    """Checksums that fit pixels that do not decompress."""
    header = struct.pack(">IIBBBBB", 80, 60, 8, 2, 0, 0, 0)
    pixels = np.random.default_rng(seed).bytes(500)
    return PNG_MAGIC + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


# name -> bytes; each is found by the quick check when the set is indexed
SEEN_AT_ONCE = {
    "truncated.jpg": truncated,
    "empty.jpg": lambda seed: b"",
    "text.jpg": lambda seed: b"this is not an image\n" * 50,
    "header.jpeg": corrupt_header,
    "huge.JPG": huge,
    "checksum.png": png_wrong_checksum,
    "cut.png": png_truncated,
    "zeros.png": lambda seed: bytes(4000),
}
# each passes the quick check and fails only in the decoder
SEEN_WHEN_DECODED = {"tables.jpg": damaged_tables, "pixels.png": png_damaged_pixels}


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def good_folder(root: Path, count: int, classes: int = 2) -> Path:
    """count JPEGs of several sizes: root/c<k>/<i>.jpg."""
    for i in range(count):
        size = 40 + 7 * (i % 5), 50 + 9 * (i % 4)
        write(root / f"c{i % classes}" / f"{i:04d}.jpg", encoded(picture(i, *size)))
    return root


def break_folder(root: Path, where: str = "c0") -> tuple[set[str], set[str]]:
    """Add one file of each corrupt kind, a folder named as an image and a link to nowhere.

    Returns the names (found by the quick check, found in the decoder).
    """
    folder = root / where
    for name, make in (SEEN_AT_ONCE | SEEN_WHEN_DECODED).items():
        write(folder / name, make(7))
    (folder / "folder.jpg").mkdir()
    os.symlink("nowhere", folder / "link.jpg")
    at_once = {f"{where}/{name}" for name in (*SEEN_AT_ONCE, "folder.jpg", "link.jpg")}
    return at_once, {f"{where}/{name}" for name in SEEN_WHEN_DECODED}


def write_shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def good_shards(root: Path, count: int, shards: int = 3, **extra: bytes) -> Path:
    """count samples over `shards` tars: <i>.jpg, <i>.cls (i % 5), and <i>.<extra> for each."""
    root.mkdir(parents=True, exist_ok=True)
    for k in range(shards):
        members = {}
        for i in range(k, count, shards):
            members[f"{i:04d}.jpg"] = encoded(picture(i, 40 + i % 7, 50 + i % 5))
            members[f"{i:04d}.cls"] = str(i % 5).encode()
            members |= {f"{i:04d}.{ext}": data for ext, data in extra.items()}
        write_shard(root / f"x-{k:02d}.tar", members)
    return root
