"""DAVIS: video sequences with a label map a frame, single-object (2016) or multi-object (2017).

DAVIS/JPEGImages/480p/SEQ/00000.jpg, DAVIS/Annotations/480p/SEQ/00000.png, and the names of the
sequences in DAVIS/ImageSets/2017/val.txt; without that file, all that are there.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from cjepa_fast.data.sets.labelmaps import read_label_map

VOID = 255  # in 2017's annotations; the object itself in 2016's
FEWEST_FRAMES = 3  # the first is given, and the benchmark leaves the last out


@dataclass(frozen=True)
class Clip:
    """A sequence: its frames' files in order, and the label map of each."""

    name: str
    frames: list[Path]
    masks: list[Path]

    def labels(self, t: int) -> np.ndarray:
        """The objects of frame t by number, 0 elsewhere: (H, W) uint8."""
        labels_HW = read_label_map(self.masks[t])
        labels_HW[labels_HW == VOID] = 1 if self._is_single else 0
        return labels_HW

    @cached_property
    def objects(self) -> int:
        """The highest number in the first frame, as the benchmark counts them."""
        return int(self.labels(0).max())

    @cached_property
    def _is_single(self) -> bool:
        return set(np.unique(read_label_map(self.masks[0]))) == {0, VOID}


def open_davis(root: str | Path) -> list[Clip]:
    """The sequences of a DAVIS folder. Raises OSError or ValueError, naming what is missing."""
    root = Path(root)
    images, masks = (root / kind / "480p" for kind in ("JPEGImages", "Annotations"))
    for folder in (images, masks):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is missing: --data is a DAVIS folder at 480p")
    listed = root / "ImageSets" / "2017" / "val.txt"
    if listed.is_file():
        names = listed.read_text(encoding="utf-8").split()
    else:
        names = sorted(folder.name for folder in images.iterdir() if folder.is_dir())
    if not names:
        raise ValueError(f"{listed if listed.is_file() else images} names no sequence")
    return [_clip(name, images / name, masks / name) for name in names]


def _clip(name: str, images: Path, masks: Path) -> Clip:
    frames = sorted(images.glob("*.jpg"))
    if len(frames) < FEWEST_FRAMES:
        raise ValueError(f"{images} has {len(frames)} .jpg frames: a sequence needs three or more")
    clip = Clip(name, frames, [masks / f"{frame.stem}.png" for frame in frames])
    for path in clip.masks:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: each frame needs its annotation")
    if not clip.objects:
        raise ValueError(f"{clip.masks[0]} marks no object: there is nothing to follow")
    return clip
