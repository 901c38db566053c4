"""A machine without DALI: every module imports, commands train and evaluate, and say so once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from test_imports import SOURCES

TOLD = "Pillow decodes the images, since DALI does not work here: DALI is blocked"
OPTIONAL = ("torchvision", "pycocotools")  # of detection alone
SITE = """
import importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "nvidia.dali" or name.startswith("nvidia.dali."):
            raise ModuleNotFoundError("DALI is blocked")

sys.meta_path.insert(0, Block())
"""


@pytest.fixture
def python(tmp_path):
    """Runs this interpreter, in which no import of nvidia.dali works, unless `dali`."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITE)  # Python runs it at its start

    def run(*args: str | Path, dali: bool = False) -> subprocess.CompletedProcess:
        environment = tiny.environment() | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        environment.pop("CJEPA_DECODER", None)
        if not dali:
            environment["PYTHONPATH"] = f"{folder}{os.pathsep}{environment['PYTHONPATH']}"
        return subprocess.run(
            [sys.executable, *map(str, args)], capture_output=True, text=True, env=environment,
            timeout=240, cwd=tiny.ROOT,
        )  # fmt: skip

    return run


def test_dali_is_blocked(python):
    done = python("-c", "import nvidia.dali")
    assert done.returncode == 1 and "ModuleNotFoundError: DALI is blocked" in done.stderr


def test_every_module_imports(python):
    """But for what a part that was not installed is needed for, whatever there is of DALI."""
    code = f"""
import importlib
for name in {sorted(SOURCES)!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in {OPTIONAL!r}:
            raise
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
@pytest.mark.slow
def test_training_and_evaluation_are_those_with_dali_but_for_rounding(python, tmp_path):
    train, losses = tiny.ROOT / "cjepa_fast" / "train.py", []
    runs = {"run.epochs": "1", "run.precision": "fp32", "data.flip": "true", "data.colour": "0.4"}
    config = tiny.write_config(tmp_path)
    for name, dali in (("with", True), ("without", False)):
        sets = [f"--set={key}={value}" for key, value in runs.items()]
        done = python(
            train, "--config", config, *sets, f"--set=run.dir={tmp_path / name}", dali=dali
        )
        assert done.returncode == 0, done.stderr
        assert (done.stdout + done.stderr).count(TOLD) == (0 if dali else 1)
        losses.append(tiny.losses(tmp_path / name))
    assert list(losses[0]) == list(losses[1]) and len(losses[0]) == 2
    for step, terms in losses[0].items():
        assert losses[1][step] == pytest.approx(terms, rel=2e-3)
        assert losses[1][step] != terms  # the decoders were two

    out = tmp_path / "knn.json"
    done = python("-m", "cjepa_fast.eval", "knn", tmp_path / "without", "--data",
                  tmp_path / "images", "--json", out)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert TOLD in done.stdout
    (row,) = json.loads(out.read_text())["rows"]
    assert 0 <= row["top1"] <= 100 and row["test_images"] > 0

    done = python(train, "--config", config, *sets, f"--set=run.dir={tmp_path / 'with'}",
                  "--resume", "auto")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "resumed with another decoder: pillow, saved with dali" in done.stdout + done.stderr


@pytest.mark.long
def test_dali_demanded_in_vain_ends_in_a_line(python, tmp_path):
    config = tiny.write_config(tmp_path, data={"decoder": "dali"})
    done = python(tiny.ROOT / "cjepa_fast" / "train.py", "--config", config)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "data.decoder = 'dali': DALI does not work here (DALI is blocked)" in done.stderr
