"""Fine-tunes in each of several ranks, stops after the first epoch, and resumes."""

import os
import sys
from pathlib import Path

import test_eval_finetune as test
import torch

from cjepa_fast.eval.finetuning.saved import SavedTraining
from cjepa_fast.runtime import distributed


def main(data: Path, out: Path) -> int:
    distributed.start(0)
    save = SavedTraining.save

    def stop(*args):
        save(*args)
        raise test.Stopped

    SavedTraining.save = stop
    try:
        test.tuned(data, test.PLAIN, out / "training", micro_batch_size=4)
    except test.Stopped:
        SavedTraining.save = save
    weights = test.tuned(data, test.PLAIN, out / "training", micro_batch_size=4, resume=True)
    if distributed.rank() == 0:
        torch.save(weights, out / "weights.pt")
    distributed.leave_group()
    return 0


if __name__ == "__main__":
    os.environ.setdefault("XDG_CACHE_HOME", str(Path(sys.argv[2]) / "cache"))
    distributed.leave(main(Path(sys.argv[1]), Path(sys.argv[2])))
