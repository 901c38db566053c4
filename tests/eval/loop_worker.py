"""In each of several ranks: a case of test_eval_loop.py. Prints what is refused, by rank."""

import sys
from pathlib import Path

import test_eval_loop as test

from cjepa_fast.eval.finetuning import loop
from cjepa_fast.eval.finetuning.saved import SavedTraining
from cjepa_fast.runtime import distributed


def damaged_for_one(folder: Path) -> None:
    """The second rank's folder is damaged, the first's holds nothing."""
    mine = folder / str(distributed.rank())
    if distributed.rank() == 1:
        (mine / "checkpoints" / "step_00000006").mkdir(parents=True)
    SavedTraining(mine, {}).restore(test.learner_of())


def not_shared(folder: Path) -> None:
    loop.train(test.learner_of(), test.Draws(), test.plan(), SavedTraining(folder / "kept", {}))
    SavedTraining(folder / ("kept", "nothing")[distributed.rank()], {}).restore(test.learner_of())


def bad_for_one(folder: Path) -> None:
    bad_from = 5 if distributed.rank() == 1 else None
    loop.train(
        test.learner_of(), test.Draws(bad_from), test.plan(), SavedTraining(folder / "kept", {})
    )


def main(case: str, folder: Path) -> int:
    distributed.start(0)
    try:
        globals()[case](folder)
    except ValueError as error:
        print(f"rank {distributed.rank()}: {error}", flush=True)
    distributed.leave_group()
    return 0


if __name__ == "__main__":
    distributed.leave(main(sys.argv[1], Path(sys.argv[2])))
