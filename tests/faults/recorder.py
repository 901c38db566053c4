"""Train as train.py does, write down what every step saw, and halt at a chosen moment.

    recorder.py OUT START MOMENT [train.py's arguments]

OUT/rows.START.RANK gets one JSON line a step, flushed at once: its number, the names of each
micro-batch's images, digests of masks and pixels, the loss in hexadecimal, which keeps every bit.
MOMENT is EVENT:AFTER:NTH:RANK, or "-" for none: in rank RANK, once step AFTER is done, the
thread that meets the NTH such event writes the process's id to OUT/halted.START and goes on when
that file is gone. AFTER 0 counts from the start of the process.
Events: "disk" (a sync, rename or removal: there is one after each file of a checkpoint), "read" (an
image, in the loader's threads), "forward" (in a step).
"""

import hashlib
import json
import os
import sys
import threading
import time
from pathlib import Path

import torch

from cjepa_fast import train
from cjepa_fast.data.sources import ImageSet
from cjepa_fast.model.jepa import JEPA
from cjepa_fast.runtime import distributed
from cjepa_fast.training import start

RANK = int(os.environ.get("RANK", "0"))


class Halt:
    """The moment, and how many of its events are still to come."""

    def __init__(self, file: Path, moment: str):
        self.file, self.step_done = file, 0
        self.event, after, nth, rank = moment.split(":") if moment != "-" else ("", 0, 0, -1)
        self.after, self.left, self.here = int(after), int(nth), int(rank) == RANK
        self._lock = threading.Lock()

    def meets(self, event: str) -> None:
        if not self.here or event != self.event or self.step_done < self.after:
            return
        with self._lock:
            self.left -= 1
            met = self.left == 0
        if met:
            self.file.write_text(f"{os.getpid()}\n")
            while self.file.exists():
                time.sleep(0.01)


def announced(halt: Halt, event: str, function):
    def call(*args, **kwargs):
        halt.meets(event)
        return function(*args, **kwargs)

    return call


def digest(tensors: list[torch.Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def row_of(step: int, batches: list, terms: dict, images: ImageSet) -> dict:
    masks = [
        part
        for batch in batches
        for part in (
            *(batch.masks.context_of(b) for b in range(len(batch.index_B))),
            batch.masks.target_idx_BMP,
        )
    ]
    return {
        "step": step,
        "images": [[images.name(i) for i in batch.index_B.tolist()] for batch in batches],
        "masks": digest(masks),
        "pixels": digest([batch.images_BCHW for batch in batches]),
        "loss": float(terms["loss"]).hex(),
    }


def main(out: Path, began: str, moment: str, arguments: list[str]) -> int:
    halt = Halt(out / f"halted.{began}", moment)
    for name in ("fsync", "rename", "replace", "unlink"):
        setattr(os, name, announced(halt, "disk", getattr(os, name)))
    ImageSet.read = announced(halt, "read", ImageSet.read)
    JEPA.forward = announced(halt, "forward", JEPA.forward)
    build_loader, step = start.build_loader, start.Trainer.step
    images = []

    def remembered(*args):
        loader = build_loader(*args)
        images.append(loader.images)
        return loader

    def recorded(self, batches, index, *more):
        terms, *rest = step(self, batches, index, *more)
        row = row_of(index + 1, batches, terms, images[0])
        with open(out / f"rows.{began}.{RANK}", "a") as file:
            file.write(json.dumps(row) + "\n")
        halt.step_done = index + 1
        return (terms, *rest)

    start.build_loader, start.Trainer.step = remembered, recorded
    return train.main(arguments)


if __name__ == "__main__":
    distributed.leave(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]))
