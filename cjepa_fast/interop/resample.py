"""Weights of a ViT made to fit another grid, or another size of its patches.

Both rules are timm's defaults, so that its own module with the same sizes computes the same.
"""

import torch
import torch.nn.functional as F


def resample_positions(
    table_ND: torch.Tensor, old: tuple[int, int], new: tuple[int, int]
) -> torch.Tensor:
    """Positions of a grid (rows, cols) at the points of another: bicubic, antialiased, fp32.

    Those of the same grid are returned as they are.
    """
    table_ND = table_ND.float()
    if old == new:
        return table_ND
    image = table_ND.view(1, *old, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=new, mode="bicubic", antialias=True, align_corners=False)
    return image.permute(0, 2, 3, 1).flatten(0, 2)


def resample_patches(kernel_DCpp: torch.Tensor, patch_size: int) -> torch.Tensor:
    """The patch embedding for patches of another size: (D, C, patch_size, patch_size) fp32.

    The kernel that makes of resized patches (bicubic, antialiased) what the old one makes of them
    as they are: exactly for larger patches, by least squares for smaller ones (FlexiViT, arXiv
    2212.08013, section 3.4).
    """
    kernel_DCpp = kernel_DCpp.float()
    old = kernel_DCpp.shape[-1]
    if old == patch_size:
        return kernel_DCpp
    pixels = torch.eye(old**2).view(-1, 1, old, old)
    resized = F.interpolate(
        pixels, size=(patch_size,) * 2, mode="bicubic", antialias=True, align_corners=False
    )
    inverse = torch.linalg.pinv(resized.flatten(1).double())  # (new, old), in pixels
    resampled = kernel_DCpp.flatten(2).double() @ inverse.T
    return resampled.float().unflatten(-1, (patch_size,) * 2)
