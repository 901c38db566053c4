"""Signs of collapse against scikit-learn, sums written out and cases that are known."""

import copy
import json
import math

import numpy as np
import pytest
import tiny
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from cjepa_fast.data.sources import open_images
from cjepa_fast.eval import features
from cjepa_fast.eval.probes import collapse, spread
from cjepa_fast.model.vit import Encoder
from cjepa_fast.telemetry import representation_stats


def test_lidar_is_the_entropy_of_scikit_learn_s_discriminants(seed):
    views = torch.randn(12, 1, 6) * torch.tensor([3.0, 2, 1, 0.5, 0.2, 0.1]) + torch.randn(12, 8, 6)
    label = np.repeat(np.arange(12), 8)
    lda = LinearDiscriminantAnalysis(solver="eigen").fit(views.flatten(0, 1).double(), label)
    share = lda.explained_variance_ratio_
    expected = math.exp(-(share * np.log(share)).sum())
    assert spread.lidar(views, delta=0.0) == pytest.approx(expected, rel=1e-6)


def test_lidar_counts_the_directions_in_which_images_differ(seed):
    """By hand: images at the corners of a square, views a shift in a third direction that is as
    wide in both: two discriminants of one size. The shift of the views counts for nothing."""
    corners = torch.tensor([[1.0, 1, 0], [1, -1, 0], [-1, 1, 0], [-1, -1, 0]])
    shifts = torch.tensor([[0.0, 0, 9], [0, 0, -9]])
    views_nqD = corners[:, None] + shifts[None]
    assert spread.lidar(views_nqD) == pytest.approx(2.0, rel=1e-9)
    flat = views_nqD * torch.tensor([1.0, 0.0, 1.0])
    assert spread.lidar(flat) == pytest.approx(1.0, rel=1e-9)
    # views three deltas wide in one direction alone: eigenvalues 1 / delta and 1 / (4 delta)
    views_nqD = corners[:, None] + torch.tensor([[0.3**0.5, 0, 0], [-(0.3**0.5), 0, 0]])[None]
    entropy = -0.8 * math.log(0.8) - 0.2 * math.log(0.2)
    assert spread.lidar(views_nqD, delta=0.1) == pytest.approx(math.exp(entropy), rel=1e-6)
    with pytest.raises(ValueError, match="4 images in 1 views"):
        spread.lidar(views_nqD[:, :1])


def test_uniformity_and_alignment_as_their_sums_over_pairs(seed, monkeypatch):
    monkeypatch.setattr(spread, "ROWS", 2)  # compared at a time
    views = torch.randn(5, 3, 4)
    unit = (views / views.norm(dim=2, keepdim=True)).double()
    pairs = [(unit[i, 0] - unit[j, 0]).square().sum() for i in range(5) for j in range(i)]
    expected = math.log(sum(math.exp(-2 * d) for d in pairs) / len(pairs))
    assert spread.uniformity(views[:, 0]) == pytest.approx(expected, rel=1e-6)
    assert spread.uniformity(torch.ones(5, 4)) == pytest.approx(0, abs=1e-12)
    pairs = [(u[a] - u[b]).square().sum().item() for u in unit for a in range(3) for b in range(a)]
    assert spread.alignment(views) == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)


def test_dimensions_that_hardly_vary_are_dead():
    features_nD = torch.tensor([[1.0, 5, 0.001], [-1, 5, -0.001], [1, 5, 0.001], [-1, 5, -0.001]])
    assert spread.dead_share(features_nD) == pytest.approx(2 / 3)  # root mean square: 2.9
    assert spread.deviations(features_nD).tolist() == pytest.approx(
        [1.1547, 0.0011547, 0], abs=1e-4
    )
    assert spread.dead_share(torch.ones(4, 3)) == 1.0


def test_the_variance_of_tokens_divides_by_position_image_and_both(seed):
    position, image, both = torch.randn(1, 7, 4), torch.randn(9, 1, 4), torch.randn(9, 7, 4)
    assert spread.token_shares(position.expand(9, 7, 4))["by_position"] == pytest.approx(1)
    assert spread.token_shares(image.expand(9, 7, 4))["by_image"] == pytest.approx(1)
    alone = both - both.mean(0, keepdim=True) - both.mean(1, keepdim=True) + both.mean((0, 1))
    assert spread.token_shares(alone)["by_both"] == pytest.approx(1)
    centred = [part - part.mean((0, 1)) for part in (position, image)]
    found = spread.token_shares(sum(centred) + alone + 3.0)
    sizes = [part.expand(9, 7, 4).square().sum().item() for part in (*centred, alone)]
    expected = [size / sum(sizes) for size in sizes]
    assert list(found.values()) == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    images = open_images(tiny.write_images(folder / "set", count=24), cache=folder / "cache")
    torch.manual_seed(0)
    encoder = Encoder(image_size=24, patch_size=4, width=24, depth=1, heads=3).eval()
    encoder.mean, encoder.std = (0.5,) * 3, (0.25,) * 3
    reading = {"device": "cpu", "batch_size": 8, "threads": 1}
    found = collapse.measure(encoder, images, count=12, views=3, crop=0.8, **reading)
    return encoder, images, reading, found


