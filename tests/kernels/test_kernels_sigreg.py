"""SIGReg's statistic against loops and its definition in float64: value, gradient, ranks."""

import cmath
import functools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_checks import (
    FLOOR,
    InTurn,
    check_operator,
    compiles_whole,
    same_bits,
    within_budget,
)
from parameters import crossed

from cjepa_fast.kernels.common import launch
from cjepa_fast.kernels.sigreg import sigreg_statistic, sigreg_statistic_reference, statistic

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# What the inputs are rounded to in the matmuls: two halves of tf32.
HALVES = 2.0**-21
SINES = 1e-7  # how far off a kernel's cosines and sines are

SHAPES = {  # (G, n, D, K); G = 0 for all rows in one group, without a table
    "aligned": (0, 128, 64, 64),
    "ragged": (0, 70, 40, 24),
    "prime": (0, 67, 37, 13),
    "power of two minus one": (0, 127, 63, 65),
    "several stretches, several tiles": (0, 150, 70, 140),
    "two rows": (0, 2, 5, 3),
    "one column, one direction": (0, 33, 1, 1),
    "groups": (5, 9, 20, 17),
    "groups of several stretches": (3, 130, 20, 70),
    "many small groups": (12, 3, 8, 5),
}


def unit(D: int, K: int) -> torch.Tensor:
    """K directions of unit length, fp32 (D, K)."""
    return torch.nn.functional.normalize(torch.randn(D, K), dim=0)


def table(G: int, n: int, gaps: float = 0.3) -> torch.Tensor:
    """int64 (G, n): rows in any order, a share of the rows empty, as many rows without one."""
    rows = torch.randperm(G * n + 7)[: G * n].view(G, n)
    return torch.where(torch.rand(G, n) < gaps, -1, rows)


def inputs(shape: tuple[int, ...], device: str = "cpu", scale: float = 1.0) -> tuple:
    """z in fp32, of means and spreads on both sides of the Gaussian's; directions; a table."""
    G, n, D, K = shape
    z = torch.randn(G * n + 7 if G else n, D) * torch.linspace(0.3, 1.7, D) + 0.5 * torch.randn(D)
    rows = table(G, n).to(device) if G else None
    return (scale * z).to(device), unit(D, K).to(device), rows


def outcome(function, z: torch.Tensor, directions: torch.Tensor, rows, **arguments) -> dict:
    z = z.detach().requires_grad_()
    value = function(z, directions.to(statistic.wide(z).dtype), rows, **arguments)
    (dz,) = torch.autograd.grad(1.5 * value, z)
    return {"value": value.detach(), "dz": dz}


def check(z: torch.Tensor, directions: torch.Tensor, rows, **arguments) -> None:
    """Within the error budget of z's dtype, and of the kernels' cosines and sines.

    Of few rows and directions their errors do not average out. A mean that is off by e moves the
    value, n times the integral of |mean - phi|^2 phi, by 2 e sqrt(n value sqrt(2 pi)) at most
    (Cauchy-Schwarz). A row's gradient, 2 / (G K) sum_k a_k times the integral of
    t phi |mean - phi|, moves by e in the mean and e in the row's own sine; t phi's integral is 2.
    """
    reference = functools.partial(
        outcome, sigreg_statistic_reference, directions=directions, rows=rows, **arguments
    )
    got = outcome(sigreg_statistic, z, directions, rows, **arguments)
    eager, exact = reference(z), reference(z.double())
    assert got["dz"].dtype == z.dtype and got["value"].dtype == torch.float32
    n, groups = (len(z), 1) if rows is None else ((rows >= 0).sum(1).amax().item(), len(rows))
    moved = {
        "value": 2 * SINES * (2.51 * n * exact["value"]).sqrt(),
        "dz": 1.5 * 8 * SINES * directions.norm(dim=1).amax() / (groups * directions.shape[1]),
    }
    for name, dtype in (("value", torch.float32), ("dz", z.dtype)):
        beside = (moved[name] / exact[name].abs().amax()).nan_to_num(0.0, posinf=0.0).item()
        floor = max(HALVES, FLOOR[dtype]) + beside
        within_budget(got[name], eager[name], exact[name], dtype, name, floor)


# --- the definition


