"""Patch features as colours: their first three principal components over the images shown.

Each image's mean is taken off first: the colours tell the parts of an image apart. With it they
would tell images apart, which the nearest neighbours show better.
Shapes: B images, N patches, D width, rows x cols the grid.
"""

import argparse

import numpy as np
import torch

from cjepa_fast.eval import cli
from cjepa_fast.eval.figures import side_by_side
from cjepa_fast.eval.figures.sheets import Column, save, sheet
from cjepa_fast.eval.figures.side_by_side import Encoders
from cjepa_fast.model.vit import Encoder

COMPONENTS = {"first": "first component %", "second": "second %", "third": "third %"}
CUT = 0.02  # of the values of a component at each end, which are shown as its extremes


@torch.inference_mode()
def components(encoder: Encoder, images_B3HW: torch.Tensor) -> torch.Tensor:
    """Each patch's first three principal components: (B, rows, cols, 3) fp64 on the CPU.

    Image by image, for a grid may be larger than trained. A component's sign is such that its
    largest loading is positive.
    """
    centred_BND = _centred(encoder, images_B3HW)
    flat = centred_BND.flatten(0, 1)
    loadings_D3 = torch.linalg.eigh(flat.T @ flat).eigenvectors[:, -3:].flip(1)
    largest = loadings_D3.gather(0, loadings_D3.abs().argmax(0, keepdim=True))
    grid = [side // encoder.patch_size for side in images_B3HW.shape[-2:]]
    return (centred_BND @ (loadings_D3 * largest.sign())).unflatten(1, grid)


@torch.inference_mode()
def explained(encoder: Encoder, images_B3HW: torch.Tensor) -> dict[str, float]:
    """The share of the patches' variance, in percent, that each of the three colours has."""
    squares = torch.linalg.svdvals(_centred(encoder, images_B3HW).flatten(0, 1)) ** 2
    shares = 100 * squares[:3] / squares.sum()
    return dict(zip(COMPONENTS, shares.tolist(), strict=True))


def _centred(encoder: Encoder, images_B3HW: torch.Tensor) -> torch.Tensor:
    """Tokens of all patches minus the mean of their image: (B, N, D) fp64 on the CPU."""
    tokens_BND = torch.cat([encoder(image[None]).double().cpu() for image in images_B3HW])
    return tokens_BND - tokens_BND.mean(1, keepdim=True)


def as_colours(scores_Brc3: torch.Tensor) -> np.ndarray:
    """The components as RGB in [0, 1], each spread over its own range."""
    ends = torch.tensor([CUT, 1 - CUT], dtype=scores_Brc3.dtype)
    low_3, high_3 = scores_Brc3.flatten(0, 2).quantile(ends, dim=0)
    span_3 = (high_3 - low_3).clamp(min=torch.finfo(scores_Brc3.dtype).tiny)
    return ((scores_Brc3 - low_3) / span_3).clamp(0, 1).numpy()


def columns(encoders: Encoders, images_B3HW: torch.Tensor) -> list[Column]:
    """Of each encoder. The later ones' signs are turned to agree with the first one's colours."""
    shown, first_Brc3 = [], None
    for which, encoder in encoders.items():
        scores_Brc3 = components(encoder, images_B3HW)
        first_Brc3 = scores_Brc3 if first_Brc3 is None else first_Brc3
        sign_3 = (first_Brc3 * scores_Brc3).sum((0, 1, 2)).sign()
        sign_3[sign_3 == 0] = 1
        shown.append((f"{which} encoder", list(as_colours(scores_Brc3 * sign_3))))
    return shown


def add_options(parser: argparse.ArgumentParser) -> None:
    side_by_side.add_options(parser)
    parser.add_argument(
        "--size", type=cli.positive, metavar="PIXELS",
        help="of the images' short side, for more patches than trained (positions interpolated)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    shown, names, rows = side_by_side.columns(args, columns, explained, args.size)
    cli.tell(args, rows, COMPONENTS, "encoder")
    title = f"Patch features within an image, first three principal components: {names}"
    print(save(sheet(shown, title), args.out))
