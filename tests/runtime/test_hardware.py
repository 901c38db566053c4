"""What the machine can do: read from its flags and held to what the environment allows."""

import json
import os
import subprocess
import sys
import types

import pytest
import tiny
import torch

from cjepa_fast import checkpoint
from cjepa_fast import config as configuration
from cjepa_fast.runtime import cgroups, distributed, hardware, provenance
from cjepa_fast.training import build

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
AVX2 = {"sse4_1", "avx2"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}


@pytest.fixture
def flags(monkeypatch):
    """Sets the processor's flags; what was probed is forgotten before and after."""
    probed = hardware.cpu_multiplies_bf16, hardware.gpu_problem

    def pretend(names: set[str], limit: str = "") -> None:
        monkeypatch.setattr(hardware, "cpu_flags", lambda: names)
        monkeypatch.setattr(hardware, "onednn_linear_works", lambda dtype: True)
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        for probe in probed:
            probe.cache_clear()

    yield pretend
    for probe in probed:
        probe.cache_clear()


@pytest.mark.parametrize(
    ("names", "limit", "tier", "precision"),
    [
        ({"sse4_1"}, "", "SSE41", "fp32"),
        (AVX2, "", "AVX2", "fp32"),
        (AVX512, "", "AVX512_CORE", "fp32"),
        (AVX512 | {"avx512_bf16"}, "", "AVX512_CORE_BF16", "bf16"),
        (AVX512 | {"avx512_bf16", "amx_bf16"}, "", "AVX512_CORE_AMX", "bf16"),
        (AVX512 | {"amx_bf16"}, "AVX512_CORE", "AVX512_CORE", "fp32"),
        (AVX512 | {"avx512_bf16"}, "avx2", "AVX2", "fp32"),
        (AVX512 | {"avx512_bf16"}, "AVX2_VNNI", "AVX2", "fp32"),
        (AVX512 | {"avx512_bf16"}, "AVX512_CORE_VNNI", "AVX512_CORE", "fp32"),
        (AVX512 | {"avx512_bf16", "amx_bf16"}, "AVX512_CORE_FP16", "AVX512_CORE_BF16", "bf16"),
        (AVX512 | {"avx512_bf16", "amx_bf16"}, "DEFAULT", "AVX512_CORE_AMX", "bf16"),
        (AVX512 | {"avx512_bf16"}, "AVX512_CORE_BF16", "AVX512_CORE_BF16", "bf16"),
    ],
)
def test_bf16_where_the_processor_multiplies_it(flags, names, limit, tier, precision):
    flags(names, limit)
    assert hardware.tier() == tier
    found = hardware.best_precision(CPU)
    assert found.precision == precision and tier in found.reason


def test_of_an_arm_processor_the_flag_counts(flags):
    flags({"asimd", "bf16"})
    assert hardware.best_precision(CPU).precision == "bf16"
    flags({"asimd"})
    assert hardware.best_precision(CPU).precision == "fp32"


