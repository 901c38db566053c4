"""J, F and their statistics: by hand, and beside a slow implementation."""

import math

import numpy as np
import pytest

from cjepa_fast.eval.dense import jf_score


def mask(*lines: str) -> np.ndarray:
    return np.array([[letter == "#" for letter in line] for line in lines])


def test_region_by_hand():
    truth, found = mask("##..", "##.."), mask(".##.", "....")
    assert jf_score.region(truth, found) == pytest.approx(1 / 5)
    assert jf_score.region(truth, truth) == 1
    assert jf_score.region(truth, ~truth) == 0
    assert jf_score.region(truth & False, truth & False) == 1


def test_edges_by_hand():
    """Half a pixel towards the origin; the last row and column look one way, the corner none."""
    assert (jf_score.edges(mask("....", ".##.", ".##.", "....")) == mask(
        "###.", "#.#.", "###.", "....")).all()  # fmt: skip
    assert (jf_score.edges(mask("...", "...", "..#")) == mask("...", ".##", ".#.")).all()


def slow_boundary(truth: np.ndarray, found: np.ndarray) -> float:
    """The benchmark's steps, a pixel at a time: boundary maps, disks around them, the counts."""
    height, width = truth.shape
    radius = math.ceil(0.008 * math.sqrt(height**2 + width**2))

    def outline(seg):
        points = set()
        for y in range(height):
            for x in range(width):
                right = seg[y, x + 1] if x + 1 < width else None
                below = seg[y + 1, x] if y + 1 < height else None
                across = seg[y + 1, x + 1] if right is not None and below is not None else None
                others = [value for value in (right, below, across) if value is not None]
                if any(value != seg[y, x] for value in others):
                    points.add((y, x))
        return points

    def grown(points):
        disk = [(dy, dx) for dy in range(-radius, radius + 1) for dx in range(-radius, radius + 1)
                if dy * dy + dx * dx <= radius * radius]  # fmt: skip
        return {(y + dy, x + dx) for y, x in points for dy, dx in disk}

    a, b = outline(truth), outline(found)
    if not a or not b:
        return 1.0 if not a and not b else 0.0
    precision, recall = len(b & grown(a)) / len(b), len(a & grown(b)) / len(a)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def blob(random, shape) -> np.ndarray:
    """A random outline that often touches the border."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    middle, size = random.uniform(0, shape), random.uniform(0.1, 0.5, 2) * shape
    wave = 1 + 0.3 * np.sin(5 * np.arctan2(y - middle[0], x - middle[1]) + random.uniform(0, 6))
    return ((y - middle[0]) / size[0]) ** 2 + ((x - middle[1]) / size[1]) ** 2 < wave


@pytest.mark.parametrize("shape", [(30, 40), (131, 90), (180, 181)])
def test_boundary_is_what_the_slow_one_finds(shape, seed):
    random = np.random.default_rng(seed)
    values = []
    for shift in (0, 2, 3, 30):
        truth = blob(random, np.array(shape))
        found = np.roll(truth, shift, axis=(0, 1))
        values.append(jf_score.boundary(truth, found))
        assert values[-1] == pytest.approx(slow_boundary(truth, found), abs=1e-12)
    assert values[0] == 1


def test_boundary_within_and_beyond_the_tolerance():
    truth = np.zeros((300, 400), dtype=bool)  # the diagonal is 500, so the tolerance 4 pixels
    truth[100:200, 100:200] = True
    assert jf_score.boundary(truth, np.roll(truth, 4, 0)) == 1
    assert jf_score.boundary(truth, np.roll(truth, 5, 0)) < 1
    assert jf_score.boundary(truth, truth & False) == 0
    assert jf_score.boundary(truth & False, truth) == 0
    assert jf_score.boundary(truth & False, truth & False) == 1


def test_statistics_by_hand():
    """Of nine values the quarters are 1-3, 3-5, 5-7 and 7-9: neighbours share a frame."""
    values = np.array([1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.2, 0.0])
    mean, recall, decay = jf_score.statistics(values)
    assert mean == pytest.approx(5.1 / 9)
    assert recall == pytest.approx(5 / 9)  # 0.5 itself is not recalled
    assert decay == pytest.approx(0.9 - 0.2)
    # of six, the cuts 2.25, 3.5 and 4.75 are rounded: 2, 4 (halves go up) and 5
    _, _, decay = jf_score.statistics(np.array([1, 0.8, 0.6, 0.4, 0.2, 0.0]))
    assert decay == pytest.approx(0.9 - 0.1)
    assert jf_score.statistics(np.array([0.6])) == (0.6, 1.0, 0.0)
