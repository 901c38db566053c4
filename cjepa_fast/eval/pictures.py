"""What the drawings share: images in, figures out."""

from pathlib import Path

import numpy as np
import torch

from cjepa_fast.data.evaluation import eval_batches
from cjepa_fast.data.sources import ImageSet
from cjepa_fast.eval.features import Subset

FIGURE = {"font.size": 9, "axes.titlesize": 9, "figure.titlesize": 11, "figure.dpi": 130}


def load_images(images: ImageSet, count: int, *, image_size: int, mean, std, crop: float = 1.0):
    """`count` images spread evenly over a set: (B, 3, image_size, image_size) fp32, normalised."""
    keep = torch.linspace(0, len(images) - 1, min(count, len(images))).round().long().unique()
    batches = eval_batches(
        Subset(images, keep), image_size=image_size, resize=crop, batch_size=len(keep),
        device="cpu", dtype=torch.float32, mean=mean, std=std, threads=1,
    )  # fmt: skip
    return torch.cat([images_B3HW.clone() for images_B3HW, _ in batches])


def as_pictures(images_B3HW: torch.Tensor, mean, std) -> np.ndarray:
    """Normalised images as RGB in [0, 1]: (B, H, W, 3)."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (mean, std))
    return (images_B3HW.cpu().float() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def save(figure, out: Path | str) -> Path:
    """Write a figure; its folder is made. Raises ValueError for an ending that cannot be drawn."""
    out = Path(out)
    endings = figure.canvas.get_supported_filetypes()
    if out.suffix.lstrip(".") not in endings:
        raise ValueError(f"{out}: cannot draw to {out.suffix!r}; use one of {', '.join(endings)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    return out
