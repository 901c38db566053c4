"""SIGReg as the loss's regulariser: what each view takes, packed too; its configuration."""

import math

import pytest
import tiny
import torch

from cjepa_fast.config import ConfigError, load, validate
from cjepa_fast.data import rng
from cjepa_fast.data.masks import MaskSampler
from cjepa_fast.kernels.gather import prediction_error
from cjepa_fast.kernels.sigreg import sigreg_statistic_reference
from cjepa_fast.model.jepa import JEPA
from cjepa_fast.model.loss import CJEPALoss, build_projector
from cjepa_fast.model.predictor import Predictor
from cjepa_fast.model.sigreg import SIGReg
from cjepa_fast.model.vit import Encoder
from cjepa_fast.training.build import build_networks

B, M, P, D, K, N, DIRECTIONS = 5, 3, 2, 4, 6, 9, 8
VIEWS = ("blocks", "context_target", "tokens", "positions")


@pytest.fixture
def batch(seed) -> dict[str, torch.Tensor]:
    """Outputs of the networks, float64; position 8 in no context, 7 in one."""
    draw = lambda *s: (1.5 * torch.randn(*s, dtype=torch.float64)).requires_grad_()  # noqa: E731
    context = torch.stack([torch.randperm(7)[:K] for _ in range(B)])
    context[2, 3] = 7
    return {
        "predicted": draw(B, M, P, D),
        "context": draw(B, K, D),
        "tokens": draw(B, N, D),
        "idx": context,
        "directions": rng.directions(0, 1, D, DIRECTIONS, torch.device("cpu")).double(),
    }


def groups(views: str, batch: dict) -> list[torch.Tensor]:
    """The samples that a view consists of, by plain loops."""
    predicted, context, idx = batch["predicted"], batch["context"], batch["idx"]
    if views == "blocks":
        return [torch.stack([predicted[b, m].mean(0) for b in range(B)]) for m in range(M)]
    if views == "context_target":
        return [torch.stack([context[b].mean(0) for b in range(B)])]
    if views == "tokens":
        return [predicted.reshape(-1, D)]
    at = [[context[b, k] for b in range(B) for k in range(K) if idx[b, k] == n] for n in range(N)]
    return [torch.stack(rows) for rows in at if len(rows) > 1]


def value_of(loss: CJEPALoss, batch: dict, project=None) -> dict[str, torch.Tensor]:
    predicted = batch["predicted"]
    jepa = prediction_error(predicted, torch.zeros_like(predicted))
    outputs = (predicted, batch["context"], batch["tokens"])
    return loss(jepa, *outputs, project, batch["idx"], batch["directions"]) | {"own": jepa}


