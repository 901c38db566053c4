"""Opening, indexing and reading image sets: folders, shards, the cache, and what is corrupt."""

import gzip
import io
import json
import os
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import corrupt_images as made
import numpy as np
import pytest
import torch
from PIL import Image

from cjepa_fast.data import formats, index, listing
from cjepa_fast.data.locations import expand_braces
from cjepa_fast.data.pack import PackableImages
from cjepa_fast.data.sources import DecodableImages, Subset, open_images


@pytest.fixture
def opened(tmp_path):
    said = []

    def open_(path, **options):
        return open_images(str(path), cache=tmp_path / "cache", log=said.append, **options)

    open_.said = said
    return open_


def test_folder_has_names_classes_and_sizes(tmp_path, opened):
    root = made.good_folder(tmp_path / "set", 9, classes=3)
    made.write(root / "c1" / "deep" / "er" / "x.png", made.encoded(made.picture(1, 33, 44), "PNG"))
    made.write(root / "c1" / ".hidden.jpg", b"nothing")
    made.write(root / "c1" / "notes.txt", b"nothing")
    images = opened(root)
    names = [images.name(i) for i in range(len(images))]
    assert names == sorted(names) and len(names) == 10 and "c1/deep/er/x.png" in names
    assert images.classes == ["c0", "c1", "c2"]
    assert [images.classes[k] for k in images.labels.tolist()] == [n.split("/")[0] for n in names]
    assert images.sizes_N2[names.index("c1/deep/er/x.png")].tolist() == [33, 44]
    for i, name in enumerate(names):
        assert images.read(i) == (root / name).read_bytes()
    assert not images.skipped and not opened.said


def test_sets_and_subsets_have_what_reads_them_asks_for(tmp_path, opened):
    """Also of a subset of a subset, whose positions are those of the one before."""
    for k in range(4):
        made.write(tmp_path / "set" / f"{k}.jpg", made.encoded(made.picture(k, 20 + k, 30)))
    images = opened(tmp_path / "set")
    some = Subset(images, torch.tensor([1, 3]))
    one = Subset(some, torch.tensor([1]))
    assert all(isinstance(found, DecodableImages) for found in (images, some, one))
    assert isinstance(images, PackableImages) and not isinstance(some, PackableImages)
    assert (some.name(0), some.name(1), one.name(0)) == ("1.jpg", "3.jpg", "3.jpg")
    assert one.read(0) == images.read(3) and one.read_original(0) == images.read_original(3)
    assert one.sizes_N2.tolist() == images.sizes_N2[[3]].tolist() and len(one) == 1
    assert len({images.fingerprint, some.fingerprint, one.fingerprint}) == 3


def test_images_beside_folders_are_unlabelled(tmp_path, opened):
    root = made.good_folder(tmp_path / "set", 4)
    made.write(root / "top.jpg", made.encoded(made.picture(1)))
    images = opened(root)
    assert images.labels is None and images.classes is None and len(images) == 5


def test_links_are_followed_but_not_in_circles(tmp_path, opened):
    root = made.good_folder(tmp_path / "set", 4)
    os.symlink(root, root / "c0" / "again")
    os.symlink(made.good_folder(tmp_path / "other", 2), root / "c9")
    assert len(opened(root)) == 6


def test_broken_files_are_named_with_the_reason(tmp_path, opened):
    root = made.good_folder(tmp_path / "set", 5)
    at_once, later = made.break_folder(root)
    images = opened(root)
    assert {name for name, _ in images.skipped} == at_once
    assert all(reason for _, reason in images.skipped)
    reasons = {name.split("/")[1]: reason for name, reason in images.skipped}
    assert "no end marker" in reasons["truncated.jpg"] and "empty" in reasons["empty.jpg"]
    assert "not an image" in reasons["text.jpg"] and "data.max_pixels" in reasons["huge.JPG"]
    assert "checksum" in reasons["checksum.png"] and "truncated" in reasons["cut.png"]
    assert "zeros" in reasons["zeros.png"] and "folder" in reasons["folder.jpg"]
    assert "No such file" in reasons["link.jpg"]
    assert len(images) == 5 + len(later)
    assert sum(any(name in line for line in opened.said) for name in at_once) == len(at_once)
    assert len(opened.said) == len(at_once) + 1  # the first line counts them


