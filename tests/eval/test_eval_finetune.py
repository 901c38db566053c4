"""Fine-tuning: each part of the recipe by hand, and short trainings that end where they should."""

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from cjepa_fast.data.sources import Subset, open_images
from cjepa_fast.eval.__main__ import main
from cjepa_fast.eval.finetuning import classify, layer_decay, recipe
from cjepa_fast.eval.finetuning.recipe import Classifier, Recipe
from cjepa_fast.eval.finetuning.saved import SavedTraining
from cjepa_fast.eval.probes import attentive, semi
from cjepa_fast.model.vit import Encoder

PLAIN = Recipe(
    epochs=2, batch=16, lr=0.01, layer_decay=1.0, drop_path=0.0, mixup=0.0, cutmix=0.0,
    erasing=0.0, smoothing=0.0, rand_augment=None,
)  # fmt: skip


def small(depth: int = 2) -> Encoder:
    encoder = Encoder(image_size=24, patch_size=8, width=12, depth=depth, heads=3)
    encoder.mean, encoder.std = (0.5,) * 3, (0.25,) * 3
    return encoder


@pytest.fixture
def data(tmp_path, monkeypatch):
    """48 images in two classes, one reddish and one bluish."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    for i in range(48):
        pixels = random.integers(0, 120, (24, 32, 3), dtype=np.uint8)
        pixels[..., 2 * (i % 2)] += 100
        path = tmp_path / "images" / f"class_{i % 2}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path / "images"


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    made, path = small(), tmp_path / "encoder.safetensors"
    save_file({name: p.contiguous() for name, p in made.state_dict().items()}, path)
    described = {**made.architecture, "mean": made.mean, "std": made.std}
    path.with_suffix(".json").write_text(json.dumps(described))
    return path


# ---------------------------------------------------------------------------------------- the parts


@pytest.mark.parametrize(
    "module, train, row",
    [(classify, "tune", classify.tuned_row), (attentive, "train", attentive.probed_row)],
)
def test_classes_without_names_may_have_large_numbers(
    data, tmp_path, monkeypatch, module, train, row
):
    """The model has a class for each; what it answers is taken for the number again."""
    images, answered = open_images(data), torch.nn.Linear(1, 2)
    images.classes, images.labels = None, 7 + 10**15 * images.labels

    class Answers(torch.nn.Module):
        """Always the second class."""

        head = answered

        def forward(self, images_BCHW):
            return torch.tensor([[0.0, 1.0]]).expand(len(images_BCHW), -1)

    seen = []

    def trained(encoder, subset, label_n, classes, *rest):
        seen.append((label_n.tolist(), classes))
        return (Answers(), Answers()) if train == "tune" else Answers()

    monkeypatch.setattr(module, train, trained)
    keep, test = torch.tensor([0, 1, 30]), torch.tensor([2, 3, 31, 45])
    kinds = images.labels.unique()
    args = options(crop=1.0, batch_size=4, task="x", checkpoint="x", out=tmp_path)
    folder = [tmp_path] if train == "tune" else []
    found = row("e", small(), ((images, keep), (images, test)), None, args, *folder)
    assert seen == [([int(images.labels[i] == kinds[1]) for i in keep], 2)]
    assert found["top1"] == 100 * (images.labels[test] == kinds[1]).double().mean()


def test_drop_path_leaves_out_whole_images_and_keeps_the_mean(seed):
    x = torch.randn(4000, 2, 3)
    dropped = layer_decay.drop_path(x, 0.25)
    gone = (dropped == 0).flatten(1).all(1)
    torch.testing.assert_close(dropped[~gone], x[~gone] / 0.75)
    assert 0.2 < gone.double().mean() < 0.3


def test_blocks_drop_more_the_deeper_they_are_and_only_in_training(seed, monkeypatch):
    encoder, images = small(depth=3), torch.randn(2, 3, 24, 24)
    before = encoder.eval()(images)
    rates = []
    monkeypatch.setattr(layer_decay, "drop_path", lambda x, rate: (rates.append(rate), x)[1])
    layer_decay.add_drop_path(encoder, 0.2)
    torch.testing.assert_close(encoder(images), before)
    assert rates == []
    encoder.train()(images)
    assert rates == pytest.approx([0.1, 0.1, 0.2, 0.2])  # attention and MLP; none in the first


def test_a_dropped_branch_is_the_identity(seed, monkeypatch):
    encoder, images = small(depth=1), torch.randn(2, 3, 24, 24)
    layer_decay.add_drop_path(encoder, 0.5)  # of one block linspace has the first rate, 0
    for branch in (encoder.blocks[0].attn, encoder.blocks[0].mlp):
        branch.register_forward_hook(
            lambda module, args, out: layer_decay.drop_path(out, 1 - 1e-12)
        )
    tokens = encoder.norm(encoder.embedded(images, None))
    torch.testing.assert_close(encoder.train()(images), tokens)


def test_layer_decay_by_hand():
    model = Classifier(small(depth=2), classes=5)
    scales = {}
    names = {id(p): name for name, p in model.named_parameters()}
    for group in layer_decay.layer_decay_groups(model, model.encoder, decay=0.5, weight_decay=0.1):
        for p in group["params"]:
            scales[names[id(p)]] = group["lr_scale"], group["weight_decay"]
    assert scales["head.weight"] == (1.0, 0.1)
    assert scales["head.bias"] == scales["norm.weight"] == (1.0, 0.0)
    assert scales["encoder.blocks.1.mlp.fc1.weight"] == (0.5, 0.1)
    assert scales["encoder.blocks.0.norm1.bias"] == (0.25, 0.0)
    assert scales["encoder.patch_embed.proj.weight"] == (0.125, 0.1)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert scales.keys() == trained


def test_learned_positions_are_below_all_blocks():
    model = Classifier(small(depth=2), classes=5)
    model.encoder.pos_embed.requires_grad_()
    (group,) = [
        group
        for group in layer_decay.layer_decay_groups(model, model.encoder, 0.5, 0.1)
        if any(p is model.encoder.pos_embed for p in group["params"])
    ]
    assert (group["lr_scale"], group["weight_decay"]) == (0.125, 0.0)


def test_mixup_by_hand():
    images = torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    mixed, target = recipe.mixup(images, torch.eye(3), share=0.75)
    assert mixed[:, 0, 0, 0].tolist() == [1.75, 2.0, 3.25]
    assert target.tolist() == [[0.75, 0, 0.25], [0, 1, 0], [0.25, 0, 0.75]]


def test_cutmix_by_hand():
    """A quarter of the area about the middle of 4 x 4; then about a corner, a quarter of that."""
    images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    mixed, target = recipe.cutmix(images, torch.eye(2), share=0.75, middle=[0.5, 0.5])
    box = torch.zeros(4, 4)
    box[1:3, 1:3] = 1
    assert torch.equal(mixed[0, 0], box) and torch.equal(mixed[1, 2], 1 - box)
    assert target.tolist() == [[0.75, 0.25], [0.25, 0.75]]
    mixed, target = recipe.cutmix(images, torch.eye(2), share=0.75, middle=[0.0, 1.0])
    assert mixed[0].nonzero().tolist() == [[channel, 0, 3] for channel in range(3)]
    assert target[0].tolist() == [15 / 16, 1 / 16]
    assert images[0].max() == 0  # the images given are left as they were


def test_mixing_takes_what_the_recipe_has(seed):
    images, target = torch.rand(4, 3, 8, 8), torch.eye(4)
    random = torch.Generator().manual_seed(seed)
    for chosen in (Recipe(), Recipe(cutmix=0), Recipe(mixup=0)):
        for _ in range(5):
            _, mixed = recipe.mix(images, target, chosen, random)
            torch.testing.assert_close(mixed.sum(1), torch.ones(4))
    untouched, same = recipe.mix(images, target, Recipe(mixup=0, cutmix=0), random)
    assert untouched is images and same is target


def test_beta_draws_have_the_mean_and_variance(seed):
    random = torch.Generator().manual_seed(seed)
    draws = torch.tensor([recipe.beta(0.8, random) for _ in range(4000)])
    assert abs(draws.mean() - 0.5) < 0.03
    assert abs(draws.var() - 1 / (4 * (2 * 0.8 + 1))) < 0.01


def test_soft_targets_are_label_smoothing(seed):
    logits, label = torch.randn(6, 9), torch.randint(9, (6,))
    ours = F.cross_entropy(logits, recipe.soft_targets(label, 9, 0.1))
    torch.testing.assert_close(ours, F.cross_entropy(logits, label, label_smoothing=0.1))


def test_erasing_takes_boxes_of_the_right_size(seed):
    random = torch.Generator().manual_seed(seed)
    erased = recipe.erase(torch.full((800, 3, 32, 32), 9.0), 0.5, random)
    share = (erased != 9).any(1).double().mean((1, 2))
    hit = share[share > 0]
    assert 320 < len(hit) < 480
    assert hit.min() > 0.01 and hit.max() < 0.36 and 0.1 < hit.mean() < 0.25


def test_the_ema_by_hand():
    """Its momentum is (1 + n) / (10 + n) of n updates before, up to the most."""
    model = torch.nn.Linear(1, 1, bias=False)
    average, by_hand = recipe.averaged(model, most=0.2), None
    for n, value in enumerate([8.0, 4.0, 0.0]):
        model.weight.data.fill_(value)
        average.update_parameters(model)
        momentum = min(0.2, (1 + n) / (10 + n))
        by_hand = value if by_hand is None else momentum * by_hand + (1 - momentum) * value
        assert average.module.weight.item() == pytest.approx(by_hand)


def test_recipes_by_size():
    width = {192: 0.65, 768: 0.65, 1024: 0.75, 1280: 0.75}
    found = {w: recipe.recipe_of(argparse.Namespace(width=w)) for w in width}
    assert {w: r.layer_decay for w, r in found.items()} == width
    assert [found[w].drop_path for w in (768, 1024, 1280)] == [0.1, 0.2, 0.3]
    assert [found[w].epochs for w in (768, 1024)] == [100, 50]


# --------------------------------------------------------------------------------------- trainings


def options(**changes) -> argparse.Namespace:
    known = {"seed": 0, "bf16": False, "micro_batch_size": 16, "threads": 1, "resume": False}
    return argparse.Namespace(**{**known, **changes})


def tuned(data: Path, chosen: Recipe, folder: Path, **changes) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    images = open_images(data)
    train = Subset(images, torch.arange(len(images)))
    arguments = options(**changes)
    model, _ = classify.tune(small(), train, images.labels, 2, chosen, arguments, folder)
    return model.state_dict()


def test_micro_batches_sum_up_to_the_batch(data, tmp_path):
    whole = tuned(data, PLAIN, tmp_path / "a")
    parts = tuned(data, PLAIN, tmp_path / "b", micro_batch_size=4)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=2e-4, rtol=0, msg=name)
    first = small().state_dict()["blocks.0.mlp.fc1.weight"]
    assert not torch.equal(whole["encoder.blocks.0.mlp.fc1.weight"], first)


def test_one_process_imports_no_deepspeed(data, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # its import fails
    chosen = replace(PLAIN, epochs=1)
    tuned(data, chosen, tmp_path / "a")
    tuned(data, chosen, tmp_path / "a", resume=True)


class Stopped(Exception):
    pass


STARTS = [(classify, classify.tune, PLAIN), (attentive, attentive.train, attentive.ProbeRecipe())]


@pytest.mark.parametrize("module, start, chosen", STARTS)
def test_labels_precision_and_micro_batches_decide_a_training(
    data, tmp_path, monkeypatch, module, start, chosen
):
    images, facts = open_images(data), []

    def noted(folder, own, **options):
        facts.append(own)
        raise Stopped

    monkeypatch.setattr(module, "SavedTraining", noted)
    train = Subset(images, torch.arange(len(images)))
    same, other = images.labels.clone(), 1 - images.labels
    ways = {"bf16": True}, {"micro_batch_size": 4}
    for labels, way in (images.labels, {}), (same, {}), (other, {}), *((same, w) for w in ways):
        torch.manual_seed(3)
        with pytest.raises(Stopped):
            start(small(), train, labels, 2, chosen, options(**way), tmp_path)
    assert facts[0] == facts[1] != facts[2]
    assert facts[0] | {"labels": facts[2]["labels"]} == facts[2]
    assert facts[0] | {"bf16": True} == facts[3] != facts[0]
    assert facts[0] | {"micro_batch": 4} == facts[4] != facts[0]


@pytest.mark.parametrize("module, start, chosen", STARTS)
def test_one_class_is_nothing_to_learn(data, tmp_path, module, start, chosen):
    images = open_images(data)
    train, labels = Subset(images, torch.arange(len(images))), torch.zeros_like(images.labels)
    with pytest.raises(ValueError, match="two classes among the training images"):
        start(small(), train, labels, 2, chosen, options(), tmp_path)


def test_what_goes_on_ends_as_what_never_stopped(data, tmp_path, monkeypatch):
    chosen = replace(PLAIN, epochs=3, drop_path=0.3, mixup=0.8, cutmix=1.0, erasing=0.5)
    whole = tuned(data, chosen, tmp_path / "a")

    def stop(kept, done):
        save(kept, done)
        if done == 6:
            raise Stopped

    save = SavedTraining.save
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(SavedTraining, "save", stop)
        tuned(data, chosen, tmp_path / "b")
    (kept,) = (tmp_path / "b" / "checkpoints").iterdir()
    assert kept.name == "step_00000006"  # of 3 an epoch: the first epoch's is gone
    with pytest.raises(ValueError, match="resume it with --resume"):
        tuned(data, chosen, tmp_path / "b")
    with pytest.raises(ValueError, match="another training: seed was 0, is 1"):
        tuned(data, chosen, tmp_path / "b", resume=True, seed=1)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="another training: enco"):
        patch.setattr(classify, "digest", lambda encoder: "of other weights")
        tuned(data, chosen, tmp_path / "b", resume=True)
    again = tuned(data, chosen, tmp_path / "b", resume=True)
    for name, value in whole.items():
        assert torch.equal(again[name], value), name


@pytest.mark.parametrize("decoder", ["dali", "pillow"])
def test_the_command_learns_colours(data, saved, tmp_path, capsys, monkeypatch, decoder):
    """With the whole recipe, RandAugment too; it finds what sets the classes apart."""
    monkeypatch.setenv("CJEPA_DECODER", decoder)
    out = tmp_path / "tuned.json"
    words = ["finetune", str(saved), "--data", str(data), "--threads", "1", "--crop", "1"]
    words += ["--out", str(tmp_path / "out"), "--json", str(out)]
    changes = ["epochs=8", "batch=8", "lr=0.2", "layer_decay=1", "rand_augment=[1,5]"]
    assert main([*words, "--set", *changes, "cutmix=0", "erasing=0"]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["top1"] >= 90
    assert 0 <= row["average_top1"] <= 100 and "top5" not in row
    assert "epoch 8 of 8: loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    "images, batch, micro_batch, ranks, expected",
    [
        (5_000, 100, 64, 1, (100, 50)),
        (50_000, 1_024, 64, 8, (1_024, 64)),
        (9_469, 189, 64, 1, (189, 63)),
        (127, 1_024, 64, 1, (126, 63)),  # nearly all of them in each epoch
        (1_000, 1_024, 64, 1, (992, 62)),
        (100, 512, 64, 8, (96, 12)),
    ],
)
def test_a_batch_is_as_asked_or_said(
    images, batch, micro_batch, ranks, expected, monkeypatch, capsys
):
    monkeypatch.setattr(classify, "world_size", lambda: ranks)
    assert classify.batches_of(images, batch, micro_batch) == expected
    said = f"{expected[0]} images a step, not {batch}: {images} images, in parts of {expected[1]}\n"
    assert capsys.readouterr().out == ("" if expected[0] == batch else said)


def test_more_ranks_than_images_are_refused(monkeypatch):
    monkeypatch.setattr(classify, "world_size", lambda: 8)
    with pytest.raises(ValueError, match="a batch of 5 images for 8 ranks: start fewer"):
        classify.batches_of(5, 16, 64)


def test_images_that_cannot_be_read_are_not_among_the_test_images(data, monkeypatch):
    read = classify.image_vectors
    monkeypatch.setattr(
        classify, "image_vectors", lambda *args, **how: [x[1:] for x in read(*args, **how)]
    )
    args = options(crop=1.0, batch_size=4)
    split = open_images(data), torch.arange(10)
    model = Classifier(small(), 2, False)
    assert classify.percent(model, small(), split, args, torch.arange(2))["test_images"] == 9


def test_what_is_wrong_is_said(data, saved, capsys):
    cases = {
        "a recipe has epochs": ["finetune", "--set", "speed=3"],
        "is not one image of each": ["semi", "--share", "0.01"],
        "--epochs is for semi with --probe": ["semi", "--epochs", "10"],
        "--probe-batch-size is for semi with --probe": ["semi", "--probe-batch-size", "8"],
        "--no-cache is for semi with --probe": ["semi", "--no-cache"],
        "--set is for semi without --probe": ["semi", "--probe", "--set", "lr=1"],
        "--micro-batch-size is for semi without": ["semi", "--probe", "--micro-batch-size", "8"],
        "batch = 0: must be above 0": ["finetune", "--set", "batch=0"],
        "drop_path = 1: must be from 0 to below 1": ["finetune", "--set", "drop_path=1"],
        "lr = high: must be a number": ["finetune", "--set", 'lr="high"'],
    }
    for expected, (task, *words) in cases.items():
        assert main([task, str(saved), "--data", str(data), *words]) == 2
        assert expected in capsys.readouterr().err


# -------------------------------------------------------------------------------------- few labels


def test_few_labels_by_fine_tuning(data, saved, tmp_path):
    out = tmp_path / "semi.json"
    words = ["semi", str(saved), "--data", str(data), "--share", "0.3,0.6", "--threads", "1"]
    words += ["--out", str(tmp_path / "few"), "--json", str(out)]
    assert main([*words, "--set", "epochs=1", "batch=8", "rand_augment=null"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["labels"] for row in rows] == ["0.3", "0.6"]
    assert rows[0]["train_images"] < rows[1]["train_images"] and "average_top1" in rows[0]
    assert {path.name for path in (tmp_path / "few").iterdir()} == {"0.3", "0.6"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": 2.5}, "epochs = 2.5: must be a whole number"),
        ({"crop_scale": 0.5}, "crop_scale = 0.5: must be two numbers"),
        ({"rand_augment": 5}, "rand_augment = 5: must be two numbers"),
        ({"average": 1.0}, "average = 1.0: must be from 0 to below 1"),
    ],
)
def test_recipes_that_make_no_sense(changes, said):
    with pytest.raises(ValueError, match=said):
        replace(PLAIN, **changes)


def test_shares_are_even_nested_and_the_same_each_time(data):
    images = open_images(data)
    keep = torch.arange(len(images))
    tenth, half = (semi.drawn(images, keep, share) for share in (0.1, 0.5))
    assert images.labels[tenth].bincount().tolist() == [2, 2]
    assert images.labels[half].bincount().tolist() == [12, 12]
    assert set(tenth.tolist()) < set(half.tolist())
    assert torch.equal(semi.drawn(images, keep, 0.1), tenth)
    fewer = keep[images.labels == 0][:3]
    with pytest.raises(ValueError, match="class class_0 has 3: ask for a smaller share"):
        semi.drawn(images, torch.cat([fewer, keep[images.labels == 1]]), 0.9)


def test_a_list_names_images_by_their_last_part_or_whole(data, tmp_path):
    images, file = open_images(data), tmp_path / "one_percent.txt"
    file.write_text("005.png\nclass_0/006.png\n\n")
    keep = torch.arange(len(images))
    names = [images.name(i) for i in semi.listed(images, keep, file).tolist()]
    assert sorted(names) == ["class_0/006.png", "class_1/005.png"]
    shutil.copy(data / "class_0" / "006.png", data / "class_1" / "006.png")
    images = open_images(data)
    keep = torch.arange(len(images))
    assert len(semi.listed(images, keep, file)) == 2
    file.write_text("006.png\n")
    with pytest.raises(ValueError, match=r"006.png may be class_0/006.png or class_1/006.png"):
        semi.listed(images, keep, file)
    file.write_text("005.png\nn01440764_10074.JPEG\n")
    with pytest.raises(ValueError, match=r"1 of its 2 names .* n01440764_10074\.JPEG"):
        semi.listed(images, keep, file)


def test_a_list_of_one_class_alone_is_said(data, saved, tmp_path, capsys):
    (file := tmp_path / "few.txt").write_text("000.png\n002.png\n004.png\n")
    assert main(["semi", str(saved), "--data", str(data), "--list", str(file)]) == 2
    said = capsys.readouterr()
    assert "1 of the 2 classes tested have no training image" in said.out
    assert "needs at least two classes" in said.err


def test_few_labels_by_probe(data, saved, tmp_path):
    out = tmp_path / "semi.json"
    words = ["semi", str(saved), "--data", str(data), "--share", "0.3,0.6", "--probe"]
    words += [
        "--optimizer",
        "lbfgs",
        "--sweep",
        "C=0.1",
        "--no-cache",
        "--crop",
        "1",
        "--json",
        str(out),
    ]
    assert main(words) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["labels"], row["layers"]) for row in rows] == [
        ("0.3", "last"), ("0.3", "last 2"), ("0.6", "last"), ("0.6", "last 2"),
    ]  # fmt: skip
    assert rows[0]["train_images"] * 2 == pytest.approx(rows[2]["train_images"], abs=2)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_ranks_stopped_and_resumed_end_where_one_does(data, tmp_path):
    """By the mean of the ranks' gradients, and from the checkpoint of the first part."""
    whole = tuned(data, PLAIN, tmp_path / "one", micro_batch_size=4)
    worker = Path(__file__).with_name("finetune_worker.py")
    done = tiny.run(worker, data, tmp_path / "two", ranks=2)
    assert done.returncode == 0, done.stderr
    assert "epoch 2 of 2" in done.stdout
    again = torch.load(tmp_path / "two" / "weights.pt", weights_only=True)
    for name, value in whole.items():
        torch.testing.assert_close(again[name], value, atol=2e-4, rtol=0, msg=name)
