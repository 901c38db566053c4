"""Patch features as colours: their first three principal components over the images shown.

Each image's mean is taken off first: the colours tell the parts of an image apart. With it they
would tell images apart, which the nearest neighbours show better.

One basis and one scale serve all encoders of a figure. Those of a checkpoint share the first one's
components. Other checkpoints have feature spaces of their own, so their components are rotated to
agree best with the first checkpoint's colours (orthogonal Procrustes, Schönemann 1966).
Shapes: B images, N patches, D width, rows x cols the grid.
"""

import argparse
from typing import NamedTuple

import numpy as np
import torch

from cjepa_fast.eval.figures import side_by_side
from cjepa_fast.eval.figures.sheets import Column, sheet
from cjepa_fast.eval.figures.side_by_side import Encoders
from cjepa_fast.eval.figures.style import save
from cjepa_fast.eval.options import positive
from cjepa_fast.eval.records import print_numbers
from cjepa_fast.model.vit import Encoder

COMPONENTS = {"first": "first component %", "second": "second %", "third": "third %"}
CUT = 0.02  # of the values of a component at each end, which are shown as its extremes
LEAST_SPAN = 0.4  # of the colours, as a share of a token's length: nearly equal tokens are grey


class Scores(NamedTuple):
    """An encoder's patches along the three axes shown (B, rows, cols, 3) fp64, over the root
    mean square length of a token; the variance of its patches on the same scale; and its
    checkpoint's axes (D, 3)."""

    scores_Brc3: torch.Tensor
    variance: float
    basis_D3: torch.Tensor

    @property
    def shares_3(self) -> torch.Tensor:
        """The share of the patches' variance along each axis, in percent."""
        tiny = torch.finfo(torch.float64).tiny
        return 100 * self.scores_Brc3.square().mean((0, 1, 2)) / max(self.variance, tiny)


@torch.inference_mode()
def components(encoder: Encoder, images_BCHW: torch.Tensor) -> torch.Tensor:
    """Each patch's first three principal components: (B, rows, cols, 3) fp64 on the CPU.

    Image by image, for a grid may be larger than trained. A component's sign is such that its
    largest loading is positive.
    """
    centred_BND = _centred(encoder, images_BCHW)[0]
    return _on_grid(centred_BND @ _loadings(centred_BND), encoder, images_BCHW)


@torch.inference_mode()
def explained(encoder: Encoder, images_BCHW: torch.Tensor) -> dict[str, float]:
    """The share of the patches' variance, in percent, of the encoder's own first components."""
    squares = torch.linalg.svdvals(_centred(encoder, images_BCHW)[0].flatten(0, 1)) ** 2
    shares = 100 * squares[:3] / squares.sum()
    return dict(zip(COMPONENTS, shares.tolist(), strict=True))


def _centred(encoder: Encoder, images_BCHW: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Tokens of all patches minus the mean of their image: (B, N, D) fp64 on the CPU; and the root
    mean square length of the tokens."""
    tokens_BND = torch.cat([encoder(image[None]).double().cpu() for image in images_BCHW])
    length = tokens_BND.square().sum(-1).mean().sqrt().item()
    return tokens_BND - tokens_BND.mean(1, keepdim=True), length


def _loadings(centred_BND: torch.Tensor) -> torch.Tensor:
    """(D, 3), orthonormal."""
    flat = centred_BND.flatten(0, 1)
    loadings_D3 = torch.linalg.eigh(flat.T @ flat).eigenvectors[:, -3:].flip(1)
    largest = loadings_D3.gather(0, loadings_D3.abs().argmax(0, keepdim=True))
    return loadings_D3 * largest.sign()


def _on_grid(scores_BN3: torch.Tensor, encoder: Encoder, images_BCHW: torch.Tensor):
    grid = [side // encoder.patch_size for side in images_BCHW.shape[-2:]]
    return scores_BN3.unflatten(1, grid)


@torch.inference_mode()
def scores(encoders: Encoders, images_BCHW: torch.Tensor) -> dict[str, Scores]:
    """The scores of each encoder, along the components of the first."""
    found, loadings_D3 = {}, None
    for which, encoder in encoders.items():
        centred_BND, length = _centred(encoder, images_BCHW)
        loadings_D3 = _loadings(centred_BND) if loadings_D3 is None else loadings_D3
        scores_BN3 = centred_BND @ loadings_D3 / length
        variance = centred_BND.square().sum(-1).mean().item() / length**2
        on_grid = _on_grid(scores_BN3, encoder, images_BCHW)
        found[f"{which} encoder"] = Scores(on_grid, variance, loadings_D3)
    return found


def rotation(ours_n3: torch.Tensor, to_n3: torch.Tensor) -> torch.Tensor:
    """The orthogonal (3, 3) matrix that takes `ours` nearest to `to`."""
    left, _, right = torch.linalg.svd(ours_n3.T @ to_n3)
    return left @ right


def in_one_basis(found: dict[str, Scores]) -> dict[str, Scores]:
    """Every checkpoint's scores rotated onto the first one's, where they have the same patches."""
    first, turns = next(iter(found.values())), {}
    for of in found.values():
        turns.setdefault(id(of.basis_D3), _turn(of, first))
    return {
        name: of._replace(scores_Brc3=of.scores_Brc3 @ turns[id(of.basis_D3)])
        for name, of in found.items()
    }


def _turn(of: Scores, first: Scores) -> torch.Tensor:
    """(3, 3)"""
    if of.basis_D3 is first.basis_D3 or of.scores_Brc3.shape != first.scores_Brc3.shape:
        return torch.eye(3, dtype=torch.float64)
    return rotation(of.scores_Brc3.flatten(0, 2), first.scores_Brc3.flatten(0, 2))


def as_colours(scores_Brc3: torch.Tensor, low_3: torch.Tensor, high_3: torch.Tensor) -> np.ndarray:
    """As RGB in [0, 1]: black at low, white at high."""
    span_3 = (high_3 - low_3).clamp(min=LEAST_SPAN)
    return (0.5 + (scores_Brc3 - (low_3 + high_3) / 2) / span_3).clamp(0, 1).numpy()


def columns(found: dict[str, Scores]) -> list[Column]:
    """The patches of each encoder as colours, in one basis and on one scale."""
    found = in_one_basis(found)
    flat_n3 = torch.cat([of.scores_Brc3.flatten(0, 2) for of in found.values()]).numpy()
    low_3, high_3 = map(torch.from_numpy, np.quantile(flat_n3, [CUT, 1 - CUT], axis=0))
    return [
        Column(f"{name}\n{_told(of)}", list(as_colours(of.scores_Brc3, low_3, high_3)))
        for name, of in found.items()
    ]


def _told(of: Scores) -> str:
    shares = ", ".join(f"{share:.0f}" for share in of.shares_3.tolist())
    return f"R, G, B: {shares} %\nvariance {of.variance:.2g}"


def figure(images: Column, found: dict[str, Scores], title: str):
    """A row an image: the image and the patches of each encoder as colours. Above each column the
    shares of its variance that the colours show, and that variance over a token's squared length.
    """
    return sheet([images, *columns(found)], title)


def add_options(parser: argparse.ArgumentParser) -> None:
    side_by_side.add_options(parser)
    parser.add_argument(
        "--size", type=positive, metavar="PIXELS",
        help="of the images' short side, for more patches than trained (positions interpolated)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    images, found, names, rows = side_by_side.gather(args, scores, explained, args.size)
    print_numbers(args, rows, COMPONENTS, "encoder")
    title = f"Patch features within an image, three principal components as R, G, B: {names}"
    print(save(figure(images, found, title), args.out))
