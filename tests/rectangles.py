"""A synthetic detection set in COCO's format: red and blue rectangles on grey noise, with masks."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {3: ("red", (230, 20, 20)), 7: ("blue", (20, 20, 230))}  # by category id


def polygon(x: int, y: int, width: int, height: int) -> list[list[int]]:
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def rle(x: int, y: int, width: int, height: int, size: tuple[int, int]) -> dict:
    """Uncompressed: runs of 0 and 1 down the columns."""
    mask = np.zeros(size, dtype=int)
    mask[y : y + height, x : x + width] = 1
    flat = mask.flatten(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *ends, len(flat)]).tolist()
    return {"size": list(size), "counts": counts if not flat[0] else [0, *counts]}


def write(folder: Path, split: str, count: int, seed: int = 0) -> Path:
    """COCO's layout: annotations/instances_SPLIT.json and SPLIT/. Returns the folder."""
    random = np.random.default_rng(seed)
    (folder / split).mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for i in range(count):
        height, width = 40 + 4 * (i % 3), 56
        pixels = random.integers(90, 140, (height, width, 3), dtype=np.uint8)
        for side, category in enumerate(random.permutation(list(COLOURS)).tolist()):
            w, h = random.integers(12, 24, 2).tolist()
            x, y = 28 * side + int(random.integers(0, 28 - w)), int(random.integers(0, height - h))
            pixels[y : y + h, x : x + w] = COLOURS[category][1]
            shape = polygon(x, y, w, h) if side else rle(x, y, w, h, (height, width))
            annotations.append({
                "id": len(annotations), "image_id": 100 + i, "category_id": category,
                "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0, "segmentation": shape,
            })  # fmt: skip
        name = f"{i:03d}.png"
        Image.fromarray(pixels).save(folder / split / name)
        images.append({"id": 100 + i, "file_name": name, "width": width, "height": height})
    categories = [{"id": number, "name": name} for number, (name, _) in COLOURS.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder
