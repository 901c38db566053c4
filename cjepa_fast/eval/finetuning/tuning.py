"""What fine-tuning stands on: the training step of one process or several, and its checkpoints.

One process trains plainly; several, started by torchrun or deepspeed, under DeepSpeed with the
optimiser's state shared out (ZeRO-1).
"""

import json
import shutil
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel

from cjepa_fast.eval.finetuning.recipe import Classifier
from cjepa_fast.runtime.distributed import from_all, rank, world_size
from cjepa_fast.runtime.files import write_text
from cjepa_fast.training.engines.zero import complete_config


class Alone:
    """The training step of one process."""

    def __init__(self, model: Classifier, groups: list[dict], micro_batch: int, accumulation: int):
        self.module, self._accumulation, self._done = model, accumulation, 0
        self.optimizer = torch.optim.AdamW(groups, lr=0.0)

    def __call__(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        return self.module(images_B3HW)

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self._accumulation).backward()

    def step(self) -> None:
        """After each micro-batch; the last of a step updates the weights."""
        self._done += 1
        if self._done % self._accumulation == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def save(self, folder: Path) -> None:
        state = {"model": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, folder / "training.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "training.pt", weights_only=True)
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


class Together:
    """The same of several processes. Weights are whole and in fp32 on each, for their average."""

    def __init__(self, model: Classifier, groups: list[dict], micro_batch: int, accumulation: int):
        import deepspeed

        trained = sum(p.numel() for group in groups for p in group["params"])
        config = {"zero_optimization": {"stage": 1}}
        self._engine, self.optimizer, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(groups, lr=0.0),
            config=complete_config(config, micro_batch, accumulation, "fp32", 0.0, trained),
            dist_init_required=False,
        )
        self.module = model
        self.backward, self.step = self._engine.backward, self._engine.step

    def __call__(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        return self._engine(images_B3HW)

    def save(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder), tag="training")

    def load(self, folder: Path) -> None:
        self._engine.load_checkpoint(str(folder), tag="training")


def batches_of(n: int, batch: int, micro_batch: int) -> tuple[int, int]:
    """(images a step, images a micro-batch), of this many processes and no more than there are."""
    processes = world_size()
    batch = min(batch, n)
    micro_batch = min(micro_batch, batch // processes)
    if not micro_batch:
        raise ValueError(f"a batch of {batch} images for {processes} processes: start fewer")
    return batch - batch % (micro_batch * processes), micro_batch


# ----------------------------------------------------------------------------------- checkpoints


def save(folder: Path, epochs: int, facts: dict, engine: Alone | Together, average) -> None:
    """Everything after this many epochs, in place of what was there. Every process calls it."""
    new = folder / f"epoch_{epochs:04d}"
    if rank() == 0:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        torch.save(average.state_dict(), new / "average.pt")
    from_all(None)  # the folder is there
    engine.save(new)
    from_all(None)  # all is written
    if rank() == 0:
        write_text(new / "state.json", json.dumps({"epochs": epochs, **facts}))
        for old in folder.glob("epoch_*"):
            if old != new:
                shutil.rmtree(old)


def restored(folder: Path, facts: dict, engine, average: AveragedModel, resume: bool) -> int:
    """Epochs done by what lies in `folder`, which is loaded. Raises ValueError if it is foreign."""
    found = sorted(path.parent for path in folder.glob("epoch_*/state.json"))
    from_all(None)  # nobody writes before all have looked
    if not found:
        return 0
    if not resume:
        raise ValueError(f"{found[-1]} is there: resume it with --resume, or name another --out")
    state = json.loads((found[-1] / "state.json").read_text())
    if foreign := [name for name in facts if state.get(name) != facts[name]]:
        name = foreign[0]
        raise ValueError(
            f"{found[-1]} is of another training: {name} was {state.get(name)}, is {facts[name]}; "
            "name another --out"
        )
    engine.load(found[-1])
    average.load_state_dict(torch.load(found[-1] / "average.pt", weights_only=True))
    return state["epochs"]
