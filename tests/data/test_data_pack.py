"""Packing: nothing lost, nothing changed, resumed, verified."""

import errno
import fcntl
import hashlib
import io
import json

import corrupt_images as made
import numpy as np
import pytest
from PIL import Image

from cjepa_fast.data import faults, listing, pack
from cjepa_fast.data.sources import ImageSet, open_images
from cjepa_fast.runtime import files


@pytest.fixture
def packed(tmp_path):
    def run(**options):
        said = []
        options = {"shard_size": 7, "workers": 2} | options
        left_out = pack.pack(tmp_path / "set", tmp_path / "out", cache=tmp_path / "cache",
                             log=said.append, **options)  # fmt: skip
        return left_out, said

    return run


def contents(images):
    """{hash of the bytes: class name} of a set."""
    digest = [hashlib.sha256(images.read_original(i)).hexdigest() for i in range(len(images))]
    return {d: images.classes[k] for d, k in zip(digest, images.labels.tolist(), strict=True)}


def test_bytes_labels_and_classes_survive(tmp_path, packed):
    root = made.good_folder(tmp_path / "set", 20, classes=3)
    made.write(root / "c1" / "a.b.png.jpg", made.encoded(made.picture(77), "PNG"))
    left_out, said = packed()
    assert left_out == [] and said == []
    before = open_images(root, cache=tmp_path / "cache")
    after = open_images(tmp_path / "out", cache=tmp_path / "cache")
    assert contents(before) == contents(after) and len(after) == 21
    assert len(list((tmp_path / "out").glob("*.tar"))) == 3
    assert sum(after.name(i).endswith(".png") for i in range(21)) == 1
    first = [after.labels[i].item() for i in range(7)]
    assert len(set(first)) > 1  # shuffled: a folder's order would begin with one class
    record = json.loads((tmp_path / "out" / "shard-000000.json").read_text())
    assert all(name.startswith("c") for name in record["names"].values())


def test_an_error_of_the_machine_ends_the_packing_and_leaves_out_nothing(
    tmp_path, packed, monkeypatch
):
    made.good_folder(tmp_path / "set", 10)

    def lost(self, i):
        raise faults.MachineFailed(errno.EIO, "the disk is lost")

    with monkeypatch.context() as patch:
        patch.setattr(ImageSet, "read_original", lost)
        with pytest.raises(faults.MachineFailed, match="the disk is lost"):
            packed()
    assert packed()[0] == []
    assert len(open_images(tmp_path / "out", cache=tmp_path / "cache")) == 10


def test_broken_images_are_left_out_and_named(tmp_path, packed):
    root = made.good_folder(tmp_path / "set", 10)
    at_once, later = made.break_folder(root)
    left_out, said = packed()
    assert {name for name, _ in left_out} == at_once | later
    assert len(said) == 1 + len(at_once) + len(later)  # the first line counts those at once
    assert len(open_images(tmp_path / "out", cache=tmp_path / "cache")) == 10
    again, _ = packed()
    assert sorted(again) == sorted(left_out)


def test_deep_images_are_shrunk_in_their_range(tmp_path, packed):
    levels_HW3 = np.repeat(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64, 1), 3, 2)
    made.write(tmp_path / "set" / "a.png", made.png(levels_HW3))  # up to 4095
    packed(short_side=16, bit_depth=12)
    images = open_images(tmp_path / "out", cache=tmp_path / "cache", log=lambda line: None)
    assert np.asarray(Image.open(io.BytesIO(images.read_original(0)))).max() > 240
    with pytest.raises(ValueError, match="bit_depth 8 must be"):
        packed(short_side=16, bit_depth=8)


def test_unlabelled_folder(tmp_path, packed):
    made.write(tmp_path / "set" / "a.jpg", made.encoded(made.picture(0)))
    packed()
    assert open_images(tmp_path / "out", cache=tmp_path / "cache").labels is None
    assert not (tmp_path / "out" / "classes.txt").exists()


def test_interrupted_run_goes_on(tmp_path, packed, monkeypatch):
    made.good_folder(tmp_path / "set", 20)
    verify, calls = pack._verify, []

    def interrupted(tar, hashes, pool):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(tar)
        verify(tar, hashes, pool)

    monkeypatch.setattr(pack, "_verify", interrupted)
    with pytest.raises(KeyboardInterrupt):
        packed()
    out = tmp_path / "out"
    assert len(list(out.glob("*.tar"))) == 2
    monkeypatch.setattr(pack, "_verify", verify)
    kept = {tar: tar.stat().st_mtime_ns for tar in out.glob("*.tar")}
    packed()
    assert len(list(out.glob("*.tar"))) == 3 and not list(out.glob("*.tmp"))
    assert all(tar.stat().st_mtime_ns == time for tar, time in kept.items())
    assert len(open_images(out, cache=tmp_path / "cache")) == 20


def test_the_same_images_give_the_same_shards(tmp_path, packed):
    made.good_folder(tmp_path / "set", 9)
    packed(workers=1)
    first = {t.name: t.read_bytes() for t in (tmp_path / "out").glob("*.tar")}
    (tmp_path / "out").rename(tmp_path / "before")
    packed(workers=3)
    assert first == {t.name: t.read_bytes() for t in (tmp_path / "out").glob("*.tar")}


def test_other_settings_or_images_are_refused(tmp_path, packed):
    root = made.good_folder(tmp_path / "set", 9)
    packed()
    with pytest.raises(ValueError, match="shard_size 7 there, 5 now"):
        packed(shard_size=5)
    made.write(root / "c0" / "new.jpg", made.encoded(made.picture(50)))
    with pytest.raises(ValueError, match="another packing"):
        packed()
    with pytest.raises(ValueError, match="at least 1"):
        packed(shard_size=0)


