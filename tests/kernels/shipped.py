"""Which of the kernels' configurations the trainings in configs/ launch, by architecture.

As each ships, and with contexts of one length (mask.context "fixed"). In bf16, with every option
that has a kernel (FP8 among them), as launch.chosen picks. The names are those of the modules'
ahead_of_time().
"""

import functools
import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch

from cjepa_fast import config
from cjepa_fast.kernels import fp8, gelu, norm
from cjepa_fast.kernels.attention.backward import backward_candidates
from cjepa_fast.kernels.attention.descriptor_forward import TMA
from cjepa_fast.kernels.attention.forward import forward_candidates
from cjepa_fast.kernels.attention.one_pass_backward import OnePass
from cjepa_fast.kernels.common import launch
from cjepa_fast.kernels.common.tiles import copy_tiles, row_tiles
from cjepa_fast.kernels.ema.lists import CHUNKS
from cjepa_fast.kernels.ema.rows_update import ROWS
from cjepa_fast.kernels.tuned import TUNED
from cjepa_fast.kernels.vicreg import position_matmuls
from cjepa_fast.kernels.vicreg import tiles as vicreg_tiles
from cjepa_fast.training.build import build_masks
from cjepa_fast.training.sizes import model_sizes

CPU = torch.device("cpu")
CONTEXTS = ((), ("mask.context=fixed",))
FOR_A_CPU = {"demo.json", "cifar10_vit_t.json", "cifar10_vit_t_long.json"}


class Chooser:
    """launch.chosen on sm_`arch`. named: the keys of tuned.py whose configuration it gave."""

    def __init__(self, arch: int):
        self.arch, self.table, self.named = arch, TUNED.get(f"sm_{arch}", {}), set()

    def __call__(self, key: str, candidates: tuple):
        if self.table.get(key) in candidates:
            self.named.add(key)
        return launch.named_in(self.table, key, candidates)


class Stack(NamedTuple):
    """Blocks of a network: their width, that of a head, and the queries of a sequence."""

    role: str
    width: int
    d: int
    queries: int
    mlp: int = 0  # its MLPs' width, of the target encoder


