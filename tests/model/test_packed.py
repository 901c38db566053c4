"""mask.context "packed": the same numbers as running each image alone, whatever the padding."""

from pathlib import Path

import pytest
import tiny
import torch

from cjepa_fast import checkpoint
from cjepa_fast.config import validate
from cjepa_fast.data import rng
from cjepa_fast.data.loader import Batch
from cjepa_fast.kernels.gather import prediction_error
from cjepa_fast.model.attention import attend, attend_packed
from cjepa_fast.model.jepa import JEPA
from cjepa_fast.model.loss import CJEPALoss, build_projector
from cjepa_fast.model.packed import PackedContext, Sequences, pack
from cjepa_fast.model.predictor import Predictor
from cjepa_fast.model.sigreg import SIGReg
from cjepa_fast.model.vit import Encoder
from cjepa_fast.runtime import distributed
from cjepa_fast.training import build
from cjepa_fast.training.trainer import Trainer

SIDE, WIDTH, N = 16, 16, 16  # pixels; 4 x 4 patches
LENGTHS = [5, 1, 8, 3]
B, M, P, LONGEST, LEAST = len(LENGTHS), 3, 4, 9, 1


def contexts() -> list[torch.Tensor]:
    return [torch.randperm(N)[:length].sort().values for length in LENGTHS]


def packed(parts: list[torch.Tensor], budget: int = sum(LENGTHS) + 13) -> PackedContext:
    """The images' contexts end to end, with padding of two pieces and room for more."""
    rows = torch.cat([part + N * b for b, part in enumerate(parts)])
    return pack(rows, torch.tensor([len(p) for p in parts]), N, budget, LONGEST, LEAST)


@pytest.fixture
def networks(seed) -> JEPA:
    encoder = Encoder(SIDE, 4, WIDTH, depth=2, heads=2)
    predictor = Predictor(WIDTH, (4, 4), width=12, depth=2, heads=3)
    return JEPA(encoder, predictor, CJEPALoss(beta=1.0), build_projector(WIDTH, [8, 8])).double()


@pytest.fixture
def batch(networks) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Images, their contexts, targets and target tokens."""
    images = torch.randn(B, 3, SIDE, SIDE, dtype=torch.float64)
    targets = torch.stack([torch.randperm(N)[: M * P].view(M, P) for _ in range(B)])
    return images, contexts(), targets, torch.randn(B, N, WIDTH, dtype=torch.float64)


def gradients(
    value: torch.Tensor, module: torch.nn.Module, **others: torch.Tensor
) -> dict[str, torch.Tensor]:
    """By name, of all that is trained and used, and of others."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad} | others
    found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def same(one, other) -> None:
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def encoded_alone(encoder: Encoder, images, parts) -> list[torch.Tensor]:
    return [encoder(images[[b]], part[None])[0] for b, part in enumerate(parts)]


def predicted_alone(predictor: Predictor, tokens, parts, targets) -> torch.Tensor:
    rows = zip(tokens, parts, targets, strict=True)
    return torch.cat([predictor(x[None], part[None], idx[None]) for x, part, idx in rows])


def test_the_encoder(networks, batch):
    images, parts, _, _ = batch
    upstream = torch.randn(sum(LENGTHS), WIDTH, dtype=torch.float64)
    out = networks.encoder(images, packed(parts))
    assert out.shape == (1, sum(LENGTHS) + 13, WIDTH)
    kept = out[0, : sum(LENGTHS)]
    alone = torch.cat(encoded_alone(networks.encoder, images, parts))
    same(kept, alone)
    one, other = (gradients((x * upstream).sum(), networks.encoder) for x in (kept, alone))
    assert len(one) == 2 + 2 * 12 + 2
    same(one, other)


