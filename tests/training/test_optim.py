"""Parameter groups, and schedules held to the released code's stateful ones."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from cjepa_fast.model.jepa import JEPA
from cjepa_fast.model.loss import CJEPALoss, build_projector
from cjepa_fast.model.predictor import Predictor
from cjepa_fast.model.vit import Encoder
from cjepa_fast.training.optim import ema_momentum, learning_rate, parameter_groups, weight_decay


@pytest.fixture
def networks() -> JEPA:
    with torch.device("meta"):
        encoder, predictor = Encoder(12, 3, 16, 2, 2), Predictor(16, (4, 4), 12, 2, 2)
        return JEPA(encoder, predictor, CJEPALoss(), build_projector(16, [10, 20]))


def names_by_group(model: nn.Module) -> dict[str, set[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {g["name"]: {names[id(p)] for p in g["params"]} for g in parameter_groups(model)}


def test_groups_hold_every_trained_parameter_once(networks):
    held = [id(p) for g in parameter_groups(networks) for p in g["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in networks.parameters() if p.requires_grad}


def test_who_is_decayed(networks):
    groups = names_by_group(networks)
    assert {g["name"]: g["decay"] for g in parameter_groups(networks)} == {
        "encoder_decay": True,
        "encoder_no_decay": False,
        "predictor_decay": True,
        "predictor_no_decay": False,
    }
    weights = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    rest = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias")
    blocks = [f"blocks.{i}" for i in range(2)]
    assert groups["encoder_decay"] == {
        "encoder.patch_embed.proj.weight",
        *(f"encoder.{b}.{w}.weight" for b in blocks for w in weights),
    }
    assert groups["encoder_no_decay"] == {
        "encoder.patch_embed.proj.bias",
        "encoder.norm.weight",
        "encoder.norm.bias",
        *(f"encoder.{b}.{w}.bias" for b in blocks for w in weights),
        *(f"encoder.{b}.{name}" for b in blocks for name in rest),
    }
    decayed = groups["predictor_decay"]
    assert {"predictor.mask_token", "predictor.predictor_embed.weight"} <= decayed
    assert {"projector.0.weight", "projector.3.weight"} <= decayed
    assert {"projector.0.bias", "projector.1.weight", "predictor.predictor_norm.weight"} <= groups[
        "predictor_no_decay"
    ]
    assert not any("pos_embed" in name for names in groups.values() for name in names)


def test_learned_positions_are_trained_and_not_decayed(networks):
    networks.encoder.pos_embed.requires_grad_()
    assert "encoder.pos_embed" in names_by_group(networks)["encoder_no_decay"]


def test_frozen_parts_are_left_out(networks):
    networks.encoder.blocks[0].requires_grad_(False)
    assert not any(
        name.startswith("encoder.blocks.0.")
        for names in names_by_group(networks).values()
        for name in names
    )


# --- schedules: index, total, warm-up; a run of 50 steps of which 12 are warm-up

TOTAL, WARMUP = 50, 12
RATES = {"start": 1e-4, "peak": 1e-3, "final": 1e-6}


def rate(index: int, **changes) -> float:
    return learning_rate(index, **({"total": TOTAL, "warmup": WARMUP} | RATES | changes))


def test_learning_rate_at_its_corners():
    assert rate(1) == pytest.approx(1e-4 + 9e-4 / 12, rel=1e-12)
    assert rate(WARMUP) == pytest.approx(1e-3, rel=1e-12)
    assert rate(WARMUP + 19) == pytest.approx((1e-3 + 1e-6) / 2, rel=1e-12)
    assert rate(TOTAL) == pytest.approx(1e-6, rel=1e-9)
    assert rate(TOTAL + 5) == rate(TOTAL)


def test_learning_rate_rises_then_falls():
    rates = [rate(i) for i in range(TOTAL + 1)]
    assert all(a < b for a, b in pairwise(rates[: WARMUP + 1]))
    assert all(a > b for a, b in pairwise(rates[WARMUP:]))
    assert min(rates) == pytest.approx(1e-6) and max(rates) == pytest.approx(1e-3)


def test_learning_rate_without_warmup_or_with_nothing_else():
    assert rate(0, warmup=0) == pytest.approx(1e-3)
    assert rate(1, warmup=0) < 1e-3
    assert rate(TOTAL, warmup=TOTAL) == pytest.approx(1e-3)
    assert rate(1, total=1, warmup=0) == pytest.approx(1e-6)


def test_weight_decay_at_its_corners():
    values = [weight_decay(i, TOTAL, 0.04, 0.4) for i in range(TOTAL + 1)]
    assert values[0] == pytest.approx(0.04) and values[-1] == pytest.approx(0.4)
    assert values[1] == pytest.approx(0.4 - 0.36 * 0.5 * (1 + math.cos(math.pi / 50)), rel=1e-12)
    assert values[25] == pytest.approx(0.22)
    assert all(a < b for a, b in pairwise(values))
    assert weight_decay(TOTAL + 5, TOTAL, 0.04, 0.4) == pytest.approx(0.4)
    assert {weight_decay(i, TOTAL, 0.04, 0.04) for i in range(TOTAL)} == {0.04}


def test_momentum_at_its_corners():
    values = [ema_momentum(i, TOTAL, 0.996, 1.0) for i in range(TOTAL + 1)]
    assert values[0] == 0.996 and values[-1] == 1.0
    assert values[25] == pytest.approx(0.998)
    steps = [b - a for a, b in pairwise(values)]
    assert steps == pytest.approx([0.004 / 50] * 50, rel=1e-9)
    assert ema_momentum(TOTAL + 5, TOTAL, 0.996, 1.0) == 1.0  # never beyond: it would extrapolate


class Counting:
    """The released code's schedulers: each call of step() advances, then gives the value."""

    def __init__(self):
        self.count = 0

    def step(self) -> tuple[float, float]:
        self.count += 1
        if self.count < WARMUP:
            progress = self.count / max(1, WARMUP)
            lr = 1e-4 + progress * (1e-3 - 1e-4)
        else:
            progress = (self.count - WARMUP) / max(1, TOTAL - WARMUP)
            lr = max(1e-6, 1e-6 + (1e-3 - 1e-6) * 0.5 * (1.0 + math.cos(math.pi * progress)))
        progress = self.count / TOTAL
        decay = min(0.4, 0.4 + (0.04 - 0.4) * 0.5 * (1.0 + math.cos(math.pi * progress)))
        return lr, decay


def test_a_whole_run_follows_the_released_schedules():
    scheduler = Counting()
    momenta = (0.996 + i * (1.0 - 0.996) / TOTAL for i in range(TOTAL + 1))
    for update in range(TOTAL):
        lr, decay = scheduler.step()
        assert rate(update + 1) == pytest.approx(lr, rel=1e-12)
        assert weight_decay(update + 1, TOTAL, 0.04, 0.4) == pytest.approx(decay, rel=1e-12)
        assert ema_momentum(update, TOTAL, 0.996, 1.0) == pytest.approx(next(momenta), rel=1e-12)
