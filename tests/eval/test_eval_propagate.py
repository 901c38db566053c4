"""Labels carried from patch to patch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cjepa_fast.eval.dense import propagate
from cjepa_fast.eval.dense.propagate import carry, frame_labels, patch_labels

GRID = (8, 11)
OPTIONS = {"topk": 5, "context": 3, "radius": 2, "temperature": 0.1}


def square(top: int, left: int) -> torch.Tensor:
    """Patches (N,) of a 3 x 3 square on the grid."""
    cells = torch.zeros(GRID, dtype=torch.long)
    cells[top : top + 3, left : left + 3] = 1
    return cells.flatten()


def test_ideal_features_carry_a_moving_square_exactly(seed):
    corners = [(1 + t // 3, t) for t in range(8)]
    one = torch.randn(16)
    look = torch.stack([one, -one])  # ground and square
    frames = [look[square(*corner)] for corner in corners]
    first = F.one_hot(square(*corners[0]), 2).float()
    found = list(propagate.propagate(frames, first, GRID, **OPTIONS))
    assert len(found) == 7
    for corner, label_NK in zip(corners[1:], found, strict=True):
        torch.testing.assert_close(label_NK, F.one_hot(square(*corner), 2).float())


def test_beyond_the_radius_nothing_is_found():
    look = torch.eye(2)
    first = F.one_hot(square(0, 0), 2).float()
    frames = [look[square(0, 0)], look[square(0, 6)]]
    (label_NK,) = propagate.propagate(frames, first, GRID, **OPTIONS)
    assert label_NK[:, 1].unflatten(0, GRID)[:, 5:].sum() == 0


def test_the_first_frame_and_the_last_few_are_the_sources(monkeypatch):
    seen = []
    monkeypatch.setattr(
        propagate, "carry", lambda t, s, labels, *a, **o: seen.append(s) or labels[0]
    )
    frames = [torch.tensor([[float(t), 1.0]]) for t in range(6)]
    list(propagate.propagate(frames, torch.ones(1, 1), (1, 1), **{**OPTIONS, "context": 2}))
    numbers = [[round(float(x[0, 0] / x[0, 1])) for x in s] for s in seen]
    assert numbers == [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4]]


def plain_carry(target, source, label, grid, topk, radius, temperature):
    """All similarities at once, exp, the neighbourhood as a mask, the rest set to zero."""
    N = len(target)
    row, col = np.divmod(np.arange(N), grid[1])
    near = (abs(row[:, None] - row) <= radius) & (abs(col[:, None] - col) <= radius)
    affinity = torch.exp(target @ source.flatten(0, 1).T / temperature)
    affinity = affinity * torch.from_numpy(np.tile(near, (1, len(source))))
    least = affinity.topk(topk, dim=1).values[:, -1:]
    affinity[affinity < least] = 0
    return affinity / affinity.sum(1, keepdim=True) @ label.flatten(0, 1)


@pytest.mark.parametrize("limit", [1, 20_000, 2**28])
def test_carry_is_what_the_whole_affinity_gives(limit, seed, monkeypatch):
    monkeypatch.setattr(propagate, "AFFINITY_BYTES", limit)
    target, *source = F.normalize(torch.randn(4, 88, 6, dtype=torch.float64), dim=-1)
    label = torch.rand(3, 88, 4, dtype=torch.float64)
    options = {"topk": 5, "radius": 2, "temperature": 0.1}
    found = carry(target, torch.stack(source), label, GRID, **options)
    torch.testing.assert_close(
        found, plain_carry(target, torch.stack(source), label, GRID, **options)
    )


def test_a_patch_with_few_neighbours_takes_what_there_is():
    one = torch.ones(1, 1)
    found = carry(one, one[None], one[None], (1, 1), topk=5, radius=12, temperature=0.1)
    assert found.item() == 1


def test_label_maps_to_patches_and_back():
    labels_HW = np.zeros((32, 44), dtype=np.uint8)
    labels_HW[8:20, 12:32] = 2
    label_NK = patch_labels(labels_HW, GRID, 3)
    assert label_NK.shape == (88, 3) and (label_NK.sum(1) == 1).all()
    back_HW = frame_labels(label_NK, GRID, 4, (32, 44))
    assert back_HW.dtype == np.uint8
    different = back_HW != labels_HW
    assert different.sum() <= 4  # bilinear upsampling rounds the corners
    assert (frame_labels(label_NK, GRID, 4, (64, 88)) == back_HW.repeat(2, 0).repeat(2, 1)).all()


def test_a_faint_label_is_spread_as_far_as_a_strong_one():
    """Each label's map has the range 0 to 1 before the highest wins."""
    faint, strong = square(1, 1), square(4, 7)
    faint_NK = torch.stack([1 - 0.4 * faint - strong, 0.4 * faint, strong], 1).float()
    found_HW = frame_labels(faint_NK, GRID, 4, (32, 44))
    assert (found_HW[6:14, 6:14] == 1).all()
    assert (found_HW[18:26, 30:38] == 2).all()
