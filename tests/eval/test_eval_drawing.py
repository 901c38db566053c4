"""What the drawings show: attention received, masked pixels, series of a log."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from cjepa_fast.data.masks import MaskSampler
from cjepa_fast.eval.figures import attention, curves, sheets
from cjepa_fast.eval.figures import mask_columns as masked
from cjepa_fast.model.vit import Encoder


@pytest.fixture
def encoder(seed):
    encoder = Encoder(image_size=32, patch_size=8, width=24, depth=2, heads=3).eval()
    encoder.mean, encoder.std = (0.5,) * 3, (0.25,) * 3
    return encoder


def test_attention_received_is_the_columns_mean(encoder, monkeypatch):
    """If every query looks at patch 6 alone, the map is one there: row 1, column 2 of 4 x 4."""
    maps_BHNN = torch.zeros(2, 3, 16, 16)
    maps_BHNN[:, :, :, 6] = 1
    monkeypatch.setattr(encoder, "attention_maps", lambda images: maps_BHNN)
    received = attention.received(encoder, torch.zeros(2, 3, 32, 32))
    assert received.shape == (2, 3, 4, 4)
    assert torch.equal(received.nonzero()[:, 2:].unique(dim=0), torch.tensor([[1, 2]]))
    assert received[0, 0, 1, 2] == 1


def test_attention_of_a_real_encoder_sums_to_one(encoder):
    received = attention.received(encoder, torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(received.sum((-2, -1)), torch.ones(2, 3))


def test_the_heads_shown_are_the_least_even():
    maps = torch.full((2, 4, 2, 2), 0.25)
    maps[:, 2] = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    maps[:, 1] = torch.tensor([[0.5, 0.5], [0.0, 0.0]])
    assert attention.most_different(maps, 2) == [1, 2]


def test_covered_pixels_are_those_of_the_patches():
    shown = masked.covered(torch.tensor([1, 3]), grid=(2, 3), shape=(4, 6))
    expected = np.zeros((4, 6), bool)
    expected[:2, 2:4] = True  # patch 1: row 0, column 1
    expected[2:, :2] = True  # patch 3: row 1, column 0
    assert np.array_equal(shown, expected)


def test_arrays_undo_the_normalisation(seed):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    rgb = torch.rand(2, 3, 4, 4)
    normalised = (rgb - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    shown = sheets.as_arrays(normalised, mean, std)
    np.testing.assert_allclose(shown, rgb.permute(0, 2, 3, 1).numpy(), atol=1e-6)


def test_a_sheet_is_drawn_and_saved(tmp_path):
    picture = np.random.default_rng(0).random((8, 8, 3))
    out = sheets.save(sheets.sheet([("a", [picture])], "title"), tmp_path / "deep" / "a.png")
    with Image.open(out) as image:
        assert min(image.size) > 200
        assert np.asarray(image.convert("L")).std() > 10  # not an empty sheet


@pytest.mark.parametrize("kind", ["random", "packed"])
def test_the_masks_picture_shows_the_context_and_hides_the_rest(seed, kind):
    picture = np.random.default_rng(seed).random((32, 32, 3)).astype(np.float32) * 0.5
    masks = MaskSampler(grid=(4, 4), context=kind, min_keep=2)(0, 0, torch.arange(1))
    _, context, both, *blocks = masked._views(picture, masks, 0, (4, 4))
    seen = masked.covered(masks.context_of(0), (4, 4), (32, 32))
    assert np.array_equal((context == picture).all(-1), seen)
    assert np.array_equal(both[seen], picture[seen])  # no target lies over the context
    for block, idx_P in zip(blocks, masks.target_idx_BMP[0], strict=True):
        target = masked.covered(idx_P, (4, 4), (32, 32))
        assert np.array_equal((block == picture).all(-1), target)


def write_log(run, count: int = 30):
    run.mkdir()
    rows = [
        {"step": s, "loss": 1 / s, "jepa": 0.5, "cov": 0.0, "images_per_s": 100.0, "rankme": None}
        for s in range(1, count + 1)
    ]
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_series_leave_out_what_was_not_logged_or_not_finite():
    rows = [{"step": 1, "x": None}, {"step": 2, "x": 3.0}, {"step": 3}, {"step": 4, "x": 0.0}]
    assert curves.series(rows, "x") == ([2, 4], [3.0, 0.0])


def test_curves_of_two_runs(tmp_path):
    runs = [write_log(tmp_path / "one"), write_log(tmp_path / "two", 5)]
    out = curves.draw(runs, tmp_path / "curves.png")
    with Image.open(out) as image:
        assert np.asarray(image.convert("L")).std() > 5


def test_runs_are_told_apart_by_the_shortest_names():
    assert curves.short_names(["/a/b/run", "/a/c/run"]) == ["b/run", "c/run"]
    assert curves.short_names(["/a/one", "/a/two"]) == ["one", "two"]
    assert curves.short_names(["/a", "/a"]) == ["a (1)", "a (2)"]


def test_curves_of_nothing_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such run"):
        curves.draw([tmp_path / "absent"], tmp_path / "c.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no log\.jsonl"):
        curves.draw([tmp_path / "empty"], tmp_path / "c.png")
    (tmp_path / "empty" / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match="no rows"):
        curves.draw([tmp_path / "empty"], tmp_path / "c.png")
    with pytest.raises(ValueError, match=r"\.docx"):
        curves.draw([write_log(tmp_path / "run")], tmp_path / "c.docx")
