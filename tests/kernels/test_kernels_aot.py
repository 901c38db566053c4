"""The kernels compiled for three architectures, in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import aot_table
import machine_code
import pytest
import shipped
import triton.language as tl
from kernel_checks import modules_to_compile

from cjepa_fast.kernels.tuned import TUNED

HERE = Path(__file__).parent
ARCHITECTURES = (80, 90, 100)


def worker(*args: str) -> subprocess.CompletedProcess:
    """aot_worker.py without the interpreter that this process may have."""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    paths = [str(HERE.parent), str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, str(HERE / "aot_worker.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.long
def test_one_configuration_of_each_gather_on_hopper():
    done = worker("--module", "gather", "--arch", "90", "--only", "bf16 16x256")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^(\d+) compiled, 0 wrong$", done.stdout, re.M), done.stdout


def test_no_constant_of_a_kernel_is_nan():
    """Triton compares a kernel's global constants before each launch, and refuses those that have
    changed: NaN never equals itself. The interpreter and a first launch do not see it."""
    for module in modules_to_compile().values():
        for name, value in vars(module).items():
            if isinstance(value, tl.constexpr):
                assert value.value == value.value, f"{module.__name__}.{name}"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_the_trainings_launch(arch):
    """No spills, shared memory and registers that the device has, the instructions there.

    `make kernels-check` compiles every configuration and writes a table where nothing is wrong. A
    compiler gives the same again: of these kernels and compilers, it stands for what it says, as a
    few drawn anew each time must show. Of others, all that is launched is compiled here.
    """
    names, current = shipped.shipped(arch)[0], aot_table.is_current()
    done = worker("--arch", str(arch), "--shipped", *(["--sample", "6"] if current else []))
    assert done.returncode == 0, done.stdout + done.stderr
    compiled = int(re.search(r"^(\d+) compiled, 0 wrong$", done.stdout, re.M)[1])
    assert compiled == (6 if current else len(names))  # each name is one of ahead_of_time()
    if current:
        cells = aot_table.cells()
        assert all(cells[name, arch] for name in names)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_and_every_tuned_choice_is_among_what_is_launched(arch):
    every = [one for module in modules_to_compile().values() for one in module.ahead_of_time()]
    names, named = shipped.shipped(arch)
    kernels = {one.kernel.__name__ for one in every if one.since <= arch}
    launched = {one.kernel.__name__ for one in every if one.name in names}
    assert kernels - launched <= {"_attention_descriptor_kernel"}  # the tuner's candidate alone
    assert launched <= kernels
    assert TUNED.get(f"sm_{arch}", {}).keys() == named


def test_the_committed_table_names_every_configuration():
    """Stale after a change of kernels: `make kernels-check` makes it anew."""
    lines = aot_table.TABLE.read_text(encoding="utf-8").splitlines()
    rows = {line.split(" | ")[0].removeprefix("| ") for line in lines}
    modules = modules_to_compile()
    assert modules.keys() >= {"gather.tokens", "ema.adamw", "common.sums", "gelu"}
    for module in modules.values():
        assert {one.name for one in module.ahead_of_time()} <= rows


def test_a_table_is_stale_after_any_change_of_a_kernel_or_a_compiler(tmp_path, monkeypatch):
    """Continuous integration compiles everything again then."""
    kernels, table = tmp_path / "kernels", tmp_path / "aot.md"
    kernels.mkdir()
    (kernels / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(aot_table, "KERNELS", kernels)
    table.write_text(f"# Kernels\n\n{aot_table.ingredients()}\n")
    assert aot_table.is_current(table) and aot_table.is_of_these_kernels(table)
    for change in ("x = 2\n", "x = 1\n\n"):
        (kernels / "a.py").write_text(change)
        assert not aot_table.is_current(table) and not aot_table.is_of_these_kernels(table)
    (kernels / "a.py").write_text("x = 1\n")
    assert aot_table.is_current(table)
    (kernels / "b.py").write_text("")
    assert not aot_table.is_current(table) and aot_table.is_of_these_compilers(table)
    (kernels / "b.py").unlink()
    for name in ("triton", "torch"):
        with monkeypatch.context() as patch:
            versions = {"triton": "3.7.1", "torch": "2.13.0", name: "9.9"}
            patch.setattr(aot_table.metadata, "version", versions.get)
            assert f"{name} 9.9" in aot_table.ingredients() and not aot_table.is_current(table)
            assert not aot_table.is_of_these_compilers(table)
            assert aot_table.is_of_these_kernels(table)


def test_the_table_by_another_triton_names_the_same_kernels():
    """Where it is current: it takes an environment of its own to make it anew."""
    found = machine_code.committed(aot_table.BESIDE.read_text(encoding="utf-8"))
    names = shipped.shipped(90)[0]
    assert found.keys() == names or not aot_table.is_of_these_kernels()
    assert "Of triton 3.6.0, " in aot_table.BESIDE.read_text(encoding="utf-8")
