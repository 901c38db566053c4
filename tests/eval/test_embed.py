"""cjepa-embed: the features of evaluation in each kind of file, resumed, on several ranks."""

import csv
import json
import os
import shutil
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import tiny
import torch

from cjepa_fast.checkpoint.encoders import load_encoder
from cjepa_fast.data.sources import open_images
from cjepa_fast.eval import __main__ as evaluation
from cjepa_fast.eval import embed
from cjepa_fast.eval.features import NoneRead, extract
from cjepa_fast.model.vit import Encoder
from cjepa_fast.runtime.files import read_tensors


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(run, images, names, features) of ten images in two classes."""
    folder = tmp_path_factory.mktemp("embed")
    torch.manual_seed(0)
    run = tiny.write_run(folder / "runs", Encoder(24, 4, 24, 4, 2))
    tiny.write_images(folder / "images", 10)
    images = open_images(str(folder / "images"))
    features, _ = extract(load_encoder(run), images, crop=0.875, threads=1)
    return run, folder / "images", [images.name(i) for i in range(10)], features.numpy()


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(embed, "PART", 4)


def call(run, images, out, *more) -> int:
    return evaluation.main(["embed", str(run), str(images), "--out", str(out), *more])


def read(path) -> tuple[list[str], np.ndarray, np.ndarray, list[str]]:
    """names, features, numbers or words of the classes, and the classes' names."""
    if path.suffix == ".npz":
        found = np.load(path, allow_pickle=False)
        return found["names"].tolist(), found["features"], found["labels"], [*found["classes"]]
    if path.suffix == ".safetensors":
        found, named = read_tensors(path), json.loads(path.with_suffix(".json").read_text())
        arrays = found["features"].numpy(), found["labels"].numpy()
        return named["names"], *arrays, named["classes"]
    if path.suffix == ".csv":
        head, *rows = csv.reader(path.open())
        assert head[:3] == ["name", "label", "f0"]
        features = np.array([[float(x) for x in row[2:]] for row in rows], np.float32)
        return [row[0] for row in rows], features, np.array([row[1] for row in rows]), []
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(path)
    features = np.array(table["features"].to_pylist(), np.float32)
    return table["name"].to_pylist(), features, np.array(table["label"].to_pylist()), []


@pytest.mark.parametrize("ending", embed.WRITERS)
def test_each_kind_of_file_holds_names_labels_and_the_features(tmp_path, made, ending, capsys):
    run, images, names, features = made
    out = tmp_path / f"features{ending}"
    if ending == ".parquet":
        pytest.importorskip("pyarrow")
    assert call(run, images, out) == 0, capsys.readouterr().err
    found_names, found, labels, classes = read(out)
    assert found_names == names and np.array_equal(found, features)
    words = [classes[x] for x in labels] if classes else labels.tolist()
    assert words == [name.partition("/")[0] for name in names]
    assert {path.name for path in tmp_path.iterdir()} <= {out.name, "features.json"}


def test_a_row_for_each_patch(tmp_path, made):
    run, images, _, features = made
    assert call(run, images, tmp_path / "a.npz", "--pool", "none") == 0
    found = np.load(tmp_path / "a.npz")["features"]
    assert found.shape == (10, 36, 24)
    np.testing.assert_allclose(found.mean(1), features, atol=1e-6)
    assert call(run, images, tmp_path / "b.npz", "--pool", "last4") == 0
    assert np.load(tmp_path / "b.npz")["features"].shape == (10, 96)


def test_it_resumes_and_makes_nothing_twice(tmp_path, made, monkeypatch, capsys):
    run, images, _, features = made
    out, asked = tmp_path / "a.npz", []

    def failing(*args, keep, **options):
        asked.append(keep.tolist())
        if len(asked) == 2:
            raise OSError("the disk went away")
        return extract(*args, keep=keep, **options)

    monkeypatch.setattr(embed, "extract", failing)
    assert call(run, images, out) == 2 and "went away" in capsys.readouterr().err
    assert not out.exists()
    assert call(run, images, out) == 0
    assert asked == [[0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7], [8, 9]]
    assert np.array_equal(np.load(out)["features"], features)


def test_a_part_has_no_more_bytes_than_it_may(tmp_path, made, monkeypatch, capsys):
    """And as many images as those that are there have, which an earlier version may have made."""
    run, images, _, features = made
    asked = []

    def noted(*args, keep, **options):
        assert not options["everywhere"]  # the first rank alone writes
        asked.append(keep.tolist())
        if len(asked) == 2:
            raise OSError("the disk went away")
        return extract(*args, keep=keep, **options)

    monkeypatch.setattr(embed, "extract", noted)
    monkeypatch.setattr(embed, "PART_BYTES", 3 * 36 * 24 * 4)
    words = run, images, tmp_path / "a.npz", "--pool", "none"
    assert call(*words) == 2
    monkeypatch.setattr(embed, "PART_BYTES", 2**30)
    assert call(*words) == 0
    assert asked == [[0, 1, 2], [3, 4, 5], [3, 4, 5], [6, 7, 8], [9]]
    found = np.load(tmp_path / "a.npz")["features"]
    np.testing.assert_allclose(found.mean(1), features, atol=1e-6)


