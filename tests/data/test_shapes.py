"""The synthetic dataset: deterministic, labelled truly, whole on disk or remade, not given away."""

import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from cjepa_fast.data.sets import scenes, shapes
from cjepa_fast.data.sources import open_images


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A set of a few pictures in an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shapes, "COUNTS", {"train": 24, "val": 8})
    return tmp_path


def pixels(split: str, index: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(scenes.render(split, index)[0])))


def test_a_picture_is_a_function_of_split_and_index():
    once, again = scenes.render("train", 5), scenes.render("train", 5)
    assert once == again
    assert once[0] != scenes.render("train", 6)[0]
    assert once[0] != scenes.render("val", 5)[0]
    assert pixels("train", 5).shape == (scenes.SIZE, scenes.SIZE, 3)


def test_labels_say_what_is_drawn(monkeypatch):
    """Every object is painted once; the label is the kind that covers the most."""
    drawn = []
    cover = scenes._cover

    def spy(kind, *rest):
        found = cover(kind, *rest)
        drawn.append((found[0].sum(), kind))
        return found

    monkeypatch.setattr(scenes, "_cover", spy)
    for index in range(40):
        drawn.clear()
        _, label, facts = scenes.render("train", index)
        assert scenes.KINDS[label] == facts["kind"] == max(drawn)[1]
        assert facts["objects"] == len(drawn)
        by_size = sorted((area for area, _ in drawn), reverse=True)
        assert all(by_size[0] > 2 * area for area in by_size[1:])  # clearly the largest


def test_distance_is_that_of_the_nearest(monkeypatch):
    drawn = []
    scene = scenes._scene
    monkeypatch.setattr(scenes, "_scene", lambda *a: drawn.append(scene(*a)) or drawn[-1])
    for index in range(20):
        distance = scenes.render("val", index)[2]["distance"]
        main = max(drawn[-1], key=lambda o: o["radius"])  # the others lie behind it
        assert distance == pytest.approx(main["distance"], abs=1e-4)
        assert distance == pytest.approx(min(o["distance"] for o in drawn[-1]), abs=1e-4)


def test_kinds_are_equally_large_and_equally_common():
    areas = {}
    for kind in scenes.KINDS:
        centre, radius = np.full(2, scenes.SIDE / 2), 20 * scenes.UNIT_RADIUS[kind]
        areas[kind] = scenes._cover(kind, centre, radius, 0.3, 1.0)[0].sum()
    assert max(areas.values()) < 1.03 * min(areas.values()), areas
    count = Counter(scenes.render("train", i)[1] for i in range(400))
    assert set(count) == set(range(len(scenes.KINDS)))
    # 400 draws of 8 kinds: 50 each, standard deviation 6.6
    assert all(20 < n < 80 for n in count.values()), count


def test_mean_colour_does_not_tell_the_kind():
    """Leave-one-out nearest neighbour on mean colour is at chance (1/8), within 3.5 deviations."""
    n = 600
    samples = [scenes.render("train", i) for i in range(n)]
    colour = np.array([np.asarray(Image.open(io.BytesIO(s[0]))).mean((0, 1)) for s in samples])
    label = np.array([s[1] for s in samples])
    distance = np.square(colour[:, None] - colour).sum(2)
    np.fill_diagonal(distance, np.inf)
    right = (label[distance.argmin(1)] == label).mean()
    chance = 1 / len(scenes.KINDS)
    assert right < chance + 3.5 * np.sqrt(chance * (1 - chance) / n)


def test_ensure_makes_shards_that_read_as_a_labelled_set(small):
    folder = shapes.ensure("train")
    assert folder == small / "cache" / "cjepa_fast" / shapes.VERSION / "train"
    images = open_images(str(folder), cache=small / "index")
    assert len(images) == 24
    for i in (0, 23):
        jpeg, label, facts = scenes.render("train", i)
        assert images.read(i) == jpeg
        assert images.labels[i] == label
        assert json.loads(images.sidecar(i, "json")) == facts


def test_classes_have_names_in_a_set_of_an_earlier_version_too(small):
    folder = shapes.ensure("val", log=lambda text: None)
    (folder / "classes.txt").unlink()  # it wrote none
    shapes.ensure("val", log=lambda text: None)
    images = open_images(folder, cache=small / "named")
    assert tuple(images.classes) == scenes.KINDS
    assert images.labels.tolist() == [scenes.render("val", i)[1] for i in range(8)]


def test_ensure_renders_once_and_again_when_damaged(small, monkeypatch):
    said = []
    folder = shapes.ensure("val", log=said.append)
    shard = next(folder.glob("*.tar"))
    whole, stamp = shard.read_bytes(), shard.stat().st_mtime_ns
    assert said
    said.clear()
    shapes.ensure("val", log=said.append)
    assert not said
    assert shard.stat().st_mtime_ns == stamp

    damaged = bytearray(whole)
    damaged[2000] ^= 1
    for harm in (
        lambda: shard.write_bytes(damaged),
        lambda: shard.write_bytes(whole[:-512]),
        shard.unlink,
        (folder / "manifest.json").unlink,
        lambda: (folder / "manifest.json").write_text("{"),
        lambda: monkeypatch.setattr(shapes, "_digest_of_first", lambda split: "of another"),
    ):
        said.clear()
        harm()
        assert shapes.ensure("val", log=said.append) == folder
        assert said  # rendered again
        assert shard.read_bytes() == whole  # to the same bytes as before
    assert [p.name for p in folder.parent.iterdir() if p.is_dir()] == ["val"]


def test_a_failed_rendering_leaves_nothing_behind(small, monkeypatch):
    monkeypatch.setattr(shapes.sys, "executable", "/bin/false")
    with pytest.raises(ChildProcessError, match="exit 1"):
        shapes.ensure("val", log=lambda text: None)
    left = [p.name for p in shapes.cache_folder().iterdir()]
    assert left == [".val.lock"]


def test_shards_do_not_depend_on_how_many_render(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "SHARD", 4)
    for name, step in (("one", 1), ("three", 3)):
        (tmp_path / name).mkdir()
        for first in range(step):
            shapes._render_shards("val", tmp_path / name, 10, first, step)
    one, three = (sorted((tmp_path / name).iterdir()) for name in ("one", "three"))
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in three]
    names = []
    for path in one:
        with tarfile.open(path) as tar:
            names += tar.getnames()
    assert sorted(names) == [f"{i:06d}.{e}" for i in range(10) for e in ("cls", "jpg", "json")]


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"'test'.*train or val"):
        shapes.ensure("test")


def test_contact_sheet(tmp_path):
    path = shapes.contact_sheet(tmp_path / "sheet.png", rows=2, columns=3)
    with Image.open(path) as sheet:
        assert sheet.width > 3 * scenes.SIZE and sheet.height > 2 * scenes.SIZE
