"""A training that would take weeks says so at once."""

import time
from collections.abc import Callable

LONG_S = 7 * 24 * 3600.0  # what is told of
WARM = 1  # micro-batches that are not timed: the first is slower
LEAST_S = 5.0  # timed, unless one micro-batch takes longer


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def rate(images_per_s: float) -> str:
    """With two digits at least: a large model on a CPU takes seconds an image."""
    digits = ",.0f" if images_per_s >= 10 else ".2g"
    return f"{images_per_s:{digits}} images/s"


class Pace:
    """The time that is left, from the first micro-batches.

    micro_batches: left in the training; images: of each, over all ranks.
    """

    def __init__(
        self, micro_batches: int, images: int, clock: Callable[[], float] = time.monotonic
    ):
        self._left, self._images, self._clock = micro_batches, images, clock
        self._done, self._began_s = 0, 0.0
        self._told = False

    def tick(self) -> str:
        """After a micro-batch: what is to be told, once, else ""."""
        if self._told:
            return ""
        self._done += 1
        if self._done == WARM:
            self._began_s = self._clock()
        took_s, timed = self._clock() - self._began_s, self._done - WARM
        if timed < 1 or took_s < LEAST_S:
            return ""
        self._told = True
        each_s = took_s / timed
        left_s = each_s * (self._left - self._done)
        if left_s < LONG_S:
            return ""
        return (
            f"about {left_s / 86400:,.0f} days at this rate ({rate(self._images / each_s)}); "
            "fewer: a GPU, a smaller model or image (model.name, data.image_size), or fewer "
            "run.epochs"
        )
