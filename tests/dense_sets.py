"""Synthetic datasets for the dense tasks, and an encoder small enough for them."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from cjepa_fast.data.sets.labelmaps import write_label_map
from cjepa_fast.model.vit import Encoder


def write_encoder(folder: Path) -> Path:
    """Random weights, patches of 4 pixels; the file that holds them."""
    encoder = Encoder(image_size=24, patch_size=4, width=24, depth=2, heads=3)
    save_file(
        {k: p.contiguous() for k, p in encoder.state_dict().items()}, folder / "e.safetensors"
    )
    described = {**encoder.architecture, "mean": [0.5] * 3, "std": [0.25] * 3}
    (folder / "e.json").write_text(json.dumps(described))
    return folder / "e.safetensors"


def write_davis(root: Path, frames: int = 5, single: bool = False) -> Path:
    """Two squares that move over noise, in a sequence "two"; or one of them, annotated by 255."""
    random = np.random.default_rng(0)
    ground = random.integers(60, 120, (40, 56, 3), dtype=np.uint8)
    for t in range(frames):
        picture, labels = ground.copy(), np.zeros((40, 56), dtype=np.uint8)
        for number, (top, left) in enumerate(((8, 4 + 4 * t), (24, 32 - 4 * t))[: 2 - single], 1):
            spot = slice(top, top + 12), slice(left, left + 12)
            picture[spot] = (250, 20, 20) if number == 1 else (20, 250, 20)
            labels[spot] = 255 if single else number
        frame = root / "JPEGImages" / "480p" / "two" / f"{t:05d}.jpg"
        frame.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(frame, quality=95)
        write_label_map(root / "Annotations" / "480p" / "two" / f"{t:05d}.png", labels)
    return root


def write_pairs(
    root: Path, counts: dict[str, int], size: tuple[int, int] = (40, 56), offset: int = 0
) -> Path:
    """Images of 8-pixel squares whose colour is their class, 0 to 2, some of them 255.

    counts: images by split; offset: added to the classes.
    """
    random = np.random.default_rng(1)
    shades = np.array([(220, 40, 40), (40, 220, 40), (40, 40, 220), (128, 128, 128)])
    for split, count in counts.items():
        for i in range(count):
            cells = random.choice(4, (size[0] // 8, size[1] // 8), p=(0.3, 0.3, 0.3, 0.1))
            labels = cells.repeat(8, 0).repeat(8, 1)
            picture = shades[labels] + random.integers(-20, 20, (*size, 3))
            path = root / "images" / split / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.astype(np.uint8)).save(path, quality=95)
            numbers = np.where(labels == 3, 255, labels + offset).astype(np.uint8)
            write_label_map(root / "masks" / split / f"{i}.png", numbers)
    return root


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
