"""VICReg's terms at each position: kernels and plain path against loops and the definition."""

import functools

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

from cjepa_fast.data.masks import MaskSampler
from cjepa_fast.kernels.common import launch
from cjepa_fast.kernels.common.ranks import wide
from cjepa_fast.kernels.vicreg import (
    forward,
    position_matmuls,
    position_statistics,
    positions,
    vicreg_position_terms,
    vicreg_position_terms_reference,
)
from cjepa_fast.kernels.vicreg.tiles import MATRIX_FORMS, matmuls_of
from cjepa_fast.model.loss import CJEPALoss

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# How far cov moves by the relative error of products of halves, bf16's and tf32's.
HALVES = {torch.float32: 2.0**-19, torch.bfloat16: 2.0**-16, torch.float16: 2.0**-16}
PADDING = 7  # tokens in no row

SHAPES = {  # (N, B, D)
    "aligned": (4, 32, 64),
    "ragged": (5, 9, 20),
    "prime": (7, 11, 37),
    "power of two minus one": (3, 31, 63),
    "several tiles of images and columns": (3, 40, 70),
    "several stretches of tokens": (6, 40, 9),
    "one column": (4, 9, 1),
    "one position": (1, 40, 12),
    "one image": (9, 1, 5),
    "fewer tokens than columns": (4, 5, 50),
    "many positions": (270, 2, 3),
}


def table(N: int, B: int) -> torch.Tensor:
    """int64 (N, B): tokens in any order, a share of the entries empty; of several positions the
    first has no token, the second one, and the others have two at least."""
    rows = torch.randperm(N * B + PADDING)[: N * B].view(N, B)
    gaps = torch.rand(N, B) < 0.3
    if N > 2:
        gaps[:2], gaps[1, 0], gaps[2:, :2] = True, False, False
    return torch.where(gaps, -1, rows)


