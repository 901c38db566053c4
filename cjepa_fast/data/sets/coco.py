"""Boxes and masks in COCO's format: the file read and checked, the images as detectors see them.

Shapes: n objects of an image, H x W pixels.
"""

import contextlib
import io
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from cjepa_fast.data import rng
from cjepa_fast.data.formats import decode_rgb
from cjepa_fast.runtime import json_text

JITTER = (0.1, 2.0)  # large-scale jitter, Ghiasi et al. 2021, arXiv 2012.07177


class Coco:
    """The images of one split, and what is annotated on them.

    api: pycocotools' COCO of the file. Its annotations are numbered from 1, for COCOeval takes a
    detection of annotation 0 for a false one. names: of the classes, of which `label` counts from
    1, as 0 is no object. unmasked: the annotation that rules masks out, if any.
    """

    def __init__(self, file: Path, images: Path):
        self.file, self.folder = file, images
        content = _read(file)
        self.images, annotations = content["images"], content["annotations"]
        self.ids = [image["id"] for image in self.images]
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self.names = [category["name"] for category in categories]
        self.category_ids = [category["id"] for category in categories]
        self.label = {number: i for i, number in enumerate(self.category_ids, start=1)}
        self._check(annotations)
        unmasked = (a["id"] for a in annotations if not a.get("segmentation"))
        self.unmasked = next(unmasked, None)
        self.api = _indexed(content | {"annotations": [
            {"iscrowd": 0, "area": a["bbox"][2] * a["bbox"][3], **a, "id": i}
            for i, a in enumerate(annotations, start=1)
        ]})  # fmt: skip

    def __len__(self) -> int:
        return len(self.images)

    def _check(self, annotations: list[dict]) -> None:
        """Raises ValueError with the file and the entry that is wrong."""
        for what, entries in (("images", self.images), ("annotations", annotations)):
            if not entries:
                raise ValueError(f"{self.file}: its {what} are empty")
            _unique(self.file, what, entries)
        for image in self.images:
            if not self.path(image).is_file():
                raise ValueError(
                    f"{self.path(image)} is missing: {self.file} names it, image {image['id']}"
                )
        known = {"image_id": set(self.ids), "category_id": set(self.category_ids)}
        for annotation in annotations:
            for key, ids in known.items():
                if annotation[key] not in ids:
                    raise ValueError(
                        f"{self.file}: annotation {annotation['id']} has the {key} "
                        f"{annotation[key]!r}, which the file does not describe"
                    )
            _check_shape(self.file, annotation)

    def path(self, image: dict) -> Path:
        return self.folder / image["file_name"]

    def objects(self, i: int) -> list[dict]:
        """The annotations of image i, crowds among them."""
        return self.api.imgToAnns[self.ids[i]]

    def single_objects(self, i: int) -> list[dict]:
        """Those a detector learns from: no crowds, and not without area."""
        return [a for a in self.objects(i) if not a["iscrowd"] and min(a["bbox"][2:]) > 0]

    def picture(self, i: int) -> Image.Image:
        """Image i in RGB, upright. Raises ValueError where the file is not what the JSON says."""
        described = self.images[i]
        path, size = self.path(described), (described["width"], described["height"])
        try:
            picture = decode_rgb(path.read_bytes())
        except OSError as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from error
        if picture.size != size:
            raise ValueError(
                f"{path} has {picture.width} x {picture.height} pixels, but {self.file} says "
                f"{size[0]} x {size[1]} (image {described['id']})"
            )
        return picture

    def masks(self, annotations: list[dict]) -> np.ndarray:
        """(n, H, W) uint8, of annotations of one image; polygons and RLE alike."""
        return np.stack([self.api.annToMask(a) for a in annotations])


def _read(file: Path) -> dict:
    try:
        content = json_text.parse(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    wanted = {
        "images": {"id", "file_name", "width", "height"},
        "annotations": {"id", "image_id", "category_id", "bbox"},
        "categories": {"id", "name"},
    }
    for section, keys in wanted.items():
        if not isinstance(content, dict) or not isinstance(content.get(section), list):
            raise ValueError(f"{file} has no list {section!r}: it is not in COCO's format")
        for index, entry in enumerate(content[section]):
            if not isinstance(entry, dict):
                raise ValueError(f"{file}: {section}[{index}] is no object: {entry!r}")
            if missing := sorted(keys - entry.keys()):
                raise ValueError(f"{file}: {section}[{index}] has no {missing[0]!r}")
    return content


def _unique(file: Path, what: str, entries: list[dict]) -> None:
    seen = set()
    for entry in entries:
        if entry["id"] in seen:
            raise ValueError(f"{file}: two of its {what} have the id {entry['id']!r}")
        seen.add(entry["id"])


def _check_shape(file: Path, annotation: dict) -> None:
    box, shape = annotation["bbox"], annotation.get("segmentation")
    if len(box) != 4 or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in box):
        raise ValueError(
            f"{file}: annotation {annotation['id']} has the bbox {box}, not x, y, width and height"
        )
    if isinstance(shape, list) and not all(map(_is_polygon, shape)):
        raise ValueError(
            f"{file}: annotation {annotation['id']} has a polygon that is not three points or more"
        )


