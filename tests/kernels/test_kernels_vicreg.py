"""VICReg's terms against loops, far from zero mean, and over several ranks."""

import forks
import pytest
import tiny
import torch
import torch.distributed as dist

from cjepa_fast.kernels.common.ranks import centred, sum_over_ranks
from cjepa_fast.kernels.gather import prediction_error
from cjepa_fast.kernels.vicreg import vicreg_terms
from cjepa_fast.model.loss import CJEPALoss, build_projector
from cjepa_fast.runtime.distributed import AllRanks

EPS = 1e-4


def by_loops(z: torch.Tensor, gamma: float = 1.0, eps: float = EPS) -> tuple[float, float, list]:
    """std, cov and the per-dimension std of z (n, D), written out number by number."""
    n, width = z.shape
    columns = [[x - sum(c) / n for x in c] for c in z.double().t().tolist()]
    c = [
        [sum(a * b for a, b in zip(u, v, strict=True)) / (n - 1) for v in columns] for u in columns
    ]
    stds = [(c[j][j] + eps) ** 0.5 for j in range(width)]
    std = sum(max(0.0, gamma - s) for s in stds) / width
    cov = sum(c[i][j] ** 2 for i in range(width) for j in range(width) if i != j) / width
    return std, cov, stds


def spread(*shape: int) -> torch.Tensor:
    """Correlated columns whose standard deviations lie on both sides of gamma = 1."""
    *_, width = shape
    scale = torch.linspace(0.3, 1.7, width, dtype=torch.float64)
    mix = torch.eye(width, dtype=torch.float64) + 0.2 * torch.randn(width, width).double()
    return torch.randn(*shape, dtype=torch.float64) * scale @ mix + torch.randn(width).double()


@pytest.mark.parametrize(("n", "width"), [(8, 5), (3, 7), (2, 4), (17, 1)])
@pytest.mark.parametrize(("gamma", "eps"), [(1.0, 1e-4), (1.3, 1e-2)])
def test_terms_against_loops(seed, n, width, gamma, eps):
    z = spread(n, width)
    std, cov, std_per_dim = vicreg_terms(z, gamma, eps)
    wanted_std, wanted_cov, wanted_per_dim = by_loops(z, gamma, eps)
    assert std.item() == pytest.approx(wanted_std, rel=1e-10, abs=1e-12)
    assert cov.item() == pytest.approx(wanted_cov, rel=1e-10, abs=1e-12)
    assert std_per_dim.tolist() == pytest.approx(wanted_per_dim, rel=1e-10)
    assert not std_per_dim.requires_grad


def test_terms_of_several_are_the_mean_of_each(seed):
    z = spread(3, 6, 4)
    std, cov, std_per_dim = vicreg_terms(z)
    each = [by_loops(block) for block in z]
    assert std.item() == pytest.approx(sum(e[0] for e in each) / 3, rel=1e-10)
    assert cov.item() == pytest.approx(sum(e[1] for e in each) / 3, rel=1e-10)
    wanted = [sum(stds) / 3 for stds in zip(*(e[2] for e in each), strict=True)]
    assert std_per_dim.tolist() == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("shape", [(6, 4), (3, 5), (2, 4, 3)])
@pytest.mark.parametrize("term", [0, 1])
def test_gradients(seed, shape, term):
    z = spread(*shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: vicreg_terms(x)[term], z)


def test_gradient_of_std_is_zero_above_gamma_and_finite_at_collapse(seed):
    wide = (10 * torch.randn(64, 3)).requires_grad_()
    vicreg_terms(wide)[0].backward()
    assert not wide.grad.any()
    collapsed = torch.ones(8, 3, requires_grad=True)
    std, cov, _ = vicreg_terms(collapsed)
    (std + cov).backward()
    assert collapsed.grad.isfinite().all()
    assert std.item() == pytest.approx(1 - EPS**0.5, rel=1e-5) and cov.item() == 0


