"""What dense tasks share: images of any size made fit for an encoder."""

import torch
import torch.nn.functional as F

from cjepa_fast.model.vit import Encoder


def fitted(size: tuple[int, int], short_side: int, patch_size: int) -> tuple[int, int]:
    """(height, width) with that short side, each rounded down to a multiple of the patch. By whole
    numbers: in floats 428 * (512 / 428) is below 512, which would cost a row of patches."""
    height, width = (
        max(patch_size, side * short_side // min(size) // patch_size * patch_size) for side in size
    )
    return height, width


def resized(image_3HW: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A picture of 0..255 in another size: (3, height, width) fp32, antialiased."""
    return F.interpolate(image_3HW[None].float(), size, mode="bilinear", antialias=True)[0]


def normalised(images_BCHW: torch.Tensor, encoder: Encoder) -> torch.Tensor:
    """Pictures of 0..255 as the encoder was shown its images."""
    mean, std = (
        255 * torch.tensor(x, device=images_BCHW.device)[:, None, None]
        for x in (encoder.mean, encoder.std)
    )
    return (images_BCHW.float() - mean) / std
