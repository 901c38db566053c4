"""`python -m cjepa_fast.eval video`: DAVIS folders in, measures and label maps out."""

import json
import os
import shutil
from pathlib import Path

import dense_sets
import numpy as np
import pytest
from PIL import Image

from cjepa_fast.data.sets.davis import open_davis
from cjepa_fast.data.sets.labelmaps import colours, read_label_map, write_label_map
from cjepa_fast.eval.__main__ import main
from cjepa_fast.eval.dense import video


@pytest.fixture
def encoder(tmp_path, seed):
    return dense_sets.write_encoder(tmp_path)


@pytest.fixture
def davis(tmp_path):
    return dense_sets.write_davis(tmp_path / "DAVIS")


def evaluate(encoder, davis, *options) -> int:
    words = ["video", str(encoder), "--data", str(davis), "--short-side", "40"]
    return main([*words, *map(str, options)])


def test_the_label_maps_written_have_the_measures_told(encoder, davis, tmp_path, capsys):
    out, maps, picture = tmp_path / "v.json", tmp_path / "maps", tmp_path / "v.png"
    options = ("--untrained", "--seed", "3", "--json", out, "--save", maps, "--out", picture)
    assert evaluate(encoder, davis, *options) == 0
    untrained, trained = json.loads(out.read_text())["rows"]
    assert untrained["encoder"] == "untrained" and trained["objects"] == 2
    assert picture.stat().st_size > 5_000

    (clip,) = open_davis(davis)
    paths = sorted((maps / "trained" / "two").iterdir())
    assert [path.name for path in paths] == [f"{t:05d}.png" for t in range(5)]
    assert Image.open(paths[1]).mode == "P"
    written = [read_label_map(path) for path in paths]
    assert (written[0] == clip.labels(0)).all()
    assert trained["sequences"]["two"]["each"] == video.measure(clip, written)
    mean = np.mean([each["jf"] for each in trained["sequences"]["two"]["each"]])
    assert trained["jf"] == pytest.approx((trained["j"] + trained["f"]) / 2) == pytest.approx(mean)
    assert f"{trained['jf']:.2f}" in capsys.readouterr().out
    assert trained["j"] > 50  # even random features tell flat squares from the ground


def test_measures_leave_the_first_and_last_frame_out(davis):
    (clip,) = open_davis(davis)
    truth = [clip.labels(t) for t in range(5)]
    wrong = [np.zeros_like(truth[0]), *truth[1:4], np.zeros_like(truth[0])]
    assert video.mean_of(video.measure(clip, wrong)) == {
        "objects": 2, "jf": 100, "j": 100, "j_recall": 100, "j_decay": 0,
        "f": 100, "f_recall": 100, "f_decay": 0,
    }  # fmt: skip
    first, second = video.measure(clip, [np.where(x == 1, 1, 0) for x in truth])
    assert (first["jf"], second["jf"]) == (100, 0)


def test_255_is_the_object_of_2016_and_nothing_in_2017(davis, tmp_path):
    (clip,) = open_davis(dense_sets.write_davis(tmp_path / "single", single=True))
    assert clip.objects == 1 and set(np.unique(clip.labels(3))) == {0, 1}
    several = davis / "Annotations" / "480p" / "two" / "00000.png"
    labels_HW = read_label_map(several)
    labels_HW[:2] = 255
    write_label_map(several, labels_HW)
    (clip,) = open_davis(davis)
    assert clip.objects == 2 and set(np.unique(clip.labels(0))) == {0, 1, 2}


def test_the_list_of_2017_names_the_sequences(davis):
    for kind in ("JPEGImages", "Annotations"):
        shutil.copytree(davis / kind / "480p" / "two", davis / kind / "480p" / "more")
    assert [clip.name for clip in open_davis(davis)] == ["more", "two"]
    listed = davis / "ImageSets" / "2017" / "val.txt"
    listed.parent.mkdir(parents=True)
    listed.write_text("two\n")
    assert [clip.name for clip in open_davis(davis)] == ["two"]


def test_what_is_wrong_names_the_file(encoder, davis, tmp_path, capsys):
    annotations = davis / "Annotations" / "480p" / "two"
    frames = davis / "JPEGImages" / "480p" / "two"

    def fails(path: Path, words: str) -> None:
        assert evaluate(encoder, davis) == 2
        said = capsys.readouterr().err
        assert str(path) in said and words in said and len(said.splitlines()) == 1, said

    third = annotations / "00003.png"
    good = third.read_bytes()
    write_label_map(third, np.ones((40, 40), dtype=np.uint8))
    fails(third, "is 40x40, its frame 56x40")
    Image.new("RGB", (56, 40)).save(third)
    fails(third, "mode RGB")
    third.write_bytes(b"no picture")
    fails(third, "cannot be read")
    third.unlink()
    fails(third, "missing")
    third.write_bytes(good)
    good = (frames / "00002.jpg").read_bytes()
    (frames / "00002.jpg").write_bytes(b"\xff\xd8 no more")
    fails(frames / "00002.jpg", "cannot be decoded")
    (frames / "00002.jpg").write_bytes(good)
    write_label_map(annotations / "00000.png", np.zeros((40, 56), dtype=np.uint8))
    fails(annotations / "00000.png", "no object")
    shutil.rmtree(davis / "Annotations")
    fails(davis / "Annotations" / "480p", "missing")


def test_colours_are_those_of_pascal_voc():
    known = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128)]
    assert [tuple(row) for row in colours()[:5].tolist()] == known
    assert tuple(colours()[20].tolist()) == (0, 64, 128)
    assert len(np.unique(colours(), axis=0)) == 256


@pytest.mark.skipif("CJEPA_REAL_DENSE" not in os.environ, reason="CJEPA_REAL_DENSE names no folder")
def test_davis_itself(tmp_path, seed):
    clips = open_davis(Path(os.environ["CJEPA_REAL_DENSE"]) / "DAVIS")
    sizes = {clip.name: (len(clip.frames), clip.objects) for clip in clips}
    assert sizes == {"car-shadow": (40, 1), "drift-chicane": (52, 1), "motocross-jump": (40, 1)}
    truth = [clips[0].labels(t) for t in range(40)]
    assert video.measure(clips[0], truth)[0]["jf"] == 100
    assert video.measure(clips[0], [truth[0]] * 40)[0]["j_decay"] > 10  # the car drives away
