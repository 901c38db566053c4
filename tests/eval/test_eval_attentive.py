"""The attentive probe: its attention by hand, what it trains and what not, and that it resumes."""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from PIL import Image

from cjepa_fast.checkpoint.encoders import save_encoder
from cjepa_fast.data.sources import Subset, open_images
from cjepa_fast.eval.__main__ import main
from cjepa_fast.eval.finetuning.saved import Learner, SavedTraining
from cjepa_fast.eval.probes import attentive
from cjepa_fast.eval.probes.attentive import AttentiveProbe, ProbeRecipe
from cjepa_fast.model.vit import Encoder

SHORT = ProbeRecipe(epochs=3, batch=16, erasing=0.5)


def small() -> Encoder:
    torch.manual_seed(3)
    encoder = Encoder(image_size=24, patch_size=8, width=12, depth=1, heads=3)
    encoder.mean, encoder.std = (0.5,) * 3, (0.25,) * 3
    return encoder


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """48 grey images in two classes: one patch, somewhere, is red or blue."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CJEPA_DECODER", "pillow")  # it starts faster
    random = np.random.default_rng(0)
    for i in range(48):
        pixels = random.integers(90, 110, (24, 24, 3), dtype=np.uint8)
        y, x = random.integers(0, 3, 2) * 8
        pixels[y : y + 8, x : x + 8, 2 * (i % 2)] = 250
        path = tmp_path / "images" / f"class_{i % 2}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path / "images"


@pytest.fixture
def saved(tmp_path) -> Path:
    save_encoder(small().eval(), tmp_path / "encoder.safetensors")
    return tmp_path / "encoder.safetensors"


def trained(data: Path, folder: Path, chosen: ProbeRecipe = SHORT, **options):
    known = {"seed": 0, "bf16": False, "micro_batch_size": 16, "threads": 1, "resume": False}
    images = open_images(data)
    probe = attentive.train(
        small(), Subset(images, torch.arange(len(images))), images.labels, 2, chosen,
        argparse.Namespace(**{**known, **options}), folder,
    )  # fmt: skip
    return probe.state_dict()


# ----------------------------------------------------------------------------------------- by hand


def by_hand(probe: AttentiveProbe, tokens_ND: torch.Tensor) -> torch.Tensor:
    """What the query makes of one image's tokens, head by head: (D,)."""
    D, H = tokens_ND.shape[1], probe.encoder.heads
    d, query = D // H, probe.query[0, 0]
    normed = F.layer_norm(tokens_ND, (D,), probe.norm1.weight, probe.norm1.bias)
    q = probe.q.weight @ query + probe.q.bias
    k, v = (normed @ probe.kv.weight.T + probe.kv.bias).split(D, 1)
    heads = []
    for h in range(H):
        part = slice(h * d, (h + 1) * d)
        weight_N = torch.softmax(k[:, part] @ q[part] / math.sqrt(d), 0)
        heads.append(weight_N @ v[:, part])
    x = query + probe.proj.weight @ torch.cat(heads) + probe.proj.bias
    normed = F.layer_norm(x, (D,), probe.norm2.weight, probe.norm2.bias)
    hidden = F.gelu(probe.mlp.fc1.weight @ normed + probe.mlp.fc1.bias)
    return x + probe.mlp.fc2.weight @ hidden + probe.mlp.fc2.bias


def test_the_query_attends_to_the_tokens(seed):
    probe, tokens = AttentiveProbe(small(), 2), torch.randn(3, 9, 12)
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
        pooled = probe.pool(tokens)
        for found, image in zip(pooled, tokens, strict=True):
            torch.testing.assert_close(found, by_hand(probe, image), rtol=1e-5, atol=1e-5)
        images = torch.randn(3, 3, 24, 24)
        logits = probe.head(probe.pool(probe.encoder(images)))
        torch.testing.assert_close(probe(images), logits)


def test_it_starts_as_v_jepa_s(seed):
    """Small weights; what ends a branch is smaller by the root of 2."""
    encoder = Encoder(24, 8, 384, 1, 6)
    probe = AttentiveProbe(encoder, 10)
    smaller = (probe.proj, probe.mlp.fc2)
    for layer in (probe.q, probe.kv, probe.mlp.fc1, *smaller):
        std = 0.02 / math.sqrt(2 if layer in smaller else 1)
        assert layer.weight.std().item() == pytest.approx(std, rel=0.05)
        assert not layer.bias.any()
    assert probe.query.std().item() == pytest.approx(0.02, rel=0.2)
    assert probe.mlp.fc1.out_features == 4 * 384


def test_the_encoder_takes_no_gradient_and_all_else_does(seed):
    probe = AttentiveProbe(small(), 2)
    probe(torch.randn(2, 3, 24, 24)).square().sum().backward()
    own = {name for name, p in probe.named_parameters() if p.grad is not None}
    assert own == {name for name, _ in probe.named_parameters() if not name.startswith("encoder.")}
    learner = Learner(probe, probe.encoder, 1.0, 1e-3)
    masters = {owned.master.name for owned in learner.state()}
    assert masters == own  # and the checkpoint holds no more


# --------------------------------------------------------------------------------------- trainings


