"""Attention's kernels against each other, and the choice among them."""

import inspect
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch.nn.attention.varlen import varlen_attn

from cjepa_fast.config import ConfigError, validate
from cjepa_fast.model import attention, attention_trial
from cjepa_fast.model.attention import attend, attend_packed
from cjepa_fast.model.attention_trial import TRIED, Shape, candidates, fastest
from cjepa_fast.model.packed import evenly
from cjepa_fast.training import backends, build

CPU = torch.device("cpu")


def tensors(shape: Shape, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    sizes = [(shape.sequences, shape.heads, n, shape.width)
             for n in (shape.queries, shape.keys, shape.keys)]  # fmt: skip
    return [torch.randn(size, device=device, dtype=dtype, requires_grad=True) for size in sizes]


def errors(name: str, inputs: list[torch.Tensor]) -> list[float]:
    """Of the output and of each gradient, against float64."""
    out = attend(*inputs, name)
    upstream = torch.linspace(-1, 1, out.shape[-1], device=out.device).to(out.dtype).expand_as(out)
    found = [out, *torch.autograd.grad(out, inputs, upstream)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    true = attend(*wide, "plain")
    wanted = [true, *torch.autograd.grad(true, wide, upstream.double())]
    return [(f.double() - w).abs().max().item() for f, w in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("name", ["plain", "sdpa", "sdpa_flash"])
@pytest.mark.parametrize("lengths", [(7, 7), (3, 11), (1, 1)])
def test_backends_of_the_cpu(seed, name, lengths):
    shape = Shape(2, 3, *lengths, 8, True)
    inputs = tensors(shape, "cpu", torch.float32)
    assert max(errors(name, inputs)) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("width", [24, 32, 64, 80, 88, 128])
@pytest.mark.parametrize("lengths", [(196, 196), (66, 66), (36, 92)])
def test_backends_of_the_gpu(seed, width, lengths):
    """Each that takes the shape, in bf16: no worse than twice plain's own rounding."""
    shape, device = Shape(4, 3, *lengths, width, True), torch.device("cuda")
    inputs = tensors(shape, "cuda", torch.bfloat16)
    budget = [2 * e + 1e-2 for e in errors("plain", inputs)]
    tried = dict(attention_trial._calls(shape, device, torch.bfloat16))
    assert {"plain", "sdpa"} <= tried.keys()
    for name in tried:
        found = errors(name, inputs)
        assert all(e <= b for e, b in zip(found, budget, strict=True)), (name, found, budget)


def test_on_a_cpu_nothing_is_timed():
    assert fastest(Shape(2, 3, 7, 7, 8, True), CPU, torch.float32) == ("plain", {})


def test_the_fastest_that_takes_the_shape_is_chosen(monkeypatch):
    """In turns; one that raises for this shape is left out."""
    taken, order = {"plain": 3.0, "sdpa": 1.0, "sdpa_flash": 2.0}, []

    def trial(q, k, v, name):
        assert q.shape == (TRIED, 3, 7, 8) and k.shape == v.shape == (TRIED, 3, 5, 8)
        if name == "sdpa_cudnn":
            raise RuntimeError("No available kernel")
        if name == "flash_attn":  # as version 4 does on a GPU that it is not for
            raise AssertionError("Unsupported compute capability")
        order.append(name)
        return q * 1

    def timed(call, device):
        call()
        return taken[order[-1]]

    monkeypatch.setattr(attention_trial, "attend", trial)
    monkeypatch.setattr(attention_trial, "_timed_ms", timed)
    monkeypatch.setattr(
        attention_trial, "candidates", lambda device: [*taken, "sdpa_cudnn", "flash_attn"]
    )
    name, medians = fastest(Shape(5000, 3, 7, 5, 8, False), CPU, torch.float32)
    assert (name, medians) == ("sdpa", taken)
    assert order[3:9] == [*taken, *taken]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("queries", [5, 3])
def test_a_trial_runs_what_a_block_runs_around_the_kernel(monkeypatch, fused, queries):
    """Gradients back to the projection's output, side by side, and of its bias where that is
    fused."""
    asked = []

    def grad(out, inputs, upstream, **options):
        asked.append([tuple(x.shape) for x in inputs])
        found = real(out, inputs, upstream, **options)
        assert out.shape == (4, queries, 24) and [x is None for x in found[:-1]] == [False] * parts
        assert (found[-1] is None) == (not fused)

    real, parts = torch.autograd.grad, 1 + (queries == 3)
    monkeypatch.setattr(torch.autograd, "grad", grad)
    shape = Shape(4, 3, queries, 5, 8, True, fused=fused)
    attention_trial._call_by_name(shape, CPU, torch.float32)("plain")
    whole = {5: [(4, 5, 72)], 3: [(4, 3, 24), (4, 5, 48)]}
    assert asked == [[*whole[queries], (72,)]]


def test_on_a_gpu_the_device_is_kept_busy_before_a_call_is_timed(monkeypatch):
    """Else a call that takes the host longer than the device is timed at the host's pace."""
    told = []

    class Event:
        def __init__(self, enable_timing):
            self.name = "event"

        def record(self):
            told.append("event")

        def elapsed_time(self, end):
            return 5.0

    class Queued:
        def zero_(self):
            told.append("queued")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: told.append("wait"))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: Queued())
    gpu = torch.device("cuda", 0)
    assert attention_trial._timed_ms(lambda: told.append("call"), gpu) == 5.0
    assert told == ["queued"] * attention_trial.QUEUED + ["event", "call", "event", "wait"]


def test_packed_sequences_are_timed_by_the_kernels_that_take_them(monkeypatch):
    tried = []

    def trial(q, k, v, queries, keys, name):
        assert q.shape == (TRIED * 7, 3, 8) and k.shape == v.shape == (TRIED * 5, 3, 8)
        assert (len(queries.starts), queries.longest, keys.longest) == (TRIED + 1, 7, 5)
        tried.append(name)
        return q * 1

    monkeypatch.setattr(attention_trial, "attend_packed", trial)
    monkeypatch.setattr(attention_trial, "candidates", lambda device: attention.BACKENDS)
    _, medians = fastest(Shape(5000, 3, 7, 5, 8, False, packed=True), CPU, torch.float32)
    assert set(medians) == set(tried) == {"plain", "sdpa_flash", "flash_attn"}


def test_packed_sequences_reach_the_kernels_by_the_right_names(monkeypatch):
    """flash-attn's versions order their arguments differently; torch's are given by position."""
    order = ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert list(inspect.signature(varlen_attn).parameters)[:7] == order
    queries, keys = evenly(3, 2), evenly(3, 4)
    inputs = [torch.randn(int(s.starts[-1]), 2, 8) for s in (queries, keys, keys)]

    def varlen(q, k, v, **named):
        starts, longest = (queries.starts, keys.starts), (2, 4)
        assert (named["cu_seqlens_q"], named["cu_seqlens_k"]) == starts
        assert (named["max_seqlen_q"], named["max_seqlen_k"]) == longest
        return attend_packed(q, k, v, queries, keys, "plain"), "log-sum-exp"

    attention.flash_attention.cache_clear()
    stand_in = SimpleNamespace(flash_attn_varlen_func=varlen)
    for module in attention.FLASH_MODULES:
        monkeypatch.setitem(sys.modules, module, stand_in)
    out = attend_packed(*inputs, queries, keys, "flash_attn")
    assert torch.equal(out, attend_packed(*inputs, queries, keys, "plain"))
    attention.flash_attention.cache_clear()


@pytest.mark.parametrize(
    ("context", "mode"),
    [("random", "per_target"), ("random", "one_pass"), ("packed", "per_target")],
)
def test_each_network_gets_the_kernel_of_its_own_lengths(monkeypatch, context, mode):
    def by_length(shape, device, dtype):
        assert shape.packed == (context == "packed" and shape.trained) and shape.width == 8
        lengths = f"{shape.queries} x {shape.keys}"
        return f"for {lengths} in {shape.sequences}, trained {shape.trained}", {}

    monkeypatch.setattr(backends, "fastest", by_length)
    predictor = tiny.CONFIG["predictor"] | {"mode": mode}
    mask = {"min_keep": 4, "context": context}
    config = validate(tiny.CONFIG | {"predictor": predictor, "mask": mask})
    config = build.with_precision(config, CPU)
    networks, target = build.build_networks(config), build.build_networks(config).encoder
    heads = networks.predictor.predictor_blocks[0].attn
    monkeypatch.setattr(heads.proj, "in_features", 24)
    choices = backends.choose_attention(networks, target, config, CPU, 8)
    masks = build.build_masks(config)(0, 0, torch.arange(8))
    K, (M, P) = round(masks.context_k), masks.target_idx_BMP.shape[1:]
    own = P if mode == "one_pass" else K + P
    assert choices == {
        "target": "for 36 x 36 in 8, trained False",
        "context": f"for {K} x {K} in 8, trained True",
        "predictor": f"for {own} x {K + P} in {8 * M}, trained True",
    }
    assert {block.attn.backend for block in target.blocks} == {choices["target"]}
    assert {block.attn.backend for block in networks.encoder.blocks} == {choices["context"]}


@pytest.mark.parametrize("takes_it", [True, False])
def test_the_last_block_of_the_predictor_has_a_kernel_for_fewer_queries(monkeypatch, takes_it):
    """Else a kernel chosen for the others ends the first step."""
    monkeypatch.setattr(backends, "fastest", lambda *_: ("sdpa_flash", {}))

    def refused(shape, *_):
        return "" if takes_it or shape.queries == shape.keys else "no kernel"

    monkeypatch.setattr(backends, "unusable", refused)
    sections = {"predictor": tiny.CONFIG["predictor"] | {"depth": 2}}
    config = build.with_precision(validate(tiny.CONFIG | sections), CPU)
    networks, target = build.build_networks(config), build.build_networks(config).encoder
    assert backends.choose_attention(networks, target, config, CPU, 8)["predictor"] == "sdpa_flash"
    *others, last = (block.attn.backend for block in networks.predictor.predictor_blocks)
    assert others == ["sdpa_flash"]
    assert last == ("sdpa_flash" if takes_it else "sdpa")
    assert {block.attn.backend for block in networks.encoder.blocks} == {"sdpa_flash"}


def test_a_resumed_run_keeps_its_kernels_where_they_work(monkeypatch):
    """Timed anew, another could win by chance, and the bits that follow would be others."""
    monkeypatch.setattr(backends, "fastest", lambda *_: ("plain", {}))
    monkeypatch.setattr(backends, "candidates", lambda device: ["plain", "sdpa", "sdpa_cudnn"])
    config = build.with_precision(validate(tiny.CONFIG), CPU)
    networks, target = build.build_networks(config), build.build_networks(config).encoder
    saved = {"target": "sdpa", "context": "sdpa_cudnn", "predictor": "flash_attn"}
    found = backends.choose_attention(networks, target, config, CPU, 8, saved)
    assert found == {"target": "sdpa", "context": "plain", "predictor": "plain"}
    assert {block.attn.backend for block in target.blocks} == {"sdpa"}


@pytest.mark.parametrize(
    ("asked", "context", "runs"),
    [("sdpa", "random", ("sdpa",) * 3), ("triton", "random", ("plain",) * 3),
     ("triton", "packed", ("plain",) * 3),
     ("sdpa_flash", "packed", ("sdpa_flash", "plain", "plain"))],
)  # fmt: skip
def test_what_runs_in_the_place_of_a_backend_that_does_not_take_a_shape_is_told(
    asked, context, runs
):
    sections = {"model": {"attention": asked}, "mask": {"context": context}}
    config = validate({name: tiny.CONFIG.get(name, {}) | own for name, own in sections.items()})
    config = build.with_precision(config, CPU)
    networks, target = build.build_networks(config), build.build_networks(config).encoder
    found = backends.choose_attention(networks, target, config, CPU, 8)
    assert tuple(found.values()) == runs


def test_a_backend_without_a_kernel_here_is_told_before_the_first_step():
    model = tiny.CONFIG["model"] | {"attention": "sdpa_cudnn"}
    config = build.with_precision(validate(tiny.CONFIG | {"model": model}), CPU)
    networks, target = build.build_networks(config), build.build_networks(config).encoder
    with pytest.raises(ConfigError, match=r'attention = "sdpa_cudnn".*target here.*take "auto"'):
        backends.choose_attention(networks, target, config, CPU, 8)


def test_flash_attention_is_found_by_version_or_named(monkeypatch):
    attention.flash_attention.cache_clear()
    for module in attention.FLASH_MODULES:
        monkeypatch.setitem(sys.modules, module, None)  # an import of it fails
    with pytest.raises(ValueError, match=r"flash_attn\.cute.*flash_attn_interface.*pip install"):
        attention.flash_attention()

    def third(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v))
        ).transpose(1, 2), "log-sum-exp"

    stand_in = SimpleNamespace(flash_attn_func=third)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", stand_in)
    inputs = tensors(Shape(2, 3, 4, 6, 8, True), "cpu", torch.float32)
    torch.testing.assert_close(attend(*inputs, "flash_attn"), attend(*inputs, "plain"))
    assert candidates(CPU) == ["plain"]
    attention.flash_attention.cache_clear()


def test_a_flash_attention_of_other_gpus_hides_no_other(monkeypatch):
    """Version 4 loads on an A100, and has no kernel for it."""
    attention.flash_attention.cache_clear()
    for module in attention.FLASH_MODULES:
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(flash_attn_func=module))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = []
    for capability in ((8, 0), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        found.append(attention.flash_attention())
        attention.flash_attention.cache_clear()
    assert found == ["flash_attn_interface", "flash_attn.cute", "flash_attn.cute", "flash_attn"]