def test_parts_of_other_features_are_not_mixed_in(tmp_path, made, monkeypatch, capsys):
    run, images, *_ = made
    monkeypatch.setattr(embed, "extract", lambda *args, **options: (_ for _ in ()).throw(OSError()))
    assert call(run, images, tmp_path / "a.npz") == 2
    assert call(run, images, tmp_path / "a.npz", "--pool", "none", "--crop", "0.5") == 2
    assert "another crop, pool" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("a.pkl", [], "must be one of .parquet, .npz, .csv, .safetensors"),
        ("a.csv", ["--pool", "none"], "--pool none"),
        ("there.npz", [], "is there already"),
    ],
)
def test_what_cannot_be_written_is_said_before_any_work(tmp_path, made, name, more, said, capsys):
    (tmp_path / "there.npz").touch()
    assert call(*made[:2], tmp_path / name, *more) == 2
    assert said in capsys.readouterr().err


def test_parts_of_images_that_are_written_anew_are_not_resumed(tmp_path, made, monkeypatch, capsys):
    """Parts of an earlier version, which did not look at the times, are if they are younger."""
    images, asked = shutil.copytree(made[1], tmp_path / "images"), []

    def failing(*args, keep, **options):
        asked.append(int(keep[0]))
        if keep[0]:
            raise OSError("the disk went away")
        return extract(*args, keep=keep, **options)

    monkeypatch.setattr(embed, "extract", failing)
    out = tmp_path / "a.npz"
    assert call(made[0], images, out) == 2
    os.utime(next(images.rglob("*.jpg")), ns=(10**18, 10**18))
    assert call(made[0], images, out) == 2 and "another copy of" in capsys.readouterr().err
    facts = json.loads((tmp_path / "a.npz.parts" / "facts.json").read_text())
    (tmp_path / "a.npz.parts" / "facts.json").write_text(json.dumps({**facts, "times": None}))
    assert call(made[0], images, out) == 2 and asked == [0, 4]
    del facts["times"]
    (tmp_path / "a.npz.parts" / "facts.json").write_text(json.dumps(facts))
    assert call(made[0], images, out) == 2 and asked == [0, 4, 4]
    os.utime(next(images.rglob("*.jpg")), ns=(2 * 10**18, 2 * 10**18))  # younger than the parts
    assert call(made[0], images, out) == 2 and asked == [0, 4, 4]


@pytest.mark.parametrize("pool", ["mean", "none", "last4"])
def test_a_part_without_a_readable_image_is_empty(tmp_path, made, monkeypatch, capsys, pool):
    """The others are written, in each kind of file; where all are empty that is an error."""
    run, images, names, features = made
    bad = [0, 4]

    def failing(*args, keep, **options):
        if int(keep[0]) in bad:
            raise NoneRead("none")
        return extract(*args, keep=keep, **options)

    monkeypatch.setattr(embed, "extract", failing)
    for ending in embed.WRITERS if pool == "mean" else [".npz"]:
        if ending == ".parquet" and not find_spec("pyarrow"):
            continue
        out = tmp_path / f"a{ending}"
        assert call(run, images, out, "--pool", pool) == 0
        assert "features of 2 images; 8 images left out" in capsys.readouterr().out
        found_names, found, *_ = read(out)
        assert found_names == names[8:]
        assert pool != "mean" or np.array_equal(found, features[8:])
    bad.append(8)
    assert call(run, images, tmp_path / "b.npz") == 2
    assert "none of the 10 images could be read" in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("b.")]


def test_a_file_of_names_that_is_there_is_left_alone(tmp_path, made, capsys):
    (tmp_path / "val.json").write_text("mine")
    assert call(*made[:2], tmp_path / "val.safetensors") == 2
    assert "val.json, which is there already" in capsys.readouterr().err
    assert (tmp_path / "val.json").read_text() == "mine"


def test_without_labels_there_are_none(tmp_path, made):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(made[1].rglob("*.jpg"))[:3]):
        (flat / f"{i}.jpg").write_bytes(path.read_bytes())
    (flat / "bad.jpg").write_bytes(b"no image")
    assert call(made[0], flat, tmp_path / "a.npz") == 0
    assert set(np.load(tmp_path / "a.npz")) == {"names", "features"}
    assert call(made[0], flat, tmp_path / "a.csv") == 0
    assert [row[1] for row in csv.reader((tmp_path / "a.csv").open())] == ["label", "", "", ""]


@pytest.mark.parametrize("ending", embed.WRITERS)
def test_an_image_without_a_label_takes_the_others_none(tmp_path, made, ending):
    if ending == ".parquet":
        pytest.importorskip("pyarrow")
    images = shutil.copytree(made[1], tmp_path / "images")
    (images / "class_1" / "001.jpg").rename(images / "loose.jpg")
    out = tmp_path / f"a{ending}"
    assert call(made[0], images, out) == 0
    names, _, labels, classes = read(out)
    words = [classes[x] if x >= 0 else None for x in labels] if classes else labels.tolist()
    expected = [None if name == "loose.jpg" else name.partition("/")[0] for name in names]
    assert "loose.jpg" in names and [word or None for word in words] == expected


def test_what_does_not_fit_is_told(tmp_path, made, monkeypatch, capsys):
    monkeypatch.setattr(embed, "free_bytes", lambda: 1000)
    assert call(*made[:2], tmp_path / "a.npz") == 2
    assert "take .parquet or .csv" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert call(*made[:2], tmp_path / "a.parquet") == 2
    assert "pip install pyarrow" in capsys.readouterr().err


def test_two_ranks_make_the_same_file(tmp_path, made):
    run, images, names, features = made
    script = tmp_path / "embed.py"
    script.write_text("import sys\nfrom cjepa_fast.eval.__main__ import main\nsys.exit(main())\n")
    done = tiny.run(script, "embed", run, images, "--out", tmp_path / "a.npz", ranks=2)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "a.npz")
    assert found["names"].tolist() == names
    np.testing.assert_allclose(found["features"], features, atol=1e-6)
