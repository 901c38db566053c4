"""I-JEPA's maths written out from its definition (arXiv 2301.08243 and its released code).

Everything below down to the tests is plain float64 arithmetic on dicts of weights by I-JEPA's
names, image by image and patch by patch; none of it calls the package. The tests hold the package
to it: encoder, predictor, loss with every gradient, and updates of the optimiser and the target.
"""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from cjepa_fast import config as configuration
from cjepa_fast.kernels.gather import target_gather
from cjepa_fast.model.jepa import JEPA
from cjepa_fast.model.loss import CJEPALoss
from cjepa_fast.model.predictor import Predictor
from cjepa_fast.model.vit import Encoder
from cjepa_fast.training.ema import Fragment, TargetEMA
from cjepa_fast.training.optim import parameter_groups
from cjepa_fast.training.trainer import Trainer

GRID, PATCH, WIDTH, HEADS, NARROW = 4, 3, 8, 2, 12
B, M = 2, 3  # images, target blocks

Weights = dict[str, torch.Tensor]


def linear(x: torch.Tensor, w: Weights, name: str) -> torch.Tensor:
    return torch.einsum("...i,oi->...o", x, w[f"{name}.weight"]) + w[f"{name}.bias"]


def standardised(x: torch.Tensor, eps: float) -> torch.Tensor:
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    return (x - mean) / (variance + eps) ** 0.5


def norm(x: torch.Tensor, w: Weights, name: str) -> torch.Tensor:
    return standardised(x, 1e-6) * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attention(x: torch.Tensor, w: Weights, name: str) -> torch.Tensor:
    """One sequence (S, D). qkv's outputs are [q | k | v], each [head 0 | head 1 ...]."""
    width = x.shape[-1]
    d = width // HEADS
    qkv = linear(x, w, f"{name}.qkv")
    outputs = []
    for head in range(HEADS):
        q, k, v = (qkv[:, part * width + head * d :][:, :d] for part in range(3))
        scores = torch.exp(torch.einsum("id,jd->ij", q, k) * d**-0.5)
        outputs.append(torch.einsum("ij,jd->id", scores / scores.sum(1, keepdim=True), v))
    return linear(torch.cat(outputs, 1), w, f"{name}.proj")


def block(x: torch.Tensor, w: Weights, name: str) -> torch.Tensor:
    x = x + attention(norm(x, w, f"{name}.norm1"), w, f"{name}.attn")
    hidden = gelu(linear(norm(x, w, f"{name}.norm2"), w, f"{name}.mlp.fc1"))
    return x + linear(hidden, w, f"{name}.mlp.fc2")


