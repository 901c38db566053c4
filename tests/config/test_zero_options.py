"""Options of ZeRO: those that would break are refused, the others train to the same weights."""

import json
import os
import subprocess
import sys

import pytest
import tiny
from test_engine import assert_agree, work

from cjepa_fast.config import ConfigError, validate
from cjepa_fast.config.checks import KEYS_OF_DEEPSPEED
from cjepa_fast.runtime import hardware
from cjepa_fast.training.engines import zero as engine

CPU = {"device": "cpu"}
ASKED_OF_DEEPSPEED = """
import json
from deepspeed.runtime.config import DeepSpeedConfig

asked = set()

class Recorder(dict):
    def get(self, key, default=None):
        asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        asked.add(key)
        return super().__contains__(key)

    def keys(self):
        return self

    def __copy__(self):
        return Recorder(self)

DeepSpeedConfig(Recorder(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1))
assert len(asked) > 40, asked
print(json.dumps(sorted(asked)))
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return work(["0:fp32"], tmp_path_factory.mktemp("alone"))[0]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("stage", "options", "ranks"),
    [
        (1, {"offload_optimizer": CPU}, 2),
        *(
            pytest.param(*other, marks=pytest.mark.long)
            for other in (
                (3, {"offload_optimizer": CPU, "offload_param": CPU}, 2),
                (2, {"reduce_bucket_size": 500, "allgather_bucket_size": 500}, 2),
                (3, {"zero_hpz_partition_size": 2}, 4),
            )
        ),
    ],
)
def test_an_option_changes_nothing_and_resumes(alone, tmp_path, stage, options, ranks):
    """The weights of stage 3 are all partitioned ("full"), as large ones are."""
    given = [f"zero={json.dumps(options)}", *(["full"] if stage == 3 else [])]
    run = [f"{stage}:fp32"]
    (whole,) = work(run, tmp_path, "save=3", *given, ranks=ranks)
    assert_agree(alone, whole, "fp32")
    (resumed,) = work(run, tmp_path, "resume", *given, ranks=ranks)
    assert_agree({**alone, "steps": alone["steps"][3:]}, resumed, "fp32")
    assert whole["average_exact"] and resumed["average_exact"]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("zero_optimization.mics_shard_size", 8, "take zero_hpz_partition_size"),
        ("zero_optimization.round_robin_gradients", True, "other weights"),
        ("zero_optimization.compute_grad_norm", False, "bad steps"),
        ("zero_optimization.zero_quantized_nontrainable_weights", True, "positions"),
        ("zero_optimization.offload_optimizer.device", "nvme", 'take "cpu"'),
        ("zero_optimization.offload_param.device", "nvme", 'take "cpu"'),
        ("zero_optimization.offload_optimizer.ratio", 0.5, "leave it out"),
        ("zero_optimization.offload_optimizer.super_offload", True, "leave it out"),
        ("zero_optimization.zenflow", {"topk_ratio": 0.1}, "leave it out"),
        ("bf16.bf16_master_weights_and_grads", True, "leave it out"),
    ],
)
def test_what_would_break_is_refused_by_its_key(key, value, said):
    section: object = value
    for part in reversed(key.split(".")):
        section = {part: section}
    with pytest.raises(ConfigError) as refused:
        validate({"deepspeed": section})
    assert str(refused.value).startswith(f"deepspeed.{key} = {json.dumps(value)}: ")
    assert said in str(refused.value)


def test_what_is_harmless_is_not_refused():
    offload = CPU | {"ratio": 1.0, "super_offload": False}
    zero = {"stage": 3, "offload_optimizer": offload, "offload_param": {"device": "none"}}
    validate({"deepspeed": {"zero_optimization": zero | {"compute_grad_norm": True}}})
    validate({"deepspeed": {"bf16": {"enabled": True}, "zero_optimization": {}}})


@pytest.mark.slow
def test_the_known_keys_are_what_deepspeed_reads():
    """Those that its configuration asks for; run apart, since it chooses a device for good."""
    done = subprocess.run(
        [sys.executable, "-c", ASKED_OF_DEEPSPEED], capture_output=True, text=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "DEEPSPEED_LOG_LEVEL": "error"},
        timeout=tiny.HANG_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout.splitlines()[-1])) <= KEYS_OF_DEEPSPEED


def completed(monkeypatch, zero: dict, cuda: bool, ranks: int, trained: int = 10**9) -> dict:
    monkeypatch.setattr(hardware, "has_gpu", lambda: cuda)
    monkeypatch.setattr(engine, "world_size", lambda: ranks)
    found = engine.complete_config({"zero_optimization": zero}, 4, 1, "bf16", 0.0, trained)
    return found["zero_optimization"]


@pytest.mark.parametrize(
    ("zero", "cuda", "ranks", "overlap"),
    [
        ({}, True, 2, True),
        ({"overlap_comm": False}, True, 2, False),
        ({}, True, 1, None),
        ({}, False, 2, False),
        ({"overlap_comm": True}, False, 2, False),
    ],
)
def test_several_gpus_overlap_their_communication(monkeypatch, zero, cuda, ranks, overlap):
    found = completed(monkeypatch, zero, cuda, ranks)
    assert found.get("overlap_comm") is overlap
    assert found["reduce_bucket_size"] < 10**9 / 10  # several fill in a backward


@pytest.mark.parametrize(("size", "ranks", "fits"), [(8, 16, True), (8, 4, True), (8, 12, False)])
def test_groups_within_nodes_divide_the_ranks(monkeypatch, size, ranks, fits):
    zero = {"stage": 3, "zero_hpz_partition_size": size}
    if fits:
        assert zero.items() <= completed(monkeypatch, zero, True, ranks).items()
        return
    with pytest.raises(ValueError, match="zero_hpz_partition_size = 8: must divide the 12 ranks"):
        completed(monkeypatch, zero, True, ranks)


def test_auto_is_as_if_it_were_left_out(monkeypatch):
    zero = {"zero_hpz_partition_size": "auto", "reduce_bucket_size": "auto", "overlap_comm": "auto"}
    validate({"deepspeed": {"zero_optimization": zero}})
    found = completed(monkeypatch, {"stage": 3} | zero, True, 12)
    assert found == completed(monkeypatch, {"stage": 3}, True, 12)
