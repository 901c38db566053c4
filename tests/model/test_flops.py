"""The counted work against published figures, and against torch's own counter."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cjepa_fast.model.flops import (
    StepSizes,
    block_flop,
    patch_embedding_flop,
    recomputed_gflop,
    step_gflop,
)
from cjepa_fast.model.predictor import Predictor
from cjepa_fast.model.vit import MODELS, Encoder

# GFLOP an image: target forward, context and predictor forward + backward, total; counted apart
# for I-JEPA's step at batch 128, where the context is cut to K and the blocks have P patches.
# (model, image size, patch, predictor depth, K, P, target, context, predictor, total)
COUNTED = [
    ("vit_tiny", 224, 16, 6, 50.2, 33.4, 2.49, 1.78, 22.14, 26.4),
    ("vit_small", 224, 16, 6, 50.2, 33.4, 9.15, 6.76, 22.22, 38.1),
    ("vit_base", 224, 16, 6, 50.2, 33.4, 34.9, 26.3, 22.4, 83.6),
    ("vit_large", 224, 16, 12, 50.2, 33.4, 122.5, 92.3, 44.6, 259),
    ("vit_huge", 224, 14, 12, 68.4, 44.2, 333, 261, 60.9, 656),
    ("vit_huge", 448, 16, 12, 226.7, 136.8, 1089, 885, 217, 2190),
]


def sizes_of(model: str, **others) -> StepSizes:
    own = {name: MODELS[model][name] for name in ("width", "depth", "mlp_ratio")}
    return StepSizes(**own, predictor_width=384, **others)


def unread_gflop(k: float, p: float) -> float:
    """What I-JEPA's last predictor block computes of the context, forward and backward."""
    block = k + p, 384, 4.0
    return 3 * 4 * (block_flop(*block) - block_flop(*block, outputs=p)) / 1e9


@pytest.mark.parametrize("row", COUNTED, ids=lambda row: f"{row[0]}_{row[1]}")
def test_work_of_the_standard_models(row):
    model, image_size, patch, depth, k, p, target, context, predictor, total = row
    sizes = sizes_of(
        model,
        image_size=image_size,
        patch_size=patch,
        predictor_depth=depth,
        context_k=k,
        targets_m=4,
        targets_p=p,
    )
    work = step_gflop(sizes)
    # I-JEPA embeds all N patches of the context image and then gathers; here only K are embedded.
    spared = (image_size // patch) ** 2 - k
    work["context"] += 2 * patch_embedding_flop(spared, patch, MODELS[model]["width"]) / 1e9
    for part in ("predictor", "total"):
        work[part] += unread_gflop(k, p)
    expected = {"target": target, "context": context, "predictor": predictor, "total": total}
    assert work == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("model", "image_size", "patch", "k", "p", "total"),
    [("vit_base", 224, 16, 81.8, 33.4, 109), ("vit_huge", 224, 14, 110.1, 44.2, 841)],
)
def test_work_with_the_whole_context(model, image_size, patch, k, p, total):
    sizes = sizes_of(
        model,
        image_size=image_size,
        patch_size=patch,
        predictor_depth=6 if model == "vit_base" else 12,
        context_k=k,
        targets_m=4,
        targets_p=p,
    )
    work = step_gflop(sizes)
    assert work["total"] + unread_gflop(k, p) == pytest.approx(total, rel=0.01)


def test_the_unread_part_is_that_of_the_published_shares():
    """7.0 % of T/16's step and 0.4 % of H/14's, at the context and targets of batch 128."""
    assert unread_gflop(50.2, 33.4) / 26.4 == pytest.approx(0.070, abs=0.002)
    assert unread_gflop(68.4, 44.2) / 656 == pytest.approx(0.004, abs=0.001)


def test_one_pass_spares_45_percent_of_the_predictor():
    """Of H/14 at the context and targets of batch 128 (the output's projection is not spared)."""
    masks = {"context_k": 68.4, "targets_m": 4, "targets_p": 44.2}
    per_target = sizes_of("vit_huge", image_size=224, patch_size=14, predictor_depth=12, **masks)
    one_pass = dataclasses.replace(per_target, predictor_mode="one_pass")
    modes = [step_gflop(sizes)["predictor"] for sizes in (per_target, one_pass)]
    assert 1 - modes[1] / modes[0] == pytest.approx(0.45, abs=0.02)


@pytest.mark.parametrize(
    ("mlp_ratio", "mode", "policy", "image"),
    [
        (4.0, "per_target", "none", (3, 40, 40)),
        (48 / 11, "per_target", "none", (5, 20, 80)),
        (4.0, "one_pass", "none", (1, 80, 20)),
        (4.0, "per_target", "norm_gelu", (3, 40, 40)),
        (48 / 11, "per_target", "selective", (3, 40, 40)),
        (4.0, "per_target", "full", (3, 40, 40)),
        (4.0, "one_pass", "selective", (3, 40, 40)),
        (48 / 11, "one_pass", "full", (3, 40, 40)),
    ],
)
def test_agrees_with_torchs_counter(mlp_ratio, mode, policy, image):
    """Exactly, since both count the matmuls alone. No two sizes are equal."""
    batch, m, k, p = 2, 3, 7, 5
    sizes = {"width": 44, "depth": 3, "heads": 2, "mlp_ratio": mlp_ratio}
    options = {"attention": "plain", "checkpointing": policy}
    encoder = Encoder(image[1:], 5, **sizes, **options, channels=image[0])
    predictor = Predictor(44, encoder.grid, 24, 2, 2, mlp_ratio=3.0, mode=mode, **options)
    images = torch.randn(batch, *image)
    context_idx = torch.stack([torch.randperm(64)[:k] for _ in range(batch)])
    target_idx = torch.stack([torch.randperm(64)[: m * p].view(m, p) for _ in range(batch)])
    counts = {}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(images)
    counts["target"] = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        context = encoder(images, context_idx)
        context.sum().backward()
    counts["context"] = counter.get_total_flops()
    leaf = context.detach().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        predictor(leaf, context_idx, target_idx).square().sum().backward()
    counts["predictor"] = counter.get_total_flops()
    counted = StepSizes(
        image_size=image[1:],
        patch_size=5,
        channels=image[0],
        width=44,
        depth=3,
        mlp_ratio=mlp_ratio,
        predictor_width=24,
        predictor_depth=2,
        predictor_mlp_ratio=3.0,
        predictor_mode=mode,
        context_k=k,
        targets_m=m,
        targets_p=p,
    )
    work = step_gflop(counted)
    assert work["total"] == pytest.approx(work["target"] + work["context"] + work["predictor"])
    if policy == "none":
        for part, count in counts.items():
            assert work[part] * 1e9 * batch == pytest.approx(count, rel=1e-9), part
    again = recomputed_gflop(policy, counted) * 1e9
    if policy in ("norm_gelu", "selective"):
        again += m * p * 2 * 24**2  # the last block's queries, as recompute.py says: not counted
    assert work["total"] * 1e9 + again == pytest.approx(sum(counts.values()) / batch, rel=1e-9)
