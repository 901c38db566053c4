"""VICReg's kernels against the definition in float64: terms, gradient, every configuration."""

import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_checks import FLOOR, check_operator, compiles_whole, same_bits, within_budget
from parameters import crossed

from cjepa_fast.kernels.common import launch
from cjepa_fast.kernels.vicreg import (
    backward,
    columns,
    forward,
    terms,
    tiles,
    vicreg_terms,
    vicreg_terms_reference,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

SHAPES = {  # (M, n, D): n >= D takes the moments of the columns, n < D the Gram matrix of the rows
    "aligned": (1, 128, 64),  # full tiles only
    "ragged": (2, 70, 40),  # a rest in rows and in columns
    "prime": (1, 67, 37),
    "power of two minus one": (1, 127, 63),
    "square": (1, 40, 40),
    "several tiles": (1, 150, 140),
    "several stretches": (1, 700, 9),  # of rows, in all launches
    "one column": (2, 33, 1),
    "two rows, one column": (1, 2, 1),
    "gram aligned": (1, 64, 128),
    "gram ragged": (3, 37, 70),
    "gram prime": (1, 29, 67),
    "gram several tiles": (1, 140, 150),
    "gram several stretches": (2, 9, 700),
    "gram two rows": (1, 2, 5),
}


def spread(*shape: int, device: str = "cpu") -> torch.Tensor:
    """fp32, columns correlated, of means and of standard deviations on both sides of gamma = 1."""
    *_, D = shape
    scale = torch.linspace(0.3, 1.7, D)
    mix = torch.eye(D) + 0.4 * torch.randn(D, D) / max(D, 1) ** 0.5
    return (torch.randn(*shape) * scale @ mix + torch.randn(D)).to(device)


def outcome(function, z: torch.Tensor, slopes: torch.Tensor, **arguments) -> dict:
    """The terms, and the gradient at z of their sum weighted by the two slopes."""
    z = z.detach().requires_grad_()
    std, cov, per_dim = function(z, **arguments)
    (dz,) = torch.autograd.grad(slopes[0].to(std) * std + slopes[1].to(cov) * cov, z)
    return {"std": std.detach(), "cov": cov.detach(), "per_dim": per_dim, "dz": dz}


def check(z: torch.Tensor, function=vicreg_terms, **arguments) -> dict:
    """The function within the error budget of z's dtype, under random slopes of the terms."""
    slopes = torch.randn(2, dtype=torch.float64)
    reference = functools.partial(outcome, vicreg_terms_reference, slopes=slopes, **arguments)
    got, eager = outcome(function, z, slopes, **arguments), reference(z)
    exact = reference(z.double())
    assert got["dz"].dtype == z.dtype and got["std"].dtype == torch.float32
    for name, wanted in exact.items():
        # std and its parts are fp32 whatever z is; cov and dz hold values rounded to z's dtype.
        dtype = torch.float32 if name in ("std", "per_dim") else z.dtype
        added = subtrahend(name, z, slopes, **arguments)
        floor = 2.0**-21 if name in ("cov", "dz") else FLOOR[torch.float32]  # two halves of tf32
        floor = max(floor, FLOOR[dtype])
        if name == "cov":
            amount = amount_of(z.double())
            floor *= max(1.0, (amount / (wanted + added)).nan_to_num(0.0, posinf=0.0).item())
        sums = (x.double() + added for x in (got[name], eager[name], wanted))
        within_budget(*sums, dtype, name, floor)
        if name == "cov":  # what two halves of bf16 leave, whatever z's own rounding is
            assert (got[name] - wanted).abs() <= 2.0**-16 * (amount + 2 * added)
    return got


def amount_of(z: torch.Tensor) -> torch.Tensor:
    """cov with the absolute value of each product in one of its factors, and twice: how far it
    moves by a relative error of the products. Where none cancel it is 2 cov."""
    z = z.detach()
    x, n = z - z.mean(-2, keepdim=True), z.shape[-2]
    c, a = (y.transpose(-1, -2) @ y / (n - 1) for y in (x, x.abs()))
    beside = c.abs() * a
    pairs = beside.sum((-2, -1)) - beside.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (2 * pairs / z.shape[-1]).mean()


def subtrahend(
    name: str, z: torch.Tensor, slopes: torch.Tensor, gamma: float = 1.0, eps: float = 1e-4
) -> float:
    """What a term is the difference from: rounding is relative to that, not to a small difference.

    The hinge is gamma minus a standard deviation; the Gram's cov_loss is |K|^2 minus the variances'
    and so is its gradient: 4 / (M D (n - 1)) (K x / (n - 1) - var x) of a centred row x. Where one
    column holds most of the variance they cancel (of two rows and five columns a draw had 0.18
    left of 0.40 minus 0.22; its error, 3e-7 of the 0.40, was over a budget of the 0.18 alone).
    """
    n, D = z.shape[-2:]
    if name in ("cov", "dz") and n < D:
        exact = z.detach().double().requires_grad_()
        variances = exact.var(-2).square().sum(-1).mean() / D
        if name == "cov":
            return variances.item()
        (dz,) = torch.autograd.grad(slopes[1] * variances, exact)
        return dz.abs().max().item()
    return gamma if name == "std" else 0.0


@pytest.mark.parametrize(("shape", "dtype"), crossed(SHAPES, DTYPES))
def test_terms_and_gradient_are_within_the_error_budget(seed, kernel_device, shape, dtype):
    check(spread(*shape, device=kernel_device).to(dtype))


@pytest.mark.parametrize(("gamma", "eps"), [(1.3, 1e-2), (0.4, 1e-6)])
@pytest.mark.parametrize("shape", [(40, 24), (20, 37)])
def test_gamma_and_eps(seed, kernel_device, shape, gamma, eps):
    check(spread(*shape, device=kernel_device), gamma=gamma, eps=eps)


@pytest.mark.parametrize("shape", [(256, 64), (24, 40)])
def test_small_spread_around_a_large_mean(seed, kernel_device, shape):
    """Better than eager, whose mean is rounded to 3e-5 where the spread is 1e-2."""
    z = (1000 + 0.01 * torch.randn(*shape)).to(kernel_device)
    got, eager, exact = (
        f(x)
        for f, x in (
            (vicreg_terms, z), (vicreg_terms_reference, z), (vicreg_terms_reference, z.double()),
        )
    )  # fmt: skip
    error, eagers = ((terms[2] - exact[2]).abs().max().item() for terms in (got, eager))
    assert error < 1e-6 * exact[2].max() and error < 0.1 * eagers
    check(z)
    check(z.to(torch.bfloat16) + torch.randn(shape, device=kernel_device).bfloat16())


STRIDES = {
    "blocks, as predicted": lambda device: spread(30, 3, 20, device=device).transpose(0, 1),
    "columns first": lambda device: spread(20, 30, device=device).t(),
    "gram, columns first": lambda device: spread(30, 20, device=device).t(),
    "steps": lambda device: spread(60, 61, device=device)[::2, 1::3],
    "offset": lambda device: spread(3, 30, 41, device=device)[1:, :, 7:],
    "one row repeated": lambda device: spread(1, 20, device=device).expand(30, 20),
    "one block repeated": lambda device: spread(1, 30, 20, device=device).expand(3, 30, 20),
}


@pytest.mark.parametrize("make", STRIDES.values(), ids=STRIDES)
def test_any_strides(seed, kernel_device, make):
    z = make(kernel_device)
    assert not z.is_contiguous()
    check(z)
    check(z.bfloat16())


def test_the_first_row_may_lie_far_away(seed, kernel_device):
    """The means are sums of distances from it."""
    z = spread(300, 6, device=kernel_device)
    z[0] += 1000
    check(z)


@pytest.mark.parametrize(
    ("shape", "dtype"), crossed({"moments": (1, 30, 20), "gram": (2, 20, 30)}, DTYPES)
)
def test_same_bits_twice(seed, kernel_device, shape, dtype):
    z = spread(*shape, device=kernel_device).to(dtype)
    slopes = torch.randn(2)
    same_bits(lambda: tuple(outcome(vicreg_terms, z, slopes).values()))


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_nan_is_not_hidden(seed, kernel_device, shape):
    z = spread(*shape, device=kernel_device)
    z[3, 5] = torch.nan
    std, cov, per_dim = vicreg_terms(z)
    assert std.isnan() and cov.isnan() and per_dim[5].isnan()
    assert per_dim.isnan().sum() == 1


def test_collapse_is_finite_and_takes_no_gradient_from_cov(seed, kernel_device):
    for shape in ((30, 20), (20, 30)):
        z = torch.full(shape, 3.0, device=kernel_device, requires_grad=True)
        std, cov, _ = vicreg_terms(z)
        (std + cov).backward()
        assert std.item() == pytest.approx(0.99) and cov.item() == 0
        assert z.grad.isfinite().all()


# --- every configuration, forced


def exact_matrix(z: torch.Tensor, gram: bool) -> torch.Tensor:
    x = z.double() - z.double().mean(1, keepdim=True)
    matrix = (x @ x.mT if gram else x.mT @ x) / (z.shape[1] - 1)
    return matrix if gram else matrix - torch.diag_embed(matrix.diagonal(dim1=1, dim2=2))


def eager_matrix(z: torch.Tensor, gram: bool) -> torch.Tensor:
    """The error of a matrix from values of z's dtype: its own rounding."""
    return exact_matrix(z, gram).to(z.dtype).float()


def forced(configs: dict) -> list:
    """(dtype, gram, configuration) for each that can be launched, under a telling name.

    `make test` takes each configuration in one dtype.
    """
    found, taken = [], set()
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for gram in (False, True):
            for config in tiles.every(configs, dtype, gram):
                name = f"{dtype}-{'gram' if gram else 'moments'}-{config}"
                marks = pytest.mark.long if (gram, config) in taken else ()
                found.append(pytest.param(dtype, gram, config, id=name, marks=marks))
                taken.add((gram, config))
    return found


MOMENTS = forced(tiles.MOMENT_CONFIGS)
GRADS = forced(tiles.GRAD_CONFIGS)


@pytest.mark.parametrize(("dtype", "gram", "config"), MOMENTS)
def test_every_configuration_of_the_moments(seed, kernel_device, dtype, gram, config):
    """A tile's width and a rest, in either direction; several blocks where that is not long."""
    splits, size = 2, config.block + 7
    M = 2 if config.block < 128 else 1
    shape = (M, size, size + 5) if gram else (M, size + 5, size)
    z = spread(*shape, device=kernel_device).to(dtype)
    mean, variance = columns.launch_columns(z, splits)
    x = z.double()
    within_budget(variance, x.var(1).float(), x.var(1), torch.float32, "variance")
    exact_mean = x.mean(1)
    within_budget(mean.sum(0), exact_mean.float(), exact_mean, torch.float32, "mean")
    matrix = forward.empty_matrix(z, gram, True)
    partial = forward.launch_moments(z, mean, gram, config, splits)
    assert partial.shape[1] == splits and partial.shape[-1] == config.block
    squares = forward.launch_reduce(partial, size, 1 / (shape[1] - 1), gram, matrix)
    exact = exact_matrix(z, gram)
    got = matrix.float().sum(1)
    within_budget(got, eager_matrix(z, gram), exact, dtype, "matrix")
    above, below = got[:, : config.block, config.block :], got[:, config.block :, : config.block]
    assert torch.equal(above, below.mT) and above.any()
    total = exact.square().sum()
    within_budget(squares.sum(), total.to(dtype).float(), total, dtype, "squares")
    if not gram:
        assert not matrix.diagonal(dim1=2, dim2=3).any()


@pytest.mark.parametrize(("dtype", "gram", "config"), GRADS)
def test_every_configuration_of_the_gradient(seed, kernel_device, dtype, gram, config):
    few, many = config.block + 2, config.block + 12
    M = 2 if config.block < 128 else 1
    z = spread(M, *((few, many) if gram else (many, few)), device=kernel_device).to(dtype)
    slopes = torch.randn(2, device=kernel_device)
    _, saved = forward.fused_forward(z, 1.0, 1e-4, True)
    dz = backward.launch_grad(z, saved, *slopes, 1.0, 1e-4, z.shape[1], config)
    eager, exact = (
        outcome(vicreg_terms_reference, x, slopes.double())["dz"] for x in (z, z.double())
    )
    within_budget(dz, eager, exact, dtype, "dz")


def test_without_gradient_no_matrix_is_kept(seed, kernel_device):
    z = spread(30, 20, device=kernel_device)[None]
    for need, size in ((True, 400), (False, 0)):
        *_, matrix = terms.terms_op(z, 1.0, 1e-4, need)
        assert matrix.numel() == size
    wanted = vicreg_terms(z.requires_grad_())
    with torch.no_grad():
        for got, term in zip(vicreg_terms(z), wanted, strict=True):
            assert torch.equal(got, term) and not got.requires_grad


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    M=st.integers(1, 3), n=st.integers(2, 70), D=st.integers(1, 70), dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_small_shape(kernel_device, M, n, D, dtype, seed):
    torch.manual_seed(seed)
    check(spread(M, n, D, device=kernel_device).to(dtype))


# --- as an operator of torch


@pytest.mark.parametrize(
    ("shape", "dtype"),
    crossed({"moments": (2, 9, 5), "gram": (2, 5, 9)}, [*DTYPES, torch.float64]),
)
def test_operator(seed, kernel_device, shape, dtype):
    z = spread(*shape, device=kernel_device).to(dtype).requires_grad_()
    check_operator(torch.ops.cjepa_fast.vicreg_terms.default, (z, 1.0, 1e-4, True))
    check_operator(torch.ops.cjepa_fast.vicreg_terms.default, (z.detach(), 1.0, 1e-4, False))
    *_, mean, variance, matrix = terms.terms_op(z.detach(), 1.0, 1e-4, True)
    slopes = torch.randn(2, device=kernel_device).to(variance.dtype)
    saved = (mean, variance, matrix, *slopes)
    check_operator(torch.ops.cjepa_fast.vicreg_grad.default, (z.detach(), *saved, 1.0, 1e-4))


@pytest.mark.parametrize("shape", [(9, 5), (2, 5, 9)])
def test_compiles_without_a_break(seed, kernel_device, shape):
    def weighted(z):
        std, cov, per_dim = vicreg_terms(2 * z)
        return torch.cat([25 * std[None], cov[None], per_dim])

    compiles_whole(weighted, spread(*shape, device=kernel_device).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # kernels and plain path
def test_autocast_changes_nothing(seed, kernel_device, dtype):
    z, slopes = spread(30, 20, device=kernel_device).to(dtype), torch.randn(2)
    wanted = outcome(vicreg_terms, z, slopes)
    with torch.autocast(kernel_device, torch.bfloat16):
        got = outcome(vicreg_terms, z, slopes)
    for name, term in wanted.items():
        assert torch.equal(got[name], term), name


def test_float64_and_empty_tensors_take_the_plain_path(seed, kernel_device, monkeypatch):
    for name in ("launch_columns", "launch_moments", "launch_reduce"):
        monkeypatch.setattr(forward, name, None)
    monkeypatch.setattr(backward, "launch_grad", None)
    check_plain(spread(9, 5, device=kernel_device).double())
    for shape in ((4, 0), (0, 4, 3)):
        for term, wanted in zip(
            vicreg_terms(torch.zeros(shape, device=kernel_device)),
            vicreg_terms_reference(torch.zeros(shape, device=kernel_device)),
            strict=True,
        ):
            assert torch.equal(term.isnan(), wanted.isnan()) and term.shape == wanted.shape


# --- the plain path, which is the CPU's


def check_plain(z: torch.Tensor) -> None:
    slopes = torch.randn(2, dtype=torch.float64)
    got, wanted = (outcome(f, z, slopes) for f in (vicreg_terms, vicreg_terms_reference))
    for name, term in wanted.items():
        torch.testing.assert_close(got[name], term, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_plain_path_is_the_definition_in_float64(seed, shape):
    assert not launch.use_kernel(torch.zeros(1))
    check_plain(spread(*shape).double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_plain_path_is_within_the_error_budget(seed, shape, dtype):
    z = spread(*shape).to(dtype)
    check(z)
    same_bits(lambda: tuple(outcome(vicreg_terms, z, torch.ones(2)).values()))
