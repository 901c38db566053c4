"""Every ZeRO stage, on one and two ranks: one trajectory, one state, bad steps skipped."""

import json
import math
import os
import subprocess
import sys

import pytest
import tiny
import torch

from cjepa_fast.kernels.common import launch
from cjepa_fast.training.engines.zero import complete_config

WORKER = tiny.ROOT / "tests" / "training" / "engine_worker.py"
FEW, STEPS, MANY = 2, 6, 20
# Sums of thousands of values taken in another order: fp32 rounding, and that of bf16 gradients.
AGREE = {"fp32": 2e-6, "bf16": 5e-3}


def work(runs: list[str], folder, *options, ranks=1, steps=STEPS, **bounds) -> list[dict]:
    """What each run, "STAGE:PRECISION", came to; they share their processes."""
    given = (",".join(runs), steps, folder, *options)
    result = tiny.run(WORKER, *given, ranks=ranks, **bounds)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """What one process without ZeRO does, by precision, made once: 20 steps, the first 6 and 2."""
    runs = ["0:fp32", "0:bf16"]
    folder = tmp_path_factory.mktemp("single")
    return {
        steps: dict(zip(("fp32", "bf16"), work(runs, folder, steps=steps), strict=True))
        for steps in (FEW, STEPS, MANY)
    }


def assert_agree(one: dict, other: dict, precision: str) -> None:
    bound = AGREE[precision]
    for a, b in zip(one["steps"], other["steps"], strict=True):
        assert a[2] == b[2]
        assert math.isclose(a[0], b[0], rel_tol=bound), (a, b)
        assert math.isclose(a[1], b[1], rel_tol=10 * bound), (a, b)
    for kind, total in one["sums"].items():
        factor = 1 if kind in ("master", "ema") else 20  # the moments are of the gradients
        assert math.isclose(total, other["sums"][kind], rel_tol=factor * bound), kind
    assert one["adam"] == other["adam"]


def assert_stages_follow(
    single: dict, folder, runs: list[str], *options, ranks: int, steps: int = MANY
) -> None:
    """Of every run: the trajectory is one rank's, the EMA an unsharded one's, exactly."""
    made = work(runs, folder, *options, ranks=ranks, steps=steps)
    for run, result in zip(runs, made, strict=True):
        stage, precision = run.split(":")
        assert_agree(single[steps][precision], result, precision)
        assert result["steps"][-1][0] < result["steps"][0][0]
        assert not result["rounded"]  # the fp32 weights start with all their digits, in bf16 too
        assert result["average_exact"], run  # in memory, in the working copy and read from disk
        whole_target = result["target_values_held"] > 0
        assert whole_target != (stage[0] == "3" and ranks > 1)


EACH_STAGE = ["0:bf16", "1:fp32", "2:bf16", "3:fp32", "3offload:bf16"]
STAGES = ("0", "1", "2", "3", "3offload")
EACH_PAIR = [f"{stage}:{precision}" for stage in STAGES for precision in AGREE]


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("runs", "ranks", "steps"),
    [
        pytest.param(EACH_PAIR, 2, MANY, marks=pytest.mark.long),
        pytest.param(EACH_STAGE, 4, STEPS, marks=pytest.mark.long),
    ],
    ids=["2-20", "4-6"],
)
def test_every_stage_on_many_ranks_follows_one(single, tmp_path, runs, ranks, steps):
    """Two ranks see each stage in each precision; four, which only cut the state finer, see each
    stage in one, and each precision."""
    assert_stages_follow(single, tmp_path, runs, f"save={steps // 2}", ranks=ranks, steps=steps)


@pytest.mark.slow
def test_every_stage_on_one_process_follows_plain_training(single, tmp_path):
    """DeepSpeed steps with zero gradients to allocate Adam's state: that must leave no trace."""
    runs = [f"{stage}:{precision}" for stage in ("1", "2", "3", "local") for precision in AGREE]
    assert_stages_follow(single, tmp_path, runs, ranks=1)


