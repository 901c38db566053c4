"""A GPU stood in for: its launches, the host's share of a step, and Triton's cache made for it."""

import json
import os
import subprocess
import sys
import tarfile

import pytest
import tiny
import torch

sys.path.insert(0, str(tiny.ROOT / "bench"))  # no package: its scripts import each other by name

import stand_in

from cjepa_fast.kernels.common import launch
from cjepa_fast.kernels.gelu import launch_gelu
from cjepa_fast.kernels.norm import launch_add_norm

BENCH = tiny.ROOT / "bench"


def test_a_launch_is_told_by_its_arguments_and_computes_nothing():
    u, told = torch.full((4, 8), 2.0, dtype=torch.bfloat16), []
    with stand_in.launches(told.append):
        assert launch.use_kernel(u)
        out = launch_gelu(u, u)
        launch_add_norm(u, None, u[0], u[0], 1e-6)
    assert torch.equal(out, torch.full_like(u, 2.0)) and not launch.use_kernel(u)
    gelu, norm = told
    assert gelu.name == "gelu" and gelu.tensors.keys() == {"u", "out"}
    assert gelu.arguments["size"] == 32 and gelu.options.keys() == {"num_warps"}
    assert norm.name == "add_norm" and norm.arguments["ADD"] is False
    assert norm.tensors["x"] is u


def run(script: str, *args, **env) -> subprocess.CompletedProcess:
    """In a process of its own, since this one may interpret."""
    return subprocess.run(
        [sys.executable, str(BENCH / script), *map(str, args)],
        env=os.environ | env, capture_output=True, text=True, timeout=tiny.HANG_S,
    )  # fmt: skip


@pytest.mark.long
def test_a_cache_made_here_is_found_elsewhere(tmp_path):
    """The probe's kernel alone. Triton's lists of files are by whole paths, which are others there;
    without what was packed, the check says that nothing is found."""
    file, there = tmp_path / "folder" / "cache.tar.xz", tmp_path / "there"
    made = run("warm_cache.py", "--out", file, "--config")
    assert made.returncode == 0, made.stderr
    assert "1 kernels" in made.stdout
    found = run("warm_cache.py", "--unpack", file, TRITON_CACHE_DIR=str(there))
    assert found.returncode == 0 and "a hit" in found.stdout, found.stdout + found.stderr
    (group,) = there.glob("*/__grp__*.json")
    assert all(str(there) in path for path in json.loads(group.read_text())["child_paths"].values())

    other = tmp_path / "other.tar.xz"
    (group.parent / group.name).unlink()
    with tarfile.open(other, "w:xz") as tar:
        tar.add(there, arcname=".")
    missed = run("warm_cache.py", "--unpack", other, TRITON_CACHE_DIR=str(tmp_path / "third"))
    assert missed.returncode == 1 and "a miss" in missed.stdout


@pytest.mark.long
def test_a_missing_cache_is_told(tmp_path):
    done = run("warm_cache.py", "--unpack", tmp_path / "no.tar.xz")
    assert done.returncode == 2 and "no.tar.xz: no such file" in done.stderr


HOST = """
import sys
sys.path.insert(0, "bench")
import host, torch
config = host.narrow("vit_t", ["model.depth=3"])
assert (config.model.depth, config.predictor.depth, config.data.micro_batch_size) == (3, 6, 2)
assert config.model.width == 16 * 3
with host.Counted() as counted:
    x = torch.zeros(4, 4)
    x.view(16).transpose(0, 0).add_(1)  # a view, a view, a write
    torch.empty(3)
    y = x @ x
print(dict(counted.by_name))
small, large = (host.least_device_ms(host.configuration.load(name)) for name in ("vit_t", "vit_h"))
print(round(large), small < large / 3)
"""


@pytest.mark.long
def test_what_the_host_bench_counts(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HOST], cwd=tiny.ROOT, capture_output=True, text=True,
        env=os.environ | {"TRITON_INTERPRET": "0"}, timeout=tiny.HANG_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    counted, least = done.stdout.splitlines()
    assert counted == "{'zeros': 1, 'add_': 1, 'mm': 1}"
    assert least.endswith("True") and 150 < int(least.split()[0]) < 200  # docs: 173 ms of ViT-H


FILL = """
import sys
sys.path.insert(0, "bench")
import stand_in, warm_cache
seen = {"update_rows": set(), "tanh": set()}
def told(wanted=lambda launch: True):
    def take(launch):
        if not wanted(launch):
            return
        given = launch.arguments
        if launch.name == "ema_rows":
            seen["update_rows"].add((given["tensors"], given["COLS"]))
        if given.get("TANH") or given.get("FIRST") == "tanh gelu":
            seen["tanh"].add(launch.name)
    return stand_in.launches(take)
stand_in.compiling = told
warm_cache.fill(["vit_h"], [], ["graph_tanh_fp8_k78"])
print(sorted(seen["update_rows"]))
print(sorted(seen["tanh"]))
print(warm_cache.overrides_of("vit_b", "graph_fp8_k78"), warm_cache.overrides_of("vit_b", "graph"))
narrow = [*warm_cache.SHALLOW, *warm_cache.NARROW, "data.micro_batch_size=2"]
for more in (warm_cache.overrides_of("vit_h", *warm_cache.MORE), []):
    made = []
    with stand_in.launches(made.append):
        warm_cache.step_of("vit_h", narrow + more)
    print(*sorted({one.name for one in made if "launch_pdl" in one.options}))
"""


@pytest.mark.long
def test_the_cache_has_the_kernels_of_the_variants_too():
    """FP8's, with the EMA of the target's matrices in their own number and widths, tanh's, and
    those that begin while the one before ends."""
    done = subprocess.run(
        [sys.executable, "-c", FILL], cwd=tiny.ROOT, capture_output=True, text=True,
        env=os.environ | {"TRITON_INTERPRET": "0"}, timeout=tiny.HANG_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows, tanh, overrides, early, ordinary = done.stdout.splitlines()
    assert rows == "[(32, 5120), (96, 1280)]"
    assert tanh == "['gelu', 'gelu_backward', 'quantise']"
    assert overrides == "None ['mask.context=fixed']"
    backward = "add_norm_backward attention attention_backward gelu gelu_backward sum_parts"
    assert early == f"add_norm {backward}" and not ordinary
