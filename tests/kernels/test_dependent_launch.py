"""Kernels that begin while the one before ends: which do, how they are launched, and that they wait
first. The order of wait and memory in what is compiled: tests/kernels/aot_worker.py."""

import ast
import importlib
import inspect
import pkgutil
import sys

import pytest
import tiny
import torch
from kernel_checks import modules_to_compile

from cjepa_fast import kernels
from cjepa_fast.kernels.attention.backward import launch_attention_backward
from cjepa_fast.kernels.attention.descriptor_forward import BY_DESCRIPTORS
from cjepa_fast.kernels.attention.forward import launch_attention
from cjepa_fast.kernels.attention.two_pass_backward import TWO_PASSES
from cjepa_fast.kernels.common import dependent_launch, launch
from cjepa_fast.kernels.fp8 import launch_quantise
from cjepa_fast.kernels.gelu import launch_gelu, launch_gelu_backward
from cjepa_fast.kernels.norm import launch_add_norm, launch_add_norm_backward

sys.path.insert(0, str(tiny.ROOT / "bench"))  # no package: its scripts import each other by name

import stand_in

EARLY = {"PDL": True, "launch_pdl": True}


@pytest.fixture
def switched(monkeypatch):
    """Puts the switch back as it was."""
    monkeypatch.setattr(dependent_launch, "_on", False)
    return dependent_launch.use_dependent_launch


def with_the_argument() -> dict[str, ast.FunctionDef]:
    """The kernels that may begin early, by name, as their source has them."""
    found = {}
    for info in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        tree = ast.parse(inspect.getsource(importlib.import_module(info.name)))
        for one in ast.walk(tree):
            kernel = isinstance(one, ast.FunctionDef) and one.name.endswith("_kernel")
            if kernel and "PDL" in [a.arg for a in one.args.args]:
                found[one.name] = one
    return found


def test_the_wait_is_a_kernel_s_first_statement():
    """In a pipelined loop it comes after the loop's first loads."""
    found = with_the_argument()
    assert len(found) == 11
    for name, function in found.items():
        body = function.body[1:] if ast.get_docstring(function) else function.body
        assert ast.unparse(body[0]) == "wait_for_previous(PDL)", name
        assert ast.unparse(function.args.defaults[-1]) == "False", name


def test_each_is_compiled_ahead_of_time_as_it_begins_early():
    """With each number of stages, since the loads of a loop are moved by their number."""
    rows = [one for module in modules_to_compile().values() for one in module.ahead_of_time()]
    early = [one for one in rows if one.constexprs.get("PDL")]

    def kinds(some):
        names = with_the_argument()
        kinds = ((one.kernel.__name__, one.constexprs.get("STAGES")) for one in some)
        return {kind for kind in kinds if kind[0] in names}

    assert kinds(early) == kinds(rows) and len(kinds(early)) > len(with_the_argument())
    assert all(one.since >= 90 for one in early)
    assert all({*dependent_launch.INSTRUCTIONS} <= {*one.must_have} for one in early)


def launch_all() -> None:
    """Every launcher of a fused block, and of one whose target is in FP8."""
    x = torch.ones(8, 64, dtype=torch.bfloat16)
    s, h, stats = launch_add_norm(x, x, x[0], x[0], 1e-6)
    launch_add_norm_backward(h, None, s, x[0], stats)
    launch_gelu_backward(launch_gelu(x), x)
    launch_quantise(x)
    q, k, v = torch.ones(1, 8, 3 * 64, dtype=torch.bfloat16).chunk(3, -1)
    launch_attention(q, k, v, 2, BY_DESCRIPTORS[0])
    out, lse = launch_attention(q, k, v, 2)
    for tile in (None, TWO_PASSES[0]):
        grads = tuple(torch.empty_like(out) for _ in range(3))
        launch_attention_backward(out, q, k, v, out, lse, 2, grads, True, tile)


def launched() -> list[tuple[str, dict]]:
    """The kernels of launch_all, and of each what says that it may begin early."""
    told = []
    with stand_in.launches(told.append):
        launch_all()
    given = [(one.kernel.__name__, one.arguments | one.options) for one in told]
    return [(name, {key: all[key] for key in EARLY if key in all}) for name, all in given]


def test_a_launch_that_may_begin_early_is_of_a_kernel_that_waits(switched):
    ordinary = launched()
    assert {name for name, _ in ordinary} == with_the_argument().keys()
    assert not any(given for _, given in ordinary)
    switched(True)
    assert all(given == EARLY for _, given in launched())
    switched(False)
    assert launched() == ordinary


@pytest.mark.parametrize(
    ("architecture", "early"),
    [("cpu", False), ("sm_80", False), ("sm_89", False), ("sm_90", True), ("sm_100", True),
     ("sm_120", True)],
)  # fmt: skip
def test_gpus_without_it_are_given_nothing(switched, monkeypatch, architecture, early):
    switched(True)
    monkeypatch.setattr(launch, "architecture", lambda device: architecture)
    given = dependent_launch.dependent(torch.device("cpu"))
    assert given == (EARLY if early else {})


@pytest.mark.gpu
@pytest.mark.parametrize("recorded", [False, True], ids=["launched", "recorded"])
def test_the_bits_are_those_of_ordinary_launches(switched, recorded):
    """Each kernel reads what the one before writes last, between matmuls as in a block."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("from sm_90 on")
    torch.manual_seed(0)
    x, w = (torch.randn(n, 1280, device="cuda", dtype=torch.bfloat16) for n in (8192, 1280))

    def block() -> list[torch.Tensor]:
        s, h, stats = launch_add_norm(x @ w, x, x[0], x[1], 1e-6)
        u = h @ w
        du, sums = launch_gelu_backward(launch_gelu(u), u)
        d, more = launch_add_norm_backward(du @ w, s, s, x[0], stats)
        q, k, v = d.view(64, 128, 1280), h.view(64, 128, 1280), s.view(64, 128, 1280)
        out, lse = launch_attention(q, k, v, 16)
        grads = tuple(torch.empty_like(out) for _ in range(3))
        last = launch_attention_backward(out, q, k, v, out, lse, 16, grads, True)
        return [s, h, du, sums, d, *more, out, *grads, last]

    wanted = block()
    switched(True)
    got = block()
    if recorded:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = block()
    for _ in range(10):
        got = got if recorded else block()
        if recorded:
            graph.replay()
        for one, other in zip(got, wanted, strict=True):
            assert torch.equal(one.view(torch.int8), other.view(torch.int8))