def test_the_measures_are_those_of_the_features_of_the_images(measured):
    encoder, images, reading, found = measured
    keep = torch.linspace(0, 23, 12).round().long()
    clean_nD, _ = features.extract(encoder, images, keep=keep, crop=0.8, **reading)
    assert found["images"] == 12
    assert found["rankme"] == pytest.approx(representation_stats(clean_nD)["rankme"].item())
    assert found["uniformity"] == pytest.approx(spread.uniformity(clean_nD), rel=1e-5)
    assert found["stds"] == pytest.approx(clean_nD.double().std(0).sort().values.flip(0).tolist())
    expected = np.linalg.svd(clean_nD.numpy(), compute_uv=False)
    np.testing.assert_allclose(found["singular_values"], expected, rtol=1e-3, atol=1e-4)
    assert found["by_position"] + found["by_image"] + found["by_both"] == pytest.approx(100)


def test_views_are_crops_of_their_own_image(measured):
    """Repeatable, and the views of an image lie nearer each other than to the next image's."""
    encoder, images, reading, _ = measured
    keep = torch.arange(6)
    views_nqD = collapse._views(encoder, images, keep, 4, 0, **reading)
    assert views_nqD.shape == (6, 4, 24)
    assert torch.equal(views_nqD, collapse._views(encoder, images, keep, 4, 0, **reading))
    within = (views_nqD - views_nqD.mean(1, keepdim=True)).square().mean()
    mixed = views_nqD.flatten(0, 1).unflatten(0, (4, 6)).transpose(0, 1)  # of several images each
    assert 0 < within < (mixed - mixed.mean(1, keepdim=True)).square().mean()


def test_an_image_without_all_its_crops_is_left_out(measured, monkeypatch, capsys):
    """As of a JPEG that ends early, whose lower crops are dropped. Others' views stay theirs."""
    encoder, images, reading, _ = measured
    keep, read = torch.tensor([1, 4, 5, 9]), features.image_vectors

    def some(*args, **options):
        found, index = read(*args, **options)
        there = torch.ones(len(index), dtype=torch.bool)
        there[[4, 6, 7, 8]] = False  # one view of image 4, all of image 5
        return found[there], index[there]

    whole = collapse._views(encoder, images, keep, 3, 0, **reading)
    assert "left out" not in capsys.readouterr().out
    monkeypatch.setattr(collapse, "image_vectors", some)
    assert torch.equal(collapse._views(encoder, images, keep, 3, 0, **reading), whole[[0, 3]])
    assert "2 of 4 images left out of LiDAR and alignment" in capsys.readouterr().out


def test_a_single_view_is_refused_before_any_work(measured, monkeypatch):
    encoder, images, reading, _ = measured
    monkeypatch.setattr(collapse, "extract", lambda *args, **how: pytest.fail("computed"))
    with pytest.raises(ValueError, match="--views 1: LiDAR and alignment need at least 2 crops"):
        collapse.measure(encoder, images, count=12, views=1, **reading)


def test_patches_that_are_all_alike_have_no_shares(measured, tmp_path):
    """null, which any reader of JSON takes, and no bar."""
    encoder, images, reading, _ = measured
    constant = copy.deepcopy(encoder)
    constant.norm.weight.data.zero_()
    constant.norm.bias.data.fill_(1.0)
    found = collapse.measure(constant, images, count=4, views=2, **reading)
    assert json.loads(json.dumps(found, allow_nan=False))["by_position"] is None
    row = {"encoder": "trained", **found}
    assert collapse.draw([row], tmp_path / "c.png", "title").stat().st_size > 10_000


def test_the_picture_and_its_numbers(measured, tmp_path):
    found = measured[-1]
    rows = [{"encoder": name, **json.loads(json.dumps(found))} for name in ("untrained", "trained")]
    assert collapse.draw(rows, tmp_path / "c.png", "title").stat().st_size > 20_000