@pytest.mark.parametrize("earlier", [False, True])
def test_other_labels_of_the_same_images_are_refused(tmp_path, earlier):
    """Finished shards keep their numbers, which a new classes.txt would give other names."""
    made.good_folder(tmp_path / "set", 4, classes=1)
    out, options = tmp_path / "out", {"shard_size": 2, "cache": tmp_path / "cache"}

    def packed(*labels):
        lines = [f"set/c0/{i:04d}.jpg,{label}\n" for i, label in enumerate(labels)]
        (tmp_path / "set.csv").write_text("".join(lines))
        pack.pack(tmp_path / "set.csv", out, **options)
        return contents(open_images(out, cache=tmp_path / "cache"))

    first = packed("cat", "dog", "cat", "dog")
    if earlier:  # a version whose manifest had no labels
        manifest = json.loads((out / pack.MANIFEST).read_text())
        del manifest["labels"]
        (out / pack.MANIFEST).write_text(json.dumps(manifest))
    (out / "shard-000001.json").unlink()
    for other in (["ant", "dog", "cat", "dog"], ["dog", "cat", "cat", "dog"])[: 2 - earlier]:
        with pytest.raises(ValueError, match=r"of another packing \(other labels or classes\)"):
            packed(*other)
    assert (out / "classes.txt").read_text() == "cat\ndog\n"
    assert packed("cat", "dog", "cat", "dog") == first


def test_a_shard_whose_record_could_not_be_read_again_is_refused(tmp_path, packed, monkeypatch):
    made.good_folder(tmp_path / "set", 9)
    packed()
    record = (tmp_path / "out" / "shard-000000.json").stat().st_size
    (tmp_path / "out").rename(tmp_path / "before")
    monkeypatch.setattr(pack, "SURE_TO_FIT", 6)
    monkeypatch.setattr(files, "MOST_JSON_BYTES", record - 1)
    with pytest.raises(ValueError, match=r"shard_size 7: the record of so many .* 6 are sure"):
        packed()
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(files, "MOST_JSON_BYTES", record + 200)
    packed()


def test_two_do_not_pack_into_one_folder(tmp_path, packed):
    made.good_folder(tmp_path / "set", 9)
    out = tmp_path / "out"
    out.mkdir()
    with open(out / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=f"{out}: a packing is writing there, process"):
            packed()
    assert packed()[0] == [] and packed()[0] == []


def test_short_side_shrinks_large_images_alone(tmp_path, packed):
    turned = made.encoded(made.picture(1, 80, 120), exif=made.exif(6))
    made.write(tmp_path / "set" / "a" / "large.jpg", turned)
    made.write(tmp_path / "set" / "a" / "small.jpg", made.encoded(made.picture(2, 30, 35)))
    packed(short_side=40, quality=80)
    after = open_images(tmp_path / "out", cache=tmp_path / "cache")
    assert sorted(after.sizes_N2.tolist()) == [[30, 35], [60, 40]]
    for i in range(2):
        image = Image.open(io.BytesIO(after.read_original(i)))
        assert image.getexif().get(0x0112, 1) == 1 and image.size == tuple(after.sizes_N2[i][::-1])


def test_short_side_keeps_the_channels(tmp_path, packed):
    """What is clear keeps its colour, too."""
    rgba = np.concatenate([made.picture(3, 64, 64), made.picture(4, 64, 64)[..., :1]], axis=2)
    rgba[:32, :, 3] = 0
    stored = {"1 L": rgba[..., :1], "2 LA": rgba[..., [0, 3]], "3 CMYK": rgba, "4 RGBA": rgba}
    for name, levels in stored.items():
        kind = "JPEG" if "CMYK" in name else "PNG"
        for side in (16, 64):
            data = levels[:side, :side].tobytes()
            image = Image.frombytes(name[2:], (side, side), data)
            made.write(tmp_path / "set" / name / f"{side}.png", made.encoded(image, kind))
    deep = rgba[..., 0].astype(np.uint16) * 257
    made.write(tmp_path / "set" / "1 L" / "deep.png", made.png(deep))
    packed(short_side=32)
    images = open_images(tmp_path / "out", cache=tmp_path / "cache")
    assert images.sizes_N2.max() == 32 and len(images) == 9
    for i, label in enumerate(images.labels.tolist()):
        name, image = images.classes[label], Image.open(io.BytesIO(images.read_original(i)))
        assert images._entries_N["channels"][i] == int(name[0])
        if image.width == 32:
            assert image.format == ("PNG" if "A" in name else "JPEG")
        for band, levels in zip(image.split(), stored[name].transpose(2, 0, 1), strict=False):
            want = Image.fromarray(levels).resize((32, 32), Image.Resampling.LANCZOS)
            want = np.asarray(want if image.width == 32 else levels[:16, :16]).astype(int)
            assert "CMYK" in name or np.abs(np.asarray(band) - want).mean() < 3


def test_what_does_not_read_back_is_refused(tmp_path, packed, monkeypatch):
    made.good_folder(tmp_path / "set", 5)
    members = listing.members

    def damaged(tar):
        with open(tar, "r+b") as file:  # a disk that forgets
            file.seek(600)
            file.write(b"\0" * 50)
        return members(tar)

    monkeypatch.setattr(listing, "members", damaged)
    with pytest.raises(ValueError, match="do not read back"):
        packed()
    assert not list((tmp_path / "out").glob("*.tar"))


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made.good_folder(tmp_path / "set", 5)
    assert pack.main([str(tmp_path / "set"), str(tmp_path / "out"), "--shard-size", "2"]) == 0
    assert "3 shards" in capsys.readouterr().out
    assert pack.main([str(tmp_path / "nothing"), str(tmp_path / "out")]) == 2
    assert "does not exist" in capsys.readouterr().err