def test_schedules_are_the_published_ones(data, tmp_path, monkeypatch):
    """From 1e-3 to nothing, and from 1e-3 to 1e-6, by half a cosine; norms are clipped at 1."""
    seen = []

    def noted(learner):
        norm = torch.nn.utils.clip_grad_norm_(
            [p for p in learner.module.parameters() if p.grad is not None], math.inf
        )
        groups = {group["decays"]: group for group in learner.optimizer.param_groups}
        values = groups[True]["lr"], groups[True]["weight_decay"], groups[False]["weight_decay"]
        seen.append((*values, learner.clip, float(norm)))
        step(learner)

    step = Learner.step
    monkeypatch.setattr(Learner, "step", noted)
    trained(data, tmp_path / "a")
    assert len(seen) == 9
    for i, (lr, decay, of_biases, clip, _) in enumerate(seen):
        half = 0.5 * (1 + math.cos(math.pi * i / 9))
        assert lr == pytest.approx(1e-3 * half)
        assert decay == pytest.approx(1e-6 + (1e-3 - 1e-6) * half)
        assert (of_biases, clip) == (0.0, 1.0)


def test_gradients_are_clipped_together(seed):
    probe = AttentiveProbe(small(), 2)
    learner = Learner(probe, probe.encoder, 1.0, 0.0, clip=0.5)
    for name, p in probe.named_parameters():
        p.grad = None if name.startswith("encoder.") else torch.ones_like(p)
    learner.optimizer.zero_grad = lambda: None
    learner.step()
    gradients = [p.grad.flatten() for p in probe.parameters() if p.grad is not None]
    assert torch.cat(gradients).norm().item() == pytest.approx(0.5, rel=1e-4)


def test_the_batch_is_a_50th_of_a_small_set():
    known = {1_281_167: 1024, 51_200: 1024, 5000: 100, 100: 16, 9: 9}
    assert {n: ProbeRecipe().batch_of(n) for n in known} == known
    assert ProbeRecipe(batch=64).batch_of(100) == 64


class Stopped(Exception):
    pass


def test_what_resumes_ends_as_what_never_stopped(data, tmp_path, monkeypatch):
    whole = trained(data, tmp_path / "a")

    def stop(kept, done):
        save(kept, done)
        if done == 6:
            raise Stopped

    save = SavedTraining.save
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(SavedTraining, "save", stop)
        trained(data, tmp_path / "b")
    with pytest.raises(ValueError, match="another training: recipe was"):
        trained(data, tmp_path / "b", replace(SHORT, lr=0.1), resume=True)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="another training: enco"):
        patch.setattr(attentive, "digest", lambda encoder: "of other weights")
        trained(data, tmp_path / "b", resume=True)
    again = trained(data, tmp_path / "b", resume=True)
    assert whole.keys() == again.keys()
    for name, value in whole.items():
        assert torch.equal(again[name], value), name
    for name, value in small().state_dict().items():
        assert torch.equal(whole[f"encoder.{name}"], value), name


def test_the_command_finds_a_patch_wherever_it_is(data, saved, tmp_path, capsys):
    out = tmp_path / "probe.json"
    words = ["attentive", str(saved), "--data", str(data), "--untrained", "--seed", "1"]
    words += ["--threads", "1", "--crop", "1", "--out", str(tmp_path / "out"), "--json", str(out)]
    changes = ["epochs=6", "batch=8", "lr=0.02", "crop_scale=[0.9,1]", "erasing=0"]
    assert main([*words, "--set", *changes]) == 0
    record = json.loads(out.read_text())
    rows = record["rows"]
    assert [row["encoder"] for row in rows] == ["untrained", "trained"]
    assert all(row["top1"] >= 90 and "top5" not in row for row in rows)
    assert rows[0]["train_images"] + rows[0]["test_images"] == 48
    assert record["task"] == "attentive" and record["settings"]["recipe"]["lr"] == 0.02
    assert record["settings"]["recipe"]["weight_decay"] == 1e-3
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"trained", "untrained"}
    said = capsys.readouterr().out
    assert "epoch 6 of 6: loss" in said and "attentive %" in said


def test_what_is_wrong_is_said(data, saved, capsys):
    cases = {
        "a recipe has epochs, batch": "speed=3",
        "batch = -1: must be above 0": "batch=-1",
        "clip = -1: must not be negative": "clip=-1",
        "crop_scale = 0.5: must be two numbers": "crop_scale=0.5",
    }
    for expected, change in cases.items():
        assert main(["attentive", str(saved), "--data", str(data), "--set", change]) == 2
        assert expected in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_ranks_end_where_one_does(data, saved, tmp_path):
    """By the mean of their gradients; erasing, which each rank draws for itself, is off."""
    found = {}
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}"
        words = ["attentive", saved, "--data", data, "--threads", 1, "--crop", 1, "--out", out]
        words += ["--json", out / "x.json", "--micro-batch-size", 4, "--set", "epochs=2"]
        words += ["batch=8", "lr=0.01", "erasing=0"]
        done = tiny.run(tiny.ROOT / "cjepa_fast" / "eval" / "__main__.py", *words, ranks=ranks)
        assert done.returncode == 0, done.stderr
        line = next(x for x in done.stdout.splitlines() if x.startswith("epoch 2 of 2"))
        found[ranks] = float(line.split()[-1])
    assert found[2] == pytest.approx(found[1], abs=2e-4)