def by_loops(z: torch.Tensor, directions: torch.Tensor, groups: list, knots: int, t_max: float):
    """As it is written in the paper: over [-t_max, t_max], number by number."""
    step, found = t_max / (knots - 1), []
    for group in groups:
        if len(group) < 2:
            continue
        for direction in directions.T.tolist():
            x = [sum(v * a for v, a in zip(z[r].tolist(), direction, strict=True)) for r in group]
            integral = 0.0
            for q in range(1 - knots, knots):
                t = q * step
                mean = sum(cmath.exp(1j * t * value) for value in x) / len(x)
                phi = math.exp(-t * t / 2)
                ends = 0.5 if abs(q) == knots - 1 else 1.0
                integral += ends * step * abs(mean - phi) ** 2 * phi
            found.append(len(x) * integral)
    return sum(found) / max(len(found), 1)


@pytest.mark.parametrize(("knots", "t_max"), [(17, 3.0), (9, 5.0), (2, 1.0)])
@pytest.mark.parametrize("function", [sigreg_statistic, sigreg_statistic_reference])
def test_the_statistic_against_loops(seed, function, knots, t_max):
    z, directions, _ = inputs((0, 23, 4, 5))
    z, directions = z.double(), directions.double()
    rows = torch.tensor([[3, 5, 7, 9], [1, -1, 0, -1], [-1, -1, 2, -1], [-1, -1, -1, -1]])
    groups = [[int(r) for r in group if r >= 0] for group in rows]
    for own, wanted in ((None, [range(23)]), (rows, groups)):
        got = function(z, directions, own, knots, t_max).item()
        assert got == pytest.approx(by_loops(z, directions, wanted, knots, t_max), rel=1e-10)


@pytest.mark.parametrize("shape", [(0, 6, 4, 5), (3, 4, 3, 5)])
def test_gradient_in_float64(seed, shape):
    z, directions, rows = inputs(shape)
    z, directions = z.double().requires_grad_(), directions.double()
    assert torch.autograd.gradcheck(lambda x: sigreg_statistic(x, directions, rows), z)


def test_a_gaussian_has_the_statistic_of_its_noise_and_others_more(seed):
    """Under the Gaussian the expectation is the integral of (1 - phi^2) phi, whatever n is."""
    directions = unit(16, 64)
    z = torch.randn(4000, 16)
    _, phi, weight = statistic.quadrature(17, 3.0, z)
    expected = (weight * (1 - phi.square())).sum().item()
    # one draw scatters by 21 % of it, with a long tail; the mean of 40 by 3.3 %
    drawn = [sigreg_statistic(torch.randn(200, 16), directions).item() for _ in range(40)]
    assert sum(drawn) / 40 == pytest.approx(expected, rel=0.2)
    for other in (0.5 * z, z + 0.5, 2 * z.abs() - 1.6, torch.zeros_like(z)):
        assert sigreg_statistic(other, directions) > 5 * expected


@pytest.mark.parametrize(
    ("z", "directions", "rows", "knots", "said"),
    [
        ((4,), (4, 2), None, 17, r"z must be \(T, D\)"),
        ((4, 3), (4, 2), None, 17, r"\(4, 3\) and \(4, 2\)"),
        ((4, 3), (3, 2), (4,), 17, r"must be \(G, n\), not \(4,\)"),
        ((4, 3), (3, 2), None, 1, "knots = 1"),
        ((1, 3), (3, 2), None, 17, "at least 2 rows"),
    ],
)
def test_what_does_not_fit_is_refused(z, directions, rows, knots, said):
    rows = rows and torch.zeros(rows, dtype=torch.int64)
    for function in (sigreg_statistic, sigreg_statistic_reference):
        with pytest.raises(ValueError, match=said):
            function(torch.zeros(z), torch.zeros(directions), rows, knots)


# --- the kernels


@pytest.mark.parametrize(("shape", "dtype"), crossed(SHAPES, DTYPES))
def test_value_and_gradient_are_within_the_error_budget(seed, kernel_device, shape, dtype):
    z, directions, rows = inputs(shape, kernel_device)
    check(z.to(dtype), directions, rows)


@pytest.mark.parametrize(("knots", "t_max"), [(2, 1.0), (9, 5.0), (33, 4.0)])
def test_knots_and_range(seed, kernel_device, knots, t_max):
    z, directions, rows = inputs((3, 20, 12, 9), kernel_device)
    check(z, directions, rows, knots=knots, t_max=t_max)


@pytest.mark.parametrize("scale", [0.01, 30.0])
def test_near_collapse_and_far_from_the_gaussian(seed, kernel_device, scale):
    """At 30 the angles take many periods."""
    check(*inputs((0, 90, 24, 20), kernel_device, scale))