@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("project", [None, "projector"])
def test_each_view_is_the_mean_statistic_of_its_samples(batch, views, project):
    project = project and build_projector(D, [7, D]).double()
    loss = CJEPALoss(sigreg=SIGReg(views=views, beta=0.3))
    terms = value_of(loss, batch, project)
    if project:  # its BatchNorm sees all rows at once
        project = _one_by_one(project, torch.cat(groups(views, batch)), views, batch)
    samples = [project(g) if project else g for g in groups(views, batch)]
    each = [sigreg_statistic_reference(g, batch["directions"]) for g in samples]
    wanted = sum(each) / len(each)
    assert set(terms) == {"loss", "jepa", "sigreg", "own"}
    torch.testing.assert_close(terms["sigreg"], wanted.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(terms["loss"], terms["own"] + 0.3 * wanted, rtol=1e-10, atol=1e-12)
    assert not terms["sigreg"].requires_grad


def _one_by_one(project, rows, views, batch):
    """The projector with the BatchNorm of the view's rows, as a function of any of them."""
    if views == "positions":  # the lone token of position 7 is among them
        rows = batch["context"].reshape(-1, D)
    linear, norm, relu, last = project
    hidden = linear(rows)
    mean, variance = hidden.mean(0), hidden.var(0, unbiased=False)

    def of(z: torch.Tensor) -> torch.Tensor:
        z = (linear(z) - mean) * (variance + norm.eps).rsqrt() * norm.weight + norm.bias
        return last(relu(z))

    return of


@pytest.mark.parametrize("views", VIEWS)
def test_the_gradient_reaches_what_the_view_looks_at_and_nothing_else(batch, views):
    loss, outputs = SIGReg(views=views), [batch[n] for n in ("predicted", "context", "tokens")]
    value = loss(*outputs, None, batch["idx"], batch["directions"])
    found = torch.autograd.grad(value, outputs, allow_unused=True, retain_graph=True)
    looked_at = 0 if views in ("blocks", "tokens") else 1
    assert [g is not None for g in found] == [i == looked_at for i in range(3)]
    each = [sigreg_statistic_reference(g, batch["directions"]) for g in groups(views, batch)]
    (wanted,) = torch.autograd.grad(sum(each) / len(each), outputs[looked_at])
    torch.testing.assert_close(found[looked_at], wanted, rtol=1e-8, atol=1e-11)
    if views == "positions":  # alone at its position
        assert not found[1][2, 3].any() and found[1][2, 2].all()


def test_beta_zero_measures_without_a_gradient(batch):
    loss = CJEPALoss(sigreg=SIGReg(beta=0.0))
    terms = value_of(loss, batch)
    assert terms["loss"] is terms["own"] and terms["sigreg"] > 0
    single = {n: x if n == "directions" else x[:1] for n, x in batch.items()}
    assert value_of(loss, single)["sigreg"].isnan()
    with pytest.raises(ValueError, match="at least 2 rows"):
        value_of(CJEPALoss(sigreg=SIGReg()), single)


def test_it_asks_for_the_directions(batch):
    with pytest.raises(ValueError, match="directions of the step"):
        SIGReg()(batch["predicted"], batch["context"], batch["tokens"])


@pytest.mark.parametrize("views", ["context_target", "positions"])
def test_packed_contexts_give_the_statistic_of_their_tokens_alone(seed, views):
    """Ragged rows end to end, padding behind them, against the tokens of each image by itself."""
    encoder = Encoder(24, 4, 24, 1, 2).double()
    networks = JEPA(
        encoder,
        Predictor(24, encoder.grid, 12, 1, 2).double(),
        CJEPALoss(sigreg=SIGReg(views=views)),
    )
    masks = MaskSampler(grid=encoder.grid, context="packed", seed=3)(0, 0, torch.arange(6))
    assert len(masks.context.rows_T) > masks.context.tokens  # there is padding
    images = torch.randn(6, 3, 24, 24, dtype=torch.float64)
    target = torch.randn(6, 36, 24, dtype=torch.float64)
    directions = rng.directions(seed, 0, 24, 16, torch.device("cpu"))
    terms = networks(images, masks.context, masks.target_idx_BMP, target, directions)
    parts = [masks.context.of_image(b) for b in range(6)]
    alone = [encoder(images[b : b + 1], part[None])[0] for b, part in enumerate(parts)]
    if views == "context_target":
        samples = [torch.stack([tokens.mean(0) for tokens in alone])]
    else:
        tokens, idx = torch.cat(alone), torch.cat(parts)
        samples = [tokens[idx == n] for n in range(36) if (idx == n).sum() > 1]
    each = [sigreg_statistic_reference(z, directions) for z in samples]
    wanted = (sum(each) / len(each)).detach()
    torch.testing.assert_close(terms["sigreg"], wanted, rtol=1e-9, atol=1e-10)


# --- the directions


def test_directions_are_of_unit_length_uniform_and_those_of_the_step(seed):
    draw = lambda step, seed=seed: rng.directions(seed, step, 6, 4000, torch.device("cpu"))  # noqa: E731
    own = draw(3)
    assert own.shape == (6, 4000) and own.dtype == torch.float32
    torch.testing.assert_close(own.norm(dim=0), torch.ones(4000))
    assert torch.equal(own, draw(3)) and not torch.equal(own, draw(4))
    assert not torch.equal(own, draw(3, seed + 1))
    spread = own @ own.T / 4000  # uniform on the sphere: the unit matrix / 6
    assert (spread - torch.eye(6) / 6).abs().max() < 6 * math.sqrt(2 / 6 / 6 / 4000)
    assert own.mean(1).abs().max() < 6 / math.sqrt(6 * 4000)


# --- the configuration


def with_sigreg(**sections) -> dict:
    return tiny.CONFIG | {"loss": {"regulariser": "sigreg", **sections}}


def test_the_configuration_builds_it():
    given = {"beta": 0.5, "views": "tokens", "directions": 7, "knots": 9, "t_max": 5.0}
    networks = build_networks(validate(with_sigreg(sigreg=given | {"projector": [10, 6]})))
    assert networks.loss.sigreg == SIGReg("tokens", 0.5, 9, 5.0)
    assert networks.projector[-1].out_features == 6
    ijepa = validate(with_sigreg(sigreg={"beta": 0, "projector": [6]}))
    assert build_networks(ijepa).projector is None
    assert build_networks(validate(tiny.CONFIG)).loss.sigreg is None
    defaults = validate(with_sigreg())
    assert build_networks(defaults).loss.sigreg == SIGReg()
    assert load("vit_s.json").loss.regulariser == "vicreg"


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"regulariser": "sigrag"}, "loss.regulariser"),
        ({"sigreg": {"knots": 1}}, "loss.sigreg.knots"),
        ({"sigreg": {"direction": 1}}, "nearest is loss.sigreg.directions"),
        ({"prediction_weight": 0, "sigreg": {"beta": 0}}, "loss.sigreg.beta = 0 nothing is left"),
    ],
)
def test_what_cannot_be_is_refused(sections, said):
    with pytest.raises(ConfigError, match=said):
        validate(with_sigreg(**sections))
