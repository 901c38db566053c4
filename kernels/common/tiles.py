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
# architecture. It may cut a row. A layer-norm must hold whole rows: in pieces (`in_pieces`), or in
# one tile of a power of two, and two tensors of them: 2048 values, and more warps for the widest;
# or twice that for the usual widths.
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


# Bytes that a kernel over whole rows may spill: two registers, which the assembler now and then
# gives up so that one program more fits a multiprocessor (at 40, 48, 64, 80, 96 or 128 of them).
TRADED = 8


def in_pieces(width: int, most: int) -> Tile | None:
    """Whole rows of a ViT's width in up to 11 pieces without a rest; None for another width.

    A kernel holds them as a tuple. 1280 values in 5 pieces of 256 leave no lane idle, where one of
    2048 leaves 768, and a row is a few warps' at most. Four warps take so many rows that a thread
    has `most` values at most, and of a piece 8 or 4.
    """
    rows = next((rows for rows in (16, 8, 4, 2, 1) if rows * width <= 128 * most), None)
    pieces = [values * 128 // rows for values in (8, 4) if rows]
    fitting = (piece for piece in pieces if width % piece == 0 and width // piece <= 11)
    return next((Tile(rows, piece) for piece in fitting), None)


@functools.cache
def cuts(tile: NamedTuple, width: int) -> dict[str, int | bool]:
    """A kernel's sizes for rows of `width` values in pieces: FULL where they leave no rest."""
    pieces = triton.cdiv(width, tile.width)
    sizes = {"ROWS": tile.rows, "WIDTH": tile.width, "PIECES": pieces}
    return sizes | {"FULL": width == pieces * tile.width}


def loads_of(tile: NamedTuple) -> tuple[str, ...]:
    """What the PTX of a kernel with whole pieces must hold; nothing where a thread has but 4."""
    return WIDE_LOADS if tile.rows * tile.width >= 8 * 32 * tile.warps else ()


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
