"""What a checkpoint costs the training: the pause, and how much slower the steps beside it are.

    python bench/saving.py [--config vit_b] [--batch 8] [--saves 4] [--folder DIR] [--json FILE]

The pause is all the time in which the step waits for the save: in beginning it, before the update
until the state has been copied, and in settling it. Plain steps are timed between the saves.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import files
import hardware
from measure import synthetic_batches

from cjepa_fast import checkpoint
from cjepa_fast import config as configuration
from cjepa_fast.checkpoint.writer import Saver
from cjepa_fast.runtime import distributed
from cjepa_fast.runtime.rates import synchronize
from cjepa_fast.training import build
from cjepa_fast.training.trainer import Trainer

PLAIN = 3  # steps between two saves


class Paused:
    """A function whose time is added up; a GPU's queue is not waited for."""

    def __init__(self, function):
        self.function, self.seconds = function, 0.0

    def __call__(self, *args):
        began = time.perf_counter()
        try:
            return self.function(*args)
        finally:
            self.seconds += time.perf_counter() - began


def measure(config: configuration.Config, saves: int, folder: Path) -> dict:
    device = distributed.start(config.run.seed)
    trainer = Trainer(config, device, steps_per_epoch=1000)
    batches = synthetic_batches(config, device, build.build_masks(config))
    saver = Saver(folder, trainer.engine, trainer.encoder_json, keep=1)
    begin, settle = Paused(saver.begin), Paused(saver.settle)
    waiting = trainer.engine.snapshot.wait = Paused(trainer.engine.snapshot.wait)
    parts = begin, waiting, settle
    index = 0

    def step_s() -> float:
        nonlocal index
        began = time.perf_counter()
        trainer.step(next(batches), index)
        synchronize(device)
        index += 1
        return time.perf_counter() - began

    plain_s, beside_s, pauses_s, save_s = [], [], [], []
    for number in range(saves + 1):  # the first warms up: it allocates the memory for the copy
        plain = [step_s() for _ in range(PLAIN)]
        for part in parts:
            part.seconds = 0.0
        began = time.perf_counter()
        begin(index, {})
        beside = [step_s()]
        while saver.busy:
            beside.append(step_s())
        settle()
        if number:
            save_s.append(time.perf_counter() - began)
            pauses_s.append(sum(part.seconds for part in parts))
            plain_s += plain
            beside_s += beside
        saver.finish()
    found = checkpoint.latest(folder.parent)
    gib = sum(file.stat().st_size for file in found.iterdir()) / 2**30
    step, slowed = statistics.median(plain_s), statistics.median(beside_s)
    pause = statistics.median(pauses_s)
    return {
        "batch": trainer.micro_batch, "saves": saves, "gib": gib, "step_ms": 1e3 * step,
        "pause_ms": 1e3 * pause, "pause_pct_of_a_step": 100 * pause / step,
        "steps_beside": len(beside_s) / saves, "slower_beside_times": slowed / step,
        "save_s": statistics.median(save_s),
    }  # fmt: skip


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="vit_b")
    parser.add_argument("--batch-size", dest="batch", type=int, default=8, help="images a step")
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="on the disk that is to be measured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    args = parser.parse_args(argv)
    sizes = [f"data.batch_size={args.batch}", f"data.micro_batch_size={args.batch}"]
    config = build.with_precision(configuration.load(args.config, sizes), hardware.here())
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        row = {"config": args.config, **measure(config, args.saves, Path(folder) / "checkpoints")}
    device = hardware.here()
    print(
        f"{args.config}, batch {row['batch']}, {row['gib']:.2f} GiB: paused "
        f"{row['pause_pct_of_a_step']:.1f} % of a step; saved in {row['steps_beside']:.1f} steps, "
        f"each {row['slower_beside_times']:.2f} times as long as one without"
    )
    if args.json:
        files.write({**hardware.provenance(device), "rows": [row]}, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
