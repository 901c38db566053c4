"""DAVIS's measures: J, the overlap of regions, and F, the agreement of their boundaries.

Perazzi et al. 2016 and Pont-Tuset et al. 2017 (arXiv 1704.00675), computed as the benchmark's
program for semi-supervised segmentation does. Masks are bool (H, W); values are in 0..1.
"""

import math

import numpy as np

TOLERANCE = 0.008  # of the image's diagonal: how far apart boundaries may lie
RECALLED = 0.5  # a frame counts as found above this


def region(truth_HW: np.ndarray, found_HW: np.ndarray) -> float:
    """J: intersection over union; 1 where neither has a pixel."""
    union = np.count_nonzero(truth_HW | found_HW)
    return np.count_nonzero(truth_HW & found_HW) / union if union else 1.0


def boundary(truth_HW: np.ndarray, found_HW: np.ndarray) -> float:
    """F: harmonic mean of precision and recall of the found boundary's pixels.

    A pixel is right if the other boundary comes within a disk of TOLERANCE, rounded up to pixels.
    """
    radius = math.ceil(TOLERANCE * math.hypot(*truth_HW.shape))
    truth_n2, found_m2 = (np.argwhere(edges(mask_HW)) for mask_HW in (truth_HW, found_HW))
    if not len(truth_n2) or not len(found_m2):
        return float(len(truth_n2) == len(found_m2))
    precision, recall = _near(found_m2, truth_n2, radius), _near(truth_n2, found_m2, radius)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def edges(mask_HW: np.ndarray) -> np.ndarray:
    """Pixels that differ from their neighbour to the right, below, or both: (H, W) bool."""
    padded = np.pad(mask_HW, ((0, 1), (0, 1)), mode="edge")
    right, below, diagonal = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (mask_HW != right) | (mask_HW != below) | (mask_HW != diagonal)


def _near(points_n2: np.ndarray, others_m2: np.ndarray, radius: int) -> float:
    """Share of the points that have one of the others within the radius."""
    from scipy.spatial import KDTree

    distance_n, _ = KDTree(others_m2).query(points_n2)
    return float((distance_n <= radius).mean())


def statistics(values_T: np.ndarray) -> tuple[float, float, float]:
    """Mean, recall and decay of an object's values over the frames, the first and last left out.

    decay: mean of the first quarter minus that of the last; neighbouring quarters share a frame.
    """
    cut_5 = np.floor(np.linspace(0, len(values_T) - 1, 5) + 0.5 + 1e-10).astype(int)
    first, last = values_T[: cut_5[1] + 1], values_T[cut_5[3] :]
    recall = (values_T > RECALLED).mean()
    return float(values_T.mean()), float(recall), float(first.mean() - last.mean())
