"""Label maps: PNG files whose pixels are numbers, of classes or of objects."""

from pathlib import Path

import numpy as np
from PIL import Image

MODES = ("L", "P")  # a byte a pixel, with or without a palette


def read_label_map(path: Path) -> np.ndarray:
    """The numbers, (H, W) uint8. Raises FileNotFoundError or ValueError, naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: each image needs a label map of its name")
    try:
        with Image.open(path) as image:
            if image.mode not in MODES:
                raise ValueError(
                    f"{path} is a picture of mode {image.mode}, not a label map: save it with one "
                    f"channel of 8 bits (mode {' or '.join(MODES)}) that holds the class numbers"
                )
            return np.asarray(image).copy()
    except OSError as error:
        raise ValueError(f"{path} cannot be read as a PNG: {error}") from error


def write_label_map(path: Path, labels_HW: np.ndarray) -> None:
    """Write numbers (H, W) uint8 as a palette PNG; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels_HW)
    image.putpalette(colours().ravel().tolist())
    image.save(path)


def colours() -> np.ndarray:
    """PASCAL VOC's colours, DAVIS's too: (256, 3) uint8.

    A number's lowest three bits are the highest of red, green and blue; the next three follow.
    """
    numbers_256 = np.arange(256)
    colours_256x3 = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        colours_256x3[:, bit % 3] |= ((numbers_256 >> bit & 1) << (7 - bit // 3)).astype(np.uint8)
    return colours_256x3
