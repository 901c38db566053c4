"""A training small enough for tests: 24-pixel images of noise, an encoder of one block."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {
    "run": {"epochs": 2},
    "data": {"image_size": 24, "batch_size": 16, "micro_batch_size": 8, "threads": 1},
    "mask": {"min_keep": 4},
    "model": {"name": "vit_tiny", "patch_size": 4, "width": 24, "depth": 2, "heads": 3},
    "predictor": {"width": 12, "depth": 1},
    "optim": {"warmup_epochs": 0.5},
    "checkpoint": {"every_steps": 2, "keep": 3},
    "telemetry": {"every_steps": 1, "tensorboard": False},
}


def write_images(folder: Path, count: int = 40, classes: int = 2) -> Path:
    random = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"class_{i % classes}" / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = random.integers(0, 255, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((40, 32), Image.BICUBIC).save(path, quality=90)
    return folder


def write_config(folder: Path, **sections) -> Path:
    """CONFIG, its images beside it, with sections' keys laid over it. Returns the file."""
    if not (folder / "images").is_dir():
        write_images(folder / "images")
    config = {name: {**CONFIG.get(name, {}), **keys} for name, keys in (CONFIG | sections).items()}
    config["data"].setdefault("path", str(folder / "images"))
    config["run"].setdefault("dir", str(folder / "run"))
    path = folder / "tiny.json"
    path.write_text(json.dumps(config))
    return path


def environment() -> dict[str, str]:
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}
    return {**os.environ, **own}


def run(script: str | Path, *args, processes: int = 1, timeout_s: float = 240):
    """Run a Python file in `processes` processes; its result with stdout and stderr as text."""
    command = [sys.executable, str(script), *map(str, args)]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command[1:1] = launcher
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=timeout_s, cwd=ROOT
    )


def train(*args, processes: int = 1):
    return run(ROOT / "cjepa_fast" / "train.py", *args, processes=processes)


def save(folder: Path, engine, step: int, encoder_json: str = "{}") -> Path:
    """An engine's checkpoint in a run's folder, written at once; every process calls it."""
    from cjepa_fast.engine import from_all
    from cjepa_fast.saver import Saver

    saver = Saver(folder / "checkpoints", engine, encoder_json, keep=9)
    saver.begin(step, {})
    saver.finish()
    from_all(None)  # the first process has named it
    return folder / "checkpoints" / f"step_{step:08d}"


def losses(run_folder: Path) -> dict[int, tuple]:
    """The loss and its terms by step, from log.jsonl."""
    rows = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    names = ("loss", "jepa", "sim", "std", "cov", "grad_norm", "lr")
    return {row["step"]: tuple(row[name] for name in names) for row in rows}