def test_flags_without_a_primitive_are_not_believed(flags, monkeypatch):
    flags(AVX512 | {"avx512_bf16"})
    monkeypatch.setattr(hardware, "onednn_linear_works", lambda dtype: False)
    assert hardware.best_precision(CPU).precision == "fp32"


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "fp32"), ((8, 0), "bf16")])
def test_old_gpus_train_in_fp32_and_say_what_is_lost(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    found = hardware.best_precision(GPU)
    assert found.precision == precision
    assert ("FlashAttention" in found.reason) == (precision == "fp32")


def test_a_gpu_that_this_torch_has_no_kernels_for_is_left_aside(flags, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise RuntimeError("CUDA error: no kernel image is available\nmore lines")

    flags(AVX2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90"])
    monkeypatch.setattr(torch, "ones", refuse)
    assert distributed.start(0) == CPU
    said = capsys.readouterr().err
    assert "on the CPU, since Tesla V100 (sm_70): CUDA error: no kernel image" in said
    assert "sm_75, sm_90" in said and "CUDA 12" in said and "more lines" not in said


@pytest.mark.parametrize("hidden", [False, True])
def test_gpus_that_torch_does_not_see_are_told(flags, monkeypatch, capsys, hidden):
    """As with a driver too old for torch's CUDA. CUDA_VISIBLE_DEVICES may hide them on purpose."""
    nvml = types.ModuleType("pynvml")
    nvml.NVMLError = RuntimeError
    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetCount = lambda: 8
    nvml.nvmlSystemGetDriverVersion = lambda: "535.183.01"
    flags(AVX2)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if hidden:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    else:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert distributed.start(0) == CPU
    said = capsys.readouterr().err
    assert ("sees none of the 8 GPUs of driver 535.183.01" in said) is not hidden


def test_a_rank_beyond_the_gpus_that_it_sees_is_told(flags, monkeypatch, capsys):
    """As under SLURM's --gpus-per-task: each then sees one, by the number 0."""

    def refuse(*args, **kwargs):
        raise AssertionError("Invalid device id")

    flags(AVX2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", refuse)
    monkeypatch.setattr(torch, "ones", refuse)
    assert distributed.start(0) == CPU
    said = capsys.readouterr().err
    assert "rank 3 here is on the CPU, since GPU 3: Invalid device id" in said
    assert "LOCAL_RANK is 3, and this process sees 1" in said


@pytest.mark.parametrize("others_work", [True, False])
def test_one_of_several_ranks_without_a_gpu_is_refused(flags, monkeypatch, capsys, others_work):
    """The others would wait for it in NCCL. Where no GPU here works, all are on the CPU."""
    flags(AVX2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    broken = (1,) if others_work else range(4)
    problem = lambda i=0: f"GPU {i}: ECC error" if i in broken else ""  # noqa: E731
    monkeypatch.setattr(hardware, "gpu_problem", problem)
    joined = []
    monkeypatch.setattr(distributed, "deepspeed", lambda: joined.append(1))
    if others_work:
        with pytest.raises(ValueError, match="one of 4 ranks cannot use its GPU") as told:
            distributed.start(0)
        assert "GPU 1: ECC error" in str(told.value)
        assert "CUDA_VISIBLE_DEVICES=0,2,3, and 3 ranks" in str(told.value) and not joined
        return
    assert distributed.start(0) == CPU and joined
    assert "rank 1 here is on the CPU, since GPU 1: ECC error" in capsys.readouterr().err


def test_all_ranks_take_the_lowest_precision(monkeypatch):
    config = configuration.validate({})
    for mine, others in (("bf16", ["bf16", "bf16"]), ("bf16", ["bf16", "fp32"])):
        monkeypatch.setattr(distributed, "all_gather_objects", lambda found, others=others: others)
        monkeypatch.setattr(
            hardware, "best_precision", lambda device, mine=mine: hardware.Choice(mine, "")
        )
        assert build.with_precision(config, CPU).run.precision == others[-1]
    given = configuration.validate({"run": {"precision": "bf16"}})
    assert build.with_precision(given, CPU) is given


def test_what_is_slow_here_is_warned_of(flags, capsys):
    flags(AVX2)
    hardware.warn_of_slow_bf16(CPU, "--bf16")
    assert "WARNING: --bf16: bf16 is slower than fp32 here" in capsys.readouterr().err
    flags(AVX512 | {"avx512_bf16"})
    hardware.warn_of_slow_bf16(CPU, "--bf16")
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "limit", ["SSE41", *(pytest.param(t, marks=pytest.mark.long) for t in ("AVX2", "AVX512_CORE"))]
)
def test_a_processor_held_to_less_is_probed_as_such(limit):
    """In a process of its own, since oneDNN reads the variable once."""
    code = (
        "from cjepa_fast.runtime import hardware; import torch;"
        "print(hardware.cpu_multiplies_bf16(), hardware.onednn_linear_works(torch.float32))"
    )
    own = {**os.environ, "ONEDNN_MAX_CPU_ISA": limit}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=own)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "False"


UNEQUAL = """
import os, sys
from cjepa_fast import train
from cjepa_fast.runtime import distributed
from cjepa_fast.runtime import hardware

mine = {"0": "bf16", "1": "fp32"}[os.environ["RANK"]]
hardware.best_precision = lambda device: hardware.Choice(mine, "of this rank")
distributed.leave(train.main(sys.argv[1:]))
"""


@pytest.mark.multiprocess
def test_a_training_on_unequal_machines_is_in_the_lowest_precision(tmp_path):
    script = tmp_path / "unequal.py"
    script.write_text(UNEQUAL)
    done = tiny.run(script, "--config", tiny.write_config(tmp_path), ranks=2)
    assert done.returncode == 0, done.stderr
    assert "precision: fp32, as run.precision or another rank has it" in done.stdout
    assert json.loads((tmp_path / "run" / "config.json").read_text())["run"]["precision"] == "fp32"
    state = checkpoint.state_of(checkpoint.latest(tmp_path / "run"))
    assert state["config"]["run"]["precision"] == "fp32"


@pytest.mark.parametrize("refused", [False, True])
def test_memory_is_grown_in_place_where_the_machine_can(monkeypatch, capsys, refused):
    """Some virtual machines advertise it and refuse the first allocation."""
    told = []

    def zeros(count, **_):
        assert count >= 64 * 2**20
        if refused:
            raise RuntimeError("CUDA driver error: unknown error\nC++ CapturedTraceback")

    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append, raising=False)
    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    distributed.grow_memory_in_place(GPU)
    assert told == ["expandable_segments:True", "expandable_segments:False"][: 1 + refused]
    said = capsys.readouterr().err
    assert said == ("memory is not grown in place: CUDA driver error: unknown error\n" * refused)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:native")  # the user's own word
    distributed.grow_memory_in_place(GPU)
    assert len(told) == 1 + refused


def test_a_copy_without_git_is_told_its_commit(monkeypatch):
    monkeypatch.setenv("CJEPA_COMMIT", "abc123")
    assert provenance.own_commit() == "abc123"


@pytest.mark.parametrize(("changed", "told"), [("bench/results/a.md", ""), ("a.py", "+changes")])
def test_results_that_are_added_change_no_code(tmp_path, monkeypatch, changed, told):
    """A measurement's own lines would make each of its later ones look changed."""

    def git(*words):
        names = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *names, *words], check=True)

    for name in ("setup.py", "bench/results/kept.md", "cjepa_fast/runtime/provenance.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        git(*words)
    monkeypatch.delenv("CJEPA_COMMIT", raising=False)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "cjepa_fast/runtime/provenance.py"))
    (tmp_path / changed).write_text("new")
    commit = provenance.own_commit()
    assert (commit[:40].isalnum(), commit[40:]) == (True, told)