def test_of_many_the_log_has_counts_and_a_file_all_names(tmp_path, opened):
    root = made.good_folder(tmp_path / "set", 2)
    for i in range(30):
        made.write(root / "c0" / f"bad{i}.jpg", b"")
    made.write(root / "c1" / "x\nerror: \x1b[31m.heic", b"\0\0\0\x18ftypheic" + bytes(99))
    report = tmp_path / "run" / "unusable.jsonl"
    images = opened(root, report=report)
    (said,) = opened.said
    assert said.startswith("31 of 33 images are left out (empty file: 30, HEIC")
    assert str(report) in said and said.isprintable()
    rows = [json.loads(line) for line in report.read_text().splitlines()]
    assert [(row["name"], row["why"]) for row in rows] == images.skipped and len(rows) == 31
    (root / "c0" / "bad0.jpg").write_bytes(b"")
    for name, _ in images.skipped:
        (root / name).unlink()
    opened(root, report=report)
    assert not report.exists() and opened.said == [said]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_named(tmp_path, opened):
    root = made.good_folder(tmp_path / "set", 2)
    made.write(root / "c0" / "locked.jpg", made.encoded(made.picture(0))).chmod(0)
    assert opened(root).skipped == [("c0/locked.jpg", "cannot be read (Permission denied)")]


