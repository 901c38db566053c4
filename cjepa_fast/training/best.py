"""The checkpoint of the best evaluation while training: RUN/best."""

from cjepa_fast.checkpoint.writer import Saver
from cjepa_fast.runtime import distributed

NONE = {"knn": -1.0, "step": None}


class BestCheckpoint:
    """Knows the step that was best by kNN, whose checkpoint the saver keeps and names RUN/best.

    score: {"knn": percent, "step": that of the checkpoint, None where there is none}. It is a
    checkpoint's at the start, if that step's checkpoint is still there. All ranks call all methods.
    """

    def __init__(self, saver: Saver, score: dict | None):
        self._saver = saver
        self.score: dict = score or NONE
        if not self._point():
            self.score = NONE
        self._before = NONE

    def link(self) -> None:
        """Name its checkpoint, if any, RUN/best: after an evaluation that no save follows."""
        if self.score["step"] is not None:
            self._point()

    def _point(self) -> bool:
        """False where its checkpoint is not there."""
        return distributed.broadcast_from_rank_0(
            lambda: self._saver.point_at_best(self.score["step"])
        )

    def settle(self, done: int) -> None:
        """Wait for a save under way. Where that of the best step failed, the best before it is the
        best again. done: the steps done so far, whose checkpoint is still to come."""
        self._saver.finish()
        saved = self.score["step"] in (self._saver.best_saved, done)
        if distributed.rank() == 0 and not saved:  # the others take its best at an evaluation
            self.score = self._before
            self._saver.best = self.score["step"]

    def offer(self, step: int, scores: dict[str, float]) -> None:
        """After an evaluation at `step`, whose scores rank 0 has; `settle` comes before."""
        score = {"knn": scores.get("knn", NONE["knn"]), "step": step}
        self._before = self.score
        self.score = distributed.broadcast_from_rank_0(
            lambda: max(self.score, score, key=lambda score: score["knn"])
        )
        self._saver.best = self.score["step"]
