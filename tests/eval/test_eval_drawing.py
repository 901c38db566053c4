"""What the drawings show: attention received, masked pixels, series of a log."""

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

from cjepa_fast.config import Config
from cjepa_fast.data.masks import MaskSampler
from cjepa_fast.eval.figures import attention, curves, seed_bands, sheets, style
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
    drawn = sheets.sheet([sheets.Column("a", [picture])], "title")
    out = style.save(drawn, tmp_path / "deep" / "a.png")
    with Image.open(out) as image:
        assert min(image.size) > 200
        assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
        assert np.asarray(image.convert("L")).std() > 10  # not an empty sheet


@pytest.mark.parametrize(
    ("name", "begin"), [("a.pdf", b"%PDF"), ("a.svg", b"<?xml"), ("a.PNG", b"\x89PNG")]
)
def test_the_kind_of_file_is_as_its_ending(tmp_path, name, begin):
    picture = np.zeros((8, 8, 3))
    out = style.save(sheets.sheet([sheets.Column("a", [picture])], "title"), tmp_path / name)
    assert out.read_bytes()[: len(begin)] == begin


def test_many_lines_differ_in_more_than_colour():
    looks = [style.line(i) for i in range(28)]
    for name in (("color", "linestyle"), ("color", "marker"), ("color", "linestyle", "marker")):
        assert len({tuple(str(look[key]) for key in name) for look in looks}) == 28
    for one, two in itertools.pairwise(looks):
        assert all(one[key] != two[key] for key in ("color", "linestyle", "marker"))


def test_a_long_title_has_lines_that_fit():
    assert max(map(len, sheets.wrapped("word " * 40, 5.0).splitlines())) <= 5 * sheets.LETTERS


@pytest.mark.parametrize("kind", ["random", "packed"])
def test_the_masks_picture_shows_the_context_and_hides_the_rest(seed, kind):
    picture = np.random.default_rng(seed).random((32, 32, 3)).astype(np.float32) * 0.5
    masks = MaskSampler(grid=(4, 4), context=kind, min_keep=2)(0, 0, torch.arange(1))
    _, context, both, *blocks = masked._views(picture, masks, 0, (4, 4))
    seen = masked.covered(masks.context_of(0), (4, 4), (32, 32))
    assert np.array_equal(context[..., 3] == 1, seen)  # what is hidden is transparent: hatched
    assert np.array_equal(context[seen][:, :3], picture[seen])
    assert np.array_equal(both[seen][:, :3], picture[seen])  # no target lies over the context
    covered = seen.copy()
    for block, idx_P in zip(blocks, masks.target_idx_BMP[0], strict=True):
        target = masked.covered(idx_P, (4, 4), (32, 32))
        covered |= target
        assert np.array_equal(block[..., 3] == 1, target)
    assert np.array_equal(both[..., 3] == 1, covered)


def test_a_block_has_one_colour_in_its_column_and_in_the_overlay(seed):
    masks = MaskSampler(grid=(4, 4), min_keep=2)(0, 0, torch.arange(2))
    black_B3HW = torch.zeros(2, 3, 32, 32)
    _, _, overlay, *alone = masked.columns(black_B3HW, (0.0,) * 3, (1.0,) * 3, masks, (4, 4))
    assert len({column.colour for column in alone}) == len(alone) == 4
    from matplotlib.colors import to_rgb

    for m, column in enumerate(alone):
        left, top, width, height, colour, text = overlay.outlines[1][m]
        assert (colour, text) == (column.colour, str(m + 1))
        shown = np.zeros((32, 32), bool)
        shown[top : top + height, left : left + width] = True
        assert np.array_equal(column.images[1][..., 3] == 1, shown)
    last = overlay.images[1][alone[-1].images[1][..., 3] == 1]  # no later block lies over it
    tint = masked.TINT * np.array(to_rgb(alone[-1].colour))
    assert (last[:, :3] >= tint - 1e-6).all() and np.abs(last[:, :3] - tint).min(0).max() < 1e-6