def test_small_spread_around_a_large_mean(seed):
    """In fp32 E[z^2] - E[z]^2 loses all here: 1e6 - 1e6 for a variance of 1e-4."""
    z = 1000 + 0.01 * torch.randn(256, 8)
    std, cov, std_per_dim = vicreg_terms(z)
    wanted_std, wanted_cov, wanted_per_dim = by_loops(z)
    assert std.item() == pytest.approx(wanted_std, rel=1e-5)
    assert cov.item() == pytest.approx(wanted_cov, rel=1e-3)
    assert std_per_dim.tolist() == pytest.approx(wanted_per_dim, rel=1e-4)
    naive = (z.square().mean(0) - z.mean(0).square()).clamp(min=0) + EPS
    assert (naive.sqrt() - std_per_dim).abs().max() > 0.1 * std_per_dim.min()


def test_bf16_is_summed_in_fp32(seed):
    z = spread(512, 6).bfloat16()
    std, cov, _ = vicreg_terms(z)
    assert std.dtype == cov.dtype == torch.float32
    wanted_std, wanted_cov, _ = by_loops(z)
    assert (std.item(), cov.item()) == pytest.approx((wanted_std, wanted_cov), rel=1e-4)


@pytest.mark.parametrize("shape", [(1, 4), (0, 4), (3, 1, 4)])
def test_a_single_row_has_no_variance(shape):
    with pytest.raises(ValueError, match="at least 2 rows, z is"):
        vicreg_terms(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4, 5)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"must be \(n, D\) or \(M, n, D\)"):
        vicreg_terms(torch.zeros(shape))


# Several ranks. Each takes uneven rows of a batch through a small network; the gradients of
# its weights are averaged over the ranks, as data parallelism does, and must be those of one
# rank that has the whole batch.

ROWS = (5, 3)


def network() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Linear(4, 6).double()


def global_terms(z: torch.Tensor, ranks) -> torch.Tensor:
    std, cov, _ = vicreg_terms(z, ranks=ranks)
    return 25 * std + cov


def local_terms(z: torch.Tensor, ranks) -> torch.Tensor:
    return global_terms(z, None)


def undifferentiated_sum(z: torch.Tensor, ranks) -> torch.Tensor:
    """Right in value, but the reduction passes no gradient on: others' rows are constants."""
    if ranks is None:
        return global_terms(z, None)
    count = torch.tensor(float(len(z))).double()
    total = z.detach().sum(0)
    dist.all_reduce(count)
    dist.all_reduce(total)
    z = z - total / count
    second = z.t() @ z
    others = second.detach().clone()
    dist.all_reduce(others)
    c = (second + others - second.detach()) / (count - 1)
    std = (c.diagonal() + EPS).sqrt()
    off = c - torch.diag(c.diagonal())
    return 25 * (1 - std).relu().mean() + off.square().sum() / z.shape[1]


VARIANTS = {
    "global": global_terms,
    "several": lambda z, ranks: global_terms(torch.stack([z, 0.5 * z.square(), z.sin()]), ranks),
    "local": local_terms,
    "undifferentiated": undifferentiated_sum,
}


def projected(seed_rows: torch.Tensor, ranks) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """VICReg's terms behind a projector with BatchNorm: value and gradients of its weights."""
    torch.manual_seed(2)
    project = build_projector(4, [5, 7, 6], ranks).double()
    value = global_terms(project(seed_rows), ranks)
    value.backward()
    return value.detach(), [p.grad for p in project.parameters()]