def test_cosine_and_sine_over_many_periods(kernel_device):
    """Angles that no rounding of the matmul touches: multiples of 1/8."""
    angle = torch.linspace(-250, 250, 4001, device=kernel_device)
    one, rows = torch.ones(1, 1, device=kernel_device), torch.zeros(1, 1, dtype=torch.int64)
    found = statistic.sums_op(one, angle[None], rows.to(kernel_device), 1, 1.0)[0, :, 0].T
    exact = torch.stack([angle.double().cos(), angle.double().sin()], 1)
    assert (found.double() - exact).abs().max() < 3e-7


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    G=st.integers(0, 4), n=st.integers(2, 70), D=st.integers(1, 40), K=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_small_shape(kernel_device, G, n, D, K, dtype, seed):
    torch.manual_seed(seed)
    z, directions, rows = inputs((G, n, D, K), kernel_device)
    check(z.to(dtype), directions, rows)


@pytest.mark.parametrize(
    ("shape", "dtype"), crossed({"one": (0, 150, 20, 70), "four": (4, 70, 20, 17)}, DTYPES)
)
def test_same_bits_twice(seed, kernel_device, shape, dtype):
    z, directions, rows = inputs(shape, kernel_device)
    same_bits(lambda: tuple(outcome(sigreg_statistic, z.to(dtype), directions, rows).values()))


def test_rows_in_no_group_count_for_nothing_whatever_they_hold(seed, kernel_device):
    z, directions, rows = inputs((4, 9, 6, 5), kernel_device)
    wanted = outcome(sigreg_statistic, z, directions, rows)
    left_out = torch.ones(len(z), dtype=torch.bool, device=kernel_device)
    left_out[rows[rows >= 0]] = False
    assert left_out.any() and not wanted["dz"][left_out].any()
    z[left_out] = torch.nan
    for name, value in outcome(sigreg_statistic, z, directions, rows).items():
        assert torch.equal(value, wanted[name])


def test_groups_of_fewer_than_two_rows_are_left_out(seed, kernel_device):
    z, directions, _ = inputs((0, 9, 6, 5), kernel_device)
    rows = torch.tensor([[4, -1, 2], [-1, 1, -1], [-1, -1, -1]], device=kernel_device)
    some, alone = (outcome(sigreg_statistic, z, directions, r) for r in (rows, rows[:1]))
    assert torch.equal(some["value"], alone["value"]) and torch.equal(some["dz"], alone["dz"])
    assert some["dz"][[2, 4]].all() and not some["dz"][1].any()
    none = outcome(sigreg_statistic, z, directions, rows[1:])
    assert none["value"] == 0 and not none["dz"].any()


def test_nan_is_not_hidden(seed, kernel_device):
    z, directions, rows = inputs((4, 9, 6, 5), kernel_device)
    several = rows[(rows >= 0).sum(1) > 1]
    z[several[several >= 0][0], 2] = torch.nan
    assert sigreg_statistic(z, directions, rows).isnan() and sigreg_statistic(z, directions).isnan()


def test_a_row_beyond_the_last_shows(seed, kernel_device):
    """On the CPU as an IndexError, else as NaN."""
    z, directions, rows = inputs((4, 9, 6, 5), kernel_device)
    rows[1, 2:4] = len(z)  # two: a group of one row counts for nothing
    assert sigreg_statistic(z, directions, rows).isnan()


def test_a_row_beyond_the_last_is_an_error_on_the_cpu(seed):
    z, directions, rows = inputs((4, 9, 6, 5))
    rows[1, 2] = len(z)
    with pytest.raises(IndexError):
        sigreg_statistic(z, directions, rows)


def test_any_strides(seed, kernel_device):
    z, directions, rows = inputs((4, 9, 6, 5), kernel_device)
    wanted = outcome(sigreg_statistic, z, directions, rows)
    strided = [x.mT.contiguous().mT for x in (z, directions, rows)]
    assert not any(x.is_contiguous() for x in strided)
    for name, value in outcome(sigreg_statistic, *strided).items():
        assert torch.equal(value, wanted[name])
    check(strided[0], strided[1], strided[2].int())


# --- several ranks


