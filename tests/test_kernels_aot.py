"""The kernels compiled for three architectures, in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton.language as tl
from kernel_checks import modules_to_compile

TESTS = Path(__file__).parent
TABLE = TESTS.parent / "bench" / "results" / "aot.md"


def worker(*args: str) -> subprocess.CompletedProcess:
    """aot_worker.py without the interpreter that this process may have."""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(TESTS.parent)
    command = [sys.executable, str(TESTS / "aot_worker.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_one_configuration_of_each_gather_on_hopper():
    done = worker("--module", "gather_tiles", "--arch", "90", "--only", "bf16 16x256")
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
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("arch", "which"), [(80, ["--one-each"]), (90, []), (100, ["--one-each"])])
def test_configurations(arch, which):
    """No spills, shared memory and registers that the device has, the instructions there. All of
    them on Hopper; the committed table is of all on all three architectures."""
    done = worker("--arch", str(arch), *which)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_committed_table_names_every_configuration():
    """Stale after a change of kernels: `python tests/aot_worker.py --markdown` makes it anew."""
    rows = {line.split(" | ")[0].removeprefix("| ") for line in TABLE.read_text().splitlines()}
    modules = modules_to_compile()
    assert modules.keys() >= {"gather_tiles", "ema"}
    for module in modules.values():
        assert {one.name for one in module.ahead_of_time()} <= rows
