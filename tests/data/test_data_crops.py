"""Crops against a per-image reference written from torchvision's description, and statistics."""

import math

import numpy as np
import pytest

from cjepa_fast.data import crops


def reference(height, width, uniforms, scale, ratio):
    """RandomResizedCrop for one image, one try after another, from the same uniforms."""
    for k in range(10):
        area = height * width * (scale[0] + uniforms[k] * (scale[1] - scale[0]))
        span = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(span[0] + uniforms[10 + k] * (span[1] - span[0]))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(uniforms[20] * (height - h + 1)), int(uniforms[21] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = round(w / ratio[0])
    elif width / height > ratio[1]:
        w = round(h * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("scale", [(0.3, 1.0), (0.08, 1.0), (1.0, 1.0), (1e-6, 1e-5)])
def test_equal_to_the_reference(seed, scale):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 700, (400, 2))
    sizes[:60, 0] *= 20  # panoramas, where no try fits
    sizes[60:120, 1] *= 20
    uniforms = rng.random((400, crops.CROP_UNIFORMS))
    ratio = (3 / 4, 4 / 3)
    got = crops.random_resized(sizes, uniforms, scale, ratio)
    want = [reference(*s, u, scale, ratio) for s, u in zip(sizes.tolist(), uniforms, strict=True)]
    np.testing.assert_array_equal(got, want)
    assert (got[:, :2] >= 0).all() and (got[:, 2:] >= 1).all()
    assert (got[:, :2] + got[:, 2:] <= sizes).all()


def test_area_aspect_and_position_are_uniform(seed):
    """Of a large square image every try with this range fits, so the first draw decides."""
    rng, n = np.random.default_rng(seed), 40_000
    sizes = np.full((n, 2), 4000)
    got = crops.random_resized(sizes, rng.random((n, crops.CROP_UNIFORMS)), (0.2, 0.5), (0.8, 1.25))
    top, left, h, w = got.astype(float).T
    shares = [
        (h * w / 4000**2 - 0.2) / 0.3,
        (np.log(w / h) - math.log(0.8)) / math.log(1.25 / 0.8),
        top / (4000 - h),
        left / (4000 - w),
    ]
    for share in shares:
        counts = np.histogram(share, 10, (0, 1))[0]
        assert ((counts - n / 10) ** 2 / (n / 10)).sum() < 40  # chi-square, 9 degrees: p < 1e-5
    assert np.abs(np.corrcoef(shares) - np.eye(4)).max() < 0.03


def test_corners_are_reached():
    sizes = np.array([[10, 10], [10, 10]])
    uniforms = np.zeros((2, crops.CROP_UNIFORMS))
    uniforms[1, 20:] = 1 - 2**-53
    uniforms[:, 10:20] = 0.5
    (first, last) = crops.random_resized(sizes, uniforms, (0.25, 0.25), (1, 1))
    assert first.tolist() == [0, 0, 5, 5] and last.tolist() == [5, 5, 5, 5]


def test_ratio_is_how_far_an_oblong_is_stretched(seed):
    """So a crop shown in an oblong is one whose aspect is as many times larger."""
    rng = np.random.default_rng(seed)
    sizes, uniforms = rng.integers(1, 700, (400, 2)), rng.random((400, crops.CROP_UNIFORMS))
    got = crops.random_resized(sizes, uniforms, (0.3, 1.0), (3 / 4, 4 / 3), (40, 100))
    ratio = (3 / 4 * 2.5, 4 / 3 * 2.5)
    want = [
        reference(*s, u, (0.3, 1.0), ratio) for s, u in zip(sizes.tolist(), uniforms, strict=True)
    ]
    np.testing.assert_array_equal(got, want)
    assert (got[:, :2] >= 0).all() and (got[:, 2:] >= 1).all()
    assert (got[:, :2] + got[:, 2:] <= sizes).all()


def test_the_centre_of_an_oblong_is_its_largest_window():
    sizes = np.array([[100, 60], [61, 90], [1, 1], [30, 400], [7, 500]])
    whole = [[35, 0, 30, 60], [8, 0, 45, 90], [0, 0, 1, 1], [0, 170, 30, 60], [0, 243, 7, 14]]
    assert crops.centre(sizes, image_size=(32, 64)).tolist() == whole
    assert crops.centre(sizes[:2], 0.5, (32, 64)).tolist() == [[42, 15, 15, 30], [19, 22, 22, 45]]
    assert crops.centre(sizes[:1], image_size=(64, 32)).tolist() == [[0, 5, 100, 50]]
    for size in (7, (7, 7)):
        assert (crops.centre(sizes, 0.7, size) == crops.centre(sizes, 0.7)).all()


def test_centre():
    sizes = np.array([[100, 60], [61, 90], [1, 1]])
    assert crops.centre(sizes).tolist() == [[20, 0, 60, 60], [0, 14, 61, 61], [0, 0, 1, 1]]
    assert crops.centre(sizes, 0.5).tolist() == [[35, 15, 30, 30], [15, 30, 30, 30], [0, 0, 1, 1]]


def test_flips_and_colours():
    assert crops.flips(np.array([[0.49], [0.5]])).tolist() == [1, 0]
    factors = crops.colour_factors(np.array([[0.0, 0.5, 1.0]]), 0.4)
    np.testing.assert_allclose(factors, [[0.6, 1.0, 1.4]], rtol=1e-6)
    assert crops.colour_factors(np.zeros((1, 3)), 1.5).min() == 0
