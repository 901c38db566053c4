"""The loss: prediction error, VICReg's views against plain pairwise loops, and the projector."""

import pytest
import torch
from test_kernels_vicreg import by_loops, spread
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cjepa_fast.kernels.gather import prediction_error
from cjepa_fast.model.loss import (
    BatchNorm,
    CJEPALoss,
    block_terms,
    build_projector,
)
from cjepa_fast.model.views import mean_over

B, M, P, D, K, N = 5, 3, 2, 4, 6, 9


@pytest.fixture
def batch(seed) -> dict[str, torch.Tensor]:
    """Outputs of the networks, float64; gradients may flow to all, so that a stop shows."""
    shapes = {"predicted": (B, M, P, D), "targets": (B, M, P, D), "context": (B, K, D)}
    shapes["tokens"] = (B, N, D)
    return {
        name: (1.5 * torch.randn(*s, dtype=torch.float64)).requires_grad_()
        for name, s in shapes.items()
    }


def gradients(loss: torch.Tensor, batch: dict) -> dict[str, torch.Tensor | None]:
    found = torch.autograd.grad(loss, list(batch.values()), allow_unused=True, retain_graph=True)
    return dict(zip(batch, found, strict=True))


def terms_of(loss, predicted, targets, context, tokens, project=None) -> dict[str, torch.Tensor]:
    """The terms, with the prediction error of targets that are gathered already."""
    jepa = prediction_error(predicted, targets, loss.prediction)
    return loss(jepa, predicted, context, tokens, project)


# --- prediction


def test_smooth_l1_against_loops(batch):
    predicted, targets = batch["predicted"], batch["targets"]
    distance = (predicted - targets).abs().flatten().tolist()
    assert min(distance) < 1 < max(distance)  # both branches
    wanted = sum(0.5 * d * d if d < 1 else d - 0.5 for d in distance) / len(distance)
    assert prediction_error(predicted, targets).item() == pytest.approx(wanted, rel=1e-12)


def test_l2_against_loops(batch):
    distance = (batch["predicted"] - batch["targets"]).flatten().tolist()
    wanted = sum(d * d for d in distance) / len(distance)
    got = prediction_error(batch["predicted"], batch["targets"], "l2").item()
    assert got == pytest.approx(wanted, rel=1e-12)


def test_half_precision_is_compared_in_fp32(seed):
    predicted, targets = torch.randn(2, 400, 50).bfloat16()
    got = prediction_error(predicted, targets)
    assert got.dtype == torch.float32
    exact = prediction_error(predicted.double(), targets.double())
    assert got.item() == pytest.approx(exact.item(), rel=1e-5)


# --- the views


def test_a_mean_is_in_fp32_without_a_copy_in_it():
    x = torch.randn(3, 50, 8).bfloat16()
    with Copies() as copies:
        mean = mean_over(x, 1)
    assert mean.dtype == torch.float32 and torch.equal(mean, x.float().mean(1))
    assert not copies.made and mean_over(x.double(), 1).dtype == torch.float64
    with Copies() as copies:
        x.float().mean(1)
    assert copies.made == [(3, 50, 8)]


