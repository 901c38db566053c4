"""The fused product on bf16 CPUs: as good as torch's own against float64, with every gradient."""

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import within_budget

from cjepa_fast import linear as linears

SHAPES = [((3, 7, 16), 24), ((5, 8), 1), ((1, 33), 40), ((0, 8), 4)]


def inputs(shape: tuple[int, ...], out: int) -> list[torch.Tensor]:
    made = torch.randn(shape), torch.randn(out, shape[-1]), torch.randn(out)
    return [x.bfloat16().requires_grad_() for x in made]


@pytest.mark.skipif(linears._fused is None, reason="this torch has no oneDNN")
@pytest.mark.parametrize(("shape", "out"), SHAPES)
@pytest.mark.parametrize("name", ["linear", "linear_gelu"])
def test_values_and_gradients_within_the_error_budget(seed, name, shape, out):
    plain = {"linear": F.linear, "linear_gelu": lambda *args: F.gelu(F.linear(*args))}[name]
    tensors, grad = inputs(shape, out), torch.randn(*shape[:-1], out).bfloat16()
    assert linears._fusable(*tensors)
    found = []
    for function, dtype in (
        (getattr(linears, name), torch.bfloat16), (plain, torch.bfloat16), (plain, torch.float64)
    ):  # fmt: skip
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        result = function(*leaves)
        found.append([result.detach(), *torch.autograd.grad(result, leaves, grad.to(dtype))])
    for ours, eager, exact in zip(*found, strict=True):
        within_budget(ours, eager, exact, torch.bfloat16)


@pytest.mark.parametrize(("shape", "out"), SHAPES[:2])
def test_gelu_in_the_product_where_no_gradient_is_asked(seed, shape, out):
    tensors = inputs(shape, out)
    with torch.no_grad():
        ours = linears.linear_gelu(*tensors)
        eager = F.gelu(F.linear(*tensors))
        exact = F.gelu(F.linear(*(x.double() for x in tensors)))
    within_budget(ours, eager, exact, torch.bfloat16)


def test_fp32_is_torchs_own(seed):
    tensors = [x.float() for x in inputs((3, 8), 5)]
    assert torch.equal(linears.linear(*tensors), F.linear(*tensors))
    assert torch.equal(linears.linear_gelu(*tensors), F.gelu(F.linear(*tensors)))


def test_a_part_that_is_not_trained_gets_no_gradient(seed):
    x, weight, bias = inputs((3, 8), 5)
    weight.requires_grad_(False)
    linears.linear(x, weight, bias).sum().backward()
    assert weight.grad is None and x.grad is not None and bias.grad is not None
