"""GELU and its backward against the definition in float64: values, gradients, sums of columns."""

import math

import pytest
import torch
from kernel_checks import FLOOR, same_bits, within_budget

from cjepa_fast.kernels import gelu
from cjepa_fast.kernels.gelu import launch_gelu, launch_gelu_backward

DTYPES = [torch.bfloat16, torch.float16]  # what fused_ops.py asks it for
SHAPES = {
    "aligned": (64, 256),
    "ragged": (37, 72),
    "prime": (41, 67),
    "one": (1, 1),
    "power of two minus one": (15, 127),
    "wide": (3, 1100),
    "no row": (0, 8),
}
# The gate and its slope are off by so much of the largest |u|, or of 1: nothing beside a value of
# 1, but more than fp16's rounding where all there is of u is one number in a tail.
GATE_ERROR, SLOPE_ERROR = 2e-7, 1e-6


def tensors(shape: tuple[int, int], device: str, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Values on both sides of zero, far enough for the tails; an upstream gradient."""
    return tuple((scale * torch.randn(shape)).to(device, dtype) for scale in (2.5, 1.0))


def definition(u: torch.Tensor, dg: torch.Tensor, kind: str, dtype=None) -> dict:
    u = u.to(dtype or u.dtype).detach().requires_grad_()
    out = gelu.gelu_reference(u, kind)
    (du,) = torch.autograd.grad(out, u, dg.to(out.dtype))
    return {"out": out.detach(), "du": du, "sums": du.sum(0)}


def floor(name: str, u: torch.Tensor, dg: torch.Tensor, wanted: torch.Tensor) -> float | None:
    """Share of the largest value: fp16's or bf16's rounding and the gate's or its slope's error."""
    if not len(u):
        return None
    error = GATE_ERROR if name == "out" else SLOPE_ERROR * dg.abs().amax().item()
    size = u.abs().amax().clamp(min=1).item()
    return FLOOR[u.dtype] + error * size / wanted.abs().amax().item()


def check(u: torch.Tensor, dg: torch.Tensor, kind: str, block=None, tile=None) -> None:
    du, sums = launch_gelu_backward(dg, u, tile, kind)
    got = {"out": launch_gelu(u, None, block, kind), "du": du, "sums": sums}
    eager, exact = definition(u, dg, kind), definition(u, dg, kind, torch.float64)
    for name, wanted in exact.items():
        within_budget(got[name], eager[name], wanted, u.dtype, name, floor(name, u, dg, wanted))


def test_one_value_in_a_tail_is_within_the_error_budget(kernel_device):
    """Of fp16, where the gate's own error is more than the rounding: seed 1148492590 met it."""
    torch.manual_seed(1148492590)
    check(*tensors((1, 1), kernel_device, torch.float16), "exact")


@pytest.fixture(params=gelu.APPROXIMATE)
def kind(request) -> str:
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_gradients_and_sums_are_within_the_error_budget(
    seed, kernel_device, shape, dtype, kind
):
    check(*tensors(shape, kernel_device, dtype), kind)


@pytest.mark.parametrize("block", gelu.BLOCKS)
def test_every_block(seed, kernel_device, block, kind):
    check(*tensors((9, 700), kernel_device, torch.bfloat16), kind, block=block)


@pytest.mark.parametrize("tile", gelu.TILES, ids=str)
def test_every_tile(seed, kernel_device, tile, kind, monkeypatch):
    """Several columns' tiles, and programs that take several times their rows."""
    monkeypatch.setattr(gelu, "PROGRAMS", 6)
    check(*tensors((101, 700), kernel_device, torch.bfloat16), kind, tile=tile)


def test_it_is_the_exact_gelu_and_not_tanhs(seed, kernel_device):
    """Within 2e-7 of Phi, on the whole range, its tails and its zero."""
    u = torch.cat([torch.linspace(-12, 12, 4801), torch.tensor([0.0, -0.0, 1e-30, 40.0])])
    out = launch_gelu(u.to(kernel_device)).cpu().double()
    exact = torch.tensor([x * 0.5 * math.erfc(-x / math.sqrt(2)) for x in u.tolist()])
    assert ((out - exact.double()).abs() <= GATE_ERROR * u.abs().clamp(min=1)).all()
    assert (torch.nn.functional.gelu(u, approximate="tanh") - exact).abs().max() > 1e-4


def test_tanh_s_is_within_fp32_of_its_definition(seed, kernel_device):
    """The gate and its slope, on the whole range; and it is at most 5e-4 from the exact one."""
    u = torch.cat([torch.linspace(-12, 12, 4801), torch.tensor([0.0, -0.0, 1e-30, 40.0, -40.0])])
    dg, on_device = torch.ones(len(u)), u.to(kernel_device)
    wanted = definition(u, dg, "tanh", torch.float64)
    out = launch_gelu(on_device, kind="tanh").cpu().double()
    du, _ = launch_gelu_backward(dg.to(kernel_device)[None], on_device[None], kind="tanh")
    size = u.abs().clamp(min=1).double()
    assert ((out - wanted["out"]).abs() <= GATE_ERROR * size).all()
    assert ((du[0].cpu().double() - wanted["du"]).abs() <= SLOPE_ERROR * size).all()
    apart = (out - definition(u, dg, "exact", torch.float64)["out"]).abs().max()
    assert 1e-4 < apart < 5e-4


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of the interpreter, in u * u
@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
def test_the_largest_values_are_as_they_should_be(kernel_device, dtype, kind):
    """No cube overflows into a NaN: gelu is u or 0 there, and its slope 1 or 0."""
    top = torch.finfo(dtype).max
    u = torch.tensor([[top, top / 2, 3e4, 17.0], [-top, -top / 2, -3e4, -17.0]], dtype=dtype)
    u, dg = u.to(kernel_device), torch.full((2, 4), 0.5, dtype=dtype, device=kernel_device)
    out, (du, _) = launch_gelu(u, kind=kind), launch_gelu_backward(dg, u, kind=kind)
    assert torch.equal(out[0], u[0]) and not out[1].any()
    assert torch.equal(du[0], dg[0]) and not du[1].any()


def test_in_place_and_the_same_bits_twice(seed, kernel_device, kind):
    u, dg = tensors((33, 72), kernel_device, torch.bfloat16)
    same_bits(lambda: (launch_gelu(u, kind=kind), *launch_gelu_backward(dg, u, kind=kind)))
    out, own = launch_gelu(u, kind=kind), u.clone()
    assert launch_gelu(own, own, kind=kind) is own and torch.equal(own, out)


@pytest.mark.filterwarnings("ignore:.*(NaN|invalid value):RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so(seed, kernel_device, value, kind):
    u, dg = tensors((3, 8), kernel_device, torch.bfloat16)
    u[1, 2] = value
    found = launch_gelu(u, kind=kind), launch_gelu_backward(dg, u, kind=kind)[0]
    wrong = ~torch.stack(found).isfinite()
    assert wrong.nonzero()[:, 1:].tolist() == [[1, 2], [1, 2]]