class Copies(TorchDispatchMode):
    """The shapes of what is copied to another dtype."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default:
            self.made.append(tuple(args[0].shape))
        return function(*args, **(kwargs or {}))


def pairwise(z_MBD: torch.Tensor, gamma: float, eps: float) -> list[torch.Tensor]:
    """VICReg of every ordered pair of blocks as in its code, averaged over the pairs."""
    total, pairs = torch.zeros(3, dtype=torch.float64), 0
    for i, a in enumerate(z_MBD):
        for j, b in enumerate(z_MBD):
            if i == j:
                continue
            sim = ((a - b) ** 2).sum() / a.numel()
            sides = []
            for z in (a, b):
                z = z - z.sum(0) / len(z)
                c = torch.einsum("ni,nj->ij", z, z) / (len(z) - 1)
                hinge = torch.clamp(gamma - (c.diagonal() + eps) ** 0.5, min=0).sum() / z.shape[1]
                off = c[~torch.eye(len(c), dtype=torch.bool)]
                sides.append((hinge, (off**2).sum() / z.shape[1]))
            std = sides[0][0] / 2 + sides[1][0] / 2
            cov = sides[0][1] + sides[1][1]
            total, pairs = total + torch.stack([sim, std, cov]), pairs + 1
    return list(total / pairs)


@pytest.mark.parametrize("shape", [(4, 8, 5), (2, 3, 7), (3, 2, 1), (5, 16, 3)])
@pytest.mark.parametrize(("gamma", "eps"), [(1.0, 1e-4), (1.4, 1e-2)])
def test_closed_forms_are_the_mean_over_ordered_pairs(seed, shape, gamma, eps):
    z = (spread(*shape) + torch.randn(shape[0], 1, shape[2])).requires_grad_()
    for got, wanted in zip(block_terms(z, gamma, eps), pairwise(z, gamma, eps), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)
        if wanted.requires_grad:
            (slope,) = torch.autograd.grad(got, z, retain_graph=True)
            (wanted_slope,) = torch.autograd.grad(wanted, z, retain_graph=True)
            torch.testing.assert_close(slope, wanted_slope, rtol=1e-9, atol=1e-11)


def test_the_pairwise_loop_agrees_with_numbers_one_by_one(seed):
    z = spread(2, 5, 3)
    sim, std, cov = pairwise(z, 1.0, 1e-4)
    sides = [by_loops(block) for block in z]
    assert std.item() == pytest.approx((sides[0][0] + sides[1][0]) / 2)
    assert cov.item() == pytest.approx(sides[0][1] + sides[1][1])
    flat = zip(z[0].flatten().tolist(), z[1].flatten().tolist(), strict=True)
    assert sim.item() == pytest.approx(sum((a - b) ** 2 for a, b in flat) / 15)


def test_one_block_has_no_pair(seed):
    z = spread(1, 6, 3)
    sim, std, cov = block_terms(z)
    wanted_std, wanted_cov, _ = by_loops(z[0])
    wanted = (0.0, wanted_std, 2 * wanted_cov)
    assert (sim.item(), std.item(), cov.item()) == pytest.approx(wanted)


def test_blocks_are_mean_pooled_over_their_patches(batch):
    sim, std, cov = CJEPALoss(views="blocks").vicreg(
        batch["predicted"], batch["context"], batch["tokens"]
    )
    pooled = torch.stack([sum(batch["predicted"][:, m, p] for p in range(P)) / P for m in range(M)])
    for got, wanted in zip((sim, std, cov), pairwise(pooled, 1.0, 1e-4), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)


def test_context_target_view(batch):
    loss = CJEPALoss(views="context_target", gamma=1.2, eps=1e-3)
    sim, std, cov = loss.vicreg(batch["predicted"], batch["context"], batch["tokens"])
    z_a = sum(batch["context"][:, k] for k in range(K)) / K
    z_b = sum(batch["tokens"][:, n] for n in range(N)) / N
    wanted_std, wanted_cov, _ = by_loops(z_a.detach(), 1.2, 1e-3)
    assert sim.item() == pytest.approx(((z_a - z_b) ** 2).mean().item(), rel=1e-12)
    assert (std.item(), cov.item()) == pytest.approx((wanted_std, wanted_cov), rel=1e-10)
    flows = gradients(sim + std + cov, batch)
    assert flows["tokens"] is None and flows["predicted"] is None
    wanted = (2 * (z_a - z_b) / z_a.numel() / K).detach()
    slope = gradients(loss.vicreg(*inputs_of(batch))[0], batch)["context"]
    torch.testing.assert_close(slope, wanted[:, None].expand(B, K, D), rtol=1e-10, atol=1e-12)


def inputs_of(batch: dict) -> tuple[torch.Tensor, ...]:
    return batch["predicted"], batch["context"], batch["tokens"]


def test_tokens_view(batch):
    sim, std, cov = CJEPALoss(views="tokens").vicreg(*inputs_of(batch))
    rows = torch.stack(
        [batch["predicted"][b, m, p] for b in range(B) for m in range(M) for p in range(P)]
    )
    wanted_std, wanted_cov, _ = by_loops(rows.detach())
    assert sim.item() == 0
    assert (std.item(), cov.item()) == pytest.approx((wanted_std, wanted_cov), rel=1e-10)
    flows = gradients(std + cov, batch)
    assert flows["predicted"].any() and flows["context"] is flows["tokens"] is None


# --- the sum


@pytest.mark.parametrize("weight", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("views", ["blocks", "context_target", "tokens"])
def test_the_loss_is_the_weighted_sum_of_its_terms(batch, views, weight):
    loss = CJEPALoss(views=views, weight=weight, beta=0.3, sim=2.0, std=5.0, cov=7.0)
    terms = terms_of(
        loss, batch["predicted"], batch["targets"].detach(), batch["context"], batch["tokens"]
    )
    sim, std, cov = loss.vicreg(*inputs_of(batch))
    jepa = prediction_error(batch["predicted"], batch["targets"])
    wanted = weight * jepa + 0.3 * (2 * sim + 5 * std + 7 * cov)
    assert set(terms) == {"loss", "jepa", "sim", "std", "cov"}
    assert all(term.dim() == 0 for term in terms.values())
    assert [name for name, term in terms.items() if term.requires_grad] == ["loss"]
    torch.testing.assert_close(terms["loss"], wanted, rtol=1e-12, atol=1e-12)
    for name, term in {"jepa": jepa, "sim": sim, "std": std, "cov": cov}.items():
        assert terms[name].item() == pytest.approx(term.item(), rel=1e-12), name


def test_the_default_weights_are_the_papers():
    loss = CJEPALoss()
    weights = (loss.beta, loss.sim, loss.std, loss.cov, loss.gamma, loss.eps)
    assert weights == (0.001, 25.0, 25.0, 1.0, 1.0, 1e-4)
    assert (loss.prediction, loss.views) == ("smooth_l1", "blocks")


@pytest.mark.parametrize("views", ["blocks", "context_target", "tokens"])
@pytest.mark.parametrize("projector", [None, [6, 8]])
def test_beta_zero_is_exactly_ijepa(batch, views, projector):
    project = build_projector(D, projector)
    project = project and project.double()
    inputs = (batch["predicted"], batch["targets"], batch["context"], batch["tokens"])
    terms = terms_of(CJEPALoss(beta=0.0, views=views), *inputs, project)
    plain = nn.functional.smooth_l1_loss(batch["predicted"], batch["targets"])
    assert terms["loss"].item() == plain.item()
    for (name, wanted), got in zip(
        gradients(plain, batch).items(), gradients(terms["loss"], batch).values(), strict=True
    ):
        assert (got is None and wanted is None) or torch.equal(got, wanted), name
    measured = terms_of(CJEPALoss(beta=1.0, views=views), *inputs, project)
    for name in ("jepa", "sim", "std", "cov"):  # still shown
        assert terms[name].item() == measured[name].item()
    slopes = gradients(measured["loss"], batch)
    moved = "context" if views == "context_target" else "predicted"
    assert slopes[moved] is not None
    assert not torch.equal(slopes[moved], gradients(plain, batch)["predicted"])


def test_bf16_inputs_give_fp32_terms(batch):
    rounded = [x.bfloat16() for x in batch.values()]
    exact = [x.double() for x in rounded]
    for views in ("blocks", "context_target", "tokens"):
        terms, wanted = (terms_of(CJEPALoss(views=views), *x) for x in (rounded, exact))
        for name, term in terms.items():
            assert term.dtype == torch.float32
            assert term.item() == pytest.approx(
                wanted[name].item(),
                rel=1e-4,
                abs=2.0**-22,  # ulps of the hinge's gamma, 1
            ), (views, name)


def test_collapse_shows_in_std_not_in_cov(seed):
    same = torch.ones(B, M, P, D)
    terms = terms_of(CJEPALoss(), same, same, torch.ones(B, K, D), torch.ones(B, N, D))
    assert terms["jepa"] == terms["sim"] == terms["cov"] == 0
    assert terms["std"].item() == pytest.approx(0.99)


# --- the projector


def test_projector_is_vicregs_expander():
    layers = list(build_projector(12, [20, 30, 40]))
    assert [type(layer) for layer in layers] == [
        nn.Linear, BatchNorm, nn.ReLU, nn.Linear, BatchNorm, nn.ReLU, nn.Linear,
    ]  # fmt: skip
    shapes = [tuple(layer.weight.shape) for layer in layers if isinstance(layer, nn.Linear)]
    assert shapes == [(20, 12), (30, 20), (40, 30)]
    assert [layers[i].bias is None for i in (0, 3, 6)] == [False, False, True]
    assert build_projector(12, None) is None
    assert [tuple(p.shape) for p in build_projector(12, [7]).parameters()] == [(7, 12)]


def test_batch_norm_is_torchs_in_training(seed):
    ours, theirs = BatchNorm(6).double(), nn.BatchNorm1d(6).double()
    with torch.no_grad():
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            q.copy_(torch.randn(6))
            p.copy_(q)
    x = [(3 + torch.randn(9, 6).double() * s).requires_grad_() for s in (2.0, 2.0)]
    x[1].data.copy_(x[0].data)
    weight = torch.randn(9, 6).double()
    for module, z in zip((ours, theirs), x, strict=True):
        (module(z) * weight).sum().backward()
    torch.testing.assert_close(ours(x[0]), theirs(x[1]), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(x[0].grad, x[1].grad, rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("views", ["blocks", "context_target", "tokens"])
def test_views_go_through_the_projector(batch, views):
    project = nn.Linear(D, 3, bias=False).double()
    terms = CJEPALoss(views=views).vicreg(*inputs_of(batch), project)
    mapped = [x @ project.weight.t() for x in inputs_of(batch)]
    wanted = CJEPALoss(views=views).vicreg(*mapped)
    for got, term in zip(terms, wanted, strict=True):
        torch.testing.assert_close(got, term, rtol=1e-10, atol=1e-12)
    sum(terms).backward()
    assert project.weight.grad.any()


def test_the_projector_of_the_target_takes_no_gradient(batch):
    """Only the context's side moves it: the target is a constant for every weight."""
    project = nn.Linear(D, 3, bias=False).double()
    sim, _, _ = CJEPALoss(views="context_target").vicreg(*inputs_of(batch), project)
    sim.backward()
    z_a, z_b = batch["context"].mean(1), batch["tokens"].mean(1)
    error = (z_a - z_b) @ project.weight.t()
    wanted = 2 / error.numel() * error.t() @ z_a
    torch.testing.assert_close(project.weight.grad, wanted, rtol=1e-10, atol=1e-12)


def test_ijepa_takes_a_single_image_and_vicreg_says_that_it_cannot():
    predicted, targets = torch.randn(1, 4, 3, 8), torch.randn(1, 4, 3, 8)
    context, tokens = torch.randn(1, 5, 8), torch.randn(1, 9, 8)
    terms = terms_of(CJEPALoss(beta=0.0), predicted, targets, context, tokens)
    assert terms["loss"].isfinite() and terms["std"].isnan()
    with pytest.raises(ValueError, match="at least 2 rows"):
        terms_of(CJEPALoss(), predicted, targets, context, tokens)
