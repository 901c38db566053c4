"""A training small enough for tests: 24-pixel images of noise, an encoder of one block."""

import contextlib
import json
import os
import random
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import forks
import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
HANG_S = 900  # it only bounds a hang: nothing here takes so long, however busy the machine is
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

IDLE_S = 0.1  # that patience() works for on one core of 2.6 GHz


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
    paths = [str(ROOT / "tests"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def run(script: str | Path, *args, ranks: int = 1, timeout_s: float = HANG_S, fresh: bool = False):
    """Run a Python file on `ranks` ranks; its result with stdout and stderr as text.

    fresh: by the interpreter and torchrun, not forked.
    """
    args = [str(arg) for arg in args]
    if not (fresh or torch.cuda.is_available()):
        return forks.run(script, args, ranks, environment(), timeout_s)
    command = [sys.executable, str(script), *args]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command[1:1] = launcher
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=timeout_s, cwd=ROOT
    )


def train(*args, **how):
    return run(ROOT / "cjepa_fast" / "train.py", *args, **how)


def patience(seconds: float) -> float:
    """`seconds` of an idle machine, in those that this one takes for the same work now.

    For a time that a test must see run out, where what must not run out of it is work.
    """
    began = time.perf_counter()
    sum(i * i for i in range(2_000_000))
    return seconds * max(1.0, (time.perf_counter() - began) / IDLE_S)


def wait_for(condition: Callable[[], object], what: str = "it") -> None:
    """Until the condition holds. What it asks for is done by others, who may be slow."""
    end = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)


@contextlib.contextmanager
def files_of_at_most(size: int):
    """Within it this process writes no file further, as on a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def free_port(low: int = 20000, high: int = 30000) -> int:
    while True:
        port = random.randrange(low, high)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def save(folder: Path, engine, step: int, encoder_json: str = "{}") -> Path:
    """An engine's checkpoint in a run's folder, written at once; every rank calls it."""
    from cjepa_fast.checkpoint.writer import Saver
    from cjepa_fast.runtime.distributed import all_gather_objects

    saver = Saver(folder / "checkpoints", engine, encoder_json, keep=9)
    saver.begin(step, {})
    saver.finish()
    all_gather_objects(None)  # rank 0 has named it
    return folder / "checkpoints" / f"step_{step:08d}"


def losses(run_folder: Path) -> dict[int, tuple]:
    """The loss and its terms by step, from log.jsonl."""
    rows = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    names = ("loss", "jepa", "sim", "std", "cov", "grad_norm", "lr")
    return {row["step"]: tuple(row[name] for name in names) for row in rows}


def write_run(folder: Path, encoder, images: str = "", **sections) -> Path:
    """A run's folder as training leaves it at its end, of an encoder that nothing has trained.

    images: their fingerprint. Its last step is 7, of 2 epochs of 16 images a step.
    """
    from cjepa_fast import config as configuration
    from cjepa_fast.checkpoint.encoders import FINAL, save_encoder

    config = configuration.load(str(write_config(folder, **sections)))
    encoder.mean, encoder.std = config.data.mean, config.data.std
    run = folder / "run"
    checkpoint = run / "checkpoints" / "step_00000007"
    checkpoint.mkdir(parents=True)
    (run / "config.json").write_text(config.to_json())
    for name in FINAL.values():
        save_encoder(encoder, run / f"{name}.safetensors")
    state = {"step": 7, "epoch": 1.75, "world_size": 2, "image_count": 40, "images": images}
    state["versions"] = {"cjepa_fast": "0.1.0", "torch": "2.13.0", "python": "3.11.7"}
    state["config"] = config.model_dump(mode="json")
    state["machine"] = "2 x a GPU"
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / "manifest.json").write_text("{}")
    rows = [{"step": step, "loss": step / 8, "jepa": 0.5, "rankme": None} for step in (5, 7, 9)]
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def uneven_encoder(**sizes):
    """An encoder no two of whose parameters are alike, biases and norms too."""
    from cjepa_fast.model.vit import Encoder

    encoder = Encoder(
        **{"image_size": 24, "patch_size": 4, "width": 24, "depth": 2, "heads": 3, **sizes}
    )
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return encoder.eval()


def with_gelu(encoder, gelu: str):
    """The same weights, by that kind of GELU."""
    from cjepa_fast.model.vit import Encoder

    other = Encoder(**{**encoder.architecture, "gelu": gelu})
    other.load_state_dict(encoder.state_dict())
    return other.eval()