@pytest.mark.parametrize(
    ("counts", "dtype"),
    crossed(
        {"1 rank": (90,), "2 ranks": (50, 40), "4 ranks": (60, 0, 1, 29)},
        [torch.float32, torch.float64, torch.bfloat16],
    ),
)
def test_ranks_together_are_one_with_all_rows(seed, kernel_device, counts, dtype):
    """Uneven, one without a row; each with a slope of its own."""
    z, directions, _ = inputs((0, 90, 20, 17), kernel_device)
    ranks, parts = InTurn(len(counts)), z.to(dtype).split(counts)

    def one(index: int) -> dict:
        return outcome(sigreg_statistic, parts[index], directions, None, ranks=ranks)

    found = ranks.run(one)
    alone, exact = (
        outcome(sigreg_statistic_reference, x, directions, None)
        for x in (z.to(dtype), z.to(dtype).double())
    )
    dz = torch.cat([f["dz"] for f in found]).double() / len(counts)
    assert all(torch.equal(f["value"], found[0]["value"]) for f in found)
    floor = max(HALVES, FLOOR[torch.float32 if dtype == torch.float64 else dtype])
    within_budget(found[0]["value"], alone["value"], exact["value"], torch.float32, floor=HALVES)
    within_budget(dz, alone["dz"].double(), exact["dz"], dtype, "dz", floor)


def test_groups_over_ranks_are_those_of_all_their_rows(seed):
    """A group with one row on either rank is one of two."""
    z, directions, _ = inputs((0, 8, 5, 7))
    z, directions = z.double(), directions.double()
    own = [
        torch.tensor([[-1, -1, -1], [-1, 3, -1], [2, -1, -1]]),
        torch.tensor([[0, 1, 2], [-1, -1, 3], [-1, -1, -1]]),
    ]
    ranks = InTurn(2)
    halves = z.split(4)
    found = ranks.run(
        lambda i: outcome(sigreg_statistic, halves[i], directions, own[i], ranks=ranks)
    )
    whole = torch.cat([own[0], torch.where(own[1] >= 0, own[1] + 4, -1)], 1)
    exact = outcome(sigreg_statistic_reference, z, directions, whole)
    torch.testing.assert_close(found[1]["value"], exact["value"], rtol=1e-12, atol=1e-14)
    dz = torch.cat([f["dz"] for f in found]) / 2
    torch.testing.assert_close(dz, exact["dz"], rtol=1e-10, atol=1e-13)
    assert dz[[3, 7]].all() and not dz[2].any()  # the pair; one by itself


# --- as operators of torch


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float64]
    + [pytest.param(t, marks=pytest.mark.long) for t in (torch.float32, torch.float16)],
)
def test_operators(seed, kernel_device, dtype):
    z, directions, rows = inputs((3, 7, 5, 6), kernel_device)
    z = z.to(dtype)
    arguments = (directions, rows, 16, 0.1875)
    check_operator(torch.ops.cjepa_fast.sigreg_sums.default, (z.requires_grad_(), *arguments))
    slopes = torch.randn(3, 2, 16, 6, device=kernel_device).to(statistic.wide(z).dtype)
    given = (z.detach(), directions, rows, slopes, 0.1875)
    check_operator(torch.ops.cjepa_fast.sigreg_grad.default, given)


def test_compiles_without_a_break(seed, kernel_device):
    z, directions, rows = inputs((3, 7, 5, 6), kernel_device)
    compiles_whole(lambda z: sigreg_statistic(2 * z, directions, rows)[None], z.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # kernels and plain path
def test_autocast_changes_nothing(seed, kernel_device, dtype):
    z, directions, rows = inputs((3, 7, 5, 6), kernel_device)
    wanted = outcome(sigreg_statistic, z.to(dtype), directions, rows)
    with torch.autocast(kernel_device, torch.bfloat16):
        got = outcome(sigreg_statistic, z.to(dtype), directions, rows)
    assert all(torch.equal(got[name], value) for name, value in wanted.items())


def test_float64_and_empty_tensors_take_the_plain_path(seed, kernel_device, monkeypatch):
    monkeypatch.setattr(statistic, "launch_sums", None)
    monkeypatch.setattr(statistic, "launch_grad", None)
    z, directions, rows = inputs((3, 7, 5, 6), kernel_device)
    outcome(sigreg_statistic, z.double(), directions, rows)
    empty = outcome(sigreg_statistic, z[:0], directions, rows[:, :0])
    assert empty["value"] == 0 and empty["dz"].shape == (0, 5)


# --- the plain path, which is the CPU's


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_plain_path_is_within_the_error_budget(seed, shape, dtype):
    assert not launch.use_kernel(torch.zeros(1))
    z, directions, rows = inputs(shape)
    z = z.to(dtype)
    if dtype == torch.float64:
        got, wanted = (
            outcome(f, z, directions, rows) for f in (sigreg_statistic, sigreg_statistic_reference)
        )
        for name, value in wanted.items():
            torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-12)
    else:
        check(z, directions, rows)
    same_bits(lambda: tuple(outcome(sigreg_statistic, z, directions, rows).values()))
