"""`python -m cjepa_fast.eval segment`: pairs of folders in, a trained head and its scores out."""

import dataclasses
import functools
import json
import os
import shutil
from pathlib import Path

import dense_sets
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score, recall_score

from cjepa_fast.checkpoint import state_of
from cjepa_fast.checkpoint.encoders import load_encoder
from cjepa_fast.data.sets.labelmaps import read_label_map, write_label_map
from cjepa_fast.data.sets.pairs import IGNORE, classes_of, named_classes, open_pairs
from cjepa_fast.eval.__main__ import main
from cjepa_fast.eval.dense import segment, segment_training, segmenter
from cjepa_fast.eval.dense.confusion import confusion, scores
from cjepa_fast.eval.dense.resize import fitted
from cjepa_fast.eval.dense.segmenter import Segmenter, logits_sliding, logits_whole, loss_of
from cjepa_fast.eval.dense.upernet import UPerHead
from cjepa_fast.eval.finetuning.layer_decay import layer_decay_groups
from cjepa_fast.eval.finetuning.saved import SavedTraining

RECIPE = segment_training.Recipe(
    steps=4, warmup=2, batch_size=2, lr=1e-2, weight_decay=0.01, layer_decay=0.7, drop_path=0.3,
    short_side=40, crop_size=24, plain_colours=False, seed=5, bf16=False,
)  # fmt: skip
CLASSES = classes_of({0: "red", 1: "green", 2: "blue"}, set())


@pytest.fixture
def encoder(tmp_path, seed):
    return dense_sets.write_encoder(tmp_path)


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return dense_sets.write_pairs(tmp_path / "data", {"train": 8, "val": 3})


def evaluate(encoder, data, *options) -> int:
    words = ["segment", str(encoder), "--data", str(data), "--short-side", "40"]
    return main([*words, "--batch-size", "2", *map(str, options)])


@pytest.fixture
def narrow(monkeypatch):
    """UPerNet with few channels."""
    few = functools.partial(UPerHead, channels=8)
    monkeypatch.setattr(segmenter, "UPerHead", few)


# ----------------------------------------------------------------------------------------- scores


def test_scores_are_scikit_learn_s(seed):
    truth, found = np.random.randint(0, 5, (2, 40, 50))
    truth[0, :7] = IGNORE
    known = truth != IGNORE
    matrix = confusion(truth, found, 5, IGNORE)
    assert (matrix == confusion_matrix(truth[known], found[known])).all()
    total, iou = scores(matrix)
    assert iou == pytest.approx(100 * jaccard_score(truth[known], found[known], average=None))
    assert total["miou"] == pytest.approx(np.mean(iou))
    assert total["aacc"] == pytest.approx(100 * accuracy_score(truth[known], found[known]))
    recall = 100 * recall_score(truth[known], found[known], average="macro")
    assert total["macc"] == pytest.approx(recall)


@pytest.mark.parametrize("short_side, patch_size", [(512, 16), (480, 16), (224, 14)])
def test_no_row_of_patches_is_lost_to_rounding(short_side, patch_size):
    """428 * (512 / 428) is 511.99..., which rounded down to patches is 496."""
    sides = range(32, 3000)
    assert {min(fitted((s, 2 * s), short_side, patch_size)) for s in sides} == {short_side}
    assert {min(fitted((s + 7, s), short_side, patch_size)) for s in sides} == {short_side}
    assert fitted((428, 640), 512, 16) == (512, 752)
    assert fitted((10, 10), 5, 16) == (16, 16)


def test_scores_by_hand():
    """Four classes: 0 and 1 are there, 2 is found where it is not, 3 is nowhere."""
    truth = np.array([0, 0, 0, 0, 1, 1, 255])
    found = np.array([0, 0, 0, 1, 1, 2, 3])
    total, iou = scores(confusion(truth, found, 4, 255))
    assert iou == pytest.approx([75, 100 / 3, 0, None])
    assert total["miou"] == pytest.approx((75 + 100 / 3 + 0) / 3)
    assert total["macc"] == pytest.approx((75 + 50) / 2)
    assert total["aacc"] == pytest.approx(100 * 4 / 6)


# ---------------------------------------------------------------------------------------- command