def _is_polygon(points: object) -> bool:
    return isinstance(points, list) and len(points) >= 6 and len(points) % 2 == 0


def _indexed(content: dict):
    from pycocotools.coco import COCO

    api = COCO()
    api.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        api.createIndex()
    return api


def check_same_classes(train: Coco, val: Coco) -> None:
    if train.label != val.label or train.names != val.names:
        raise ValueError(f"{train.file} and {val.file} do not have the same categories")


# ----------------------------------------------------------------------------------------- views


class View(NamedTuple):
    """A window of an image, brought to another size: pixels of the image, pixels of the view."""

    left: float
    top: float
    width: float
    height: float
    size: tuple[int, int]  # width and height of the view
    mirrored: bool

    def picture(self, picture: Image.Image) -> Image.Image:
        window = (self.left, self.top, self.left + self.width, self.top + self.height)
        seen = picture.resize(self.size, Image.Resampling.BILINEAR, box=window)
        return ImageOps.mirror(seen) if self.mirrored else seen

    def masks(self, masks_nHW: np.ndarray) -> np.ndarray:
        """The nearest pixel of the image for each of the view: (n, height, width)."""
        wide, high = self.size
        x = self.left + (np.arange(wide) + 0.5) * self.width / wide
        y = self.top + (np.arange(high) + 0.5) * self.height / high
        seen = masks_nHW[:, y.astype(int)[:, None], x.astype(int)[None]]
        return seen[:, :, ::-1] if self.mirrored else seen

    def boxes(self, boxes_n4: np.ndarray) -> np.ndarray:
        """Boxes (x, y, width, height) of the image as (x1, y1, x2, y2) of the view, cut to it."""
        scale = np.array(self.size) / (self.width, self.height)
        low = (boxes_n4[:, :2] - (self.left, self.top)) * scale
        high = low + boxes_n4[:, 2:] * scale
        low, high = np.clip(low, 0, self.size), np.clip(high, 0, self.size)
        if self.mirrored:
            low[:, 0], high[:, 0] = self.size[0] - high[:, 0], self.size[0] - low[:, 0]
        return np.concatenate([low, high], 1)


def jittered(size: tuple[int, int], canvas: int, draw_4: list[float]) -> View:
    """A view that fits the canvas (pixels, square) for four uniform draws: large-scale jitter.

    The image is scaled until its longer side is 0.1 to 2 times the canvas's; of what is larger than
    the canvas a window stays.
    """
    low, high = JITTER
    ratio = (low + (high - low) * draw_4[0]) * canvas / max(size)
    seen = [min(canvas, max(1, round(side * ratio))) for side in size]
    window = [min(side, canvas / ratio) for side in size]
    corner = [(side - w) * u for side, w, u in zip(size, window, draw_4[1:3], strict=True)]
    return View(*corner, *window, tuple(seen), draw_4[3] < 0.5)


class TrainViews(torch.utils.data.Dataset):
    """Jittered views of some images of a split, as torchvision's detectors take them.

    Item i is at index i of an epoch: (picture (3, H, W) uint8, {"boxes": (n, 4) fp32, "labels":
    (n,) int64, "masks": (n, H, W) uint8, if the split has them}), a function of seed and epoch.
    """

    def __init__(self, coco: Coco, order: list[int], canvas: int, seed: int, epoch: int):
        self.coco, self.order, self.canvas = coco, order, canvas
        index = torch.arange(len(order))
        self.draw_n4 = rng.uniforms(seed, rng.CROP, epoch, index, 4).tolist()

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        picture = self.coco.picture(self.order[i])
        view = jittered(picture.size, self.canvas, self.draw_n4[i])
        objects = self.coco.single_objects(self.order[i])
        found = {
            "boxes": view.boxes(np.array([a["bbox"] for a in objects], dtype=float)),
            "labels": np.array([self.coco.label[a["category_id"]] for a in objects]),
        }
        if self.coco.unmasked is None:
            found["masks"] = view.masks(self.coco.masks(objects))
        return as_tensor(view.picture(picture)), _what_is_left(found)


def _what_is_left(found: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Without the objects that lie outside the view; a box is drawn around its mask anew."""
    boxes_n4 = found["boxes"].copy()
    for box_4, mask_HW in zip(boxes_n4, found.get("masks", ()), strict=False):
        rows, columns = (np.flatnonzero(mask_HW.any(axis)) for axis in (1, 0))
        ends = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] if len(rows) else [0] * 4
        box_4[:] = ends
    keep = (boxes_n4[:, 2:] - boxes_n4[:, :2] >= 1).all(1)
    found = {**found, "boxes": boxes_n4.astype(np.float32)}
    return {name: torch.from_numpy(values[keep].copy()) for name, values in found.items()}


class ValImages(torch.utils.data.Dataset):
    """Images at some indices of a split: (picture (3, H, W) uint8, index)."""

    def __init__(self, coco: Coco, indices: list[int]):
        self.coco, self.indices = coco, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return as_tensor(self.coco.picture(self.indices[i])), self.indices[i]


def as_tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).contiguous()