def test_the_predictor(networks, batch):
    _, parts, targets, _ = batch
    context = packed(parts)
    tokens = torch.randn(1, len(context.rows_T), WIDTH, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(B, M, P, WIDTH, dtype=torch.float64)
    out = networks.predictor(tokens, context, targets)
    split = tokens[0, : sum(LENGTHS)].split(LENGTHS)
    alone = predicted_alone(networks.predictor, split, parts, targets)
    same(out, alone)
    one, other = (
        gradients((x * upstream).sum(), networks.predictor, tokens=tokens) for x in (out, alone)
    )
    same(one, other)


@pytest.mark.parametrize("views", ["blocks", "context_target", "tokens"])
def test_the_whole_loss(networks, batch, views):
    images, parts, targets, target_tokens = batch
    networks.loss = CJEPALoss(views=views, beta=1.0)
    terms = networks(images, packed(parts), targets, target_tokens)
    tokens = encoded_alone(networks.encoder, images, parts)
    predicted = predicted_alone(networks.predictor, tokens, parts, targets)
    means = torch.stack([x.mean(0) for x in tokens])[:, None]
    there = torch.stack([x[idx] for x, idx in zip(target_tokens, targets, strict=True)])
    normed = torch.nn.functional.layer_norm(there, (WIDTH,))
    jepa = prediction_error(predicted, normed)
    wanted = networks.loss(jepa, predicted, means, target_tokens, networks.projector)
    same(terms, wanted)
    one, other = (gradients(t["loss"], networks) for t in (terms, wanted))
    assert {name.partition(".")[0] for name in one} == {"encoder", "predictor", "projector"}
    same(one, other)


@pytest.mark.parametrize(
    "loss",
    [
        CJEPALoss(views="blocks", beta=1.0),
        CJEPALoss(views="context_target", beta=1.0),
        CJEPALoss(views="positions", beta=1.0),
        CJEPALoss(views="blocks", beta=1.0, positions_weight=0.5),
        CJEPALoss(sigreg=SIGReg(views="positions", beta=1.0)),
    ],
    ids=lambda loss: "SIGReg" if loss.sigreg else f"{loss.views} {loss.positions_weight}",
)
def test_padding_changes_nothing(networks, batch, loss):
    """Neither its amount nor its values, and its tokens' own gradients are exactly zero. The
    projector's BatchNorm does not see it either."""
    images, parts, targets, target_tokens = batch
    networks.loss, tokens = loss, []
    more = () if loss.sigreg is None else (rng.directions(0, 0, 8, 16, torch.device("cpu")),)
    networks.encoder.register_forward_hook(lambda *args: tokens.append(args[2]))
    wanted = networks(images, packed(parts), targets, target_tokens, *more)
    grads = gradients(wanted["loss"], networks, tokens=tokens[0])
    encoded = grads.pop("tokens")[0]
    assert encoded[: sum(LENGTHS)].all() and torch.count_nonzero(encoded[sum(LENGTHS) :]) == 0
    none, much = (packed(parts, sum(LENGTHS) + extra) for extra in (0, 40))
    other = packed(parts)
    other.rows_T[sum(LENGTHS) :] = torch.randint(B * N, (13,))
    for context in (none, much, other):
        terms = networks(images, context, targets, target_tokens, *more)
        same(terms, wanted)
        same(gradients(terms["loss"], networks), grads)


def heads(sequences: Sequences, *shape: int, **kind) -> torch.Tensor:
    return torch.randn(int(sequences.starts[-1]), *shape, **kind).requires_grad_()


def cut(*lengths: int, device: str = "cpu") -> Sequences:
    starts = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    return Sequences(starts, longest=max(lengths) + 2, real=len(lengths))


def test_gradients_of_plain_packed_attention(seed):
    queries, keys = cut(2, 3, 0, 0), cut(4, 3, 2, 0)
    q, k, v = (heads(s, 2, 3, dtype=torch.float64) for s in (queries, keys, keys))
    assert torch.autograd.gradcheck(
        lambda *x: attend_packed(*x, queries, keys, "plain"), (q, k, v), fast_mode=False
    )


@pytest.mark.parametrize(
    ("device", "backend"), [("cpu", "plain"), ("cpu", "sdpa"), ("cpu", "auto"), *[
        pytest.param("cuda", name, marks=pytest.mark.gpu)
        for name in ("plain", "auto", "sdpa_flash", "flash_attn")
    ]],
)  # fmt: skip
@pytest.mark.parametrize("width", [24, 64, 80])
def test_packed_attention_is_that_of_each_sequence(seed, device, backend, width):
    """With sequences that have keys and no queries, and nothing at all: the padding's."""
    if backend == "flash_attn":
        pytest.importorskip("flash_attn")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    queries, keys = cut(7, 40, 0, 0, device=device), cut(90, 40, 150, 0, device=device)
    kind = {"device": device, "dtype": dtype}
    inputs = [heads(s, 2, width, **kind) for s in (queries, keys, keys)]
    out = attend_packed(*inputs, queries, keys, backend)
    upstream = torch.randn_like(out)
    found = [out, *torch.autograd.grad(out, inputs, upstream)]

    def alone(*wide: torch.Tensor) -> torch.Tensor:
        parts = (x.split(s.lengths_S.tolist()) for x, s in zip(wide, (queries, keys, keys)))  # noqa: B905
        rows = [[x.transpose(0, 1)[None] for x in part] for part in zip(*parts, strict=True)]
        return torch.cat([attend(*row, "plain")[0].transpose(0, 1) for row in rows])

    def true(dtype: torch.dtype) -> list[torch.Tensor]:
        wide = [x.detach().to(dtype).requires_grad_() for x in inputs]
        return [alone(*wide), *torch.autograd.grad(alone(*wide), wide, upstream.to(dtype))]

    exact = true(torch.float64)
    floor = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for one, plain, right in zip(found, true(dtype), exact, strict=True):
        budget = 2 * (plain.double() - right).abs().max() + floor
        assert (one.double() - right).abs().max() <= budget
    assert torch.count_nonzero(found[2][130:]) == torch.count_nonzero(found[3][130:]) == 0


def trained(folder: Path, steps: range, from_: Path | None = None) -> tuple[list[dict], Path]:
    """The terms of some steps on noise, and the checkpoint after them."""
    sections = {
        "run": {"precision": "bf16"},
        "data": tiny.CONFIG["data"] | {"batch_size": 8},
        "mask": {"min_keep": 4, "context": "packed"},
        "optim": {"warmup_epochs": 0, "lr": 0.01},
    }
    device = distributed.start(0)
    config = build.with_precision(validate(tiny.CONFIG | sections), device)
    trainer = Trainer(config, device, steps_per_epoch=10, restoring=from_ is not None)
    if from_ is not None:
        assert checkpoint.restore(from_, trainer.engine)["step"] == steps.start
    masks, found = build.build_masks(config), []
    for index in steps:
        images = torch.randn(8, 3, 24, 24, generator=torch.Generator().manual_seed(index))
        drawn = masks(0, index, torch.arange(8) + 8 * index)
        batch = Batch(images.bfloat16(), drawn, torch.arange(8), 0, index, 0)
        terms, applied = trainer.step([batch], index)
        assert applied and trainer.scalars(terms, [batch])["context_k"] == drawn.context_k
        found.append({name: term.item() for name, term in terms.items()})
    return found, tiny.save(folder, trainer.engine, steps.stop)


def test_training_and_going_on_from_a_checkpoint(tmp_path):
    """In bf16: the loss falls, and the steps after a checkpoint are the same bit for bit."""
    whole, _ = trained(tmp_path / "whole", range(6))
    first, held = trained(tmp_path / "first", range(4))
    second, _ = trained(tmp_path / "second", range(4, 6), held)
    assert first + second == whole
    assert whole[-1]["loss"] < whole[0]["loss"]