def test_a_set_whose_colours_are_its_classes_is_learnt(encoder, data, tmp_path, capsys):
    out, picture = tmp_path / "s.json", tmp_path / "s.png"
    options = ("--steps", 40, "--lr", 0.05, "--plain-colours")  # for these are what is learnt
    options += ("--json", out, "--out", picture, "--count", 2)
    assert evaluate(encoder, data, *options) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["miou"] > 85 and row["aacc"] > 90  # what is missed lies along the squares' edges
    assert list(row["iou"]) == ["class 0", "class 1", "class 2"]
    assert (row["train_images"], row["test_images"], row["classes"]) == (8, 3, 3)
    assert np.mean(list(row["iou"].values())) == pytest.approx(row["miou"])
    assert f"{row['miou']:.2f}" in capsys.readouterr().out
    assert picture.stat().st_size > 5_000


def test_what_is_wrong_names_the_file(encoder, data, capsys, monkeypatch):
    """Before anything is learnt."""
    monkeypatch.setattr(segment, "train", None)

    def fails(path: Path, words: str, *options) -> None:
        assert evaluate(encoder, data, "--steps", 1, *options) == 2
        said = capsys.readouterr().err
        assert str(path) in said and words in said and len(said.splitlines()) == 1, said

    mask = data / "masks" / "val" / "1.png"
    good = mask.read_bytes()
    write_label_map(mask, np.zeros((40, 40), dtype=np.uint8))
    fails(mask, "is 40x40, its image 56x40")
    write_label_map(mask, np.full((40, 56), 7, dtype=np.uint8))
    fails(mask, "number 7")
    Image.new("RGB", (56, 40)).save(mask)
    fails(mask, "mode RGB")
    mask.unlink()
    fails(mask, "missing")
    mask.write_bytes(good)
    fails("--crop-size 25", "try 28", "--crop-size", 25)
    fails("--slide 40", "gaps", "--slide", 40, "--crop-size", 24)
    fails("--resume", "--save", "--resume")
    fails("--batch-size 1", "2 or more", "--head", "upernet", "--batch-size", 1)
    fails("--layers 4", "upernet reads a block of each", "--head", "upernet", "--layers", 4)
    fails("1 classes", "two or more", "--ignore-index", 0, 1)
    shutil.rmtree(data / "images" / "val")
    fails(data / "images", "no folder validation or val or test")
    shutil.rmtree(data / "masks")
    fails(data, "neither annotations nor masks")


def test_a_frozen_encoder_drops_no_path(encoder, data, tmp_path, narrow, capsys):
    out = tmp_path / "s.json"
    frozen = ("--head", "upernet", "--frozen", "--steps", 1, "--json", out)
    assert evaluate(encoder, data, *frozen) == 0
    assert json.loads(out.read_text())["settings"]["drop_path"] == 0
    assert evaluate(encoder, data, "--drop-path", 0.1) == 2
    assert "--drop-path 0.1: a frozen encoder drops none" in capsys.readouterr().err
    assert evaluate(encoder, data, "--layer-decay", 0.5) == 2
    assert "--layer-decay 0.5: a frozen encoder trains no block" in capsys.readouterr().err


def test_the_loss_must_stay_finite(encoder, data, capsys):
    assert evaluate(encoder, data, "--steps", 3, "--lr", 1e30) == 2
    assert "--lr" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- data


def test_ade20k_s_zero_counts_nowhere(tmp_path):
    data = dense_sets.write_pairs(tmp_path, {"training": 2, "validation": 1}, offset=1)
    (tmp_path / "masks").rename(tmp_path / "annotations")
    lines = ["Idx\tRatio\tTrain\tVal\tName", "1\t0.1\t9\t9\twall", "2\t0.1\t9\t9\tdoor, gate"]
    (tmp_path / "objectInfo150.txt").write_text("\n".join([*lines, "3\t0.1\t9\t9\tsky"]) + "\n")
    classes = segment.find_classes(str(data), None, {0})
    assert classes.names == ("wall", "door", "sky")
    assert classes.table_256[[0, 1, 2, 3, 255]].tolist() == [IGNORE, 0, 1, 2, IGNORE]
    assert segment.is_ade20k(data)
    pairs = open_pairs(data, segment.TRAINING)
    numbers = read_label_map(pairs.masks[0])
    labels = pairs.labels(0, classes)
    assert (labels[numbers < 255] + 1 == numbers[numbers < 255]).all()
    assert (labels[numbers == 255] == IGNORE).all()


