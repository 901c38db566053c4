"""Linear layers on a CPU: each way as good as torch's own against float64, with every gradient."""

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import FLOOR, within_budget

from cjepa_fast.kernels.gelu import APPROXIMATE
from cjepa_fast.model import cpu_linear as linears
from cjepa_fast.model.cpu_linear import LinearBackends, LinearUse
from cjepa_fast.runtime import hardware

SHAPES = [((3, 7, 16), 24), ((5, 8), 1), ((1, 33), 40), ((0, 8), 4)]
PLAIN = {
    "linear": F.linear,
    "linear_gelu": lambda x, weight, bias, kind="exact": F.gelu(
        F.linear(x, weight, bias), approximate=APPROXIMATE[kind]
    ),
}
ONEDNN = LinearBackends("onednn", "onednn", "onednn")


@pytest.fixture(params=["bf16 instructions", "no bf16 instructions", "fp32: torch", "fp32: onednn"])
def way(request, monkeypatch) -> torch.dtype:
    """Each way that a call can take: its dtype."""
    library = linears.in_use()
    if request.param.startswith("fp32"):
        if request.param.endswith("onednn") and not hardware.onednn_linear_works(torch.float32):
            pytest.skip("this torch has no oneDNN Linear")
        linears.use(ONEDNN if request.param.endswith("onednn") else LinearBackends())
    elif request.param == "no bf16 instructions":
        monkeypatch.setattr(hardware, "cpu_multiplies_bf16", lambda: False)
    elif not hardware.cpu_multiplies_bf16():
        pytest.skip(f"{hardware.processor_name()} multiplies no bf16 ({hardware.tier()})")
    yield torch.float32 if request.param.startswith("fp32") else torch.bfloat16
    linears.use(library)


def inputs(shape: tuple[int, ...], out: int, dtype: torch.dtype) -> list[torch.Tensor]:
    made = torch.randn(shape), torch.randn(out, shape[-1]), torch.randn(out)
    return [x.to(dtype).requires_grad_() for x in made]


@pytest.mark.parametrize(("shape", "out"), SHAPES)
@pytest.mark.parametrize("name", PLAIN)
def test_values_and_gradients_within_the_error_budget(seed, way, name, shape, out):
    tensors, grad = inputs(shape, out, way), torch.randn(*shape[:-1], out).to(way)
    found = []
    for function, dtype in (
        (getattr(linears, name), way), (PLAIN[name], way), (PLAIN[name], torch.float64)
    ):  # fmt: skip
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        result = function(*leaves)
        found.append([result.detach(), *torch.autograd.grad(result, leaves, grad.to(dtype))])
    for ours, eager, exact, amount in zip(*found, summed(tensors, grad), strict=True):
        within_budget(ours, eager, exact, way, floor=floor_of(way, amount, exact))


def summed(tensors: list[torch.Tensor], grad: torch.Tensor) -> list[float]:
    """The largest sum of absolute terms behind the result, and behind each gradient: what sums in
    another order are off by is a share of that, however much of it cancels."""
    leaves = [x.detach().double().abs().requires_grad_() for x in tensors]
    result = F.linear(*leaves)
    every = [result.detach(), *torch.autograd.grad(result, leaves, grad.double().abs())]
    return [found.max().item() if found.numel() else 0.0 for found in every]


def floor_of(dtype: torch.dtype, amount: float, exact: torch.Tensor) -> float:
    scale = exact.abs().max().item() if exact.numel() else 1.0
    return FLOOR[dtype] * max(1.0, amount / scale) if scale else FLOOR[dtype]


@pytest.mark.parametrize("kind", APPROXIMATE)
@pytest.mark.parametrize(("shape", "out"), SHAPES[:2])
def test_gelu_in_the_matmul_where_no_gradient_is_asked(seed, way, shape, out, kind):
    tensors = inputs(shape, out, way)
    with torch.no_grad():
        ours = linears.linear_gelu(*tensors, kind)
        eager = PLAIN["linear_gelu"](*tensors, kind)
        exact = PLAIN["linear_gelu"](*(x.double() for x in tensors), kind)
    amount = summed(tensors, exact)[0]
    within_budget(ours, eager, exact, way, floor=floor_of(way, amount, exact))


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_each_kind_of_gelu_is_its_own_with_and_without_gradients(way, kind):
    """Where they differ by 4.7e-4, a hundredth of their value there."""
    x = torch.tensor([[-2.25, 0.0]], dtype=way)
    eye, bias = torch.eye(2, dtype=way), torch.zeros(2, dtype=way)
    wanted = F.gelu(x[0, 0].double(), approximate=APPROXIMATE[kind]).item()
    for asked in (False, True):
        with torch.set_grad_enabled(asked):
            found = linears.linear_gelu(x, eye, bias, kind)[0, 0].item()
        assert abs(found / wanted - 1) < (1e-5 if way == torch.float32 else 0.005)


@pytest.mark.parametrize("way", ["fp32: torch"], indirect=True)
def test_without_a_trial_fp32_is_torchs_own(seed, way):
    assert linears.in_use() == LinearBackends()
    tensors = inputs((3, 8), 5, torch.float32)
    assert torch.equal(linears.linear(*tensors), F.linear(*tensors))
    assert torch.equal(linears.linear_gelu(*tensors), F.gelu(F.linear(*tensors)))
    tanh = F.gelu(F.linear(*tensors), approximate="tanh")
    assert torch.equal(linears.linear_gelu(*tensors, "tanh"), tanh)


def test_a_part_that_is_not_trained_gets_no_gradient(seed, way):
    x, weight, bias = inputs((3, 8), 5, way)
    weight.requires_grad_(False)
    linears.linear(x, weight, bias).sum().backward()
    assert weight.grad is None and x.grad is not None and bias.grad is not None


def test_autocast_is_left_to_torch(seed, way):
    tensors = inputs((3, 8), 5, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert linears.linear(*tensors).dtype == torch.bfloat16
        with torch.no_grad():
            assert linears.linear_gelu(*tensors).dtype == torch.bfloat16


def test_the_faster_library_is_taken_for_each_kind_of_call(monkeypatch):
    """By the sum over all uses; of what is not trained no backward is timed."""
    took = {"forward": (1.0, 0.5), "backward": (1.0, 0.97), "gelu": (1.0, 2.0)}  # torch, oneDNN
    asked = []

    def trial(kind: str, one: LinearUse):
        asked.append((kind, one.trained))
        return took[kind]

    monkeypatch.setattr(linears, "_trial", trial)
    monkeypatch.setattr(linears, "_seconds", lambda seconds: seconds)
    monkeypatch.setattr(hardware, "onednn_linear_works", lambda dtype: True)
    uses = [LinearUse(4, 8, 8, True), LinearUse(4, 8, 8, False)]
    assert linears.fastest(uses) == LinearBackends("onednn", "torch", "torch")
    assert ("backward", False) not in asked and ("forward", False) in asked
    monkeypatch.setattr(hardware, "onednn_linear_works", lambda dtype: False)
    assert linears.fastest(uses) == LinearBackends()
    linears.use(ONEDNN)
    assert linears.in_use() == LinearBackends()


def test_a_real_trial_runs(seed):
    assert set(linears.fastest([LinearUse(6, 8, 12, True)])) <= {"torch", "onednn"}
