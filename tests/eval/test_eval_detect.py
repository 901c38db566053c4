"""Detection: the detector over the pyramid, its fine-tuning, the command."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import rectangles
import tiny
import torch
import vision_ops
from safetensors.torch import save_file

from cjepa_fast.data.sets.coco import Coco, ValImages
from cjepa_fast.eval.__main__ import main
from cjepa_fast.eval.dense import rcnn_training
from cjepa_fast.eval.dense.detect import detections, facts_of, open_split
from cjepa_fast.eval.dense.pyramid import Pyramid
from cjepa_fast.eval.dense.rcnn_training import Recipe, fine_tune
from cjepa_fast.eval.finetuning.layer_decay import add_drop_path, layer_decay_groups
from cjepa_fast.eval.finetuning.saved import SavedTraining
from cjepa_fast.model.vit import Encoder

pytest.importorskip("pycocotools", reason="pycocotools is an extra (detect)")
needs_torchvision = pytest.mark.skipif(
    not vision_ops.installed(), reason="torchvision is an extra (detect)"
)


@pytest.fixture(scope="module", autouse=True)
def torchvision() -> None:
    """Loaded here, not as tests are collected: where that ends the process, a test is named."""
    if vision_ops.installed():
        vision_ops.load()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = rectangles.write(tmp_path_factory.mktemp("coco"), "train", count=6, seed=1)
    return rectangles.write(folder, "val", count=3, seed=2)


# ---------------------------------------------------------------------------------- the detector


def detector(patch_size: int = 16):
    """A tiny one, of 16 channels and few samples, on a canvas of 64 pixels."""
    from cjepa_fast.eval.dense import rcnn

    encoder = Encoder(image_size=32, patch_size=patch_size, width=24, depth=2, heads=3)
    encoder.mean, encoder.std = (0.5,) * 3, (0.25,) * 3
    model = rcnn.mask_rcnn(Pyramid(encoder, 16), 2, 64)
    model.roi_heads.fg_bg_sampler.batch_size_per_image = 32
    return model


@needs_torchvision
def test_boxes_are_read_from_where_they_lie_at_every_level(seed):
    """Of maps whose values are their cells' x, a box yields its middle; small images change
    nothing of that."""
    model = detector(patch_size=8)
    maps = {}
    for level, stride in enumerate(model.backbone.strides):
        x = torch.arange(256 // stride).float() * stride
        maps[str(level)] = x.expand(1, 1, len(x), -1) + 1000 * level
    boxes = torch.tensor([[8.0, 8, 48, 48], [4, 4, 64, 64], [9, 3, 129, 123], [8, 8, 238, 238]])
    found = model.roi_heads.box_roi_pool(maps, [boxes], [(20, 9)])
    middle = (boxes[:, 0] + boxes[:, 2]) / 2
    levels = torch.tensor([0, 1, 2, 3])  # from 14 patches (112 pixels) on, 2; a level a doubling
    assert torch.allclose(found.mean((1, 2, 3)), middle + 1000 * levels, atol=0.5)


@needs_torchvision
def test_anchors_lie_on_their_cells(seed):
    from torchvision.models.detection.image_list import ImageList

    model = detector()
    images = ImageList(torch.zeros(1, 3, 64, 64), [(20, 9)])
    maps = list(model.backbone(images.tensors).values())
    (anchors,) = model.rpn.anchor_generator(images, maps)
    counts = [3 * found.shape[-1] ** 2 for found in maps]
    for stride, of_level in zip(model.backbone.strides, anchors.split(counts), strict=True):
        middles = (of_level[:, :2] + of_level[:, 2:]) / 2
        assert torch.equal(middles, (middles / stride).round() * stride)
        sides = (of_level[:, 2:] - of_level[:, :2]).prod(1).sqrt()
        assert torch.allclose(sides, torch.tensor(8.0 * stride), rtol=0.1)


@needs_torchvision
def test_every_parameter_learns_at_the_rate_of_its_depth(seed):
    model = detector()
    groups = layer_decay_groups(model, model.backbone.encoder, decay=0.5, weight_decay=0.1)
    rate = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(rate) == sorted(map(id, trained.values()))
    encoder = model.backbone.encoder
    assert rate[id(encoder.patch_embed.proj.weight)] == 0.125
    assert [rate[id(block.mlp.fc1.weight)] for block in encoder.blocks] == [0.25, 0.5]
    assert rate[id(encoder.norm.weight)] == rate[id(model.rpn.head.cls_logits.weight)] == 1
    assert decay[id(encoder.norm.weight)] == decay[id(encoder.blocks[0].mlp.fc1.bias)] == 0
    assert decay[id(encoder.blocks[0].mlp.fc1.weight)] == 0.1


@needs_torchvision
def test_drop_path_leaves_out_branches_of_later_blocks_while_training(seed):
    encoder = Encoder(image_size=32, patch_size=8, width=24, depth=3, heads=3)
    images = torch.randn(256, 3, 32, 32)
    whole = encoder(images)
    add_drop_path(encoder, 0.5)
    assert torch.equal(encoder.eval()(images), whole)
    encoder.train()
    seen = []
    for block in encoder.blocks:
        block.attn.register_forward_hook(
            lambda module, _, out: seen.append((out == 0).flatten(1).all(1).float().mean())
        )
    encoder(images)
    assert seen[0] == 0 and 0.05 < seen[1] < 0.5 and 0.25 < seen[2] < 0.75


@needs_torchvision
def test_a_canvas_off_the_coarsest_stride_is_refused():
    from cjepa_fast.eval.dense.rcnn import mask_rcnn

    encoder = Encoder(image_size=32, patch_size=8, width=24, depth=0, heads=3)
    with pytest.raises(ValueError, match="image size 80 is not a multiple of 32"):
        mask_rcnn(Pyramid(encoder, 16), 2, 80)


# ------------------------------------------------------------------------------------ fine-tuning

RECIPE = Recipe(
    image_size=64, epochs=8, batch_size=3, lr=2e-3, warmup_steps=1, channels=16, drop_path=0.1,
    layer_decay=0.8,
)  # fmt: skip


def start(folder: Path, kept: SavedTraining, recipe: Recipe = RECIPE):
    torch.manual_seed(0)
    model = detector()
    add_drop_path(model.backbone.encoder, recipe.drop_path)
    fine_tune(model, open_split(folder, "train"), recipe, kept, torch.device("cpu"))
    return model


class Interrupted(SavedTraining):
    def save(self, done):
        super().save(done)
        if done == 2:  # an epoch
            raise KeyboardInterrupt


def losses(model, train: Coco) -> dict[str, float]:
    """Of one view of every image."""
    torch.manual_seed(0)
    recipe = dataclasses.replace(RECIPE, batch_size=len(train))
    usable = rcnn_training.usable_images(train)
    (batch,) = rcnn_training.epoch_batches(train, usable, recipe, 0, len(train), threads=0)
    pictures = [rcnn_training.as_input(picture, torch.device("cpu")) for picture in batch[0]]
    with torch.no_grad():
        return {name: loss.item() for name, loss in model.train()(pictures, batch[1]).items()}


@needs_torchvision
@pytest.mark.long
def test_it_learns_where_objects_are_what_they_are_and_their_masks(folder, tmp_path):
    train = open_split(folder, "train")
    torch.manual_seed(0)
    before = losses(detector(), train)
    after = losses(start(folder, SavedTraining(tmp_path / "a", {})), train)
    for name in ("loss_objectness", "loss_classifier", "loss_mask"):
        assert after[name] < 0.85 * before[name], name


@needs_torchvision
def test_an_interrupted_training_goes_on_as_if_it_had_not_been(folder, tmp_path, capsys):
    recipe = dataclasses.replace(RECIPE, epochs=2)
    whole = start(folder, SavedTraining(tmp_path / "whole", {"lr": 1}), recipe)
    with pytest.raises(KeyboardInterrupt):
        start(folder, Interrupted(tmp_path / "half", {"lr": 1}), recipe)
    torch.rand(9)
    resumed = start(folder, SavedTraining(tmp_path / "half", {"lr": 1}), recipe)
    assert "epoch 1 of 2 is done, from" in capsys.readouterr().out
    for name, p in whole.state_dict().items():
        assert torch.equal(p, resumed.state_dict()[name]), name
    with pytest.raises(ValueError, match=r"half.* is of another training: lr was 1, is 2"):
        start(folder, SavedTraining(tmp_path / "half", {"lr": 2}), recipe)


def test_the_learning_rate_rises_and_falls_in_two_steps():
    recipe = Recipe(warmup_steps=4)
    factors = [recipe.lr_factor(step, 54) for step in range(54)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
    assert factors[47:53] == pytest.approx([1, 0.1, 0.1, 0.1, 0.1, 0.01])


def test_ranks_share_each_step_and_together_see_each_image(folder, monkeypatch):
    train = open_split(folder, "train")
    recipe = Recipe(image_size=64, batch_size=4)
    seen = {}
    for world, micro in ((1, 4), (2, 1)):
        monkeypatch.setattr(rcnn_training, "world_size", lambda world=world: world)
        for rank in range(world):
            monkeypatch.setattr(rcnn_training, "rank", lambda rank=rank: rank)
            batches = rcnn_training.epoch_batches(train, range(6), recipe, 0, micro, threads=0)
            seen[world, rank] = [p.float().mean().item() for pictures, _ in batches
                                 for p in pictures]  # fmt: skip
    whole = seen[1, 0]
    assert len(whole) == 8 and len(set(whole[:6])) == 6
    assert seen[2, 0] == whole[0:2] + whole[4:6] and seen[2, 1] == whole[2:4] + whole[6:8]
    with pytest.raises(ValueError, match="batch size 4 does not divide"):
        recipe.micro_batch(3)


@pytest.mark.parametrize("threads", [0, 1])
def test_an_unreadable_picture_is_named_in_one_line(folder, tmp_path, threads):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "val" / "001.png").write_text("text")
    images = ValImages(open_split(copy, "val"), [0, 1])
    with pytest.raises(ValueError, match=r"^.*001\.png cannot be read as an image") as raised:
        list(rcnn_training.read(images, threads))
    assert "\n" not in str(raised.value)


def test_the_annotations_are_among_what_decides_a_training(folder, tmp_path):
    """Their content too: the file may be written anew."""
    shutil.copytree(folder, tmp_path / "set")
    encoder = Encoder(image_size=32, patch_size=16, width=24, depth=1, heads=3)
    encoder.mean, encoder.std = (0.5,) * 3, (0.25,) * 3
    train = open_split(tmp_path / "set", "train")
    before = facts_of(encoder, train, RECIPE, False)
    train.file.write_text(train.file.read_text() + "\n")
    after = facts_of(encoder, train, RECIPE, False)
    assert [name for name in before if before[name] != after[name]] == ["annotations_sha256"]


# ------------------------------------------------------------------------------------ the command


@pytest.fixture
def run(tmp_path) -> Path:
    encoder = Encoder(image_size=32, patch_size=16, width=24, depth=1, heads=3)
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(tiny.write_config(tmp_path), run / "config.json")
    weights = {key: p.contiguous() for key, p in encoder.state_dict().items()}
    save_file(weights, run / "encoder.safetensors")
    described = {**encoder.architecture, "mean": [0.5] * 3, "std": [0.25] * 3}
    (run / "encoder.json").write_text(json.dumps(described))
    return run


def options(folder: Path) -> list[str]:
    numbers = {"image-size": 64, "epochs": 1, "batch-size": 3, "channels": 8, "threads": 0}
    sizes = [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    return ["--data", str(folder), "--train", "train", "--val", "val", *sizes]


@needs_torchvision
def test_the_command_trains_scores_draws_and_goes_on(run, folder, capsys):
    assert main(["detect", str(run), *options(folder)]) == 0, capsys.readouterr().err
    (path,) = (run / "eval").glob("detect-*.json")
    record = json.loads(path.read_text())
    (row,) = record["rows"]
    assert (row["train_images"], row["val_images"]) == (6, 3)
    assert 0 <= row["ap_mask"] <= 100 and record["headings"]["ap_box"] == "AP box"
    assert record["settings"]["layer_decay"] == 0.7
    assert Path(record["picture"]).stat().st_size > 5_000
    capsys.readouterr()
    assert main(["detect", str(run), *options(folder)]) == 0
    said = capsys.readouterr().out
    assert "epoch 1 of 1 is done, from" in said and "loss" not in said
    assert json.loads(path.read_text())["rows"] == [row]
    assert main(["detect", str(run), *options(folder), "--lr", "1"]) == 2
    assert "another training: lr was 0.0001, is 1.0" in capsys.readouterr().err


@needs_torchvision
def test_without_masks_there_are_boxes_alone_and_that_is_said(folder, tmp_path, capsys, run):
    plain = shutil.copytree(folder, tmp_path / "plain")
    path = plain / "annotations/instances_train.json"
    content = json.loads(path.read_text())
    del content["annotations"][4]["segmentation"]
    path.write_text(json.dumps(content))
    assert main(["detect", str(run), *options(plain)]) == 0
    said = capsys.readouterr().out
    assert "annotation 4 has no mask" in said and "AP box" in said and "AP mask" not in said


@needs_torchvision
def test_detections_are_of_the_images_as_they_came(folder, seed):
    """However small its canvas makes an image, boxes and masks have the image's own pixels."""
    coco, model = open_split(folder, "val"), detector()
    model.roi_heads.score_thresh = 0.0
    results = detections(model, coco, torch.device("cpu"), 0)
    assert {r["image_id"] for r in results} == {100, 101, 102}
    for result in results:
        described = coco.images[result["image_id"] - 100]
        size = [described["height"], described["width"]]
        assert result["segmentation"]["size"] == size
        x, y, w, h = result["bbox"]
        assert x >= 0 and y >= 0 and w > 0 and h > 0 and x + w <= 56.01 and y + h <= 56.01


def test_what_is_wrong_is_said_in_one_line(run, folder, tmp_path, capsys, monkeypatch):
    loose = tmp_path / "encoder.safetensors"
    shutil.copy(run / "encoder.safetensors", loose)
    shutil.copy(run / "encoder.json", loose.with_suffix(".json"))
    (tmp_path / "config.json").unlink(missing_ok=True)
    cases = [("say --out", [str(loose), *options(folder)]),
             ("instances_train2017.json", [str(run), "--data", str(folder)])]  # fmt: skip
    if vision_ops.installed():
        for expected, command in cases:
            assert main(["detect", *command]) == 2
            assert expected in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    assert main(["detect", str(run), *options(folder)]) == 2
    assert "pip install '.[detect]'" in capsys.readouterr().err
