"""The whole way in minutes, on synthetic images: `python -m cjepa_fast.demo` (`make demo`).

Renders the shapes set, trains configs/demo.json on its images (never on its labels) through the
same command a user would give, compares kNN with what needs no learning, and draws what happened:
report.html holds all of it.
"""

import argparse
import contextlib
import itertools
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

from cjepa_fast.data.sets import shapes
from cjepa_fast.eval.__main__ import main as evaluate
from cjepa_fast.telemetry import read_log
from cjepa_fast.tools import report

TRAIN = Path(__file__).with_name("train.py")
HELD_OUT = "shapes:val"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cjepa_fast.demo", description=__doc__)
    parser.add_argument("--out", default="runs/demo", metavar="RUN", help="folder of the run")
    parser.add_argument("--config", default="demo.json", metavar="FILE")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    args = parser.parse_args(argv)
    began = time.perf_counter()
    run = free_folder(Path(args.out))
    for split, count in shapes.COUNTS.items():
        print(f"{split}: {count:,} images in {shapes.ensure(split)}", flush=True)
    status = train(run, args.config, args.overrides)
    if status or not (run / "encoder.safetensors").is_file():
        return status  # it failed or was stopped, and has said so
    speeds = [row["images_per_s"] for row in read_log(run) if row["images_per_s"]]
    print(f"\ntrained at {statistics.median(speeds):,.0f} images/s")
    print("how well each tells the largest shape of an image:")
    status = compare(run) or draw(run) or report.main([str(run), "--images", HELD_OUT])
    print(f"all of it in {time.perf_counter() - began:.0f} s; the run's folder: {run}")
    return status


def free_folder(run: Path) -> Path:
    """`run` itself, or run-2, run-3, ... where a run is there already: none is overwritten."""
    names = itertools.chain([run], (run.with_name(f"{run.name}-{n}") for n in itertools.count(2)))
    return next(name for name in names if not (name / "config.json").exists())


def train(run: Path, config: str, overrides: list[str]) -> int:
    """Training in a process of its own, as a user starts it. Returns its exit status."""
    sets = [f"run.dir={json.dumps(str(run))}", *overrides]
    command = [sys.executable, str(TRAIN), "--config", config]
    command += [part for override in sets for part in ("--set", override)]
    print(f"\n$ {shlex.join(['python', 'cjepa_fast/train.py', *command[2:]])}", flush=True)
    training = subprocess.Popen(command)
    while True:
        with contextlib.suppress(KeyboardInterrupt):  # the training has it too: it saves and ends
            return training.wait()


def compare(run: Path) -> int:
    """kNN of raw pixels and mean colour; kNN and linear probe of untrained and trained encoder."""
    also = ["--max-train", "4096", "--pixels", "--linear", "--untrained"]
    also += ["--json", str(run / "knn.json")]
    return evaluate(["knn", str(run), "--data", "shapes", "--test", HELD_OUT, *also])


def draw(run: Path) -> int:
    """curves.png and the figures of what was learnt, in the run's folder."""
    print("\ndrawn:", flush=True)
    tasks = {
        "curves": [],
        "attention": ["--images", HELD_OUT],
        "pca": ["--images", HELD_OUT],
        "masks": ["--images", HELD_OUT],
        "retrieve": ["--data", HELD_OUT],
    }
    for task, options in tasks.items():
        status = evaluate([task, str(run), *options, "--out", str(run / f"{task}.png")])
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