@functools.cache
def stacks() -> tuple[Stack, ...]:
    """Of all trainings, each once, with the lengths that backends.choose_attention tells them."""
    found = set()
    for path, sets in itertools.product(config.configs_folder().glob("*.json"), CONTEXTS):
        if path.name in FOR_A_CPU:
            continue
        trained = config.load(str(path), sets)
        model, part, masks = model_sizes(trained), trained.predictor, build_masks(trained)
        drawn = masks(0, 0, torch.arange(64))
        K, P = round(drawn.context_k), drawn.target_idx_BMP.shape[2]
        N = (trained.data.image_size // trained.model.patch_size) ** 2
        mlp = round(model["width"] * model["mlp_ratio"])
        for role, width, heads, queries, hidden in (
            ("target", model["width"], model["heads"], N, mlp),
            ("context", model["width"], model["heads"], K, 0),
            ("predictor", part.width, part.heads or model["heads"], K + P, 0),
        ):
            found.add(Stack(role, width, width // heads, queries, hidden))
    return tuple(sorted(found))


def shipped(arch: int) -> tuple[set[str], set[str]]:
    """The names of what is launched on sm_`arch`, and the keys that tuned.py decided."""
    choose = Chooser(arch)
    found = {"sum_parts bf16", *_gelu(choose), *_ema(choose), *_vicreg(choose), *_sigreg()}
    found |= {*_positions()}
    for stack in stacks() + _tuned(choose):
        found |= {*_attention(choose, stack)}
        if stack.width:
            found |= {*_copies(choose, stack.width), *_norm(choose, stack.width)}
        if stack.role == "target":
            found |= {*_losses(choose, stack.width)}
            found |= {*_quantised(stack.width, stack.mlp)} if arch >= 89 else set()
    return found, choose.named


def _tuned(choose: Chooser) -> tuple[Stack, ...]:
    """Sequences for which another tile than the first is chosen: contexts vary in length."""
    keys = filter(None, (re.fullmatch(r"attention (\d+)x(\d+)", key) for key in choose.table))
    return tuple(Stack("tuned", 0, int(key[2]), int(key[1])) for key in keys)


def _tile(tile: tuple) -> str:
    return f"bf16 {tile.rows}x{tile.width}"


def _copies(choose: Chooser, width: int) -> Iterator[str]:
    tiles = copy_tiles(width)
    gather = _tile(choose(f"gather {width}", tiles))
    yield from (f"{op} {gather}" for op in ("gather_tokens", "embed_gather", "add_positions"))
    for op in ("gather backward", "predictor_input", "predictor_input backward"):
        yield f"{op} {_tile(choose(f'{op} {width}', tiles))}"


def _losses(choose: Chooser, width: int) -> Iterator[str]:
    for op in ("target_gather", "prediction_loss", "prediction_loss backward"):
        yield f"{op} {_tile(choose(f'{op} {width}', row_tiles(width)))}"


def _quantised(width: int, mlp: int) -> Iterator[str]:
    """A block's four inputs of matmuls, and the target's weights."""
    of = "bf16 {} {}x{}".format
    narrow, wide = (of(size, *fp8.tile_of(size)) for size in (width, mlp))
    yield from (f"quantise {first} {narrow}" for first in ("rows", "norm", "add norm"))
    yield from (f"quantise {first} {wide}" for first in ("gelu", "tanh gelu"))
    yield from (f"ema_update_rows fp32 {size}" for size in (width, mlp) if size in ROWS)


def _norm(choose: Chooser, width: int) -> Iterator[str]:
    """In and beside a residual stream of either width."""
    tile = choose(f"add_norm {width}", norm.forward_tiles(width))
    back = choose(f"add_norm backward {width}", norm.tiles(width))
    for stream in ("bf16", "fp32"):
        yield f"add_norm bf16 {stream} {width} {tile.rows}x{tile.width} {tile.warps}"
        name = f"{back.rows}x{back.width} {back.warps} {back.stages}"
        yield f"add_norm backward bf16 {stream} {width} {name}"


def _gelu(choose: Chooser) -> Iterator[str]:
    """Of either kind, model.gelu."""
    tile = choose("gelu backward", gelu.TILES)
    for kind in ("", "tanh "):
        yield f"gelu {kind}bf16 " + "{} {}".format(*choose("gelu", gelu.BLOCKS))
        yield f"gelu backward {kind}{_tile(tile)} {tile.stages}"


def _ema(choose: Chooser) -> Iterator[str]:
    """Of one process, whose gradients are in bf16; and of ZeRO's fragments, aligned or not."""
    chunk = choose("adamw_ema_step", CHUNKS)
    for ema in ("", ", no EMA"):
        yield f"adamw_ema_step bf16 {chunk}, aligned, copy bf16{ema}"
    chunk = choose("ema_update", CHUNKS)
    yield from (f"ema_update fp32 {chunk}, {kind}, copy bf16" for kind in ("aligned", "unaligned"))


def _vicreg(choose: Chooser) -> Iterator[str]:
    """Of few and of many rows, in small and in large matrices."""
    yield from ("vicreg column bf16", "vicreg combine bf16", "vicreg finish", "vicreg finish gram")
    for gram in (False, True):
        for size in (vicreg_tiles.LARGE - 1, vicreg_tiles.LARGE):
            n, D = (size, size + 1) if gram else (size + 1, size)
            z = torch.empty(1, n, D, dtype=torch.bfloat16, device="meta")
            for kernel in ("moment", "grad"):
                tile = choose(*vicreg_tiles.candidates(kernel, z, gram))
                name = f"bf16 {'gram ' * gram}{tile.block}x{tile.block_k}"
                yield f"vicreg {kernel} {name}"
                if kernel == "moment":
                    yield from (f"vicreg reduce bf16 x 2 {tile.block}{k}" for k in ("", " keep"))


def _positions() -> Iterator[str]:
    """VICReg's terms at each position: of bf16 tokens, in small and in large matrices."""
    yield from (f"vicreg position {part}" for part in ("hinge", "finish"))
    yield from (f"vicreg position {part} bf16" for part in ("statistics", "deviations"))
    for kernel, configs in (
        ("moment", position_matmuls.MOMENTS), ("grad", position_matmuls.GRADS)
    ):  # fmt: skip
        for tile in position_matmuls.every(configs, 2):
            yield f"vicreg position {kernel} bf16 {tile.block}x{tile.block_k}"


def _sigreg() -> Iterator[str]:
    """Where loss.regulariser is "sigreg": one configuration for all."""
    yield from (f"sigreg {part} bf16" for part in ("sums", "slopes", "rows"))


def _attention(choose: Chooser, stack: Stack) -> Iterator[str]:
    tile = choose(*forward_candidates(stack.queries, stack.d, choose.arch >= TMA))
    yield f"attention bf16 {stack.d} {_joined(tile)}"
    if stack.role in ("target", "tuned"):
        return
    tile = choose(*backward_candidates(stack.queries, stack.d, CPU))
    whole = isinstance(tile, OnePass)
    for part in ("",) if whole else (", queries", ", keys"):
        yield f"attention backward{part} bf16 {stack.d} {_joined(tile)}"


def _joined(tile: tuple) -> str:
    return "x".join(map(str, tile))