def whole_loss(views: str, rows: slice, ranks) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """CJEPALoss of an even share of a batch of 8, with a projector; one weight of each input."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *s: torch.randn(*s, generator=generator, dtype=torch.float64)  # noqa: E731
    inputs = [draw(8, 4, 3, 5), draw(8, 4, 3, 5), draw(8, 6, 5), draw(8, 9, 5)]
    torch.manual_seed(4)
    project = build_projector(5, [6, 7], ranks).double()
    weights = [torch.ones(5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    predicted, targets, context, tokens = (x[rows] for x in inputs)
    predicted, context = predicted * weights[0], context * weights[1]
    loss = CJEPALoss(beta=0.5, views=views, ranks=ranks)
    terms = loss(prediction_error(predicted, targets), predicted, context, tokens, project)
    terms["loss"].backward()
    grads = [w.grad for w in (*weights, *project.parameters()) if w.grad is not None]
    return torch.stack([terms["std"], terms["cov"]]), grads


def averaged(grads: list[torch.Tensor]) -> list[torch.Tensor]:
    for grad in grads:
        dist.all_reduce(grad)
        grad /= dist.get_world_size()
    return grads


def each_variant(x: torch.Tensor, ranks) -> dict[str, tuple[torch.Tensor, list[torch.Tensor]]]:
    found = {}
    for name, terms in VARIANTS.items():
        model = network()
        value = terms(model(x), ranks)
        value.backward()
        found[name] = value.detach(), [p.grad for p in model.parameters()]
    found["projector"] = projected(x, ranks)
    return found


def worker(rank: int, port: int, x: torch.Tensor, out: str) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=len(ROWS))
    ranks = AllRanks()
    found = each_variant(x.split(ROWS)[rank], ranks)
    even = slice(4 * rank, 4 * rank + 4)
    found |= {views: whole_loss(views, even, ranks) for views in VIEWS}
    found = {name: (value, averaged(grads)) for name, (value, grads) in found.items()}
    torch.save(found, f"{out}/rank{rank}.pt")
    dist.destroy_process_group()


VIEWS = ("blocks", "context_target", "tokens")


@pytest.fixture(scope="module")
def parallel(tmp_path_factory) -> tuple[dict, list[dict]]:
    """What one rank finds on the whole batch, and what each of two finds together."""
    torch.manual_seed(0)
    x = torch.randn(sum(ROWS), 4, dtype=torch.float64) * torch.tensor([0.3, 1, 2, 0.1])
    x[: ROWS[0]] += 2  # the ranks' own means differ, as if the data were sorted
    port = tiny.free_port()
    out = tmp_path_factory.mktemp("ranks")
    forks.spawn(worker, (port, x, str(out)), len(ROWS))
    alone = each_variant(x, None)
    alone |= {views: whole_loss(views, slice(None), None) for views in VIEWS}
    return alone, [torch.load(out / f"rank{rank}.pt") for rank in range(len(ROWS))]


def differs(alone, together) -> bool:
    pairs = zip(alone[1], together[1], strict=True)
    return not all(torch.allclose(a, b, rtol=1e-6, atol=1e-8) for a, b in pairs)


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["global", "several", "projector", *VIEWS])
def test_ranks_together_equal_one_with_the_whole_batch(parallel, name):
    alone, ranks = parallel
    (value, grads) = alone[name]
    assert len(grads) >= 2 and all(g.any() for g in grads)
    for together in ranks:
        torch.testing.assert_close(together[name][0], value, rtol=1e-10, atol=1e-12)
        for got, wanted in zip(together[name][1], grads, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-11)


@pytest.mark.multiprocess
def test_local_statistics_are_another_loss(parallel):
    alone, ranks = parallel
    assert all(not torch.isclose(r["local"][0], alone["local"][0], rtol=0.01) for r in ranks)
    assert differs(alone["local"], ranks[0]["local"])


@pytest.mark.multiprocess
def test_a_reduction_without_gradient_is_right_in_value_alone(parallel):
    alone, ranks = parallel
    for together in ranks:
        torch.testing.assert_close(together["undifferentiated"][0], alone["global"][0])
    assert differs(alone["global"], ranks[0]["undifferentiated"])


def test_one_rank_needs_no_others(seed):
    z = spread(4, 3).requires_grad_()
    assert sum_over_ranks(z, None) is z
    rows, count = centred(z, None)
    assert count.item() == 4
    torch.testing.assert_close(rows.sum(0), torch.zeros(3).double(), rtol=0, atol=1e-12)
