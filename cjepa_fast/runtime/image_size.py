"""The size of the images that networks see: one number, a square's side, or (height, width).

A square is always one number, so that [96, 96] and 96 are the same everywhere: in configurations,
encoder.json and digests.
"""

from collections.abc import Sequence

ImageSize = int | tuple[int, int]


def simplest(size: int | Sequence[int]) -> ImageSize:
    """One number for a square, else (height, width). Raises ValueError for what is neither."""
    if isinstance(size, int):
        return size
    if not (isinstance(size, (list, tuple)) and list(map(type, size)) == [int, int]):
        raise ValueError(f"image_size {size!r}: must be a square's side, or [height, width]")
    height, width = size
    return height if height == width else (height, width)


def height_width(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def patch_grid(size: ImageSize, patch_size: int) -> tuple[int, int]:
    """(rows, cols) of whole patches."""
    height, width = height_width(size)
    return height // patch_size, width // patch_size


def aspect(size: ImageSize) -> float:
    """Width over height."""
    height, width = height_width(size)
    return width / height


def with_short_side(size: ImageSize, short_side: int, multiple: int = 1) -> ImageSize:
    """About the same aspect, with that short side; both rounded to multiples of `multiple`."""
    sides = height_width(size)
    scale = short_side / min(sides) / multiple
    return simplest([max(round(side * scale), 1) * multiple for side in sides])


def shown(size: ImageSize) -> str:
    """ "96 x 128", height first."""
    return "{} x {}".format(*height_width(size))