def inputs(shape: tuple[int, ...], device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 z, columns correlated, an offset for each position, deviations on both sides of gamma,
    NaN in tokens of no row; and the table."""
    N, B, D = shape
    rows = table(N, B)
    z = torch.full((N * B + PADDING, D), torch.nan)
    mix = torch.linspace(0.3, 1.7, D).diag() + 0.4 * torch.randn(D, D) / D**0.5
    for own in rows:
        live = own[own >= 0]
        z[live] = torch.randn(len(live), D) @ mix + 2 * torch.randn(D)
    return z.to(device), rows.to(device)


def outcome(function, z: torch.Tensor, rows: torch.Tensor, slopes, **arguments) -> dict:
    z = z.detach().requires_grad_()
    std, cov = function(z, rows, **arguments)
    (dz,) = torch.autograd.grad(slopes[0].to(std) * std + slopes[1].to(std) * cov, z)
    return {"std": std.detach(), "cov": cov.detach(), "dz": dz}


def deviations_of(z: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """float64 deviations (tokens in rows, D), and F."""
    own = [z[r[r >= 0]].detach().double() for r in rows]
    own = [x - x.mean(0) for x in own if len(x)]
    return torch.cat(own or [z[:0].double()]), max(sum(len(x) - 1 for x in own), 1)


def amount_of(z: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """How far cov moves by a relative error of the products, where none cancel."""
    d, free = deviations_of(z, rows)
    beside = (d.T @ d).abs() * (d.abs().T @ d.abs()) / free**2
    return 2 * (beside.sum() - beside.diagonal().sum()) / z.shape[1]


def hold(got: dict, z: torch.Tensor, rows: torch.Tensor, slopes, gamma=1.0, **arguments) -> None:
    """The terms and the gradient within the error budget of z's dtype."""
    arguments = {"slopes": slopes, "gamma": gamma, **arguments}
    reference = functools.partial(outcome, vicreg_position_terms_reference, **arguments)
    eager, exact = reference(z, rows), reference(z.double(), rows)
    assert got["dz"].dtype == z.dtype and got["std"].dtype == torch.float32
    sums = (x["std"] + gamma for x in (got, eager, exact))  # the hinge is a difference from gamma
    within_budget(*sums, torch.float32, "std")
    assert (got["cov"] - exact["cov"]).abs() <= HALVES[z.dtype] * amount_of(z, rows)
    floor = max(2.0**-21, FLOOR[z.dtype])
    within_budget(got["dz"], eager["dz"], exact["dz"], z.dtype, "dz", floor)


def check(z: torch.Tensor, rows: torch.Tensor, **arguments) -> None:
    slopes = torch.randn(2, dtype=torch.float64)
    got = outcome(vicreg_position_terms, z, rows, slopes, **arguments)
    hold(got, z, rows, slopes, **arguments)


# --- the definition


def by_loops(z: torch.Tensor, rows: torch.Tensor, gamma: float, eps: float) -> tuple[float, float]:
    """Number by number."""
    D = z.shape[1]
    free, hinges, scatter = 0, 0.0, [[0.0] * D for _ in range(D)]
    for own in rows.tolist():
        tokens = [z[t].tolist() for t in own if t >= 0]
        if len(tokens) < 2:
            continue
        means = [sum(column) / len(tokens) for column in zip(*tokens, strict=True)]
        away = [[x - m for x, m in zip(token, means, strict=True)] for token in tokens]
        stds = [(sum(a[j] ** 2 for a in away) / (len(away) - 1) + eps) ** 0.5 for j in range(D)]
        hinges += (len(away) - 1) * sum(max(0.0, gamma - s) for s in stds) / D
        free += len(away) - 1
        for i in range(D):
            for j in range(D):
                scatter[i][j] += sum(a[i] * a[j] for a in away)
    off = sum((scatter[i][j] / free) ** 2 for i in range(D) for j in range(D) if i != j)
    return hinges / free, off / D


@pytest.mark.parametrize(("gamma", "eps"), [(1.0, 1e-4), (1.3, 1e-2)])
@pytest.mark.parametrize("function", [vicreg_position_terms, vicreg_position_terms_reference])
def test_the_terms_against_loops(seed, function, gamma, eps):
    z, rows = inputs((5, 9, 4))
    std, cov = function(z.double(), rows, gamma, eps)
    wanted_std, wanted_cov = by_loops(z.double(), rows, gamma, eps)
    assert std.item() == pytest.approx(wanted_std, rel=1e-10, abs=1e-12)
    assert cov.item() == pytest.approx(wanted_cov, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("term", [0, 1])
@pytest.mark.parametrize("function", [vicreg_position_terms, vicreg_position_terms_reference])
def test_gradient_in_float64(seed, function, term):
    z, rows = inputs((4, 3, 2))
    z = z.double().nan_to_num(0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: function(x, rows)[term], z)


@pytest.mark.parametrize(
    ("z", "rows", "said"),
    [
        ((4,), (4, 2), r"z must be \(T, D\)"),
        ((4, 3), (4,), r"not \(4, 3\) and \(4,\)"),
        ((1, 3), (4, 2), "at least 2 rows"),
    ],
)
def test_what_does_not_fit_is_refused(z, rows, said):
    for function in (vicreg_position_terms, vicreg_position_terms_reference):
        with pytest.raises(ValueError, match=said):
            function(torch.zeros(z), torch.zeros(rows, dtype=torch.int64))


# --- the kernels


@pytest.mark.parametrize(("shape", "dtype"), crossed(SHAPES, DTYPES))
def test_terms_and_gradient_are_within_the_error_budget(seed, kernel_device, shape, dtype):
    z, rows = inputs(shape, kernel_device)
    check(z.to(dtype), rows)


@pytest.mark.parametrize(("gamma", "eps"), [(1.3, 1e-2), (0.4, 1e-6)])
def test_gamma_and_eps(seed, kernel_device, gamma, eps):
    check(*inputs((5, 12, 24), kernel_device), gamma=gamma, eps=eps)


@pytest.mark.parametrize("slopes", [(1.0, 0.0), (0.0, 1.0), (25.0, 1e-35), (0.0, 0.0)])
def test_one_term_alone(seed, kernel_device, slopes):
    z, rows = inputs((5, 9, 20), kernel_device)
    slopes = torch.tensor(slopes, dtype=torch.float64)
    got = outcome(vicreg_position_terms, z, rows, slopes)
    hold(got, z, rows, slopes)
    assert got["dz"].any() == slopes.any()


def test_small_spread_around_large_means(seed, kernel_device):
    """Better than eager, whose means are rounded to 3e-5 where the spread is 1e-2."""
    z, rows = inputs((4, 30, 12), kernel_device)
    for n, own in enumerate(rows):
        live = own[own >= 0]
        z[live] = 1000 + n + 0.01 * torch.randn(len(live), 12, device=kernel_device)
    slopes = torch.ones(2, dtype=torch.float64)
    got = outcome(vicreg_position_terms, z, rows, slopes)
    eager, exact = (
        outcome(vicreg_position_terms_reference, x, rows, slopes) for x in (z, z.double())
    )
    hold(got, z, rows, slopes)
    error, eagers = ((x["dz"] - exact["dz"]).abs().max() for x in (got, eager))
    assert error < 1e-5 * exact["dz"].abs().max() and error < 0.1 * eagers


def test_padding_and_positions_of_fewer_than_two_tokens_count_for_nothing(seed, kernel_device):
    z, rows = inputs((6, 9, 20), kernel_device)
    slopes = torch.ones(2)
    got = outcome(vicreg_position_terms, z, rows, slopes)
    live = torch.zeros(len(z), dtype=torch.bool, device=kernel_device)
    live[rows[rows >= 0]] = True
    several = (rows >= 0).sum(1) > 1
    paired = torch.zeros_like(live)
    paired[rows[several][rows[several] >= 0]] = True
    assert (live & ~paired).sum() == 1 and (~live).sum() > PADDING
    assert torch.equal(got["dz"].any(1), paired)
    z[~paired] = 0.0
    again = outcome(vicreg_position_terms, z, rows[several], slopes)
    for name, value in again.items():
        torch.testing.assert_close(value, got[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(3, 1, 5), (1, 1, 4), (2, 0, 4)])
def test_without_two_tokens_at_any_position_all_is_zero(kernel_device, shape):
    rows = torch.arange(shape[0] * shape[1], device=kernel_device).view(shape[:2])
    z = torch.randn(6, shape[2], device=kernel_device)
    got = outcome(vicreg_position_terms, z, rows, torch.ones(2))
    assert not any(value.any() for value in got.values())


def test_collapse_is_finite_and_takes_no_gradient_from_cov(seed, kernel_device):
    _, rows = inputs((5, 9, 20))
    z = torch.full((5 * 9 + PADDING, 20), 3.0, device=kernel_device)
    got = outcome(vicreg_position_terms, z, rows.to(kernel_device), torch.ones(2))
    assert got["std"].item() == pytest.approx(0.99) and got["cov"] == 0
    assert got["dz"].isfinite().all()


def test_nan_is_not_hidden(seed, kernel_device):
    z, rows = inputs((5, 9, 20), kernel_device)
    z[rows[2][rows[2] >= 0][0], 2] = torch.nan
    assert all(value.isnan() for value in vicreg_position_terms(z, rows))


def test_a_token_beyond_the_last_shows(seed, kernel_device):
    """On the CPU as an IndexError, else as NaN."""
    z, rows = inputs((5, 9, 20), kernel_device)
    rows[2, 0] = len(z)
    assert vicreg_position_terms(z, rows)[0].isnan()


def test_a_token_beyond_the_last_is_an_error_on_the_cpu(seed):
    z, rows = inputs((5, 9, 20))
    rows[1, 2] = len(z)
    with pytest.raises(IndexError):
        vicreg_position_terms(z, rows)


def test_any_strides(seed, kernel_device):
    z, rows = inputs((5, 9, 20), kernel_device)
    slopes = torch.randn(2)
    wanted = outcome(vicreg_position_terms, z, rows, slopes)
    strided = [x.mT.contiguous().mT for x in (z, rows)]
    assert not any(x.is_contiguous() for x in strided)
    for given_rows in (strided[1], strided[1].int()):
        for name, value in outcome(vicreg_position_terms, strided[0], given_rows, slopes).items():
            assert torch.equal(value, wanted[name])


@pytest.mark.parametrize(
    ("shape", "dtype"), crossed({"small": (5, 9, 20), "wide": (3, 12, 70)}, DTYPES)
)
def test_same_bits_twice(seed, kernel_device, shape, dtype):
    z, rows = inputs(shape, kernel_device)
    slopes = torch.randn(2)
    same_bits(lambda: tuple(outcome(vicreg_position_terms, z.to(dtype), rows, slopes).values()))


@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    N=st.integers(1, 6), B=st.integers(1, 40), D=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_small_shape(kernel_device, N, B, D, dtype, seed):
    torch.manual_seed(seed)
    z, rows = inputs((N, B, D), kernel_device)
    check(z.to(dtype), rows)


def test_packed_contexts_give_the_terms_of_the_plain_path(seed, kernel_device):
    """Ragged contexts end to end, with padding that holds NaN, as the loss sees them."""
    grid, images = (6, 6), 6
    context = MaskSampler(grid=grid, context="packed", seed=3)(0, 0, torch.arange(images)).context
    T, last = len(context.rows_T), context.sequences.starts[context.sequences.real]
    assert last < T
    tokens = torch.randn(1, T, 12)
    tokens[:, last:] = torch.nan
    target = torch.zeros(images, 36, 12)
    loss = CJEPALoss(views="positions")
    std, cov = loss.at_positions(tokens.to(kernel_device), target, None, context.to(kernel_device))
    exact = loss.at_positions(tokens.double(), target, None, context)
    torch.testing.assert_close(torch.stack([std, cov]).double().cpu(), torch.stack(exact))


# --- every configuration, forced


def forms() -> list:
    """(dtype, configuration) of the moments and of the gradient, each once."""
    found = []
    for table_, name in ((position_matmuls.MOMENTS, "moments"), (position_matmuls.GRADS, "grad")):
        for dtype in (torch.bfloat16, torch.float32):
            parts = MATRIX_FORMS[matmuls_of(dtype)][1]
            for config in position_matmuls.every(table_, parts):
                found.append(pytest.param(name, dtype, config, id=f"{name}-{dtype}-{config.block}"))
    return found


@pytest.mark.parametrize(("which", "dtype", "config"), forms())
def test_every_configuration(seed, kernel_device, monkeypatch, which, dtype, config):
    """A tile's width and a rest, in two stretches of tokens."""
    launcher = getattr(position_matmuls, f"launch_position_{which}")
    arguments = {"config": config} | ({"splits": 2} if which == "moments" else {})
    monkeypatch.setattr(
        positions, f"launch_position_{which}", functools.partial(launcher, **arguments)
    )
    z, rows = inputs((3, 45, config.block + 7), kernel_device)
    check(z.to(dtype), rows)


def test_deviations_have_the_mean_s_second_part_and_are_zero_for_padding(seed, kernel_device):
    z, rows = inputs((4, 20, 9), kernel_device)
    live = torch.zeros(len(z), dtype=torch.bool, device=kernel_device)
    live[rows[rows >= 0]] = True
    z = z + 1000
    own = position_statistics.launch_statistics(z, rows)
    assert torch.equal(own.count, (rows >= 0).sum(1).float())
    (found,) = position_statistics.launch_deviations(z, own.mean, own.position)
    assert not found[~live].any() and torch.equal(own.position >= 0, live)
    for n, tokens in enumerate(rows):
        x = z[tokens[tokens >= 0]].double()
        assert (own.position[tokens[tokens >= 0]] == n).all()
        if len(x):
            exact = x - x.mean(0)
            assert (found[tokens[tokens >= 0]] - exact).abs().max() < 2e-6
            error = (own.squares[n] - exact.square().sum(0)).abs()
            assert (error <= 1e-5 * exact.square().sum(0) + 1e-9).all()


def test_without_gradient_no_matrix_is_kept(seed, kernel_device):
    z, rows = inputs((5, 9, 20), kernel_device)
    for need, size in ((True, 400), (False, 0)):
        *_, matrix, _ = positions.position_terms_op(z, rows, 1.0, 1e-4, need)
        assert matrix.numel() == size
    wanted = vicreg_position_terms(z.requires_grad_(), rows)
    with torch.no_grad():
        for got, term in zip(vicreg_position_terms(z, rows), wanted, strict=True):
            assert torch.equal(got, term) and not got.requires_grad


# --- several ranks


def shares(z: torch.Tensor, rows: torch.Tensor, images: tuple[int, ...]) -> list[tuple]:
    """Each rank's tokens, their indices in z, and its table, of so many images."""
    found = []
    for own in rows.split(images, 1):
        tokens = own[own >= 0]
        table_ = torch.full_like(own, -1)
        table_[own >= 0] = torch.arange(len(tokens), device=own.device)
        found.append((z[tokens], tokens, table_))
    return found


def exact_slopes(ranks: int) -> torch.Tensor:
    """float64 (ranks, 2) whose sums are exact in fp32, also where they nearly cancel."""
    return (1024 * torch.randn(ranks, 2, dtype=torch.float64)).round() / 1024


@pytest.mark.parametrize(
    ("images", "dtype"),
    crossed({"1 rank": (9,), "2 ranks": (5, 4), "4 ranks": (6, 0, 1, 2)}, DTYPES),
)
def test_ranks_together_are_one_with_all_tokens(seed, kernel_device, images, dtype):
    """Uneven, one without a token, one with one image; each with slopes of its own."""
    z, rows = inputs((5, 9, 20), kernel_device)
    z = z.to(dtype)
    parts, ranks = shares(z, rows, images), InTurn(len(images))
    slopes = exact_slopes(len(images))

    def one(index: int) -> dict:
        own, _, table_ = parts[index]
        return outcome(vicreg_position_terms, own, table_, slopes[index], ranks=ranks)

    found = ranks.run(one)
    dz = torch.zeros_like(z)
    for (_, tokens, _), own in zip(parts, found, strict=True):
        dz[tokens] = own["dz"]
    for own in found:
        assert torch.equal(own["std"], found[0]["std"]) and torch.equal(own["cov"], found[0]["cov"])
        hold(own | {"dz": dz}, z, rows, slopes.sum(0))


def test_ranks_are_asked_for_two_sums_and_one_of_the_gradients(seed, kernel_device):
    """Of N (D + 1) numbers in float64, N D + D^2 in fp32, and two; the host waits for nothing."""
    z, rows = inputs((5, 9, 20), kernel_device)
    ranks = InTurn(1)
    ranks.run(lambda index: outcome(vicreg_position_terms, z, rows, torch.ones(2), ranks=ranks))
    assert [(x.numel(), x.dtype) for x in ranks.heard[0]] == [
        (5 * 21, torch.float64), (5 * 20 + 400, torch.float32), (2, torch.float32)
    ]  # fmt: skip


# --- as operators of torch


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16] + [pytest.param(t, marks=pytest.mark.long) for t in DTYPES if t.itemsize == 4],
)
def test_operators(seed, kernel_device, dtype):
    z, rows = inputs((3, 7, 5), kernel_device)
    z = z.nan_to_num(0.5).to(dtype).requires_grad_()
    op = torch.ops.cjepa_fast.vicreg_position_terms.default
    check_operator(op, (z, rows, 1.0, 1e-4, True))
    check_operator(op, (z.detach(), rows, 1.0, 1e-4, False))
    _, _, *saved = positions.position_terms_op(z.detach(), rows, 1.0, 1e-4, True)
    slopes = torch.randn(2, device=kernel_device)
    check_operator(
        torch.ops.cjepa_fast.vicreg_position_grad.default, (*saved, *slopes, 1.0, 1e-4, dtype)
    )


