"""Where the encoders look: the last block's attention, target and context encoder side by side.

A patch's attention is what it receives, averaged over all the queries (and over the heads).
Shapes: B images, H heads, N patches, rows x cols the grid.
"""

import argparse
import math

import numpy as np
import torch
import torch.nn.functional as F

from cjepa_fast.eval import cli
from cjepa_fast.eval.figures import side_by_side
from cjepa_fast.eval.figures.sheets import FIGURE, Column, as_arrays, save, sheet
from cjepa_fast.eval.figures.side_by_side import Encoders
from cjepa_fast.model.vit import Encoder

SINGLE_HEADS = 3  # heads shown on their own, of the target encoder of one checkpoint alone
COLOURS, STRENGTH = "inferno", 0.72  # over a pale grey copy of the image


def received(encoder: Encoder, images_B3HW: torch.Tensor) -> torch.Tensor:
    """Attention each patch receives, by head: (B, H, rows, cols); a head's map sums to one."""
    return encoder.attention_received(images_B3HW).cpu()


def evenness(encoder: Encoder, images_B3HW: torch.Tensor) -> dict[str, float]:
    """Entropy of the heads' maps as a share of an even map's, in percent, averaged."""
    maps_BHN = received(encoder, images_B3HW).flatten(2)
    entropy_BH = torch.special.entr(maps_BHN).sum(-1)
    return {"evenness": 100 * entropy_BH.mean().item() / math.log(maps_BHN.shape[-1])}


def most_different(maps_BHrc: torch.Tensor, count: int) -> list[int]:
    """The heads whose maps are the least even (lowest entropy, averaged over images)."""
    entropy_H = torch.special.entr(maps_BHrc).sum((-2, -1)).mean(0)
    return entropy_H.argsort()[:count].sort().values.tolist()


def columns(
    encoders: Encoders, images_B3HW: torch.Tensor, mean, std, single_heads: int = 0
) -> list[Column]:
    """Of each encoder, and of the first one's most different heads, over the images.

    images_B3HW: normalised by mean and std.
    """
    by_head = {which: received(encoder, images_B3HW) for which, encoder in encoders.items()}
    maps = {f"{which} encoder": maps_BHrc.mean(1) for which, maps_BHrc in by_head.items()}
    first, first_BHrc = next(iter(by_head.items()))
    for head in most_different(first_BHrc, single_heads):
        maps[f"{first}, head {head + 1}"] = first_BHrc[:, head]
    images = as_arrays(images_B3HW, mean, std)
    return [(name, list(map(_over, images, maps_Brc))) for name, maps_Brc in maps.items()]


def _over(image_HW3: np.ndarray, map_rc: torch.Tensor) -> np.ndarray:
    """The map over a pale grey copy of its image; its own range is spread over the colours."""
    from matplotlib import colormaps

    span = (map_rc.max() - map_rc.min()).clamp(min=torch.finfo(torch.float32).tiny)
    level_rc = (map_rc - map_rc.min()) / span
    level_HW = F.interpolate(level_rc[None, None], image_HW3.shape[:2], mode="bilinear")[0, 0]
    colour_HW3 = colormaps[COLOURS](level_HW.numpy())[..., :3]
    return STRENGTH * colour_HW3 + (1 - STRENGTH) * image_HW3.mean(2, keepdims=True)


def figure(shown: list[Column], title: str):
    """A row an image: the image and what `columns` gave, with a scale."""
    from matplotlib import rc_context
    from matplotlib.cm import ScalarMappable

    drawn = sheet(shown, title)
    drawn.set_figwidth(drawn.get_figwidth() + 0.9)  # for the scale
    with rc_context(FIGURE):
        bar = drawn.colorbar(
            ScalarMappable(cmap=COLOURS), ax=drawn.axes, shrink=0.5, pad=0.01, ticks=[0, 1]
        )
        bar.set_ticklabels(["least", "most"])
        bar.set_label("attention received, within each map")
    return drawn


def add_options(parser: argparse.ArgumentParser) -> None:
    side_by_side.add_options(parser)


def run(args: argparse.Namespace) -> None:
    single = SINGLE_HEADS if len(args.checkpoints) == 1 else 0

    def of(encoders: Encoders, images_B3HW: torch.Tensor) -> list[Column]:
        first = next(iter(encoders.values()))
        return columns(encoders, images_B3HW, first.mean, first.std, single)

    shown, names, rows = side_by_side.columns(args, of, evenness)
    cli.tell(args, rows, {"evenness": "evenness of the attention received %"}, "encoder")
    print(save(figure(shown, f"Attention of the last block: {names}"), args.out))
