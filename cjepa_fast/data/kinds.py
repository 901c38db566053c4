"""Which files look like images, by their names and first bytes, and what the others of them are.

Whether a file is read is decided by its content (formats.py): a JPEG named .heic is read.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

READ = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".gif", ".bmp", ".dib", ".webp",
    ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".avif",
)  # fmt: skip
# What a camera's raw file holds beside its data is a preview of a few pixels, as a TIFF.
RAW = (".dng", ".cr2", ".cr3", ".crw", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw")
OTHERS = (
    ".heic", ".heif", ".jxl", ".jxr", ".svg", ".psd", ".psb", ".xcf", ".ico", ".icns", ".tga",
    ".pcx", ".sgi", ".qoi", ".exr", ".hdr", ".dds", ".eps", ".dcm", ".fits", ".fit",
)  # fmt: skip
ARRAYS = (".npy",)  # images where there are no others, else features, masks or the like beside them
EXTENSIONS = frozenset((*READ, *RAW, *OTHERS, *ARRAYS))
# Bytes at an offset, of kinds that neither DALI nor Pillow reads.
MAGIC = (
    (4, b"ftyphei", "HEIC"), (4, b"ftyphev", "HEIC"), (4, b"ftypmif1", "HEIC"),
    (0, b"\xff\x0a", "JPEG XL"), (0, b"\0\0\0\x0cJXL ", "JPEG XL"), (0, b"II\xbc", "JPEG XR"),
    (0, b"8BPS", "Photoshop"), (0, b"gimp xcf", "GIMP"), (0, b"\0\0\x01\0", "an icon"),
    (0, b"v/1\x01", "OpenEXR"), (0, b"#?RADIANCE", "Radiance HDR"), (0, b"DDS ", "DDS"),
    (0, b"qoif", "QOI"), (0, b"<svg", "SVG"), (0, b"<?xml", "SVG"), (0, b"%!PS", "PostScript"),
    (128, b"DICM", "DICOM"), (0, b"SIMPLE  =", "FITS"), (0, b"icns", "an icon"),
)  # fmt: skip


def extension(name: str | bytes) -> str:
    """In small letters, with its dot: of those that images have, else ""."""
    base = name.rsplit(b"/", 1)[-1].decode("latin-1") if isinstance(name, bytes) else name
    found = "." + base.rpartition(".")[2].lower()
    return found if found in EXTENSIONS else ""


def without_arrays(found: Sequence[T], name: Callable[[T], str | bytes]) -> list[T]:
    """Those of `found` that are images: arrays are, where nothing else is. What has no image's
    name, as a lost link, is no picture."""
    others = [one for one in found if extension(name(one)) not in ARRAYS]
    return others if any(extension(name(one)) for one in others) else list(found)


def unread(head: bytes) -> str:
    """The kind of image that these first bytes begin, where it is one that is not read; else ""."""
    return next((kind for at, magic, kind in MAGIC if head[at:].startswith(magic)), "")