def test_compiles_without_a_break(seed, kernel_device):
    z, rows = inputs((3, 7, 5), kernel_device)
    z = z.nan_to_num(0.5).requires_grad_()
    compiles_whole(lambda z: torch.stack(vicreg_position_terms(2 * z, rows)), z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # kernels and plain path
def test_autocast_changes_nothing(seed, kernel_device, dtype):
    z, rows = inputs((3, 7, 5), kernel_device)
    slopes = torch.randn(2)
    wanted = outcome(vicreg_position_terms, z.to(dtype), rows, slopes)
    with torch.autocast(kernel_device, torch.bfloat16):
        got = outcome(vicreg_position_terms, z.to(dtype), rows, slopes)
    assert all(torch.equal(got[name], value) for name, value in wanted.items())


def test_float64_takes_the_plain_path(seed, kernel_device, monkeypatch):
    monkeypatch.setattr(positions, "launch_statistics", None)
    monkeypatch.setattr(forward, "launch_moments", None)
    z, rows = inputs((3, 7, 5), kernel_device)
    assert outcome(vicreg_position_terms, z.double(), rows, torch.ones(2))["dz"].any()


# --- the plain path, which is the CPU's


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_plain_path_is_within_the_error_budget(seed, shape, dtype):
    assert not launch.use_kernel(torch.zeros(1))
    z, rows = inputs(shape)
    z, slopes = z.to(dtype), torch.randn(2, dtype=torch.float64)
    got = outcome(vicreg_position_terms, z, rows, slopes)
    exact = outcome(vicreg_position_terms_reference, z.double(), rows, slopes)
    for name, value in got.items():
        assert value.dtype == (dtype if name == "dz" else wide(z).dtype)
        tight = {"rtol": 1e-8, "atol": 1e-10} if dtype == torch.float64 else {}
        atol = tight or {"rtol": 2e-2 if name == "dz" else 1e-4, "atol": 1e-4}
        torch.testing.assert_close(value.double(), exact[name], **atol)
    same_bits(lambda: tuple(outcome(vicreg_position_terms, z, rows, slopes).values()))
