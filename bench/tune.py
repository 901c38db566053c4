"""Which configuration of each kernel is the fastest on this GPU: `python bench/ops.py --tune`.

Writes kernels/tuned.py, keeping what it says of other architectures. The candidates are lists in
the kernels' files, all compiled ahead of time and tested; here they take turns on the shapes of the
models in configs/.
"""

import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import files
import hardware
import torch
from stopwatch import Stopwatch

from cjepa_fast.kernels import gelu, norm, tuned
from cjepa_fast.kernels.attention import backward as attention_backward
from cjepa_fast.kernels.attention import forward as attention_forward
from cjepa_fast.kernels.common import launch
from cjepa_fast.kernels.common.tiles import copy_tiles, row_tiles
from cjepa_fast.kernels.ema import adamw, plain_update
from cjepa_fast.kernels.ema.lists import CHUNKS, on_device
from cjepa_fast.kernels.gather import predictor, targets, tokens
from cjepa_fast.kernels.tuned import TUNED
from cjepa_fast.kernels.vicreg import backward as vicreg_backward
from cjepa_fast.kernels.vicreg import forward as vicreg_forward
from cjepa_fast.kernels.vicreg.columns import launch_columns
from cjepa_fast.kernels.vicreg.tiles import candidates

TABLE = Path(tuned.__file__)
WIDTHS = (192, 384, 768, 1024, 1280, 1408)
MARGIN = 0.97  # of the first candidate's time: less of a gain may be noise
IMAGES, PATCHES, CONTEXT, TARGETS, PER_TARGET = 128, 256, 100, 4, 45
HEADER = f'"""{tuned.__doc__}"""\n\n'


class Knob(NamedTuple):
    """A kernel at one shape: the key in tuned.py, its candidates, and a call with one of them."""

    key: str
    candidates: Sequence[Any]
    call: Callable[[Any], Any]


def vicreg_knobs(device: torch.device, shapes: Sequence[tuple[int, int]]) -> Iterator[Knob]:
    """The covariance kernels of z (n, D): matmuls fp32 or bf16, the matrix n x n or D x D."""
    for (n, D), dtype in ((s, d) for s in shapes for d in (torch.float32, torch.bfloat16)):
        z, gram = torch.randn(1, n, D, device=device, dtype=dtype), n < D
        mean, _ = launch_columns(z)
        _, saved = vicreg_forward.fused_forward(z, 1.0, 1e-4, True)
        one = torch.ones((), device=device)

        def moments(config, z=z, mean=mean, gram=gram, matrix=saved.matrix):
            # with their sum: smaller tiles, or more of them, leave it more to read
            partial = vicreg_forward.launch_moments(z, mean, gram, config)
            vicreg_forward.launch_reduce(partial, matrix.shape[-1], 1.0, gram, matrix)

        def grad(config, z=z, saved=saved, one=one):
            vicreg_backward.launch_grad(z, saved, one, one, 1.0, 1e-4, z.shape[1], config)

        yield Knob(*candidates("moment", z, gram), moments)
        yield Knob(*candidates("grad", z, gram), grad)


def gather_knobs(device: torch.device, images: int, width: int) -> Iterator[Knob]:
    """The gather kernels, of bf16 tokens (B, N, D), positions and mask token."""
    B, K, M, P = images, CONTEXT, TARGETS, PER_TARGET

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    order = torch.rand(B, PATCHES, device=device).argsort(1)
    context, blocks = order[:, :K].contiguous(), order[:, : M * P].contiguous()
    x, pred, pos = normal(B, PATCHES, width), normal(B, M * P, width), normal(PATCHES, width)
    kept, grad, one = (
        x[:, :K].contiguous(),
        normal(B * M, K + P, width),
        x.new_ones((), dtype=torch.float32),
    )
    sequences = kept, pos, pos[0], context, blocks.view(B, M, P)
    errors = pred, x, blocks, "smooth_l1", 1e-5
    copied: dict[str, Callable] = {
        "gather": lambda t: tokens.launch_gather(x, None, context, tile=t),
        "gather backward": lambda t: tokens.launch_gather_backward(
            kept, context, PATCHES, x.dtype, t
        ),
        "predictor_input": lambda t: predictor.launch_predictor_input(*sequences, t),
        "predictor_input backward": lambda t: predictor.launch_predictor_input_backward(
            grad, B, K, (x.dtype, x.dtype), t
        ),
    }
    rows: dict[str, Callable] = {
        "target_gather": lambda t: targets.launch_target_gather(x, blocks, 1e-5, t),
        "prediction_loss": lambda t: targets.launch_prediction_loss(*errors, t),
        "prediction_loss backward": lambda t: targets.launch_prediction_slope(one, *errors, t),
    }
    for kernels, tiles in ((copied, copy_tiles(width)), (rows, row_tiles(width))):
        yield from (Knob(f"{name} {width}", tiles, call) for name, call in kernels.items())