def position(patch: int, width: int) -> torch.Tensor:
    """Column first, then row; each [sin | cos]; stored in fp32."""
    values = []
    for along in (patch % GRID, patch // GRID):
        angles = [along * 10000 ** (-i / (width / 4)) for i in range(width // 4)]
        values += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return torch.tensor(values, dtype=torch.float32).double()


def encode(image: torch.Tensor, w: Weights, patches: list[int] | None = None) -> torch.Tensor:
    """The tokens (K, D) of one image's patches at `patches`, or of all."""
    tokens = []
    for patch in range(GRID * GRID) if patches is None else patches:
        y, x = PATCH * (patch // GRID), PATCH * (patch % GRID)
        pixels = image[:, y : y + PATCH, x : x + PATCH]
        convolved = (w["patch_embed.proj.weight"] * pixels).sum((1, 2, 3))
        tokens.append(convolved + w["patch_embed.proj.bias"] + position(patch, WIDTH))
    x = torch.stack(tokens)
    for i in range(2):
        x = block(x, w, f"blocks.{i}")
    return norm(x, w, "norm")


def predict(context: torch.Tensor, patches: list[int], targets: list[int], w: Weights):
    """The tokens (P, D) of one target block from one image's context (K, D)."""
    x = linear(context, w, "predictor_embed")
    x = x + torch.stack([position(patch, NARROW) for patch in patches])
    masked = [w["mask_token"][0, 0] + position(patch, NARROW) for patch in targets]
    x = torch.cat([x, torch.stack(masked)])
    for i in range(3):
        x = block(x, w, f"predictor_blocks.{i}")
    return linear(norm(x[len(patches) :], w, "predictor_norm"), w, "predictor_proj")


def smooth_l1(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    distance = (x - y).abs()
    return torch.where(distance < 1, 0.5 * distance**2, distance - 0.5)


def ijepa_loss(images, contexts, targets, encoder: Weights, predictor: Weights, target: Weights):
    """Mean smooth-L1 over every number; contexts[b] and targets[b][m] are lists of patches."""
    errors = []
    for image, patches, blocks in zip(images, contexts, targets, strict=True):
        with torch.no_grad():
            wanted = standardised(encode(image, target), 1e-5)
        context = encode(image, encoder, patches)
        for chosen in blocks:
            predicted = predict(context, patches, chosen, predictor)
            errors += [
                smooth_l1(predicted[p], wanted[patch]).flatten() for p, patch in enumerate(chosen)
            ]
    return torch.cat(errors).mean()


# --- the fixtures


def scattered(module: torch.nn.Module, scale: float = 0.3) -> torch.nn.Module:
    """Every trained weight moved, so that no bias is zero and no norm is one."""
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn(p.shape))
    return module.double()


def weights_of(module: torch.nn.Module) -> Weights:
    """Copies as leaves; positions are left out, the definition makes its own."""
    return {
        name: p.detach().clone().requires_grad_()
        for name, p in module.named_parameters()
        if p.requires_grad
    }


@pytest.fixture
def networks(seed) -> JEPA:
    encoder = scattered(Encoder(GRID * PATCH, PATCH, WIDTH, 2, HEADS))
    predictor = scattered(Predictor(WIDTH, (GRID, GRID), NARROW, 3, HEADS))
    return JEPA(encoder, predictor, CJEPALoss(beta=0.0))


@pytest.fixture
def target(networks) -> Encoder:
    return scattered(copy.deepcopy(networks.encoder), 0.2).requires_grad_(False)


def draw_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, context patches (B, K) and overlapping target patches (B, M, P), in any order."""
    images = torch.randn(B, 3, GRID * PATCH, GRID * PATCH, dtype=torch.float64)
    contexts = torch.stack([torch.randperm(16)[:6] for _ in range(B)])
    targets = torch.stack([torch.randperm(16)[:3] for _ in range(B * M)]).view(B, M, 3)
    return images, contexts, targets


def close(got: torch.Tensor, wanted: torch.Tensor, **tolerance) -> None:
    tolerance = {"rtol": 1e-9, "atol": 1e-11} | tolerance
    torch.testing.assert_close(got.detach().double(), wanted.detach(), **tolerance)


# --- the tests


def test_encoder(networks):
    images, contexts, _ = draw_batch()
    weights = weights_of(networks.encoder)
    whole, chosen = networks.encoder(images), networks.encoder(images, contexts)
    for b in range(B):
        close(whole[b], encode(images[b], weights))
        close(chosen[b], encode(images[b], weights, contexts[b].tolist()))


def test_predictor(networks):
    _, contexts, targets = draw_batch()
    context = torch.randn(B, 6, WIDTH, dtype=torch.float64)
    got = networks.predictor(context, contexts, targets)
    weights = weights_of(networks.predictor)
    # The released code's order is block by block, all images in each; ours is by image.
    for m in range(M):
        for b in range(B):
            patches, chosen = contexts[b].tolist(), targets[b, m].tolist()
            close(got[b, m], predict(context[b], patches, chosen, weights))


def test_targets(target):
    images, _, targets = draw_batch()
    got = target_gather(target(images), targets)
    weights = dict(target.named_parameters())
    for b in range(B):
        wanted = standardised(encode(images[b], weights), 1e-5)
        for m in range(M):
            close(got[b, m], torch.stack([wanted[i] for i in targets[b, m].tolist()]))


def test_loss_and_every_gradient(networks, target):
    images, contexts, targets = draw_batch()
    terms = networks(images, contexts, targets, target(images))
    terms["loss"].backward()
    encoder, predictor = weights_of(networks.encoder), weights_of(networks.predictor)
    fixed = {name: p.detach() for name, p in target.named_parameters()}
    wanted = ijepa_loss(images, contexts.tolist(), targets.tolist(), encoder, predictor, fixed)
    close(terms["loss"], wanted)
    close(terms["jepa"], wanted)
    wanted.backward()
    for part, weights in (("encoder", encoder), ("predictor", predictor)):
        for name, leaf in weights.items():
            close(networks.get_parameter(f"{part}.{name}").grad, leaf.grad, atol=1e-10)


def adamw(p, grad, state: dict, lr: float, weight_decay: float) -> None:
    """Loshchilov & Hutter 2019, algorithm 2: betas (0.9, 0.999), eps 1e-8."""
    state["t"] = state.get("t", 0) + 1
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * grad
    state["v"] = 0.999 * state.get("v", 0) + 0.001 * grad**2
    m = state["m"] / (1 - 0.9 ** state["t"])
    v = state["v"] / (1 - 0.999 ** state["t"])
    p.data -= lr * weight_decay * p.data
    p.data -= lr * m / (v**0.5 + 1e-8)


# Of a run of 10 steps of which 2 are warm-up: the released code advances the learning rate and the
# weight decay before its first update, and takes the first momentum of its list after it.
TOTAL, WARMUP = 10, 2
LR = [
    2e-4 + (1e-3 - 2e-4) * 1 / 2,
    1e-6 + (1e-3 - 1e-6) * 0.5 * (1 + math.cos(math.pi * 0 / 8)),
    1e-6 + (1e-3 - 1e-6) * 0.5 * (1 + math.cos(math.pi * 1 / 8)),
]
DECAY = [0.4 + (0.04 - 0.4) * 0.5 * (1 + math.cos(math.pi * i / 10)) for i in (1, 2, 3)]
MOMENTUM = [0.996, 0.996 + 0.004 * 1 / 10, 0.996 + 0.004 * 2 / 10]


def schedules(index: int) -> tuple[float, float, float]:
    """What the trainer applies at its step `index` (from 0)."""
    run = {"epochs": 5}
    rates = {"lr": 1e-3, "start_lr": 2e-4, "final_lr": 1e-6, "warmup_epochs": 1}
    config = configuration.validate({"run": run, "optim": rates})
    trainer = SimpleNamespace(config=config, steps_per_epoch=2, total_steps=TOTAL)
    return Trainer.schedules(trainer, index)


def test_the_first_steps_of_the_schedules():
    for i in range(3):
        assert schedules(i) == pytest.approx((LR[i], DECAY[i], MOMENTUM[i]), rel=1e-12)


def test_updates_of_the_optimiser_and_the_target(networks):
    """Three steps, each with its own batch: weights, moments and target follow the definition."""
    target = copy.deepcopy(networks.encoder)
    encoder, predictor = weights_of(networks.encoder), weights_of(networks.predictor)
    wanted_ema = {name: p.detach().clone() for name, p in encoder.items()}
    states: dict[str, dict] = {}

    groups = parameter_groups(networks)
    optimiser = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8)
    masters = [Fragment(name, 0, p.detach().float().flatten()) for name, p in encoder.items()]
    exact = copy.deepcopy(target)
    ema = TargetEMA(target.float(), masters, torch.float32)

    for step in range(3):
        images, contexts, targets = draw_batch()
        # the package
        lr, weight_decay, momentum = schedules(step)
        for group in optimiser.param_groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay if group["decay"] else 0.0
        optimiser.zero_grad()
        # of the definition's EMA, which the target's is held to below: in the target's own fp32
        # a gradient that is nearly zero would be noise, and Adam makes whole steps of noise
        exact.load_state_dict({**exact.state_dict(), **wanted_ema})
        tokens = exact(images)
        networks(images, contexts, targets, tokens)["loss"].backward()
        optimiser.step()
        for master in masters:
            master.values.copy_(networks.encoder.get_parameter(master.name).detach().flatten())
        ema.update(momentum)
        # the definition
        patches = (contexts.tolist(), targets.tolist())
        ijepa_loss(images, *patches, encoder, predictor, wanted_ema).backward()
        for part, weights in (("encoder", encoder), ("predictor", predictor)):
            for name, p in weights.items():
                decayed = "bias" not in name and p.dim() > 1
                state = states.setdefault(f"{part}.{name}", {})
                adamw(p, p.grad, state, LR[step], DECAY[step] if decayed else 0.0)
                p.grad = None
        for name, p in encoder.items():
            wanted_ema[name] = MOMENTUM[step] * wanted_ema[name] + (1 - MOMENTUM[step]) * p.detach()
        # Where a gradient is zero but for rounding (the keys' biases) Adam divides noise by its
        # eps: that does not move a weight by a thousandth of a step.
        for part, weights in (("encoder", encoder), ("predictor", predictor)):
            for name, p in weights.items():
                close(networks.get_parameter(f"{part}.{name}"), p, rtol=0, atol=1e-3 * LR[step])
        for name, p in wanted_ema.items():
            close(ema.module.get_parameter(name), p, rtol=3e-7, atol=3e-7)