@pytest.mark.multiprocess
@pytest.mark.parametrize("bug", ["local", pytest.param("scale", marks=pytest.mark.long)])
def test_wrong_statistics_or_gradients_would_be_seen(single, tmp_path, bug):
    """VICReg over a rank's own images, and gradients divided twice: what the bounds must see."""
    for result in work(["0:fp32", "3:fp32"], tmp_path, f"bug={bug}", ranks=2):
        with pytest.raises(AssertionError):
            assert_agree(single[STEPS]["fp32"], result, "fp32")


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("stage", "then", "ranks"),
    [
        *(("2", "local", 1), ("1", "3", 2)),
        *(
            pytest.param(*other, marks=pytest.mark.long)
            for other in (("3", "2", 2), ("local", "1", 2), ("1", "3", 4))
        ),
    ],
)
def test_a_checkpoint_resumes_under_another_stage_and_world_size(
    single, tmp_path, stage, then, ranks
):
    half = STEPS // 2
    first = 1 if stage == "local" else 2
    work([f"{stage}:fp32"], tmp_path, f"save={half}", ranks=first, steps=half)
    (resumed,) = work([f"{then}:fp32"], tmp_path, "resume", ranks=ranks)
    whole = single[STEPS]["fp32"]
    assert len(resumed["steps"]) == half and resumed["average_exact"]
    assert_agree({**whole, "steps": whole["steps"][half:]}, resumed, "fp32")


@pytest.mark.long
@pytest.mark.multiprocess
def test_a_training_that_goes_back_repeats_its_steps(tmp_path):
    """From a checkpoint restored in its midst: whatever a stage keeps besides is put back too."""
    runs = ["0:bf16", "1:fp32", "3:fp32", "3:bf16", "3offload:fp32"]
    for run, result in zip(runs, work(runs, tmp_path, "save=3", "again", ranks=2), strict=True):
        assert len(result["steps"]) == STEPS + 3 and result["average_exact"], run
        assert result["steps"][STEPS:] == result["steps"][3:STEPS], run


SKIPPING = ["0:fp32", "0:bf16", "1:bf16", "2:fp32", "3:bf16", "3offload:fp32"]


@pytest.mark.multiprocess
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize("fault", ["nan", "spike"])
def test_a_bad_step_is_skipped_on_all(tmp_path, fault, ranks):
    """An image of NaNs on one rank; a gradient above its limit."""
    runs = SKIPPING if ranks == 2 else ["local:fp32", "local:bf16"]
    for run, result in zip(runs, work(runs, tmp_path, f"{fault}=2", ranks=ranks), strict=True):
        assert [step[2] for step in result["steps"]] == [True, True, False, True, True, True], run
        assert all(math.isfinite(total) for total in result["sums"].values())
        assert all(math.isfinite(step[0]) for i, step in enumerate(result["steps"]) if i != 2)
        assert math.isfinite(result["steps"][2][1]) == (fault == "spike")  # the norm is told
        assert result["adam"] == STEPS - 1 and result["average_exact"]


@pytest.mark.long
@pytest.mark.multiprocess
def test_no_update_while_a_weight_is_not_finite_on_one_rank(tmp_path):
    """In the working copy: ZeRO-3 writes it anew from its share, below nothing does."""
    results = work(SKIPPING, tmp_path, "weight=2", ranks=2)
    for run, result in zip(SKIPPING, results, strict=True):
        applied = [True, True, False] + [run[0] == "3"] * 3
        assert [step[2] for step in result["steps"]] == applied, run
        assert result["adam"] == sum(applied)
        if run != "0:fp32" and run != "2:fp32":  # whose weights are their own masters
            assert all(math.isfinite(total) for total in result["sums"].values()), run


@pytest.mark.multiprocess
@pytest.mark.long
def test_blocks_computed_again_follow_plain_training(single, tmp_path):
    for result in work(["2:fp32", "3:fp32"], tmp_path, "full", ranks=2):
        assert_agree(single[STEPS]["fp32"], result, "fp32")


@pytest.mark.multiprocess
@pytest.mark.skipif(not launch.INTERPRETING, reason="Triton compiles here: every test runs kernels")
def test_the_engine_trains_with_the_kernels(single, tmp_path):
    """The gathers, the loss, VICReg and the EMA, on two ranks, in the interpreter."""
    for result in work(["0:fp32", "3:fp32"], tmp_path, "kernels", ranks=2, steps=FEW):
        assert_agree(single[FEW]["fp32"], result, "fp32")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_process_without_deepspeed_follows_it(single, tmp_path, precision):
    (local,) = work([f"local:{precision}"], tmp_path)
    assert_agree(single[STEPS][precision], local, precision)
    assert not local["rounded"] and local["adam"] == STEPS