def test_classes_by_name_and_those_left_out_between(tmp_path):
    (tmp_path / "classes.txt").write_text("sky\nvoid\nroad\n")
    assert named_classes(tmp_path) == {0: "sky", 1: "void", 2: "road"}
    (tmp_path / "classes.txt").write_text("0\tSky\n4\tStreet lamp\n11\tUnlabelled\n")
    assert named_classes(tmp_path) == {0: "Sky", 4: "Street lamp", 11: "Unlabelled"}
    classes = classes_of(named_classes(tmp_path), {11})
    assert classes.names == ("Sky", "Street lamp")
    assert classes.table_256[[0, 4, 11, 255, 3]].tolist() == [0, 1, IGNORE, IGNORE, -1]
    (tmp_path / "classes.txt").write_text("0\tSky\n0\tRoad\n")
    with pytest.raises(ValueError, match="twice"):
        named_classes(tmp_path)


# ------------------------------------------------------------------------------------------ model


@pytest.mark.parametrize("patch_size", [4, 14, 16])
def test_upernet_s_levels_and_logits(patch_size, seed):
    head = UPerHead(8, patch_size, classes=5, channels=8)
    blocks = [torch.randn(2, 8, 4, 6) for _ in range(4)]
    levels = [tuple(make(x).shape[2:]) for make, x in zip(head.resample, blocks, strict=True)]
    scaled = {4: [(4, 6), (2, 3), (1, 2), (1, 1)]}
    assert levels == scaled.get(patch_size, [(16, 24), (8, 12), (4, 6), (2, 3)])
    main_logits, auxiliary = head(blocks)
    assert main_logits.shape == (2, 5, *levels[0]) and auxiliary.shape == (2, 5, *levels[2])
    (alone,) = head.eval()(blocks)
    assert alone.shape == main_logits.shape
    (main_logits.sum() + auxiliary.sum()).backward()
    assert all(p.grad is not None for p in head.parameters())


def test_what_learns_and_how_fast(encoder, narrow):
    model = Segmenter(load_encoder(encoder), "upernet", 3, layers=1, frozen=False)
    groups = layer_decay_groups(model, model.encoder, 0.5, 0.05)
    rates = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sorted(rates) == sorted(id(p) for p in trained)
    blocks = model.encoder.blocks
    assert rates[id(model.head.classify[1].weight)] == (1, 0.05)
    assert rates[id(model.head.classify[1].bias)] == (1, 0)
    assert rates[id(blocks[1].attn.qkv.weight)] == (0.5, 0.05)
    assert rates[id(blocks[0].norm1.weight)] == (0.25, 0)
    assert rates[id(model.encoder.patch_embed.proj.weight)] == (0.125, 0.05)

    logits = model.train()(torch.randn(2, 3, 24, 32))
    loss_of(logits, torch.randint(0, 3, (2, 24, 32)), IGNORE).backward()
    assert all(p.grad is not None for p in trained)


@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_a_frozen_encoder_stays(encoder, data, narrow, head):
    model = Segmenter(load_encoder(encoder), head, 3, layers=1, frozen=True)
    before = {key: p.clone() for key, p in model.state_dict().items()}
    pairs = open_pairs(data, segment.TRAINING)
    segment_training.train(model, pairs, CLASSES, dataclasses.replace(RECIPE, steps=2))
    after = model.state_dict()
    for key, value in before.items():
        if key.startswith("encoder."):
            assert torch.equal(after[key], value)
    weight = next(key for key in before if "classify" in key and key.endswith("weight"))
    assert not torch.equal(after[weight], before[weight])


def test_the_loss_counts_no_ignored_pixel(seed):
    logits, labels = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8))
    labels[0] = IGNORE
    alone = torch.nn.functional.cross_entropy(logits[1:], labels[1:])
    torch.testing.assert_close(loss_of([logits], labels, IGNORE), alone)
    torch.testing.assert_close(loss_of([logits, logits], labels, IGNORE), 1.4 * alone)
    assert loss_of([logits], torch.full_like(labels, IGNORE), IGNORE) == 0


