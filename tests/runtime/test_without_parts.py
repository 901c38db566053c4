"""Where Triton, DeepSpeed or NVML cannot be had, as on a Mac: one process trains on the CPU."""

import subprocess
import sys

import pytest
import tiny
import torch

# sitecustomize of the processes below: the packages named cannot be imported there.
BLOCKER = """
import os, sys
for name in os.environ.get("CJEPA_BLOCKED", "").split():
    sys.modules[name] = None
"""
ABSENT_ON_A_MAC = ("triton", "deepspeed", "pynvml")
TRAIN = tiny.ROOT / "cjepa_fast" / "train.py"


@pytest.fixture
def blocked(tmp_path, monkeypatch):
    """Python processes started from here lack those packages."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    paths = [str(tmp_path), *tiny.environment()["PYTHONPATH"].split(":")]
    monkeypatch.setenv("CJEPA_BLOCKED", " ".join(ABSENT_ON_A_MAC))
    monkeypatch.setattr(
        tiny, "environment", lambda env=tiny.environment: env() | {"PYTHONPATH": ":".join(paths)}
    )


def python(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=tiny.environment(), timeout=200,
        capture_output=True, text=True,
    )  # fmt: skip


def test_the_blocker_blocks(blocked):
    for name in ABSENT_ON_A_MAC:
        done = python("-c", f"import {name}")
        assert "ModuleNotFoundError" in done.stderr, name


@pytest.mark.long
def test_one_process_trains_to_the_weights_that_it_has_with_all_packages(
    blocked, tmp_path, monkeypatch
):
    """On a CPU nothing of them is called."""
    config = tiny.write_config(tmp_path, run={"epochs": 1})  # 2 steps
    for name in ("without", "with"):
        done = python(TRAIN, "--config", config, "--set", f"run.dir={tmp_path / name}")
        assert done.returncode == 0, done.stderr
        assert "step 2/2" in done.stdout
        monkeypatch.setenv("CJEPA_BLOCKED", "")
    without, whole = (tmp_path / n / "encoder.safetensors" for n in ("without", "with"))
    assert without.read_bytes() == whole.read_bytes()


@pytest.mark.long
def test_several_ranks_say_that_they_need_deepspeed(blocked, tmp_path):
    done = python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *(TRAIN, "--config", tiny.write_config(tmp_path)),
    )
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "DeepSpeed cannot be imported" in said[0], done.stderr
    assert "one process" in said[0] and not (tmp_path / "run").exists()


@pytest.mark.long
def test_settings_that_only_deepspeed_has_say_so_too(blocked, tmp_path):
    config = tiny.write_config(tmp_path, optim={"implementation": "fused"})
    done = python(TRAIN, "--config", config)
    assert done.returncode == 2 and "error: DeepSpeed cannot be imported" in done.stderr


def test_a_kernel_without_triton_tells_the_way_out(blocked):
    code = (
        "import torch\n"
        "from cjepa_fast.kernels.gather import tokens\n"
        "from cjepa_fast.kernels.common import launch, tiles\n"
        "assert tiles.row_tiles(96)[0].width == 128 and not launch.INTERPRETING\n"
        "tokens._gather_forward_kernel[(1,)](torch.ones(1))"
    )
    done = python("-c", code)
    last = done.stderr.strip().splitlines()[-1]
    assert "_gather_forward_kernel" in last and "pip install triton" in last


def test_with_triton_the_kernels_are_tritons_own():
    """Else all tests of kernels would run the stand-in."""
    triton = pytest.importorskip("triton")
    from cjepa_fast.kernels.common import maybe_triton

    assert maybe_triton.triton is triton and maybe_triton.tl is triton.language


@pytest.mark.parametrize(
    "n", [1, 65, *(pytest.param(n, marks=pytest.mark.long) for n in (2, 3, 63, 64, 1000))]
)
def test_the_stand_ins_numbers_are_tritons(blocked, n):
    code = (
        "from cjepa_fast.kernels.common.maybe_triton import triton\n"
        f"print(triton.next_power_of_2({n}), triton.cdiv({n}, 8))"
    )
    power = 2 ** int(torch.tensor(float(n)).log2().ceil())
    assert python("-c", code).stdout.split() == [str(power), str((n + 7) // 8)]