def stream_knobs(device: torch.device, rows: int, width: int) -> Iterator[Knob]:
    """The norm and GELU kernels of a bf16 residual stream (rows, width), its MLP 4 times as
    wide."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    x, y, weight, bias = normal(rows, width), normal(rows, width), normal(width), normal(width)
    s, h, stats = norm.launch_add_norm(x, y, weight, bias, 1e-6)
    yield Knob(
        f"add_norm {width}", norm.forward_tiles(width),
        lambda tile: norm.launch_add_norm(x, y, weight, bias, 1e-6, tile),
    )  # fmt: skip
    yield Knob(
        f"add_norm backward {width}", norm.tiles(width),
        lambda tile: norm.launch_add_norm_backward(h, x, s, weight, stats, tile),
    )  # fmt: skip


def gelu_knobs(device: torch.device, rows: int, width: int) -> Iterator[Knob]:
    u, dg = (torch.randn(rows, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    yield Knob("gelu", gelu.BLOCKS, lambda block: gelu.launch_gelu(u, None, block))
    yield Knob("gelu backward", gelu.TILES, lambda tile: gelu.launch_gelu_backward(dg, u, tile))


def attention_knobs(
    device: torch.device, shapes: Sequence[tuple[int, int, int, int, bool]]
) -> Iterator[Knob]:
    """The attention kernels. shapes: sequences, tokens, heads, width of a head, whether trained."""
    tma = launch.at_least(attention_forward.TMA, device)
    for B, S, H, d, trained in shapes:
        qkv = torch.randn(B, S, 3 * H * d, device=device, dtype=torch.bfloat16)
        q, k, v = qkv.chunk(3, -1)
        out, lse = attention_forward.launch_attention(q, k, v, H)
        yield Knob(
            *attention_forward.forward_candidates(S, d, tma),
            lambda tile, q=q, k=k, v=v, H=H: attention_forward.launch_attention(q, k, v, H, tile),
        )  # fmt: skip
        if not trained:
            continue
        dqkv = torch.empty_like(qkv)

        def backward(tile, qkv=qkv, out=out, lse=lse, H=H, dqkv=dqkv):
            parts = qkv.chunk(3, -1), dqkv.chunk(3, -1)
            attention_backward.launch_attention_backward(
                out, *parts[0], out, lse, H, parts[1], True, tile
            )

        yield Knob(*attention_backward.backward_candidates(S, d, device), backward)


# Target, context and predictor of the models in configs/, as their masks draw them.
ATTENTIONS = (
    (128, 256, 16, 80, False), (128, 91, 16, 80, True), (512, 120, 16, 24, True),
    (512, 140, 16, 24, True), (128, 196, 16, 64, False), (128, 60, 16, 64, True),
    (1024, 90, 12, 32, True), (1024, 90, 6, 64, True), (1024, 90, 3, 128, True),
    (32, 1024, 16, 80, False), (32, 370, 16, 80, True), (128, 470, 16, 24, True),
)  # fmt: skip


def ema_knobs(device: torch.device, shapes: Sequence[tuple[int, ...]]) -> Iterator[Knob]:
    """The update kernels, of a list of weights: fp32 masters, bf16 gradients and copies."""

    def weights(dtype: torch.dtype) -> list[torch.Tensor]:
        return [torch.rand(shape, device=device, dtype=dtype) for shape in shapes]

    arrays = [weights(torch.float32) for _ in range(5)]
    arrays[1] = weights(torch.bfloat16)
    copies = [weights(torch.bfloat16) for _ in range(2)]
    numbers = adamw.adamw_numbers(device, 10, 1e-4, 0.996, (0.9, 0.999), 1e-8, 0.05)
    weight = on_device([0.004], device)
    yield Knob(
        "ema_update", CHUNKS,
        lambda chunk: plain_update.launch_ema(arrays[4], arrays[0], copies[1], weight, chunk),
    )  # fmt: skip
    yield Knob(
        "adamw_ema_step", CHUNKS,
        lambda chunk: adamw.launch_adamw_ema(arrays, *copies, numbers, chunk),
    )  # fmt: skip


def widths_of(make: Callable[..., Iterator[Knob]], *args) -> Iterator[Knob]:
    for width in WIDTHS:
        yield from make(*args, width)


# By family, all kernels at the sizes of a training.
FAMILIES: dict[str, Callable[[torch.device], Iterator[Knob]]] = {
    "vicreg": lambda device: vicreg_knobs(
        device, [(25_088, 1280), (25_088, 384), (1024, 4096), (128, 1280)]
    ),
    "gather": lambda device: widths_of(gather_knobs, device, IMAGES),
    "add_norm": lambda device: widths_of(stream_knobs, device, 16_384),
    "gelu": lambda device: gelu_knobs(device, 16_384, 5120),
    "attention": lambda device: attention_knobs(device, ATTENTIONS),
    "ema": lambda device: ema_knobs(device, [(1280, 5120), (1280,), (1280, 1280)] * 32),
}


def knobs(device: torch.device, only: Sequence[str] = ()) -> Iterator[Knob]:
    """For each text of `only` the family of that name, or the kernels whose key has it; else
    all."""
    for text in only or [""]:
        if text in FAMILIES:
            yield from FAMILIES[text](device)
            continue
        every = itertools.chain.from_iterable(make(device) for make in FAMILIES.values())
        yield from (knob for knob in every if text in knob.key)


def fastest(knob: Knob, watch: Stopwatch, seconds: float) -> tuple[int, list[float]]:
    """The index of the fastest candidate, and the medians in microseconds: infinite where one
    fails."""
    calls = {}
    for i, candidate in enumerate(knob.candidates):
        try:
            knob.call(candidate)  # compile, and warm up
            calls[i] = functools.partial(knob.call, candidate)
        except Exception as error:  # one that asks for more than this GPU has is not the fastest
            print(f"{knob.key}: {candidate} fails: {type(error).__name__}: {error}"[:300])
    times = [math.inf] * len(knob.candidates)
    for i, found in watch.turns(calls, seconds).items():
        times[i] = median(found)
    best = min(range(len(times)), key=times.__getitem__)
    return (best if times[best] < MARGIN * times[0] else 0), times


def tune(
    found: Iterator[Knob], watch: Stopwatch, seconds: float
) -> Iterator[tuple[Knob, int, list]]:
    """For each kernel with a choice: the index of the fastest candidate, and all medians in us."""
    for knob in found:
        if len(knob.candidates) < 2:
            continue
        best, times = fastest(knob, watch, seconds)
        print(f"{knob.key:32s} {best}  " + "  ".join(f"{us:.1f} us" for us in times), flush=True)
        yield knob, best, times


def prepare(found: Iterator[Knob], share: tuple[int, int]) -> int:
    """Call every `share[1]`-th candidate from number `share[0]` on, and so compile it; how many.

    Processes that take a share each compile on all cores what one would compile on one: Triton
    keeps it on the disk.
    """
    mine, every = share
    number = count = 0
    for knob in found:  # one at a time, so that its tensors go before the next one's come
        for candidate in knob.candidates:
            number += 1
            if (number - 1) % every != mine:
                continue
            try:
                knob.call(candidate)
                count += 1
            except Exception as error:  # one that asks for more than this GPU has
                print(f"{knob.key}: {candidate} fails: {type(error).__name__}: {error}"[:300])
    return count


def numbers_of(candidate: int | tuple) -> int | tuple:
    return tuple(candidate) if isinstance(candidate, tuple) else candidate


def source(table: dict[str, dict[str, int | tuple]]) -> str:
    """The text of kernels/tuned.py."""
    named = {architecture: found for architecture, found in sorted(table.items()) if found}
    if not named:
        return f"{HEADER}TUNED: dict[str, dict[str, int | tuple]] = {{}}\n"
    lines = ["TUNED: dict[str, dict[str, int | tuple]] = {"]
    for architecture, found in named.items():
        lines.append(f'    "{architecture}": {{')
        lines += [f'        "{key}": {numbers},' for key, numbers in sorted(found.items())]
        lines.append("    },")
    return HEADER + "\n".join([*lines, "}"]) + "\n"


def written(found: dict[str, int | tuple], architecture: str) -> None:
    """kernels/tuned.py with these keys of one architecture; what it says of others stays."""
    beside = TABLE.with_suffix(".partial")  # every kernel imports it: it is whole at any time
    beside.write_text(source(TUNED | {architecture: found}), encoding="utf-8")
    beside.replace(TABLE)


def main(
    device: torch.device,
    seconds: float,
    only: Sequence[str] = (),
    share: tuple[int, int] | None = None,
    json_file: Path | None = None,
) -> int:
    """The table is written after each kernel. share: compile this share instead (`prepare`).
    json_file: also the times of all candidates, which report.py --collect takes over."""
    if device.type != "cuda":
        print("error: --tune times kernels: it needs a CUDA device", file=sys.stderr)
        return 2
    if share:
        print(f"prepared: {prepare(knobs(device, only), share)} candidates")
        return 0
    architecture = launch.architecture(device)
    table, rows = dict(TUNED.get(architecture, {})), []
    for knob, best, times in tune(knobs(device, only), Stopwatch(device), seconds):
        table.pop(knob.key, None)
        if best:
            table[knob.key] = numbers_of(knob.candidates[best])
        written(table, architecture)
        us = [time if math.isfinite(time) else None for time in times]  # JSON has no infinity
        rows.append({"key": knob.key, "best": best, "us": us} | named(knob))
        if json_file:
            about = {"architecture": architecture, "table": table, "rows": rows}
            files.write(hardware.provenance(device) | about, json_file)
    print(f"written: {TABLE}")
    return 0


def named(knob: Knob) -> dict:
    return {"candidates": [numbers_of(candidate) for candidate in knob.candidates]}