def test_a_git_that_does_not_answer_is_not_waited_for(monkeypatch):
    asked = []

    def run(command, timeout, **_):
        asked.append(command)
        if "status" in command:
            raise subprocess.TimeoutExpired(command, timeout)
        return types.SimpleNamespace(stdout="abc\n")

    monkeypatch.delenv("CJEPA_COMMIT", raising=False)
    monkeypatch.setattr(provenance.subprocess, "run", run)
    assert provenance.own_commit() == "abc+changes"  # perhaps
    assert all("--no-optional-locks" in command for command in asked)
    monkeypatch.setattr(provenance, "_git", lambda *_: None)
    assert provenance.own_commit() is None


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 6),
        ({"cpu.max": "900000 100000"}, 6),
        ({"cpu/cpu.cfs_quota_us": "350000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 6),
        ({}, 6),
    ],
)
def test_a_containers_share_of_the_cores_counts(tmp_path, monkeypatch, files, cores):
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    monkeypatch.setattr(cgroups, "OWN", tmp_path / "none")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert hardware.cores() == cores


@pytest.mark.parametrize(("said", "threads"), [(None, 2), ("4", 4)])
def test_torch_takes_no_more_threads_than_cores_unless_told(monkeypatch, said, threads):
    taken = [4]
    monkeypatch.setattr(hardware, "cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: taken[-1])
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if said:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    distributed.few_threads()
    distributed.few_threads()
    assert taken[-1] == threads and len(taken) <= 2


def test_on_a_processor_of_no_known_tier_nothing_is_imitated(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho aarch64 bf16\n")
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", tiny.ROOT / "scripts" / "tiers.sh", "--no-tests"],
        env={**os.environ, "PYTHON": str(python)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "aarch64 bf16 is not among the tiers of x86: nothing is imitated\n"
