"""GELU and its backward against the definition in float64: values, gradients, sums of columns."""

import math

import pytest
import torch
from kernel_checks import same_bits, within_budget

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


def tensors(shape: tuple[int, int], device: str, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Values on both sides of zero, far enough for the tails; an upstream gradient."""
    return tuple((scale * torch.randn(shape)).to(device, dtype) for scale in (2.5, 1.0))


def definition(u: torch.Tensor, dg: torch.Tensor, dtype=None) -> dict[str, torch.Tensor]:
    u = u.to(dtype or u.dtype).detach().requires_grad_()
    out = gelu.gelu_reference(u)
    (du,) = torch.autograd.grad(out, u, dg.to(out.dtype))
    return {"out": out.detach(), "du": du, "sums": du.sum(0)}


def check(u: torch.Tensor, dg: torch.Tensor, block=None, tile=None) -> None:
    du, sums = launch_gelu_backward(dg, u, tile)
    got = {"out": launch_gelu(u, None, block), "du": du, "sums": sums}
    eager, exact = definition(u, dg), definition(u, dg, torch.float64)
    for name, wanted in exact.items():
        within_budget(got[name], eager[name], wanted, u.dtype, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_gradients_and_sums_are_within_the_error_budget(seed, kernel_device, shape, dtype):
    check(*tensors(shape, kernel_device, dtype))


@pytest.mark.parametrize("block", gelu.BLOCKS)
def test_every_block(seed, kernel_device, block):
    check(*tensors((9, 700), kernel_device, torch.bfloat16), block=block)


@pytest.mark.parametrize("tile", gelu.TILES, ids=str)
def test_every_tile(seed, kernel_device, tile, monkeypatch):
    """Several columns' tiles, and programs that take several times their rows."""
    monkeypatch.setattr(gelu, "PROGRAMS", 6)
    check(*tensors((101, 700), kernel_device, torch.bfloat16), tile=tile)


def test_it_is_the_exact_gelu_and_not_tanhs(seed, kernel_device):
    """Within 2e-7 of Phi, on the whole range, its tails and its zero."""
    u = torch.cat([torch.linspace(-12, 12, 4801), torch.tensor([0.0, -0.0, 1e-30, 40.0])])
    out = launch_gelu(u.to(kernel_device)).cpu().double()
    exact = torch.tensor([x * 0.5 * math.erfc(-x / math.sqrt(2)) for x in u.tolist()])
    assert ((out - exact.double()).abs() <= 2e-7 * u.abs().clamp(min=1)).all()
    assert (torch.nn.functional.gelu(u, approximate="tanh") - exact).abs().max() > 1e-4


def test_in_place_and_the_same_bits_twice(seed, kernel_device):
    u, dg = tensors((33, 72), kernel_device, torch.bfloat16)
    same_bits(lambda: (launch_gelu(u), *launch_gelu_backward(dg, u)))
    out, own = launch_gelu(u), u.clone()
    assert launch_gelu(own, own) is own and torch.equal(own, out)


@pytest.mark.filterwarnings("ignore:.*(NaN|invalid value):RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so(seed, kernel_device, value):
    u, dg = tensors((3, 8), kernel_device, torch.bfloat16)
    u[1, 2] = value
    wrong = ~torch.stack([launch_gelu(u), launch_gelu_backward(dg, u)[0]]).isfinite()
    assert wrong.nonzero()[:, 1:].tolist() == [[1, 2], [1, 2]]
