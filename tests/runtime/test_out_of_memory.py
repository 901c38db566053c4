"""Out of memory is one message with the ways out, and the status of bad input."""

import re
import shlex
import subprocess
import sys

import pytest
import tiny
import torch
from launched import started

from cjepa_fast import checkpoint
from cjepa_fast.runtime import oom


def cpu_error() -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize(
    ("error", "meant"),
    [
        (cpu_error(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (MemoryError(), True),
        (RuntimeError("shapes (2, 3) and (4, 5) cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_are_of_memory(error, meant):
    assert oom.is_out_of_memory(error) is meant


def ways_out(**changes) -> list[str]:
    given = {
        "rank": 0, "ranks": 8, "micro_batch": 128, "smallest": 1, "checkpointing": "none",
        "stage": 1, "command_line": ["--config", "vit_h.json", "--set=data.path=/a b"],
    }  # fmt: skip
    text = oom.advice(MemoryError(), **given | changes)
    return re.findall(r"^  --set (\S+)$", text, re.MULTILINE)


def test_the_ways_out_are_those_that_are_left():
    assert ways_out() == [
        "data.micro_batch_size=64",
        "model.checkpointing=selective",
        "model.checkpointing=full",
        "deepspeed.zero_optimization.stage=2",
    ]
    assert ways_out(checkpointing="selective", micro_batch=1, stage=3) == [
        "model.checkpointing=full"
    ]
    assert ways_out(checkpointing="full", ranks=1, micro_batch=3, smallest=2) == []
    assert ways_out(checkpointing="full", ranks=1, micro_batch=4, smallest=2) == [
        "data.micro_batch_size=2"
    ]


SHORT = """
import os, sys, torch
from cjepa_fast import train
from cjepa_fast.runtime import distributed
from cjepa_fast.training import cpu_micro_batch, trainer
from cjepa_fast.model.jepa import JEPA

where, rank = sys.argv[1], sys.argv[2]
whole, calls = JEPA.forward, []
def forward(self, *args):
    calls.append(1)
    if where == str((len(calls) + 1) // 2):  # two micro-batches a step
        torch.empty(2**60, dtype=torch.uint8)
    return whole(self, *args)

def build(*args):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

if where == "cut":
    cpu_micro_batch.most_images = lambda config: 4
    where = "1"
if os.environ.get("RANK", "0") == rank:
    JEPA.forward = forward
    if where == "build":
        trainer.build_engine = build
distributed.leave(train.main(sys.argv[3:]))
"""


def run_short(folder, where: str, *more):
    script = folder / "short.py"
    script.write_text(SHORT)
    config = tiny.write_config(folder, run={"epochs": 9})
    return tiny.run(script, where, 0, "--config", config, *more)


def assert_one_message(result, folder, resumed: bool = False) -> str:
    assert result.returncode == 2 and "Traceback" not in result.stderr
    (said,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "out of memory on rank 0, with 8 images at a time: " in said
    # VICReg's statistics are of a micro-batch, and a resume in smaller ones is refused
    assert ("  --set data.micro_batch_size=4\n" in result.stderr) is not resumed
    assert "  --set model.checkpointing=full\n" in result.stderr
    assert "stage=" not in result.stderr  # one process
    return said


@pytest.mark.long
def test_out_of_memory_at_the_start(tmp_path):
    result = run_short(tmp_path, "build", "--set", "model.depth=1")
    assert "Tried to allocate 2.00 GiB" in assert_one_message(result, tmp_path)
    assert "resume from" not in result.stderr
    told = re.search(r"what fits: cjepa-plan (.*) GPU --count 1 ", result.stderr).group(1)
    plan = [
        sys.executable,
        "-m",
        "cjepa_fast.tools.plan",
        *shlex.split(told),
        "h100",
        "--count",
        "1",
    ]
    fits = subprocess.run(plan, capture_output=True, text=True, cwd=tiny.ROOT, check=True)
    assert "largest batch" in fits.stdout


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 6])  # a checkpoint is written after every second step
def test_out_of_memory_in_a_step(tmp_path, step):
    result = run_short(tmp_path, str(step))
    assert "DefaultCPUAllocator" in assert_one_message(result, tmp_path, resumed=step == 6)
    last = checkpoint.latest(tmp_path / "run")
    assert (f"resume from {last} with: python" in result.stderr) is (step == 6)
    assert (last is not None) is (step == 6)


@pytest.mark.slow
def test_the_advice_is_of_the_micro_batch_that_was_cut(tmp_path):
    result = run_short(tmp_path, "cut")
    assert "micro-batch: 4 images instead of 8" in result.stdout
    assert "out of memory on rank 0, with 4 images at a time: " in result.stderr
    assert "  --set data.micro_batch_size=2\n" in result.stderr


@pytest.mark.long
@pytest.mark.multiprocess
def test_out_of_memory_on_one_of_two_ends_both(tmp_path):
    script = tmp_path / "short.py"
    script.write_text(SHORT)
    config = tiny.write_config(tmp_path, run={"epochs": 10000, "timeout_s": 3600})
    with started(2, script, ["3", "1", "--config", config], tmp_path) as run:
        assert run.wait() != 0
    said = run.err.read_text()
    assert "error: out of memory on rank 1, with 8 images at a time" in said
    assert "  --set deepspeed.zero_optimization.stage=1\n" in said
    assert "error: no sign of life from rank 1 " in said
    assert "failed (RuntimeError: " in said and "DefaultCPUAllocator" in said