def test_the_rate_warms_up_and_falls_to_nothing():
    rates = [segment_training.share_of_peak(step, 10, 4) for step in range(11)]
    assert rates == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])


class ByPixel(torch.nn.Module):
    """Logits that are the pixels themselves, so that windows change nothing."""

    def __init__(self):
        super().__init__()
        self.windows = []

    def forward(self, images_BCHW):
        self.windows.append(tuple(images_BCHW.shape[-2:]))
        return [images_BCHW]


def test_sliding_windows_cover_the_image(seed):
    model, images = ByPixel(), torch.randn(1, 3, 20, 30)
    torch.testing.assert_close(logits_sliding(model, images, 16, 10), images)
    assert model.windows == [(16, 16)] * 6  # rows from 0 and 4, columns from 0, 10 and 14
    model.windows.clear()
    torch.testing.assert_close(logits_sliding(model, images, 40, 10), logits_whole(model, images))
    assert model.windows == [(20, 30)] * 2


# --------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_a_training_that_was_stopped_ends_as_if_it_had_not(encoder, data, tmp_path, narrow, head):
    pairs = open_pairs(data, segment.TRAINING)
    kept = tmp_path / "kept"

    def trained(recipe=RECIPE, **options):
        torch.manual_seed(1)
        frozen = head == "linear"
        model = Segmenter(load_encoder(encoder), head, 3, layers=1, frozen=frozen)
        segment_training.train(model, pairs, CLASSES, recipe, **options)
        return model.state_dict()

    whole = trained()
    with pytest.MonkeyPatch.context() as patch:
        save = SavedTraining.save

        def killed(*args):
            save(*args)
            raise KeyboardInterrupt

        patch.setattr(SavedTraining, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(save_to=kept, save_every=2)
    assert state_of(kept / "checkpoints" / "step_00000002")["step"] == 2
    with pytest.raises(ValueError, match="resume it with --resume, or name another --save"):
        trained(save_to=kept)
    assert dense_sets.same(trained(save_to=kept, resume=True), whole)
    assert dense_sets.same(trained(save_to=kept, resume=True), whole)  # nothing is left to do
    with pytest.raises(ValueError, match=r"is of another training: lr was 0\.01, is 1\.0"):
        trained(dataclasses.replace(RECIPE, lr=1.0), save_to=kept, resume=True)
    write_label_map(pairs.masks[0], np.zeros((40, 56), dtype=np.uint8))
    with pytest.raises(ValueError, match="is of another training: label_maps_sha256 was"):
        trained(save_to=kept, resume=True)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_two_ranks_share_the_images(encoder, data, tmp_path):
    """BatchNorm sees each rank's own images on a CPU, so the scores alone are compared."""
    out = tmp_path / "two.json"
    words = ["segment", encoder, "--data", data, "--short-side", 40, "--batch-size", 4]
    words += ["--steps", 20, "--lr", 0.05, "--plain-colours", "--json", out]
    done = tiny.run(tiny.ROOT / "cjepa_fast" / "eval" / "__main__.py", *words, ranks=2)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert row["miou"] > 60 and row["test_images"] == 3


@pytest.mark.skipif("CJEPA_REAL_DENSE" not in os.environ, reason="CJEPA_REAL_DENSE names no folder")
def test_camvid_and_ade20k_themselves(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    camvid = Path(os.environ["CJEPA_REAL_DENSE"]) / "camvid"
    pairs, tests = (open_pairs(camvid, names) for names in (segment.TRAINING, segment.VALIDATION))
    assert (len(pairs), len(tests)) == (120, 40)
    classes = segment.find_classes(str(camvid), pairs, {11})
    assert classes.names[3] == "Road" and len(classes) == 11
    assert set(np.unique(tests.labels(0, classes))) <= {*range(11), IGNORE}
    ade = Path(os.environ["CJEPA_REAL_DENSE"]) / "misc" / "ade20k_sample"
    classes = segment.find_classes(str(ade), pairs, {0})
    assert len(classes) == 150 and classes.names[:2] == ("wall", "building")
