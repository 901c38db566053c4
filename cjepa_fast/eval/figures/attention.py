"""Where the encoders look: the last block's attention, target and context encoder side by side.

A patch's attention is what it receives, averaged over all the queries (and over the heads), in
multiples of an even share, 1/N. One scale serves all maps of a figure and never spans less than
LEAST_SPAN, so that the noise of an even map does not look like attention.
Shapes: B images, H heads, N patches, rows x cols the grid.
"""

import argparse
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from cjepa_fast.eval.figures import side_by_side
from cjepa_fast.eval.figures.sheets import Column, as_arrays, sheet
from cjepa_fast.eval.figures.side_by_side import Encoders
from cjepa_fast.eval.figures.style import STYLE, save
from cjepa_fast.eval.records import print_numbers
from cjepa_fast.model.vit import Encoder

SINGLE_HEADS = 3  # heads shown on their own, of the target encoder of one checkpoint alone
COLOURS, STRENGTH = "inferno", 0.72  # over a pale grey copy of the image
LEAST_SPAN, CLIPPED = 3.0, 0.01  # of the scale in even shares; the share of patches beyond its end


class Maps(NamedTuple):
    """Attention of an encoder or a head: multiples of an even share (B, rows, cols), how even the
    attention is in percent, and the images in [0, 1] (B, H, W, 3)."""

    shares_Brc: torch.Tensor
    evenness: float
    images_BHW3: np.ndarray


def received(encoder: Encoder, images_BCHW: torch.Tensor) -> torch.Tensor:
    """Attention each patch receives, by head: (B, H, rows, cols); a head's map sums to one."""
    return encoder.attention_received(images_BCHW).cpu()


def evenness(encoder: Encoder, images_BCHW: torch.Tensor) -> dict[str, float]:
    """Entropy of the heads' maps as a share of an even map's, in percent, averaged."""
    return {"evenness": _evenness(received(encoder, images_BCHW))}


def _evenness(maps_BHrc: torch.Tensor) -> float:
    entropy_BH = torch.special.entr(maps_BHrc).sum((-2, -1))
    return 100 * entropy_BH.mean().item() / math.log(maps_BHrc[0, 0].numel())


def most_different(maps_BHrc: torch.Tensor, count: int) -> list[int]:
    """The heads whose maps are the least even (lowest entropy, averaged over images)."""
    entropy_H = torch.special.entr(maps_BHrc).sum((-2, -1)).mean(0)
    return entropy_H.argsort()[:count].sort().values.tolist()


def maps(
    encoders: Encoders, images_BCHW: torch.Tensor, mean, std, single_heads: int = 0
) -> dict[str, Maps]:
    """The attention maps of each encoder, and of the first one's most different heads, by name.

    images_BCHW: normalised by mean and std.
    """
    by_head = {which: received(encoder, images_BCHW) for which, encoder in encoders.items()}
    chosen = {f"{which} encoder": maps_BHrc for which, maps_BHrc in by_head.items()}
    first, first_BHrc = next(iter(by_head.items()))
    for head in most_different(first_BHrc, single_heads):
        chosen[f"{first}, head {head + 1}"] = first_BHrc[:, head : head + 1]
    images = as_arrays(images_BCHW, mean, std)
    return {
        name: Maps(maps_BHrc.mean(1) * maps_BHrc[0, 0].numel(), _evenness(maps_BHrc), images)
        for name, maps_BHrc in chosen.items()
    }


def top_of(found: dict[str, Maps]) -> float:
    """Where the scale ends, which begins at 0: in multiples of an even share."""
    flat = torch.cat([of.shares_Brc.flatten().float() for of in found.values()])
    return max(LEAST_SPAN, np.quantile(flat.numpy(), 1 - CLIPPED).item())


def columns(found: dict[str, Maps]) -> list[Column]:
    """The maps over their images, in the colours of one scale."""
    top = top_of(found)
    return [
        Column(
            f"{name}\nevenness {of.evenness:.1f} %",
            [_over(*pair, top) for pair in zip(of.images_BHW3, of.shares_Brc, strict=True)],
        )
        for name, of in found.items()
    ]


def _over(image_HW3: np.ndarray, shares_rc: torch.Tensor, top: float) -> np.ndarray:
    """The map over a pale grey copy of its image; black is no attention, the brightest `top`."""
    from matplotlib import colormaps

    level_rc = (shares_rc.float() / top).clamp(0, 1)
    level_HW = F.interpolate(level_rc[None, None], image_HW3.shape[:2], mode="bilinear")[0, 0]
    colour_HW3 = colormaps[COLOURS](level_HW.numpy())[..., :3]
    return STRENGTH * colour_HW3 + (1 - STRENGTH) * image_HW3.mean(2, keepdims=True)


def figure(images: Column, found: dict[str, Maps], title: str):
    """A row an image: the image and the maps, with their scale."""
    from matplotlib import rc_context
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    drawn = sheet([images, *columns(found)], title)
    drawn.set_figwidth(drawn.get_figwidth() + 0.9)  # for the scale
    colours = ScalarMappable(Normalize(0, top_of(found)), COLOURS)
    with rc_context(STYLE):
        bar = drawn.colorbar(colours, ax=drawn.axes, shrink=0.6, aspect=30, pad=0.01, extend="max")
        bar.set_label("attention a patch receives (1 = an even share)")
        bar.ax.axhline(1, color="white", linewidth=1)
    return drawn


def add_options(parser: argparse.ArgumentParser) -> None:
    side_by_side.add_options(parser)


def run(args: argparse.Namespace) -> None:
    single = SINGLE_HEADS if len(args.checkpoints) == 1 else 0

    def of(encoders: Encoders, images_BCHW: torch.Tensor) -> dict[str, Maps]:
        first = next(iter(encoders.values()))
        return maps(encoders, images_BCHW, first.mean, first.std, single)

    images, found, names, rows = side_by_side.gather(args, of, evenness)
    print_numbers(args, rows, {"evenness": "evenness of the attention received %"}, "encoder")
    print(save(figure(images, found, f"Attention of the last block: {names}"), args.out))
