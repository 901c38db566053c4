"""What a confusion matrix says of a segmentation. Entry (t, f): pixels of class t found to be f."""

import numpy as np


def confusion(truth: np.ndarray, found: np.ndarray, classes: int, ignore: int) -> np.ndarray:
    """(classes, classes) int64, of arrays of one shape; where truth is `ignore` nothing counts."""
    counted = truth != ignore
    cell = truth[counted].astype(np.int64) * classes + found[counted]
    return np.bincount(cell, minlength=classes**2).reshape(classes, classes)


def scores(matrix_CC: np.ndarray) -> tuple[dict[str, float], list[float | None]]:
    """In percent: {"miou", "macc", "aacc"}, and the IoU of each class.

    A class that is neither there nor found has no IoU (None), and one that is not there no
    accuracy: the means leave them out.
    """
    right_C = matrix_CC.diagonal().astype(float)
    truth_C, found_C = matrix_CC.sum(1), matrix_CC.sum(0)
    union_C = truth_C + found_C - right_C
    with np.errstate(invalid="ignore"):
        iou_C, accuracy_C = 100 * right_C / union_C, 100 * right_C / truth_C
    total = {
        "miou": float(np.nanmean(iou_C)),
        "macc": float(np.nanmean(accuracy_C)),
        "aacc": float(100 * right_C.sum() / matrix_CC.sum()),
    }
    return total, [None if np.isnan(iou) else float(iou) for iou in iou_C]
