"""How lengths fill a GPU, by sums that can be done by hand."""

import dataclasses

import pytest

from cjepa_fast.config import load
from cjepa_fast.model import waves
from cjepa_fast.model.flops import StepSizes, step_gflop
from cjepa_fast.training import build
from cjepa_fast.training.sizes import counted_sizes

SIZES = StepSizes(
    image_size=224, patch_size=16, width=256, depth=1, mlp_ratio=1.0, predictor_width=256,
    predictor_depth=1, predictor_mlp_ratio=1.0, context_k=101, targets_m=1, targets_p=28,
)  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "columns", "multiprocessors", "tiles"),
    [
        (128, 256, 1, 1),  # one full tile
        (129, 256, 1, 2),  # a second for one row
        (128, 257, 1, 2),  # and for one column
        (128, 256, 4, 4),  # a wave of four, three of them idle
        (640, 256, 4, 8),  # five tiles: two waves
    ],
)
def test_whole_waves_of_full_tiles(rows, columns, multiprocessors, tiles):
    matmul = waves.Matmul(rows, 7, columns, 3)
    assert matmul.work == rows * 7 * columns * 3
    assert matmul.capacity(multiprocessors) == tiles * 128 * 256 * 7 * 3


def test_attention_pads_to_whole_tiles():
    assert [waves.AttentionWork(1, n, 8, 1).share for n in (64, 128)] == [1, 1]
    assert waves.AttentionWork(1, 65, 8, 1).share == (65 / 128) ** 2
    assert waves.AttentionWork(1, 32, 8, 1).capacity(4) == 4 * waves.AttentionWork(1, 32, 8, 1).work


def test_a_context_that_spills_over_is_found_out():
    """128 tokens are a tile, and with 28 more of a target they fill no second one; 100 + 28 do."""
    spilling = waves.fill(1, SIZES, 1)
    best = waves.best_keep(1, SIZES, 1, 1)
    assert best.keep == 100 and best.share > spilling.share
    assert best.attention == ((100 / 128) ** 2, 1.0)
    assert waves.best_keep(1, SIZES, 1, 101).keep == 101  # not fewer than min_keep
    assert "mask.keep=100" in waves.describe(1, SIZES, 1, 1)
    fitting = dataclasses.replace(SIZES, context_k=100)
    assert "mask.keep" not in waves.describe(1, fitting, 1, 1)


@pytest.mark.parametrize("mode", ["per_target", "one_pass"])
def test_the_work_is_what_is_counted(mode):
    """Forward and the inputs' gradients: two thirds of the linear layers' count, all of
    attention's; but for the last block of the predictor, which the count cuts short."""
    config = load("vit_s.json", [f"predictor.mode={mode}", "predictor.depth=30"])
    sizes = counted_sizes(config, 60, 4, 36)
    gflop = step_gflop(sizes)
    found = list(waves.step_work(1, sizes))
    linear = 2 * sum(p.work for p in found if isinstance(p, waves.Matmul)) / 1e9
    attention = 2 * sum(p.work for p in found if isinstance(p, waves.AttentionWork)) / 1e9
    total = 1.5 * linear + attention / waves.ATTENTION_SLOWER
    counted = gflop["context"] + gflop["predictor"]
    assert total == pytest.approx(counted, rel=0.03 if mode == "per_target" else 0.25)


def test_keep_is_the_context_of_fixed():
    config = load("vit_s.json", ["mask.context=fixed", "mask.keep=50"])
    sampler = build.build_masks(config)
    assert sampler.fixed_context == 50
    assert dataclasses.replace(sampler, keep=None).fixed_context != 50
