"""data.channels: a training on .npy of five bands, its resume, what evaluates, draws and refuses
it; one on gray JPEGs."""

import argparse
import json
import shutil

import numpy as np
import pytest
import test_run
import tiny
from PIL import Image

from cjepa_fast import config as configuration
from cjepa_fast import load_encoder, train
from cjepa_fast.data.sources import open_images
from cjepa_fast.eval.__main__ import main as evaluate
from cjepa_fast.eval.finetuning import classify, recipe
from cjepa_fast.telemetry import read_log
from cjepa_fast.training import build
from cjepa_fast.training.sizes import counted_sizes, meta_batch

handlers = test_run.handlers
BANDS = 5
DATA = {"channels": BANDS, "mean": [0.5] * BANDS, "std": [0.25] * BANDS}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The configuration of a run of 4 steps that evaluates online; its folder."""
    folder = tmp_path_factory.mktemp("bands")
    random = np.random.default_rng(0)
    for i in range(44):
        small = random.integers(0, 256, (6, 8, BANDS), dtype=np.uint8)
        path = folder / "images" / f"class_{i % 3}" / f"{i:03d}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, small.repeat(5, 0).repeat(5, 1).transpose(2, 0, 1))
    online = {"data": str(folder / "images"), "every_epochs": 1, "share": 1.0}
    config = tiny.write_config(
        folder,
        run={"epochs": 2, "precision": "fp32"},
        data=DATA,
        eval={"k": 3, "online": online},
        checkpoint={"every_steps": 2, "keep": 9},
    )
    assert train.main(["--config", str(config)]) == 0
    return config, folder / "run"


def test_it_trains_evaluates_and_resumes_to_the_same_bits(trained, tmp_path):
    config, run = trained
    assert [row["step"] for row in read_log(run) if "knn" in row] == [0, 2, 4]
    described = json.loads((run / "encoder.json").read_text())
    assert described["channels"] == len(described["mean"]) == BANDS
    assert load_encoder(run).patch_embed.proj.in_channels == BANDS
    halted = shutil.copytree(run, tmp_path / "run", symlinks=True)
    shutil.rmtree(halted / "checkpoints" / "step_00000004")
    again = ["--set", f"run.dir={halted}", "--resume", "auto"]
    assert train.main(["--config", str(config), *again]) == 0
    name = "encoder.safetensors"
    assert (halted / name).read_bytes() == (run / name).read_bytes()


def test_probes_and_figures_read_it(trained, tmp_path):
    _, run = trained
    images, out = str(run.parent / "images"), tmp_path / "knn.json"
    assert evaluate(["knn", str(run), "--data", images, "--pixels", "--json", str(out)]) == 0
    assert len(json.loads(out.read_text())["rows"]) == 3
    for task in ("masks", "pca", "retrieve"):
        figure = tmp_path / f"{task}.png"
        named = ["--data" if task == "retrieve" else "--images", images]
        assert evaluate([task, str(run), *named, "--count", "2", "--out", str(figure)]) == 0
        assert figure.stat().st_size > 1000


def test_what_works_on_rgb_alone_refuses_it_by_name(trained, tmp_path, capsys):
    _, run = trained
    images, encoder = open_images(run.parent / "images"), load_encoder(run)
    args = argparse.Namespace(threads=1, seed=0)
    with pytest.raises(ValueError, match=r"rand_augment: .*set it to null"):
        classify.loader_of(images, encoder, recipe.BASE, args, 8, 8)
    plain = classify.changed(recipe.BASE, [("rand_augment", None)])
    loader = classify.loader_of(images, encoder, plain, args, 8, 8)
    assert next(loader.iterate(0)).images_BCHW.shape == (8, BANDS, 24, 24)
    loader.close()
    assert evaluate(["segment", str(run), "--data", str(tmp_path)]) != 0
    assert "segment reads RGB images" in capsys.readouterr().err
    photographs = tiny.write_images(tmp_path / "rgb", 40)
    assert evaluate(["knn", str(run), "--data", str(photographs)]) != 0
    assert "data.channels = 5: class_0/000.jpg has 3" in capsys.readouterr().err


def test_a_batch_without_values_has_its_channels(trained):
    settings = configuration.load(str(trained[0]))
    images_BCHW, *_ = meta_batch(settings, build.first_masks(settings, 2))
    assert images_BCHW.shape == (2, BANDS, 24, 24)
    assert counted_sizes(settings, 9, 4, 6).channels == BANDS


@pytest.mark.parametrize("decoder", ["dali", "pillow"])
def test_gray_images_train_with_either_decoder(tmp_path, capsys, decoder):
    for i in range(20):
        path = tmp_path / "images" / f"{i:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((30, 40), 12 * i, np.uint8)).save(path)
    config = tiny.write_config(
        tmp_path, data={"channels": 1, "mean": [0.5], "std": [0.5], "decoder": decoder}
    )
    assert train.main(["--config", str(config), "--dry-run"]) == 0
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "07.jpg")
    assert train.main(["--config", str(config), "--dry-run"]) != 0
    said = capsys.readouterr().err
    assert "data.channels = 1: 07.jpg has 3; all images of a set" in said
    assert "Traceback" not in said
