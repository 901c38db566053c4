"""What a fine-tuning does beside the plain step, each part on its own.

Mixup (Zhang et al. 2018), cutmix (Yun et al. 2019), random erasing (Zhong et al. 2020), the EMA
of the weights; layer decay and drop path are in layer_decay.py. Numbers are MAE's (He et al. 2021,
arXiv 2111.06377, App. A.1, and its code).
Shapes: B images, C classes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

from cjepa_fast.model.vit import Encoder


@dataclass(frozen=True)
class Recipe:
    """lr: for 256 images; drop_path: of the last block; smoothing: of the labels; average: of the
    weights, at most; rand_augment: DALI's n and m, of 30: timm's "rand-m9" is of 10."""

    epochs: int = 100
    batch: int = 1024
    lr: float = 5e-4
    layer_decay: float = 0.65
    drop_path: float = 0.1
    weight_decay: float = 0.05
    warmup_epochs: float = 5
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1
    erasing: float = 0.25
    average: float = 0.9999
    rand_augment: tuple[int, int] | None = (2, 27)
    crop_scale: tuple[float, float] = (0.08, 1.0)

    def __post_init__(self):
        check_values(vars(self))


def check_values(values: dict[str, object]) -> None:
    """Raises ValueError, naming the value, for one of a recipe that makes no sense."""
    for name, value in values.items():
        if name in ("rand_augment", "crop_scale"):
            pair = isinstance(value, tuple) and len(value) == 2
            if not (pair or (value is None and name == "rand_augment")):
                raise ValueError(f"{name} = {value}: must be two numbers, as in [0.08, 1]")
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name} = {value}: must be a number")
        if name in ("epochs", "batch") and not isinstance(value, int):
            raise ValueError(f"{name} = {value}: must be a whole number")
        if name in ("epochs", "batch", "lr", "layer_decay") and not value > 0:
            raise ValueError(f"{name} = {value}: must be above 0")
        if name in ("drop_path", "smoothing", "average") and not 0 <= value < 1:
            raise ValueError(f"{name} = {value}: must be from 0 to below 1")
        if value < 0:
            raise ValueError(f"{name} = {value}: must not be negative")


BASE = Recipe()
LARGE = Recipe(epochs=50, lr=1e-3, layer_decay=0.75, drop_path=0.2)
HUGE = Recipe(epochs=50, lr=1e-3, layer_decay=0.75, drop_path=0.3)
# The paper's for 1 % of the labels; what it leaves open is that of the whole set, minus what mixes
# images: few steps are made.
FEW_LABELS = {"epochs": 50, "batch": 512, "layer_decay": 0.75, "smoothing": 0.1}
FEW_LABELS |= {"mixup": 0.0, "cutmix": 0.0}


def recipe_of(encoder: Encoder) -> Recipe:
    """By width: that of B below L's, and H's for all that is wider than L."""
    if encoder.width < 1024:
        return BASE
    return LARGE if encoder.width == 1024 else HUGE


# ------------------------------------------------------------------------------------------ model


class Classifier(nn.Module):
    """The encoder's blocks, the mean over patches, LayerNorm, a linear head: logits (B, C)."""

    def __init__(self, encoder: Encoder, classes: int, bf16: bool = False):
        super().__init__()
        encoder.norm = nn.Identity()  # the norm of the mean replaces it
        self.encoder, self.bf16 = encoder, bf16
        self.norm = nn.LayerNorm(encoder.width, eps=1e-6)
        self.head = nn.Linear(encoder.width, classes)
        nn.init.normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        with torch.autocast(images_BCHW.device.type, torch.bfloat16, enabled=self.bf16):
            tokens_BND = self.encoder(images_BCHW)
        return self.head(self.norm(tokens_BND.float().mean(1)))


def averaged(model: nn.Module, most: float) -> AveragedModel:
    """The EMA of a model's weights; its momentum begins low and grows to `most`."""

    def update(ema: list, current: list, count: torch.Tensor) -> None:
        n = float(count)
        torch._foreach_lerp_(ema, current, 1 - min(most, (1 + n) / (10 + n)))

    return AveragedModel(model, multi_avg_fn=update)


# ----------------------------------------------------------------------------------------- images


def soft_targets(label_B: torch.Tensor, classes: int, smoothing: float) -> torch.Tensor:
    """One-hot rows with `smoothing` spread evenly over all classes: (B, C), rows summing to one."""
    return F.one_hot(label_B, classes) * (1 - smoothing) + smoothing / classes


def mix(
    images_BCHW: torch.Tensor, target_BC: torch.Tensor, recipe: Recipe, random: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup or cutmix, each half of the time where both are on, of a batch with itself reversed.

    random: of the CPU.
    """
    if not recipe.mixup and not recipe.cutmix:
        return images_BCHW, target_BC
    pick = float(torch.rand((), generator=random))
    if recipe.cutmix and (pick < 0.5 or not recipe.mixup):
        share = beta(recipe.cutmix, random)
        middle = torch.rand(2, generator=random).tolist()
        return cutmix(images_BCHW, target_BC, share, middle)
    return mixup(images_BCHW, target_BC, beta(recipe.mixup, random))


def beta(alpha: float, random: torch.Generator) -> float:
    """A draw of Beta(alpha, alpha), from two of Gamma(alpha)."""
    a, b = torch._standard_gamma(torch.full((2,), alpha, dtype=torch.float64), random).tolist()
    return a / (a + b) if a + b else 0.5


def mixup(images_BCHW: torch.Tensor, target_BC: torch.Tensor, share: float):
    """share of each image and target, and 1 - share of the one at its index from the end."""
    return tuple(share * x + (1 - share) * x.flip(0) for x in (images_BCHW, target_BC))


def cutmix(images_BCHW: torch.Tensor, target_BC: torch.Tensor, share: float, middle: list[float]):
    """A box of 1 - share of the area, about `middle` (of 1), from the image at the index from the
    end. What of the box lies in the image decides the targets."""
    height, width = images_BCHW.shape[-2:]
    half = (1 - share) ** 0.5 / 2
    top, bottom = (_within(middle[0] + side, height) for side in (-half, half))
    left, right = (_within(middle[1] + side, width) for side in (-half, half))
    images_BCHW = images_BCHW.clone()
    box = images_BCHW.flip(0)[..., top:bottom, left:right]
    images_BCHW[..., top:bottom, left:right] = box
    area = (bottom - top) * (right - left) / (height * width)
    return images_BCHW, (1 - area) * target_BC + area * target_BC.flip(0)


def _within(position: float, length: int) -> int:
    return min(max(round(position * length), 0), length)


def erase(images_BCHW: torch.Tensor, chance: float, random: torch.Generator) -> torch.Tensor:
    """In `chance` of the images, in place, a box of 2 to 33 % of the area becomes noise.

    Its aspect is log-uniform in 0.3 to 3.3. random: of the CPU.
    """
    B, _, height, width = images_BCHW.shape
    for b, (hit, size, aspect, y, x) in enumerate(torch.rand(B, 5, generator=random).tolist()):
        if hit >= chance:
            continue
        area = (0.02 + 0.31 * size) * height * width
        ratio = 0.3 * 11**aspect
        h, w = (min(round((area * r) ** 0.5), side)
                for r, side in ((ratio, height), (1 / ratio, width)))  # fmt: skip
        top, left = int(y * (height - h + 1)), int(x * (width - w + 1))
        images_BCHW[b, :, top : top + h, left : left + w].normal_()
    return images_BCHW
