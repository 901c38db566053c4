"""The counter-based random numbers: uniform, independent, pure."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from cjepa_fast.data import rng

STREAMS = range(8)
SIGMAS = 5.0  # a right generator goes beyond it about once in two million statistics


def chi_square_sigmas(counts: torch.Tensor) -> float:
    """How far Pearson's statistic for equal expected counts lies above its mean, in sigmas.

    Wilson & Hilferty's cube root (1931) makes the chi-square's heavy tail a normal one.
    """
    counts = counts.flatten().double()
    expected = counts.mean()
    freedom = counts.numel() - 1
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5


def correlation_sigmas(a: torch.Tensor, b: torch.Tensor) -> float:
    both = torch.stack([a.flatten(), b.flatten()])
    return abs(torch.corrcoef(both)[0, 1].item()) * a.numel() ** 0.5


def test_uniforms_have_the_stated_shape_type_and_range(seed):
    values = rng.uniforms(seed, rng.CROP, 3, torch.arange(5000), 7)
    assert values.shape == (5000, 7) and values.dtype == torch.float64
    assert values.min() >= 0 and values.max() < 1
    assert (values * 2.0**53 == (values * 2.0**53).round()).all()  # 53 bits, none rounded up to 1


@pytest.mark.parametrize("stream", STREAMS)
def test_uniforms_fill_the_unit_interval_evenly(seed, stream):
    values = rng.uniforms(seed, stream, 1, torch.arange(20_000), 5)
    for column in values.T:
        assert chi_square_sigmas(torch.histc(column.float(), 64, 0, 1)) < SIGMAS
    low_bits = (values * 2.0**20 % 1 * 64).long()  # the small digits are as random as the large
    assert chi_square_sigmas(torch.bincount(low_bits.flatten(), minlength=64)) < SIGMAS


def test_pairs_of_columns_indices_epochs_streams_and_seeds_are_uncorrelated(seed):
    index = torch.arange(40_000)
    base = rng.uniforms(seed, rng.MASK_POSITION, 5, index, 2)
    others = {
        "columns": base[:, 1],
        "next index": rng.uniforms(seed, rng.MASK_POSITION, 5, index + 1, 1),
        "next epoch": rng.uniforms(seed, rng.MASK_POSITION, 6, index, 1),
        "next stream": rng.uniforms(seed, rng.MASK_POSITION + 1, 5, index, 1),
        "next seed": rng.uniforms(seed + 1, rng.MASK_POSITION, 5, index, 1),
    }
    for name, other in others.items():
        assert correlation_sigmas(base[:, 0], other) < SIGMAS, name
        cells = (base[:, 0] * 16).long() * 16 + (other.flatten() * 16).long()
        assert chi_square_sigmas(torch.bincount(cells, minlength=256)) < SIGMAS, name


def test_no_two_keys_share_their_draws():
    """Small seeds, streams and epochs, the ones that users pick, never give the same numbers."""
    index = torch.tensor([0])
    keys = itertools.product(range(12), STREAMS, range(12))
    seen = [rng.bits(*key, index).item() for key in keys]
    assert len(set(seen)) == len(seen)


def test_a_draw_depends_on_its_index_alone(seed):
    """The rest of the batch, its order and the number of columns change nothing."""
    index = torch.arange(1000)
    whole = rng.uniforms(seed, rng.FLIP, 2, index, 6)
    mixed = torch.randperm(1000)
    assert torch.equal(rng.uniforms(seed, rng.FLIP, 2, index[mixed], 6), whole[mixed])
    assert torch.equal(rng.uniforms(seed, rng.FLIP, 2, index[7:8], 3), whole[7:8, :3])


def test_draws_do_not_touch_torchs_generator(seed):
    before = torch.get_rng_state()
    rng.uniforms(seed, 0, 0, torch.arange(10), 2)
    rng.permutation(seed, 0, 10)
    assert torch.equal(before, torch.get_rng_state())


def test_draws_are_the_same_in_another_process(seed):
    code = f"from cjepa_fast.data import rng; print(rng.permutation({seed}, 4, 50).tolist())"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert shown.stdout.strip() == str(rng.permutation(seed, 4, 50).tolist())


@pytest.mark.parametrize("n", [0, 1, 2, 997, 4096])
def test_permutation_holds_every_image_once(seed, n):
    order = rng.permutation(seed, 0, n)
    assert order.dtype == torch.int64 and torch.equal(order.sort().values, torch.arange(n))


def test_permutation_changes_with_epoch_and_seed_and_repeats_for_both(seed):
    order = rng.permutation(seed, 0, 1000)
    assert torch.equal(order, rng.permutation(seed, 0, 1000))
    for other in (rng.permutation(seed, 1, 1000), rng.permutation(seed + 1, 0, 1000)):
        same = (order == other).sum().item()  # about Poisson(1)
        assert same < 12


def test_permutation_puts_every_image_at_every_index_equally_often(seed):
    counts = torch.zeros(6, 6)
    for epoch in range(3000):
        counts[torch.arange(6), rng.permutation(seed, epoch, 6)] += 1
    # rows and columns sum to 3000, which leaves 25 of 35 free: the bound is only safer for it
    assert chi_square_sigmas(counts) < SIGMAS


def test_seeds_of_any_size_and_sign_work():
    index = torch.arange(4)
    for value in (0, -1, 2**63 - 1, 2**63, 2**64 - 1):
        assert rng.uniforms(value, 0, 0, index, 1).shape == (4, 1)


def test_the_draws_are_those_of_every_version():
    """A run that is resumed after an update sees the crops and masks it would have seen."""
    wanted = {
        0: [-9003888528628206464, 6156377923772705684],
        -5: [1467778823434112221, -8616512978671933524],
        2**63: [8299965747072494096, -2901585770277141401],
    }
    for value, numbers in wanted.items():
        found = rng.bits(value, rng.CROP, 7, torch.tensor([0, 2**40 + 1]))
        assert found.tolist() == numbers
