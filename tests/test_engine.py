"""Every ZeRO stage, on one and two processes: one trajectory, one state, bad steps skipped."""

import json
import math
import subprocess
import sys

import pytest
import tiny
import torch

from cjepa_fast.engine import complete_config
from cjepa_fast.kernels import launch

WORKER = tiny.ROOT / "tests" / "engine_worker.py"
STEPS = 6
# Sums of thousands of values taken in another order: fp32 rounding, and that of bf16 gradients.
AGREE = {"fp32": 2e-6, "bf16": 5e-3}


def work(stage, precision, folder, *options, processes=1) -> dict:
    result = tiny.run(WORKER, stage, precision, STEPS, folder, *options, processes=processes)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """What one process without ZeRO does, by precision, made once."""
    made = {}

    def result(precision: str) -> dict:
        if precision not in made:
            made[precision] = work(0, precision, tmp_path_factory.mktemp(precision))
        return made[precision]

    return result


def assert_agree(one: dict, other: dict, precision: str) -> None:
    bound = AGREE[precision]
    for a, b in zip(one["steps"], other["steps"], strict=True):
        assert a[2] == b[2]
        assert math.isclose(a[0], b[0], rel_tol=bound), (a, b)
        assert math.isclose(a[1], b[1], rel_tol=10 * bound), (a, b)
    for kind, total in one["sums"].items():
        factor = 1 if kind in ("master", "ema") else 20  # the moments are of the gradients
        assert math.isclose(total, other["sums"][kind], rel_tol=factor * bound), kind
    assert one["adam"] == other["adam"] == STEPS


@pytest.mark.multiprocess
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stages_on_two_processes_follow_one_process(single, tmp_path, stage, precision):
    two = work(stage, precision, tmp_path, processes=2)
    assert_agree(single(precision), two, precision)
    assert two["steps"][-1][0] < two["steps"][0][0]
    assert not two["rounded"]  # the fp32 weights start with all their digits, in bf16 too


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("stage", "then", "processes"), [(2, "local", 1), (1, 3, 2), (3, 2, 2), ("local", 1, 2)]
)
def test_a_checkpoint_resumes_under_another_stage_and_world_size(
    single, tmp_path, stage, then, processes
):
    work(stage, "fp32", tmp_path, "save=3", processes=1 if stage == "local" else 2)
    resumed = work(then, "fp32", tmp_path, "resume", processes=processes)
    whole = single("fp32")
    assert len(resumed["steps"]) == 3
    assert_agree({**whole, "steps": whole["steps"][3:]}, resumed, "fp32")


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("stage", "precision"),
    [(0, "fp32"), (0, "bf16"), (1, "bf16"), (3, "bf16"), ("local", "bf16")],
)
def test_a_nan_on_one_process_is_skipped_on_all(tmp_path, stage, precision):
    result = work(stage, precision, tmp_path, "nan=2", processes=1 if stage == "local" else 2)
    assert [step[2] for step in result["steps"]] == [True, True, False, True, True, True]
    assert all(math.isfinite(total) for total in result["sums"].values())
    assert all(math.isfinite(step[0]) for i, step in enumerate(result["steps"]) if i != 2)
    assert result["adam"] == STEPS - 1


@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [2, 3])
def test_blocks_computed_again_follow_plain_training(single, tmp_path, stage):
    two = work(stage, "fp32", tmp_path, "full", processes=2)
    assert_agree(single("fp32"), two, "fp32")


@pytest.mark.multiprocess
@pytest.mark.skipif(not launch.INTERPRETING, reason="Triton compiles here: every test runs kernels")
@pytest.mark.parametrize("stage", [0, 3])
def test_the_engine_trains_with_the_kernels(single, tmp_path, stage):
    """The gathers, the loss, VICReg and the average, on two processes, in the interpreter."""
    two = work(stage, "fp32", tmp_path, "kernels", processes=2)
    assert_agree(single("fp32"), two, "fp32")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_process_without_deepspeed_follows_it(single, tmp_path, precision):
    local = work("local", precision, tmp_path)
    assert_agree(single(precision), local, precision)
    assert not local["rounded"]


@pytest.mark.slow
def test_deepspeeds_own_adamw_follows_torchs(single, tmp_path):
    """It is compiled first, for over a minute."""
    assert_agree(single("fp32"), work(0, "fp32", tmp_path, "adam=deepspeed"), "fp32")


def test_apexs_adamw_follows_torchs(single, tmp_path):
    pytest.importorskip("apex.optimizers", reason="apex is not installed")
    assert_agree(single("fp32"), work(0, "fp32", tmp_path, "adam=apex"), "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stages_on_one_process_follow_plain_training(single, tmp_path, stage):
    """DeepSpeed steps with zero gradients to allocate Adam's state: that must leave no trace."""
    assert_agree(single("fp32"), work(stage, "fp32", tmp_path), "fp32")


def test_the_users_deepspeed_json_is_kept():
    own = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 7}, "train_batch_size": "auto"}
    options = {"micro_batch": 4, "accumulation": 2, "precision": "bf16", "clip": 1.0, "trained": 9}
    config = complete_config(own, **options)
    assert config["zero_optimization"]["reduce_bucket_size"] == 7
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 2 and "train_batch_size" not in config
    assert config["bf16"]["enabled"] is True and config["gradient_clipping"] == 1.0
    assert complete_config({}, **options)["zero_optimization"]["reduce_bucket_size"] == 9
    assert config["zero_optimization"].get("overlap_comm") is (
        None if torch.cuda.is_available() else False
    )


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_process_leaves_with_its_status_and_its_last_words(processes):
    code = "from cjepa_fast import engine; print('the last words', end=''); engine.leave(3)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, env={**tiny.environment(), "WORLD_SIZE": processes},
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (3, "the last words"), result.stderr
