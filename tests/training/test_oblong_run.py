"""data.image_size = [H, W]: a training, its resume, its encoder, what evaluates and draws it."""

import argparse
import json
import shutil

import numpy as np
import pytest
import test_run
import tiny
import torch

from cjepa_fast import config as configuration
from cjepa_fast import load_encoder, train
from cjepa_fast.data.evaluation import eval_batches
from cjepa_fast.data.sources import open_images
from cjepa_fast.eval.__main__ import main as evaluate
from cjepa_fast.eval.figures import sheets
from cjepa_fast.eval.finetuning import classify, recipe
from cjepa_fast.model.vit import Encoder
from cjepa_fast.telemetry import read_log
from cjepa_fast.tools import plan
from cjepa_fast.training import build
from cjepa_fast.training.sizes import counted_sizes, meta_batch

handlers = test_run.handlers
SIZE = [16, 32]
PATCHES = 4 * 8


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The configuration of a run of 4 steps that evaluates online; its folder."""
    folder = tmp_path_factory.mktemp("oblong")
    images = tiny.write_images(folder / "images", count=44, classes=3)
    online = {"data": str(images), "every_epochs": 1, "share": 1.0}
    config = tiny.write_config(
        folder,
        run={"epochs": 2, "precision": "fp32"},
        data={"image_size": SIZE},
        eval={"k": 3, "online": online},
        checkpoint={"every_steps": 2, "keep": 9},
    )
    assert train.main(["--config", str(config)]) == 0
    return config, folder / "run"


def test_it_trains_evaluates_and_resumes_to_the_same_bits(trained, tmp_path):
    config, run = trained
    rows = read_log(run)
    assert [row["step"] for row in rows if "knn" in row] == [0, 2, 4]
    described = json.loads((run / "encoder.json").read_text())
    assert described["image_size"] == SIZE
    encoder = load_encoder(run)
    assert encoder.grid == (4, 8) and encoder.architecture["image_size"] == tuple(SIZE)
    halted = shutil.copytree(run, tmp_path / "run", symlinks=True)
    shutil.rmtree(halted / "checkpoints" / "step_00000004")
    (halted / "encoder.safetensors").unlink()
    again = ["--set", f"run.dir={halted}", "--resume", "auto"]
    assert train.main(["--config", str(config), *again]) == 0
    name = "encoder.safetensors"
    assert (halted / name).read_bytes() == (run / name).read_bytes()


def test_it_is_evaluated_on_windows_of_its_own_shape(trained, tmp_path, capsys):
    _, run = trained
    images, out = run.parent / "images", tmp_path / "knn.json"
    assert evaluate(
        ["knn", str(run), "--data", str(images), "--pixels", "--json", str(out), "--no-cache"]
    ) == 0  # fmt: skip
    rows = json.loads(out.read_text())["rows"]
    assert [row["encoder"] for row in rows] == ["raw pixels", "mean colour", "trained"]
    encoder = load_encoder(run)
    found = open_images(images)
    windows_N4 = np.array([[7, 2, 18, 35]] * len(found), np.int32)  # of 32 x 40, 0.875 of 20 x 40
    both = []
    for own in ({"resize": 0.875}, {"windows_N4": windows_N4}):
        (shown, _), *_ = eval_batches(
            found, image_size=encoder.image_size, mean=encoder.mean, std=encoder.std,
            batch_size=2, device="cpu", dtype=torch.float32, threads=1, **own,
        )  # fmt: skip
        assert shown.shape == (2, 3, *SIZE)
        both.append(shown)
    assert torch.equal(*both)


@pytest.mark.parametrize("task", ["attention", "pca", "masks", "retrieve"])
def test_its_figures_are_of_oblongs(trained, tmp_path, monkeypatch, task):
    _, run = trained
    sizes, load = [], sheets.load_images

    def noted(*args, **options):
        images_BCHW = load(*args, **options)
        sizes.append(tuple(images_BCHW.shape[2:]))
        return images_BCHW

    for module in ("masks", "retrieve", "side_by_side"):
        monkeypatch.setattr(f"cjepa_fast.eval.figures.{module}.load_images", noted)
    images, out = str(run.parent / "images"), tmp_path / "figure.png"
    options = {
        "pca": ["--images", images, "--size", "27"],
        "retrieve": ["--data", images, "--no-cache"],
    }.get(task, ["--images", images])
    assert evaluate([task, str(run), "--out", str(out), "--count", "2", *options]) == 0
    assert out.stat().st_size > 1000
    assert sizes == [{"pca": (28, 56), "retrieve": (128, 256)}.get(task, tuple(SIZE))]


def test_fine_tuning_crops_to_its_shape(trained, tmp_path):
    _, run = trained
    images, encoder = open_images(run.parent / "images"), load_encoder(run)
    args = argparse.Namespace(threads=1, seed=0)
    loader = classify.loader_of(images, encoder, recipe.BASE, args, 8, 8)
    batch = next(loader.iterate(0))
    loader.close()
    assert batch.images_BCHW.shape == (8, 3, *SIZE)
    request = next(loader._batch_requests(0))
    height_B, width_B = request.show(request.index_B).window_B4[:, 2:].T
    stretched_B = width_B / height_B / 2
    assert stretched_B.min() > 0.6 and stretched_B.max() < 1.6  # 3/4 to 4/3, in whole pixels
    model = recipe.Classifier(encoder, 3)
    assert model(batch.images_BCHW).shape == (8, 3)


def test_it_is_planned_and_counted_as_what_it_is(trained):
    settings = configuration.load(str(trained[0]))
    masks = build.build_masks(settings)
    assert masks.grid == (4, 8)
    images, _, _, tokens = meta_batch(settings, build.first_masks(settings, 2))
    assert images.shape == (2, 3, *SIZE) and tokens.shape[1] == PATCHES
    assert int(masks(0, 0, torch.arange(64)).target_idx_BMP.max()) > PATCHES // 2
    square = settings.data.model_copy(update={"image_size": 16})
    half = counted_sizes(settings.model_copy(update={"data": square}), 9, 4, 6)
    whole = counted_sizes(settings, 9, 4, 6)
    assert plan.step_gflop(half)["target"] < plan.step_gflop(whole)["target"] / 2
    found = plan.plans(settings.model_copy(
        update={"run": settings.run.model_copy(update={"precision": "bf16"})}), 1)[0]  # fmt: skip
    assert found.per_image > 0


def test_an_older_encoder_s_description_still_builds_a_square():
    described = {"image_size": 24, "patch_size": 4, "width": 24, "depth": 1, "heads": 3}
    assert Encoder(**described).architecture["image_size"] == 24


def test_ijepa_s_checkpoints_are_refused_for_an_oblong(tmp_path, capsys):
    torch.save({"encoder": {}, "predictor": {}, "target_encoder": {}}, tmp_path / "x.pth.tar")
    config = tiny.write_config(
        tmp_path, data={"image_size": [8, 72]}, run={"init_from": str(tmp_path / "x.pth.tar")},
        model={"name": "vit_tiny", "patch_size": 4},
    )  # fmt: skip
    text = json.loads(config.read_text())
    for key in ("width", "depth", "heads"):
        text["model"].pop(key, None)
    text["predictor"].pop("heads", None)
    config.write_text(json.dumps(text))
    assert train.main(["--config", str(config)]) != 0
    said = capsys.readouterr().err
    assert "[8, 72]" in said and "a square" in said and "Traceback" not in said
