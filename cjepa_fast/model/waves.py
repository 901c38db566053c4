"""How well a length fills a GPU: waves of the matmuls' tiles, and attention's padded tiles.

A GPU computes a matmul in tiles, one a multiprocessor at a time. A matmul of 1.05 waves of tiles
takes as long as one of 2. Attention pads queries and keys to whole tiles. With mask.context "fixed"
the lengths of a step are constants, so that mask.keep can be chosen to waste little. Predicted from
the sizes alone, of TILE_ROWS x TILE_COLS tiles, as the library takes for matmuls of this size on
sm_90; another tile moves the figures (docs/performance.md says what has been measured).

Work is in multiply-adds. K context patches, M target blocks, P patches a block, D width.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

from cjepa_fast.model.flops import StepSizes

TILE_ROWS, TILE_COLS = 128, 256
ATTENTION_TILE = 64  # queries, and keys, that kernels/attention/ takes at a time on most shapes
# A multiply-add of attention takes so many times as long as one of a matmul: 2.4 TFLOP in 32 ms of
# the H200's ViT-H step, beside 790 TFLOP/s (bench/results/h200).
ATTENTION_SLOWER = 10
TOLERANCE = 0.1  # of K, within which a better one is looked for


class Matmul(NamedTuple):
    """A matmul (rows, inner) x (inner, columns), done `times` over."""

    rows: int
    inner: int
    columns: int
    times: int

    @property
    def work(self) -> int:
        return self.rows * self.inner * self.columns * self.times

    def capacity(self, multiprocessors: int) -> int:
        """The work that whole waves of full tiles would have done meanwhile."""
        tiles = math.ceil(self.rows / TILE_ROWS) * math.ceil(self.columns / TILE_COLS)
        tiles = math.ceil(tiles / multiprocessors) * multiprocessors
        return tiles * TILE_ROWS * TILE_COLS * self.inner * self.times


class AttentionWork(NamedTuple):
    """softmax(q k^T) v of `sequences` of one length, over all heads, done `times` over."""

    sequences: int
    length: int
    width: int
    times: int

    @property
    def share(self) -> float:
        """The share of its tiles' pairs of query and key that are of real tokens."""
        return (self.length / _padded(self.length)) ** 2

    @property
    def work(self) -> int:
        pairs = self.sequences * self.length**2
        return ATTENTION_SLOWER * 2 * pairs * self.width * self.times

    def capacity(self, multiprocessors: int) -> float:
        """As of a matmul; its programs are many and small, so that waves do not count."""
        return self.work / self.share


def _padded(length: int) -> int:
    return math.ceil(length / ATTENTION_TILE) * ATTENTION_TILE


def step_work(images: int, sizes: StepSizes) -> Iterator[Matmul | AttentionWork]:
    """What of a step's blocks follows K: linear layers, forward and their inputs' gradients, and
    attention, its backward counted as twice its forward. images: of a micro-batch.

    The gradients of the weights sum over the rows, so their tiles do not follow K.
    """
    K, M, P = sizes.context_k, sizes.targets_m, sizes.targets_p
    per_target = sizes.predictor_mode == "per_target"
    sequences, length = (images * M, K + P) if per_target else (images, K + P * M)
    narrow = sizes.predictor_width, sizes.predictor_mlp_ratio, sizes.predictor_depth
    for count, tokens, D, ratio, blocks in (
        (images, K, sizes.width, sizes.mlp_ratio, sizes.depth),
        (sequences, length, *narrow),
    ):
        hidden = round(D * ratio)
        for inner, columns in ((D, 3 * D), (D, D), (D, hidden), (hidden, D)):
            yield Matmul(count * tokens, inner, columns, blocks)
            yield Matmul(count * tokens, columns, inner, blocks)
        yield AttentionWork(count, tokens, D, 3 * blocks)


class Fill(NamedTuple):
    """A K, the share of the GPU's time in these parts that is work, and of attention's tiles for
    the encoder and for the predictor."""

    keep: int
    share: float
    attention: tuple[float, float]


def fill(images: int, sizes: StepSizes, multiprocessors: int) -> Fill:
    """How full the multiprocessors are in a step of so many images; K is sizes.context_k."""
    found = list(step_work(images, sizes))
    share = sum(p.work for p in found) / sum(p.capacity(multiprocessors) for p in found)
    attention = tuple(p.share for p in found if isinstance(p, AttentionWork))
    return Fill(sizes.context_k, share, attention)


def best_keep(images: int, sizes: StepSizes, multiprocessors: int, fewest: int) -> Fill:
    """The K from 10 % below this one up to it with the greatest share; `fewest`: the least K.

    Not above it: each patch more is one that more layouts must be redrawn for.
    """
    K = sizes.context_k
    lowest = min(K, max(fewest, math.ceil(K * (1 - TOLERANCE))))
    others = (dataclasses.replace(sizes, context_k=keep) for keep in range(K, lowest - 1, -1))
    fills = (fill(images, other, multiprocessors) for other in others)
    return max(fills, key=lambda one: one.share)


def describe(images: int, sizes: StepSizes, multiprocessors: int, fewest: int) -> str:
    """One line for people."""
    now = fill(images, sizes, multiprocessors)
    best = best_keep(images, sizes, multiprocessors, fewest)
    said = f"{now.share:.0%} of the time is work at K = {now.keep}"
    if best.keep != now.keep:
        said += f", {best.share:.0%} at mask.keep={best.keep}"
    encoder, predictor = now.attention
    return (
        f"{said}; of attention's tiles {encoder:.0%} (encoder) and {predictor:.0%} (predictor); "
        f"predicted, {multiprocessors} multiprocessors"
    )
