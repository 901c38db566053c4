"""Tiles of rows of values: what one program of a kernel over rows handles.

A copy may cut a row into several tiles. A layer-norm, or a row's scale, needs whole rows.
"""

import functools
from typing import NamedTuple

import torch

from cjepa_fast.kernels.common import launch
from cjepa_fast.kernels.common.maybe_triton import triton


class Tile(NamedTuple):
    """What one program handles: rows x width values, by that many warps of 32 threads."""

    rows: int
    width: int
    warps: int = 4


# A copy's tile is 4096 values: each of 128 threads has four 16-byte loads of bf16 under way, on any
# architecture. It may cut a row. A layer-norm must hold whole rows, of a power of two, and two
# tensors of them: 2048 values, and more warps for the widest; or twice that for the usual widths.
COPY_TILES = {width: Tile(4096 // width, width) for width in (64, 128, 256, 512)}
ROW_TILES = {
    width: (Tile(max(2048 // width, 1), width, min(max(width // 512, 4), 16)),)
    for width in (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
}
for width in (256, 512, 1024, 2048):
    ROW_TILES[width] += (Tile(4096 // width, width, 8),)
WIDEST = max(ROW_TILES)  # values of a row that a layer-norm here can hold

# What the PTX of a kernel over rows must hold: loads of 16 bytes (32 on sm_100), and the copies of
# a loop in stages.
WIDE_LOADS = (r"ld\.global[\w.:]*\.v[48]\.b32",)
WIDE_COPIES = (r"cp\.async\.c[ag]\.shared\.global[^;]*0x10",)


def copy_tiles(width: int) -> tuple[Tile, ...]:
    """The tiles that cut `width` without a rest, the widest first, or the one that covers most."""
    exact = [tile for size, tile in COPY_TILES.items() if width % size == 0]
    most = COPY_TILES[min(512, max(64, triton.next_power_of_2(width)))]
    return tuple(exact[::-1]) or (most,)


def row_tiles(width: int) -> tuple[Tile, ...]:
    return ROW_TILES[max(64, triton.next_power_of_2(width))]


def chosen_tile(kernel: str, tiles: tuple[Tile, ...], x: torch.Tensor) -> Tile:
    """For a kernel over rows of x, by tuned.py or else the first."""
    return launch.chosen(f"{kernel} {x.shape[-1]}", tiles, x.device)


def promoted(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype of the tensors' sum."""
    return functools.reduce(torch.promote_types, [t.dtype for t in tensors])
