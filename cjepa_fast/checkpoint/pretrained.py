"""A pretrained encoder with what its images go through: features from Python, in two lines.

Images are what data/transform.py takes: paths, PIL images, arrays or tensors, one or many.
Shapes: n images, N patches, D width.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch

from cjepa_fast.data.sources import LIMITS, Limits
from cjepa_fast.data.transform import Transform, one_by_one
from cjepa_fast.model.vit import Encoder
from cjepa_fast.runtime.hardware import cores

POOLS = ("mean", "none", "last4")
LAYERS = 4  # of "last4"
CROP = 0.875  # of the short side, where no run says its eval.crop: that key's default
THREADS = 8  # at most, that read and resize images


class PretrainedEncoder(Encoder):
    """An Encoder, in evaluation mode: `encoder(images)` takes normalised batches as ever.

    mean, std: the normalisation its images had; crop: the share of the largest centred
    window that evaluation keeps; limits: as its training had them, of which max_pixels and
    bit_depth hold for `embed` too; transform: what makes such an image of any other.
    """

    def __init__(self, encoder: Encoder, crop: float, limits: Limits = LIMITS):
        with torch.device("meta"):
            super().__init__(**encoder.architecture)
        self.load_state_dict(encoder.state_dict(), assign=True)
        self.mean, self.std, self.crop, self.limits = encoder.mean, encoder.std, crop, limits
        self.eval()

    @property
    def transform(self) -> Transform:
        return Transform(self.image_size, self.mean, self.std, self.crop, self.limits)

    @torch.no_grad()
    def embed(self, images: Any, pool: str = "mean", batch_size: int = 64) -> torch.Tensor:
        """Features, fp32, on the CPU; of one image as of a list of one.

        pool: "mean" over an image's patches, (n, D); "none", (n, N, D); "last4", the means of the
        last four blocks side by side, (n, 4 D). Raises ValueError for another pool, or an image
        that cannot be read, which it names.
        """
        if pool not in POOLS:
            raise ValueError(f"pool={pool!r}: must be one of {', '.join(map(repr, POOLS))}")
        wanted = self.last(LAYERS if pool == "last4" else 1)
        found = []
        for batch_BCHW in batches_of(images, self.transform, batch_size):
            batch_BCHW = batch_BCHW.to(self.norm.weight)
            layers = [x.float() for x in self.layers(batch_BCHW, wanted)]
            layers = layers if pool == "none" else [x.mean(1) for x in layers]
            found.append(torch.cat(layers, -1).cpu())
        return torch.cat(found)

    def attention(self, images: Any, batch_size: int = 16) -> torch.Tensor:
        """Attention that each patch receives in the last block, by head: (n, heads, rows, cols),
        each map summing to one."""
        batches = batches_of(images, self.transform, batch_size)
        found = [self.attention_received(x_BCHW.to(self.norm.weight)).cpu() for x_BCHW in batches]
        return torch.cat(found)


def batches_of(images: Any, transform: Transform, batch_size: int) -> Iterator[torch.Tensor]:
    """One image or many, as in the module's first lines, transformed: (B, C, H, W), on the CPU."""
    several = iter(one_by_one(images))
    with ThreadPoolExecutor(min(THREADS, cores())) as pool:
        while batch := list(islice(several, batch_size)):
            yield torch.stack(list(pool.map(transform, batch)))
