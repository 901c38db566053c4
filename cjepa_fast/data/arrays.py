"""Images that are arrays: .npy files, and TIFFs of bands that Pillow has no mode for.

Of three axes of a .npy the shorter of the first and the last are the channels; the last, where both
are as long. Of two axes there is one channel. Unsigned integers of 8 and 16 bits are shares of
their range, or of data.bit_depth's; floating-point numbers are what they are, and so mean and std
are in their units. Nothing is unpickled.
"""

import io
import math
import threading
import tokenize
from typing import NamedTuple

import numpy as np

from cjepa_fast.data import tiff_bands
from cjepa_fast.data.headers import HeaderDamaged, Unusable

NPY_MAGIC = b"\x93NUMPY"
TYPES = ("u1", "u2", "f2", "f4", "f8")
MOST_CHANNELS = 1024
# Held while numpy parses a header, which is Python's text: in Python 3.11 two threads that do so at
# once get a SystemError by chance, of sound bytes (seen in 3.11.7; akin to CPython's issue 106905).
NPY_LOCK = threading.Lock()
# What numpy raises of a damaged header, which is Python's text.
NPY_ERRORS = (ValueError, SyntaxError, TypeError, RecursionError, tokenize.TokenError)


class Shape(NamedTuple):
    """bits: of an unsigned integer of more than 8, else 8."""

    height: int
    width: int
    channels: int
    bits: int


def is_array(head: bytes) -> bool:
    return head.startswith((NPY_MAGIC, *tiff_bands.MAGIC))


def inspect(file, head: bytes, length: int) -> Shape:
    """What the header of an array says, of a file `length` bytes long; head: its first bytes.

    Raises Unusable, naming what cannot be read, or HeaderDamaged for what is no header.
    """
    if head.startswith(NPY_MAGIC):
        shape, _, dtype, start = _npy_header(file)
        if math.prod(shape) * dtype.itemsize > length - start:
            raise Unusable(f"truncated: an array of {shape} that is not all there")
        height, width, channels = _height_width_channels(shape)
    else:
        bands = tiff_bands.header(file, length)
        dtype, (height, width, channels) = bands.dtype, bands.upright
    if not 1 <= channels <= MOST_CHANNELS:
        raise Unusable(f"of {channels} channels, more than {MOST_CHANNELS} or none")
    return Shape(height, width, channels, _bits(dtype))


def pixels(data: bytes, bits: int | None = None) -> np.ndarray:
    """(H, W, C) fp32, in `levels`.

    bits: in use, if fewer than the type has. Raises OSError.
    """
    white_is_zero = False
    try:
        if data.startswith(NPY_MAGIC):
            shape, columns_first, dtype, start = _npy_header(io.BytesIO(data))
            values = np.frombuffer(data, dtype, math.prod(shape), start)
            values = _channels_last(values.reshape(shape, order="F" if columns_first else "C"))
        else:
            values, white_is_zero = tiff_bands.read(data)
    except (*NPY_ERRORS, EOFError, Unusable, HeaderDamaged) as error:
        raise OSError(f"cannot be decoded ({error})") from error
    shares = levels(values, bits)
    return 255 - shares if white_is_zero else shares


def levels(values: np.ndarray, bits: int | None = None) -> np.ndarray:
    """Shares times 255, in fp32: of unsigned integers those of their range, floats as they are."""
    wide = values.astype(np.float32)
    if values.dtype.kind == "u":
        deep = bits if bits and values.dtype.itemsize > 1 else 8 * values.dtype.itemsize
        return np.minimum(wide * np.float32(255 / (2**deep - 1)), 255)
    if not np.isfinite(wide).all():
        raise OSError("cannot be decoded (it holds values that are not finite)")
    return wide * 255


def _npy_header(file) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """(shape, whether its first index runs fastest, type, where the values begin)."""
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        version = np.lib.format.read_magic(file)
        if version not in readers:
            raise Unusable(f"a .npy of version {version[0]}.{version[1]}")
        with NPY_LOCK:
            shape, columns_first, dtype = readers[version](file)
    except (*NPY_ERRORS, MemoryError) as error:
        raise HeaderDamaged(f"damaged header ({error})") from error
    if dtype.hasobject:
        raise Unusable("an array of Python objects, which is never unpickled")
    if dtype.str[1:] not in TYPES or dtype.shape:
        raise Unusable(
            f"an array of {dtype}: store whole numbers as uint8 or uint16, others as floats"
        )
    return shape, columns_first, dtype, file.tell()


def _bits(dtype: np.dtype) -> int:
    return 16 if dtype.kind == "u" and dtype.itemsize == 2 else 8


def _height_width_channels(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) == 2:
        return (*shape, 1)
    if len(shape) != 3:
        raise Unusable(f"an array of {len(shape)} axes, where an image has two or three")
    return (*shape[1:], shape[0]) if shape[0] < shape[2] else shape


def _channels_last(values: np.ndarray) -> np.ndarray:
    if values.ndim == 2:
        return values[..., None]
    return values.transpose(1, 2, 0) if values.shape[0] < values.shape[2] else values