# Stands in for a C++ compiler: DeepSpeed's two sources as one, not optimised, and without torch's
# headers for networks in C++. Any other way it would take minutes.
COMPILER = """
import os, sys
from pathlib import Path
args = sys.argv[1:]
if "-c" in args:
    at = args.index("-c") + 1
    source = Path(args[at])
    args[at] = f"{source.stem}_alone.cpp"
    both = source.with_name("cpu_adam_impl.cpp"), source
    lines = [f'#include "{file}"' for file in both if source.stem == "cpu_adam"]
    Path(args[at]).write_text("\\n".join(lines))
    args += ["-O0", "-g0", "-DTORCH_INDUCTOR_CPP_WRAPPER"]
    args += ["-include", "torch/types.h"] if lines else []
os.execvp(os.environ["REAL_CXX"], [os.environ["REAL_CXX"], *args])
"""


@pytest.mark.long
@pytest.mark.slow
def test_deepspeeds_own_adamw_follows_torchs(single, tmp_path, monkeypatch, pytestconfig):
    """It is compiled first, into a folder that only this test uses: a lock found there was left by
    a test that was killed."""
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!{sys.executable}\n{COMPILER}")
    compiler.chmod(0o755)
    monkeypatch.setenv("REAL_CXX", os.environ.get("CXX", "c++"))
    monkeypatch.setenv("CXX", str(compiler))
    compiled = pytestconfig.cache.mkdir("torch_extensions")
    for lock in compiled.rglob("lock"):
        lock.unlink()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(compiled))
    (own,) = work(["0:fp32"], tmp_path, "adam=deepspeed")
    assert_agree(single[STEPS]["fp32"], own, "fp32")


def test_apexs_adamw_follows_torchs(single, tmp_path):
    pytest.importorskip("apex.optimizers", reason="apex is not installed")
    (own,) = work(["0:fp32"], tmp_path, "adam=apex")
    assert_agree(single[STEPS]["fp32"], own, "fp32")


def test_the_users_deepspeed_json_is_kept():
    own = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 7}, "train_batch_size": "auto"}
    options = {"micro_batch": 4, "accumulation": 2, "precision": "bf16", "clip": 1.0, "trained": 9}
    config = complete_config(own, **options)
    assert config["zero_optimization"]["reduce_bucket_size"] == 7
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 2 and "train_batch_size" not in config
    assert config["bf16"]["enabled"] is True and config["gradient_clipping"] == 1.0
    assert config["timers"]["throughput"]["enabled"] is False  # it would wait for the device
    assert complete_config({}, **options)["zero_optimization"]["reduce_bucket_size"] == 9
    assert config["zero_optimization"].get("overlap_comm") is (
        None if torch.cuda.is_available() else False
    )


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("precision", AGREE)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_higher_stages_sum_bf16_gradients_in_fp32(stage, precision, accumulation):
    """Unless the user's JSON says otherwise."""

    def data_types(**own) -> dict | None:
        own |= {"zero_optimization": {"stage": stage}}
        return complete_config(own, 4, accumulation, precision, 1.0, 9).get("data_types")

    summed = stage >= 2 and precision == "bf16" and accumulation == 2
    assert data_types() == ({"grad_accum_dtype": "fp32"} if summed else None)
    assert data_types(data_types={"grad_accum_dtype": "bf16"}) == {"grad_accum_dtype": "bf16"}


@pytest.mark.multiprocess
def test_sums_of_bf16_gradients_are_those_of_one_rank(tmp_path):
    """The first moments show it: 3e-6 apart. Where gradients are summed in bf16 it is 3e-4."""
    (one,) = work(["local:bf16"], tmp_path)
    for made in work(["2:bf16", "3:bf16"], tmp_path, ranks=2):
        assert math.isclose(made["sums"]["exp_avg"], one["sums"]["exp_avg"], rel_tol=3e-5)


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_process_leaves_with_its_status_and_its_last_words(ranks):
    code = (
        "from cjepa_fast.runtime import distributed\n"
        "print('the last words', end=''); distributed.leave(3)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, env={**tiny.environment(), "WORLD_SIZE": ranks},
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (3, "the last words"), result.stderr


def test_a_start_imports_no_compiler(tmp_path):
    """A second and a half, for an optimiser of DeepSpeed's that nothing uses."""
    code = (
        f"import sys; sys.path.append({str(WORKER.parent)!r}); import engine_worker\n"
        "engine_worker.main(); print('torch._inductor.compile_fx' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "1:fp32", "1", str(tmp_path)],
        capture_output=True, text=True, env=tiny.environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"
