"""How far a share of test images may be off: its standard error, and Wilson's score interval
(Wilson 1927, JASA 22).

It says what other test images would give. What another training would give is a matter of seeds.
"""

import math

# The keys of rows that are percentages of the test images.
RIGHT = {"top1", "top1_centred", "top5", "linear", "ridge", "logistic", "lars"}
RIGHT |= {"average_top1", "average_top5"}
Z = 1.96  # standard errors: 95 % of a normal distribution


def interval(percent: float, images: int) -> tuple[float, float]:
    """(low, high) in percent, at 95 %, of a share of `images` images. Raises ValueError without
    images."""
    if images < 1:
        raise ValueError(f"{images} test images: a share needs one at least")
    share = min(1.0, max(0.0, percent / 100))
    scale = 1 + Z**2 / images
    middle = (share + Z**2 / (2 * images)) / scale
    half = Z / scale * math.sqrt(share * (1 - share) / images + (Z / (2 * images)) ** 2)
    return max(0.0, 100 * (middle - half)), min(100.0, 100 * (middle + half))


def standard_error(percent: float, images: int) -> float:
    """The standard error of a percentage of `images` test images, in points."""
    share = percent / 100
    return 100 * math.sqrt(share * (1 - share) / images)


def of_row(row: dict, key: str) -> tuple[float, float] | None:
    """The interval of an evaluation's row; None where the value is no share of its test images."""
    images, value = row.get("test_images"), row.get(key)
    if key not in RIGHT or not isinstance(value, float) or not images:
        return None
    return interval(value, images)


def with_interval(percent: float, images: int) -> str:
    """ "76.0 ± 1.9 %": half the interval behind the value."""
    low, high = interval(percent, images)
    return f"{percent:.1f} ± {(high - low) / 2:.1f} %"
