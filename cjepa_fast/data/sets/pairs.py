"""Images with a label map each: ADE20K's folders, or any pair of folders.

    ROOT/images/SPLIT/a.jpg with ROOT/annotations/SPLIT/a.png, or with ROOT/masks/SPLIT/a.png

A label map holds a class number a pixel. The numbers in use are named in ROOT/classes.txt or in
ADE20K's ROOT/objectInfo150.txt; without these they are those of the training label maps.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cjepa_fast.data.sets.labelmaps import read_label_map
from cjepa_fast.data.sources import LIMITS, ImageSet, Limits, open_images
from cjepa_fast.runtime.files import read_text

IGNORE = 255  # a pixel that counts nowhere, in label maps and in what is made of them
UNKNOWN = -1
MASKS = ("annotations", "masks")  # ADE20K's name first
TRAINING = ("training", "train")
VALIDATION = ("validation", "val", "test")


@dataclass(frozen=True)
class Classes:
    """The classes in order, and the numbers that stand for them in the label maps.

    table_256: int16, from a number in a file to a class, IGNORE or UNKNOWN.
    """

    names: tuple[str, ...]
    table_256: np.ndarray

    def __len__(self) -> int:
        return len(self.names)


def classes_of(named: dict[int, str], ignored: set[int]) -> Classes:
    """The named numbers but the ignored ones, in order. Raises ValueError for fewer than two."""
    numbers = sorted(set(named) - ignored - {IGNORE})
    if len(numbers) < 2:
        raise ValueError(f"{len(numbers)} classes to tell apart: there must be two or more")
    table_256 = np.full(256, UNKNOWN, dtype=np.int16)
    table_256[numbers] = np.arange(len(numbers))
    table_256[sorted(ignored | {IGNORE})] = IGNORE
    return Classes(tuple(named[number] for number in numbers), table_256)


class Pairs:
    """The images of a split and their label maps, in a fixed order."""

    def __init__(self, images: ImageSet, folder: Path):
        self.images = images
        names = [Path(images.name(i)) for i in range(len(images))]
        self.masks = [folder / name.with_suffix(".png") for name in names]
        for path in self.masks:
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing: each image needs a label map")

    def __len__(self) -> int:
        return len(self.masks)

    def image_name(self, i: int) -> str:
        return str(self.images.root / self.images.name(i))

    def labels(self, i: int, classes: Classes) -> np.ndarray:
        """Classes and IGNORE by pixel: (H, W) uint8.

        Raises ValueError for a label map of another size than its image and for a number that is
        no class, naming the file.
        """
        numbers_HW = read_label_map(self.masks[i])
        height, width = map(int, self.images.sizes_N2[i])
        if numbers_HW.shape != (height, width):
            raise ValueError(
                f"{self.masks[i]} is {numbers_HW.shape[1]}x{numbers_HW.shape[0]}, its image "
                f"{width}x{height}: they must be of one size"
            )
        labels_HW = classes.table_256[numbers_HW]
        if (labels_HW == UNKNOWN).any():
            number = int(numbers_HW[labels_HW == UNKNOWN][0])
            raise ValueError(
                f"{self.masks[i]} holds the number {number}, which is no class: name it in "
                f"classes.txt, or leave it out with --ignore-index {number}"
            )
        return labels_HW.astype(np.uint8)


def open_pairs(root: str | Path, split: tuple[str, ...], limits: Limits = LIMITS) -> Pairs:
    """The first of the splits that is there. Raises OSError or ValueError, naming the folder."""
    images = Path(root) / "images"
    name = next((name for name in split if (images / name).is_dir()), None)
    if name is None:
        raise FileNotFoundError(f"{images} has no folder {' or '.join(split)}")
    return Pairs(open_images(images / name, limits=limits), mask_folder(root) / name)


def mask_folder(root: str | Path) -> Path:
    folders = [Path(root) / name for name in MASKS]
    found = next((folder for folder in folders if folder.is_dir()), None)
    if found is None:
        raise FileNotFoundError(f"{root} has neither {' nor '.join(MASKS)}, beside its images")
    return found


def is_ade20k(root: str | Path) -> bool:
    """Whether the folders are named as ADE20K's, whose number 0 stands for all other things: it
    has no name."""
    as_ade20k = (Path(root) / "annotations" / "training").is_dir()
    return as_ade20k and 0 not in (named_classes(root) or {})


def named_classes(root: str | Path) -> dict[int, str] | None:
    """Names by number, from a list beside the images if there is one.

    classes.txt: a line a class, `number<tab>name`, or names alone, which count from 0.
    """
    info = Path(root) / "objectInfo150.txt"
    if info.is_file():
        rows = [
            line.split("\t")
            for line in info.read_text(encoding="utf-8").splitlines()[1:]
            if line.strip()
        ]
        return {int(row[0]): row[-1].split(",")[0].strip() for row in rows}
    listed = Path(root) / "classes.txt"
    if not listed.is_file():
        return None
    named: dict[int, str] = {}
    for index, line in enumerate(filter(str.strip, read_text(listed).splitlines())):
        first, _, rest = line.strip().partition("\t")
        number, name = (first, rest) if first.isdecimal() and rest else (str(index), line)
        if int(number) > IGNORE or int(number) in named:
            raise ValueError(f"{listed}: {line.strip()!r} has a number twice, or one above 255")
        named[int(number)] = name.strip()
    return named
