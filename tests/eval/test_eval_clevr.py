"""CLEVR's two questions: the labels by hand, and what is wrong said plainly."""

import io
import json
import tarfile

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file

from cjepa_fast.eval import splits
from cjepa_fast.eval.__main__ import main
from cjepa_fast.eval.probes import clevr
from cjepa_fast.eval.probes.clevr import Fact
from cjepa_fast.model.vit import Encoder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def picture(i: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(i).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def things(depths) -> list[dict]:
    return [{"shape": "cube", "pixel_coords": [3, 4, depth]} for depth in depths]


@pytest.fixture
def set_of_clevr(tmp_path):
    """CLEVR as it unpacks, 12 images for training and 6 of val; image i has 3 + i % 3 objects."""
    root = tmp_path / "CLEVR_v1.0"
    (root / "scenes").mkdir(parents=True)
    for split, count in (("train", 12), ("val", 6)):
        folder = root / "images" / split
        folder.mkdir(parents=True)
        scenes = []
        for i in range(count):
            name = f"CLEVR_{split}_{i:06d}.png"
            (folder / name).write_bytes(picture(i))
            depths = [12.0, 7.9 + 0.5 * (i % 5), *[11.0] * (1 + i % 3)]
            scenes.append({"image_filename": name, "objects": things(depths)})
        text = json.dumps({"info": {}, "scenes": scenes[::-1]})  # not in the images' order
        (root / "scenes" / f"CLEVR_{split}_scenes.json").write_text(text)
    return root


@pytest.fixture
def encoder(tmp_path):
    made = Encoder(image_size=24, patch_size=8, width=12, depth=2, heads=3)
    path = tmp_path / "encoder.safetensors"
    save_file({name: p.contiguous() for name, p in made.state_dict().items()}, path)
    described = {**made.architecture, "mean": [0.5] * 3, "std": [0.25] * 3}
    path.with_suffix(".json").write_text(json.dumps(described))
    return path


def test_the_bins_are_vtab_s():
    """As task_adaptation's clevr.py: the last of 0, 8, 8.5, 9, 9.5, 10 that is below the depth."""
    depths = [7.0, 8.0, 8.01, 8.5, 8.7, 9.2, 9.5, 9.8, 10.0, 10.1, 30.0]
    by_hand = [0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 5]
    train = [Fact(3 + i % 8, depth, True) for i, depth in enumerate(depths)]
    labels = clevr.labels_of(train, [Fact(10, 8.2, True)])
    assert labels["distance"][0].tolist() == by_hand
    assert labels["distance"][1].tolist() == [1]
    assert labels["count"][0].tolist() == [i % 8 for i in range(11)]
    assert labels["count"][1].tolist() == [7]


def test_other_distances_are_cut_into_six_even_bins():
    train = [Fact(3, i / 10, False) for i in range(60)]
    labels = clevr.labels_of(train, [Fact(3, 0.0, False), Fact(3, 9.0, False)])
    assert labels["distance"][0].bincount().tolist() == [10] * 6
    assert labels["distance"][1].tolist() == [0, 5]


def test_facts_of_clevr_follow_the_images(set_of_clevr):
    (train, test), facts = clevr.splits_of(str(set_of_clevr), None, None)
    assert [fact.objects for fact in facts[0]] == [3 + i % 3 for i in range(12)]
    assert [fact.distance for fact in facts[1]] == [7.9 + 0.5 * (i % 5) for i in range(6)]
    assert len(train[1]) == 12 and len(test[1]) == 6
    (train, _), facts = clevr.splits_of(str(set_of_clevr), None, 5)
    assert [fact.objects for fact in facts[0]] == [3 + i % 3 for i in train[1].tolist()]
    assert len(train[1]) == 5


def test_facts_beside_the_images_of_shards(tmp_path):
    """As the shapes set has them, and with CLEVR's own objects."""
    beside = [{"objects": 4, "distance": 0.7}, {"objects": things([9.0, 8.2, 12.0])}]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, facts in enumerate(beside):
            for name, data in ((f"{i}.jpg", picture(i, "JPEG")), (f"{i}.json", json.dumps(facts))):
                member = tarfile.TarInfo(name)
                data = data.encode() if isinstance(data, str) else data
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    path = str(tmp_path / "a.tar")
    _, facts = clevr.splits_of(path, path, None)
    assert facts[0] == [Fact(4, 0.7, False), Fact(3, 8.2, True)]


def test_the_command_writes_a_row_a_question(set_of_clevr, encoder, tmp_path, capsys):
    out = tmp_path / "clevr.json"
    words = ["clevr", str(encoder), "--data", str(set_of_clevr), "--json", str(out), "--crop", "1"]
    sweep = ["--optimizer", "adamw", "--epochs", "2", "--sweep", "lr=0.01", "wd=0"]
    assert main([*words, *sweep, "--no-cache"]) == 0
    rows = json.loads(out.read_text())["rows"]
    wanted = [("count", "last"), ("count", "last 2"), ("distance", "last"), ("distance", "last 2")]
    assert [(row["question"], row["layers"]) for row in rows] == wanted
    assert rows[0]["commonest"] == pytest.approx(100 / 3)
    assert {row["train_images"] for row in rows} == {12}
    assert "count" in capsys.readouterr().out


def test_mirrored_features_are_those_of_mirrored_images(set_of_clevr, encoder, tmp_path):
    from cjepa_fast import load_encoder
    from cjepa_fast.data.sources import open_images
    from cjepa_fast.eval.features import extract

    mirrored = tmp_path / "mirrored"
    mirrored.mkdir()
    for path in (set_of_clevr / "images" / "val").iterdir():
        Image.open(path).transpose(Image.FLIP_LEFT_RIGHT).save(mirrored / path.name)
    loaded, cached = load_encoder(encoder), tmp_path / "features"
    images = open_images(set_of_clevr / "images" / "val")
    plain, _ = extract(loaded, images, cache=cached)
    flipped, _ = extract(loaded, images, flip=True, cache=cached)
    expected, _ = extract(loaded, open_images(mirrored))
    torch.testing.assert_close(flipped, expected, atol=2e-2, rtol=0)  # resized, then mirrored
    assert (plain - flipped).abs().max() > 10 * (expected - flipped).abs().max()


def test_memory_for_both_copies_is_asked_before_any_work(
    set_of_clevr, encoder, monkeypatch, capsys
):
    monkeypatch.setattr(splits, "free_bytes", lambda: 1000)
    monkeypatch.setattr(clevr, "extract", lambda *args, **how: pytest.fail("computed"))
    assert main(["clevr", str(encoder), "--data", str(set_of_clevr)]) == 2
    assert f"{2 * 12 + 6} images with 24 values each take" in capsys.readouterr().err


def test_what_is_wrong_is_named(set_of_clevr, encoder, tmp_path, capsys):
    unlabelled = tiny.write_images(tmp_path / "images", count=4)
    scenes = set_of_clevr / "scenes" / "CLEVR_val_scenes.json"

    def said(data) -> str:
        assert main(["clevr", str(encoder), "--data", str(data)]) == 2
        return capsys.readouterr().err

    assert "has no .json beside it" in said(unlabelled)
    scenes.write_text(json.dumps({"scenes": []}))
    assert "has no scene of CLEVR_val_000000.png" in said(set_of_clevr)
    wrong = {"image_filename": "CLEVR_val_000000.png", "objects": [{"shape": "cube"}]}
    scenes.write_text(json.dumps({"scenes": [wrong]}))
    assert "CLEVR_val_000000.png: no scene of CLEVR" in said(set_of_clevr)
    scenes.unlink()
    assert "CLEVR_val_scenes.json is not there" in said(set_of_clevr)
    for path in (set_of_clevr / "images" / "val").iterdir():
        path.unlink()
    assert "no usable image in" in said(set_of_clevr)