def test_hidden_patches_are_hatched():
    picture = np.zeros((8, 8, 4))
    whole, hidden = sheets.sheet(
        [sheets.Column("a", [picture[..., :3]]), sheets.Column("b", [picture])], ""
    ).axes
    assert whole.patch.get_hatch() is None and hidden.patch.get_hatch()


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


def write_seeds(folder, name: str, knn: list[float]):
    """Runs of one configuration: RUN/name/seed_0, ..., each with kNN 10 untrained and then knn."""
    for seed, value in enumerate(knn):
        run = folder / name / f"seed_{seed}"
        run.mkdir(parents=True)
        # what changes no number of a training makes no configuration of its own
        own = {"run": {"seed": seed, "dir": str(run)}, "data": {"path": name, "threads": 1 + seed}}
        (run / "config.json").write_text(Config(**own).to_json())
        rows = [{"step": 0, "knn": 10.0}, {"step": 5, "knn": value, "loss": value}]
        (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        yield run


def test_seeds_are_one_line_within_a_band(tmp_path):
    runs = [
        *write_seeds(tmp_path, "one", [20.0, 24.0, 40.0]),
        *write_seeds(tmp_path, "two", [30.0]),
    ]
    logs = curves.grouped(runs)
    assert list(map(len, logs.values())) == [3, 1] and next(iter(logs)) == "one (3 seeds)"

    from matplotlib.figure import Figure

    axes = Figure().subplots()
    curves._panel(axes, "knn", logs)
    mean, alone, untrained = axes.lines
    assert list(mean.get_ydata()) == [10, 28] and list(alone.get_ydata()) == [10, 30]
    assert set(untrained.get_ydata()) == {10}
    (band,) = axes.collections
    ys = band.get_paths()[0].vertices[:, 1]
    assert (ys.min(), ys.max()) == (10, 40)
    assert axes.get_ylabel() == "kNN (% right)"
    assert mean.get_linewidth() > alone.get_linewidth()  # a line that lies on it does not hide it
    assert mean.get_linestyle() != alone.get_linestyle()


def test_a_quantity_that_a_run_lacks_is_said(tmp_path):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    logs = curves.grouped([*write_seeds(tmp_path, "one", [20.0]), write_log(tmp_path / "two")])
    curves._panel(axes, "knn", logs)
    assert "not logged: two" in [text.get_text() for text in axes.texts]


@pytest.mark.parametrize("panels", range(1, 40))
def test_no_panel_is_alone_in_the_last_row(panels):
    columns = curves.columns_for(panels)
    assert panels <= 5 or panels % columns != 1
    assert columns <= 5


def test_noise_does_not_look_like_a_trend():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    axes.plot([0, 1], [22.86, 22.94])
    seed_bands.at_least(axes, 5.0)
    assert np.ptp(axes.get_ylim()) == pytest.approx(5)


@pytest.mark.parametrize(("last", "scale"), [(3.0, "linear"), (30.0, "log"), (0.0, "linear")])
def test_an_axis_is_logarithmic_over_a_decade(last, scale):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    rows = [{"step": 1, "cov": 1.0}, {"step": 2, "cov": last}]
    curves._panel(axes, "cov", {"run": [rows]})
    assert axes.get_yscale() == scale


def test_runs_are_told_apart_by_the_shortest_names():
    assert curves.short_names(["/a/b/run", "/a/c/run"]) == ["b/run", "c/run"]
    assert curves.short_names(["/a/one", "/a/two"]) == ["one", "two"]
    assert curves.short_names(["/a", "/a"]) == ["a (1)", "a (2)"]


def test_a_run_whose_configuration_cannot_be_read_has_a_line_of_its_own(tmp_path):
    """Its rows are all that is drawn; it may be of another version."""
    runs = list(write_seeds(tmp_path, "one", [20.0, 24.0, 40.0]))
    saved = json.loads((runs[2] / "config.json").read_text())
    saved["data"]["of_another_version"] = 1
    (runs[2] / "config.json").write_text(json.dumps(saved))
    assert [len(rows) for rows in curves.grouped(runs).values()] == [2, 1]


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