FORMATS = {
    "png named jpg": lambda p: made.encoded(p, "PNG"),
    "gif named jpg": lambda p: made.encoded(Image.fromarray(p).quantize(64), "GIF"),
    "webp named jpg": lambda p: made.encoded(p, "WEBP", lossless=True),
    "bmp named jpg": lambda p: made.encoded(p, "BMP"),
    "cmyk": lambda p: made.encoded(Image.fromarray(p).convert("CMYK")),
    "rgb coded": lambda p: made.encoded(p, keep_rgb=True),
    "corrupt exif": lambda p: made.encoded(p, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(20)),
    "large header": lambda p: made.encoded(p, icc_profile=bytes(200_000)),
    "padded": lambda p: made.encoded(p) + bytes(10_000),
    "preview inside": lambda p: made.encoded(p, comment=made.encoded(made.picture(3, 20, 20))),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_content_decides_and_odd_kinds_are_converted(tmp_path, opened, kind):
    pixels = made.picture(5)
    made.write(tmp_path / "set" / "a.jpg", FORMATS[kind](pixels))
    images = opened(tmp_path / "set")
    assert len(images) == 1 and images.sizes_N2.tolist() == [[60, 80]]
    as_it_is = kind in ("png named jpg", "large header", "padded", "preview inside")
    assert (images.read(0) == images.read_original(0)) == as_it_is
    got = np.asarray(Image.open(io.BytesIO(images.read(0))).convert("RGB")).astype(int)
    assert np.abs(got - pixels).mean() < (12 if "gif" in kind else 3)


def test_end_marker_of_a_preview_is_no_end_marker():
    """A camera file cut inside its pixels still holds its preview's end marker."""
    whole = made.encoded(made.picture(5), comment=made.encoded(made.picture(3, 20, 20)))
    cut = whole[:-200]
    assert b"\xff\xd9" in cut
    header = formats.inspect(lambda at, count: cut[at : at + count], len(cut))
    assert 50 < header.there_pct < 100


@pytest.mark.parametrize("orientation", range(9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_sizes_are_upright(orientation, kind):
    data = made.encoded(made.picture(1, 30, 50), kind, exif=made.exif(orientation))
    shape = formats.inspect(lambda at, count: data[at : at + count], len(data))
    assert shape[:3] == ((50, 30) if orientation >= 5 else (30, 50)) + (formats.PLAIN,)
    assert formats.decode_rgb(data).size == shape[1::-1]


def test_sixteen_bits_are_scaled_not_clipped():
    gray = made.picture(2)[..., 0]
    got = np.asarray(formats.decode_rgb(made.png(gray.astype(np.uint16) * 257))).astype(int)
    assert np.abs(got - gray[..., None]).max() <= 1


def test_shards_have_labels_and_siblings(tmp_path, opened):
    root = made.good_shards(tmp_path / "set", 11, json=b'{"a": 1}')
    images = opened(root)
    assert len(images) == 11 and sorted(images.labels.tolist()) == sorted(i % 5 for i in range(11))
    for i in range(11):
        number = int(images.name(i).split("/")[1][:4])
        assert images.labels[i] == number % 5
        size = 40 + number % 7, 50 + number % 5
        assert images.read(i) == made.encoded(made.picture(number, *size))
        assert images.sizes_N2[i].tolist() == [*size]
    assert images.sidecar(3, "json") == b'{"a": 1}' and images.sidecar(3, ".none") is None
    (root / "classes.txt").write_text("a\nb\nc\nd\ne\n")
    assert opened(root).classes == list("abcde")
    pattern = opened(str(root / "x-{00..02}.tar"))
    assert pattern.fingerprint == images.fingerprint and len(pattern) == 11
    assert len(opened(root / "x-00.tar")) == 4


def test_folder_siblings(tmp_path, opened):
    root = made.good_folder(tmp_path / "set", 2)
    made.write(root / "c0" / "0000.json", b"{}")
    images = opened(root)
    assert images.sidecar(0, "json") == b"{}" and images.sidecar(1, "json") is None


def test_shards_without_every_label_are_unlabelled(tmp_path, opened):
    members = {f"{i}.jpg": made.encoded(made.picture(i)) for i in range(3)} | {"0.cls": b"1"}
    made.write_shard(tmp_path / "a.tar", members)
    assert opened(tmp_path / "a.tar").labels is None


def test_broken_member_is_skipped(tmp_path, opened):
    members = {"0.jpg": made.encoded(made.picture(0)), "1.jpg": made.truncated(1), "2.jpg": b""}
    made.write_shard(tmp_path / "a.tar", members)
    images = opened(tmp_path / "a.tar")
    assert len(images) == 1 and {n for n, _ in images.skipped} == {"a.tar/1.jpg", "a.tar/2.jpg"}


def test_tars_left_beside_unpacked_folders_do_not_count(tmp_path, opened):
    root = made.good_folder(tmp_path / "set", 4)
    made.write_shard(root / "c0.tar", {"0.jpg": made.encoded(made.picture(0))})
    assert len(opened(root)) == 4


def _cut_tar(path):
    made.good_shards(path, 4, shards=1)
    shard = path / "x-00.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 3])


def _bad_header(path):
    """tarfile takes a damaged header for the end of the archive, and so would lose the rest."""
    made.good_shards(path, 4, shards=1)
    shard = path / "x-00.tar"
    with tarfile.open(shard) as tar:
        third = tar.getmembers()[2].offset
    whole = bytearray(shard.read_bytes())
    whole[third + 150] ^= 255
    shard.write_bytes(whole)


def _cut_between_members(path):
    made.good_shards(path, 4, shards=1)
    shard = path / "x-00.tar"
    with tarfile.open(shard) as tar:
        third = tar.getmembers()[2].offset
    shard.write_bytes(shard.read_bytes()[:third])


def _gzipped(path):
    made.good_shards(path, 4, shards=1)
    shard = path / "x-00.tar"
    (path / "x-00.tar.gz").write_bytes(gzip.compress(shard.read_bytes()))
    shard.unlink()


@pytest.mark.parametrize(
    ("prepare", "name", "error", "says"),
    [
        (None, "set", FileNotFoundError, "does not exist"),
        (lambda p: p.mkdir(), "set", ValueError, "no usable image"),
        (lambda p: made.write(p / "a.jpg", b""), "set", ValueError, "a.jpg: empty file"),
        (_cut_tar, "set", ValueError, "x-00.tar is cut short"),
        (_cut_tar, "set/x-00.tar", ValueError, "x-00.tar is cut short"),
        (_bad_header, "set", ValueError, "breaks off at byte"),
        (_cut_between_members, "set", ValueError, "breaks off at byte"),
        (lambda p: made.write(p / "x.tar", b""), "set", ValueError, "x.tar is cut short"),
        (lambda p: made.write(p / "x.tar", b"text" * 999), "set", ValueError, "no plain tar"),
        (_gzipped, "set", ValueError, "gunzip -k"),
        (_gzipped, "set/x-00.tar.gz", ValueError, "gunzip -k"),
        (lambda p: made.write(p, b"x"), "set", ValueError, "neither a folder nor a .tar"),
        (lambda p: made.good_shards(p, 4), "set/x-{00..04}.tar", FileNotFoundError, "x-03.tar"),
        (lambda p: made.good_shards(p, 4), "set/x-{3..1}.tar", ValueError, "counts down"),
        (None, "shapes:test", ValueError, "shapes:val"),
    ],
)
def test_errors_name_the_path_and_the_way_out(tmp_path, opened, prepare, name, error, says):
    if prepare:
        prepare(tmp_path / "set")
    with pytest.raises(error, match=says):
        opened(name if name.startswith("shapes") else tmp_path / name)


def test_shard_without_images_is_an_error(tmp_path, opened):
    root = made.good_shards(tmp_path / "set", 4)
    made.write_shard(root / "x-99.tar", {"a.txt": b"x"})
    with pytest.raises(ValueError, match=r"x-99.tar holds no image"):
        opened(root)


def test_braces():
    assert expand_braces("a-{08..11}.tar") == [f"a-{i:02d}.tar" for i in range(8, 12)]
    assert expand_braces("{a,b}{0..1}") == ["a0", "a1", "b0", "b1"]


@pytest.fixture
def inspected(monkeypatch):
    count, lock, inspect = [], threading.Lock(), formats.inspect

    def counting(read, length):
        with lock:
            count.append(length)
        return inspect(read, length)

    monkeypatch.setattr(formats, "inspect", counting)
    return count


@pytest.mark.parametrize("make", [made.good_folder, made.good_shards])
def test_second_start_checks_nothing_and_sees_the_same(tmp_path, opened, inspected, make):
    root = make(tmp_path / "set", 9)
    if make is made.good_folder:
        made.break_folder(root)
    first = opened(root)
    assert inspected
    inspected.clear()
    second = opened(root)
    assert not inspected and first.skipped == second.skipped
    assert first.fingerprint == second.fingerprint and (first.sizes_N2 == second.sizes_N2).all()
    assert [first.name(i) for i in range(9)] == [second.name(i) for i in range(9)]
    assert first.labels.tolist() == second.labels.tolist()


def test_changed_files_alone_are_checked_again(tmp_path, opened, inspected):
    root = made.good_folder(tmp_path / "set", 9)
    before = opened(root)
    made.write(root / "c0" / "0000.jpg", made.encoded(made.picture(99, 71, 72)))
    touched = root / "c0" / "0002.jpg"
    made.write(touched, b"x" * touched.stat().st_size)  # as long as it was
    made.write(root / "c0" / "new.jpg", made.encoded(made.picture(98)))
    (root / "c1" / "0001.jpg").unlink()
    inspected.clear()
    after = opened(root)
    assert len(inspected) == 3 and len(after) == 8
    assert after.sizes_N2[0].tolist() == [71, 72] and after.skipped[0][0] == "c0/0002.jpg"
    assert after.fingerprint != before.fingerprint
    inspected.clear()
    opened(root)
    assert not inspected


def test_changed_shard_alone_is_checked_again(tmp_path, opened, inspected):
    root = made.good_shards(tmp_path / "set", 9)
    opened(root)
    made.write_shard(root / "x-01.tar", {"a.jpg": made.encoded(made.picture(0))})
    inspected.clear()
    assert len(opened(root)) == 7 and len(inspected) == 1


def change_times(root, times_s: float) -> None:
    for path in filter(Path.is_file, root.rglob("*")):
        os.utime(path, (times_s, times_s))


@pytest.mark.parametrize("make", [made.good_folder, made.good_shards])
def test_a_time_that_int64_does_not_hold_is_a_time_too(tmp_path, opened, inspected, make):
    """As a clock that is wrong gives it, in a file system that holds it."""
    root, after_2262_s = make(tmp_path / "set", 9), 2**63 / 1e9 + 1e6
    change_times(root, after_2262_s)
    if any(path.stat().st_mtime_ns < 2**63 for path in root.rglob("*.*")):
        pytest.skip("this file system holds no such time")
    images = opened(root)
    assert len(images) == 9 and images.read(0)
    inspected.clear()
    assert len(opened(root)) == 9 and not inspected


@pytest.mark.parametrize("make", [made.good_folder, made.good_shards])
def test_copies_at_one_path_of_two_nodes_have_an_index_each(tmp_path, opened, inspected, make):
    root = make(tmp_path / "set", 9)
    looked = []
    for node in (1, 2, 1, 2):
        change_times(root, 1e9 + node)
        inspected.clear()
        opened(root)
        looked.append(len(inspected))
    assert looked == [9, 9, 0, 0]


def test_of_many_copies_the_newest_indexes_are_kept(tmp_path, opened, inspected, monkeypatch):
    monkeypatch.setattr(index, "KEPT", 2)
    root = made.good_folder(tmp_path / "set", 3)
    before = index.cache_name(root, tmp_path / "cache").with_suffix(".npz")
    made.write(before, b"of an earlier version")
    for node in range(4):
        change_times(root, 1e9 + node)
        opened(root)
    assert len([*(tmp_path / "cache").rglob("*.npz")]) == 2 and not before.exists()
    inspected.clear()
    opened(root)
    assert not inspected


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no zip", None])
def test_damaged_cache_is_made_anew(tmp_path, opened, damage):
    root = made.good_folder(tmp_path / "set", 3)
    opened(root)
    (cached,) = (tmp_path / "cache").rglob("*.npz")
    cached.write_bytes(cached.read_bytes()[:-100] if damage is None else damage)
    assert len(opened(root)) == 3


def test_cache_that_cannot_be_written_costs_a_line(tmp_path):
    root, said = made.good_folder(tmp_path / "set", 3), []
    made.write(tmp_path / "file", b"")
    assert len(open_images(str(root), cache=tmp_path / "file" / "below", log=said.append)) == 3
    assert len(said) == 1 and "not kept" in said[0]


def test_cache_lies_in_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    open_images(str(made.good_folder(tmp_path / "set", 1)), log=lambda line: None)
    assert len(list((tmp_path / "xdg" / "cjepa_fast" / "index").rglob("*.npz"))) == 1


def test_reading_is_safe_from_many_threads(tmp_path, opened, monkeypatch):
    monkeypatch.setattr("cjepa_fast.data.sources.OPEN_SHARDS", 2)  # the third is opened each time
    images = opened(made.good_shards(tmp_path / "set", 30))
    alone = [images.read(i) for i in range(30)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(images.read, list(range(30)) * 20)) == alone * 20


def test_a_damaged_shard_costs_the_others_no_listing(tmp_path, opened, monkeypatch):
    """What was listed and checked is kept, and the damaged ones are told at the end."""
    monkeypatch.setattr(listing, "LISTED", 2)
    root = made.good_shards(tmp_path / "set", 40, 5)
    shards, walked = sorted(root.glob("*.tar")), []
    assert len(shards) > 3
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[: len(whole) // 2])
    walk = listing._walk
    monkeypatch.setattr(listing, "_walk", lambda shard: walked.append(shard.name) or walk(shard))
    with pytest.raises(ValueError, match=f"{shards[1].name} is cut short"):
        opened(root)
    assert len(walked) == len(shards)
    shards[1].write_bytes(whole)
    walked.clear()
    assert len(opened(root)) == 40 and walked == [shards[1].name]


def test_file_that_shrank_is_an_oserror(tmp_path, opened):
    root = made.good_folder(tmp_path / "set", 2)
    images = opened(root)
    made.write(root / "c0" / "0000.jpg", b"short")
    with pytest.raises(OSError, match="changed since"):
        images.read(0)


def test_names_of_any_bytes(tmp_path, opened):
    root = tmp_path / "set"
    root.mkdir()
    name = os.fsencode(root) + b"/caf\xe9 \xff.jpg"
    with open(name, "wb") as file:
        file.write(made.encoded(made.picture(0)))
    images = opened(root)
    assert os.fsencode(images.name(0)) == b"caf\xe9 \xff.jpg" and images.read(0)


def test_index_is_compact(tmp_path):
    names = [b"n01440764/n01440764_%05d.JPEG" % i for i in range(1000)]
    table = index.Table.of(names, np.zeros(1000, index.ENTRY), {})
    index.save(tmp_path / "t.npz", table)
    assert (tmp_path / "t.npz").stat().st_size < 1000 * 90
    loaded = index.load(tmp_path / "t.npz")
    assert loaded.names() == names and loaded.name(0) == names[0] and loaded.name(999) == names[999]


def test_key_ends_at_the_first_dot():
    assert listing.split_key("a.b/c.seg.png") == ("a.b/c", "seg.png")
