"""What a folder, a shard or a list holds is used, or left out by name and reason."""

import contextlib
import errno
import json
import os
import resource
import tarfile
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import corrupt_images as made
import numpy as np
import pytest
import tiny
from PIL import Image

from cjepa_fast.data import faults, formats, index, left_out, listing, lists, locations, sources
from cjepa_fast.data.decode_pipeline import ImagesGone, Skipped, read_one
from cjepa_fast.data.sets import pairs
from cjepa_fast.data.sources import Limits, open_images
from cjepa_fast.runtime import reads_in_progress


@pytest.fixture
def opened(tmp_path):
    said = []

    def open_(path, **options):
        return open_images(path, cache=tmp_path / "cache", log=said.append, **options)

    open_.said = said
    return open_


def jpeg(seed: int = 0) -> bytes:
    return made.encoded(made.picture(seed))


def names(images) -> list[str]:
    return [images.name(i) for i in range(len(images))]


def reasons(images) -> dict[str, str]:
    return {name.rpartition("/")[2]: why for name, why in images.skipped}


# --------------------------------------------------------------------------------- kinds of images

KINDS = {
    "jpg": "JPEG", "jfif": "JPEG", "jpe": "JPEG", "png": "PNG", "webp": "WEBP", "tif": "TIFF",
    "tiff": "TIFF", "bmp": "BMP", "gif": "GIF", "jp2": "JPEG2000", "ppm": "PPM", "avif": "AVIF",
}  # fmt: skip
UNREAD = {
    "a.heic": b"\0\0\0\x18ftypheic" + bytes(99), "a.jxl": b"\xff\x0a" + bytes(99),
    "a.psd": b"8BPS" + bytes(99), "a.svg": b"<svg/>", "a.dng": b"II*\0" + bytes(99),
    "a.exr": b"v/1\x01" + bytes(99), "a.ico": b"\0\0\x01\0" + bytes(99),
}  # fmt: skip


@pytest.mark.parametrize("where", ["folder", "shard"])
def test_every_kind_is_read_or_named(tmp_path, opened, where):
    pixels = made.picture(1)
    files = {f"good_{e}.{e}": made.encoded(pixels, kind) for e, kind in KINDS.items()}
    files["named.heic"] = jpeg()  # the content decides
    root = tmp_path / "set"
    root.mkdir()
    for name, data in (files | UNREAD).items() if where == "folder" else ():
        made.write(root / name, data)
    if where == "shard":
        made.write_shard(root / "x.tar", files | UNREAD)
    images = opened(root)
    assert {name.rpartition("/")[2] for name in names(images)} == set(files)
    assert reasons(images).keys() == UNREAD.keys()
    assert reasons(images)["a.heic"].startswith("HEIC, which neither")
    assert "raw file" in reasons(images)["a.dng"]
    for i, name in enumerate(names(images)):
        got = np.asarray(formats.decode_rgb(images.read(i))).astype(int)
        most = 40 if "gif" in name else 12
        assert "named" in name or np.abs(got - pixels).mean() < most, name
        assert tuple(images.sizes_N2[i]) == got.shape[:2]


def test_kinds_that_nobody_reads_do_not_make_another_set(tmp_path, opened):
    root = made.good_folder(tmp_path / "set", 3)
    before = opened(root).fingerprint
    made.write(root / "c0" / "a.heic", UNREAD["a.heic"])
    assert opened(root).fingerprint == before
    made.write(root / "c0" / "a.webp", made.encoded(made.picture(0), "WEBP"))
    assert opened(root).fingerprint != before


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["TIFF", "WEBP"])
def test_other_kinds_are_upright_too(turn, kind):
    data = made.encoded(made.picture(1, 30, 50), kind, exif=made.exif(turn))
    header = formats.inspect(lambda at, count: data[at : at + count], len(data))
    image = formats.decode_rgb(data)
    assert (header.height, header.width) == (image.height, image.width)
    assert (header.height, header.width) == ((50, 30) if turn >= 5 else (30, 50))


def segment(marker: int, body: bytes, size: int | None = None) -> bytes:
    return bytes([0xFF, marker]) + (size or len(body) + 2).to_bytes(2, "big") + body


PLAIN = jpeg(5)
APP0 = 2 + 2 + int.from_bytes(PLAIN[4:6], "big")  # where the first segment ends
DAMAGED = {
    "stuffed": PLAIN[:APP0] + bytes(7) + PLAIN[APP0:],
    "junk first": b"\r\n\0junk" + PLAIN,
    "a cut APP14": PLAIN[:APP0] + segment(0xEE, b"Adobe\0\x64") + PLAIN[APP0:],
    "a broken Photoshop block": PLAIN[:APP0]
    + segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\xff")
    + PLAIN[APP0:],
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_pillow_opens_is_used(tmp_path, opened, kind):
    made.write(tmp_path / "set" / "a.jpg", DAMAGED[kind])
    images = opened(tmp_path / "set")
    got = np.asarray(formats.decode_rgb(images.read(0))).astype(int)
    assert np.abs(got - made.picture(5)).mean() < 3 and not images.skipped


def test_a_damaged_avif_is_named_at_the_start_or_in_the_training(tmp_path, opened):
    whole = made.encoded(made.picture(1), "AVIF")
    pixels = whole.find(b"mdat") + 4
    made.write(tmp_path / "set" / "header.avif", whole.replace(b"iloc", b"ilok"))
    made.write(tmp_path / "set" / "pixels.avif", whole[:pixels] + b"\xff" * len(whole[pixels:]))
    images = opened(tmp_path / "set")
    assert "Failed to decode image" in reasons(images)["header.avif"]
    assert names(images) == ["pixels.avif"]
    assert "Failed to decode frame" in str(read_one(images, 0, 3))


@pytest.mark.parametrize("where", ["header", "pixels"])
def test_memory_that_is_short_is_no_damage(tmp_path, opened, monkeypatch, where):
    made.write(tmp_path / "set" / "a.avif", made.encoded(made.picture(1), "AVIF"))
    images = opened(tmp_path / "set")
    made.write(tmp_path / "other" / "a.avif", made.encoded(made.picture(1), "AVIF"))

    def short(*args):
        raise RuntimeError("Failed to decode image: Out of memory")

    monkeypatch.setattr(formats, "_open_other", short)
    with pytest.raises(RuntimeError, match="Out of memory"):
        images.read(0) if where == "pixels" else opened(tmp_path / "other")


def test_a_large_file_without_a_known_header_is_not_read_whole(tmp_path, opened):
    """Of a JPEG the header itself may be long: previews, profiles."""
    read, length = [], formats.MOST_UNKNOWN + (1 << 20)

    def part(at: int, count: int) -> bytes:
        read.append(count)
        return b"\x47" * min(count, 1 << 20)

    with pytest.raises(formats.Unusable, match="unsupported kind, in a file of 257 MiB"):
        formats.inspect(part, length)
    assert max(read) <= formats.HEAD_BYTES
    path = made.write(tmp_path / "set" / "video.jpg", b"\x47" * 1000)
    made.write(tmp_path / "set" / "a.jpg", jpeg())
    os.truncate(path, length)  # a hole, which takes no room
    assert "in a file of 257 MiB" in reasons(opened(tmp_path / "set"))["video.jpg"]


def test_what_no_parser_expects_is_named_too(tmp_path, opened, monkeypatch):
    root, real = made.good_folder(tmp_path / "set", 4), formats.inspect
    strange = (root / "c0" / "0000.jpg").read_bytes()

    def inspect(read, length):
        if read(0, length) == strange:
            raise AssertionError("no such marker")
        return real(read, length)

    monkeypatch.setattr(formats, "inspect", inspect)
    images = opened(root)
    assert len(images) == 3
    assert reasons(images) == {"0000.jpg": "damaged (AssertionError('no such marker'))"}


@pytest.mark.parametrize(("share", "used"), [(0.5, False), (0.97, True)])
def test_a_jpeg_that_is_cut_short_is_used_if_most_is_there(tmp_path, opened, share, used):
    pixels = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    whole = made.encoded(pixels)
    made.write(tmp_path / "set" / "cut.jpg", whole[: int(len(whole) * share)])
    made.write(tmp_path / "set" / "whole.jpg", whole)
    images = opened(tmp_path / "set")
    assert ("cut.jpg" in names(images)) == used
    if used:
        assert np.asarray(formats.decode_rgb(images.read(0))).shape == (200, 200, 3)
    else:
        assert "no end marker, 5" in reasons(images)["cut.jpg"]
    either = [names(opened(tmp_path / "set", limits=Limits(min_jpeg=m))) for m in (0.0, 1.0)]
    assert ["cut.jpg" in found for found in either] == [True, False]


def test_large_images_are_left_out_by_a_limit_with_a_name(tmp_path, opened):
    root = made.good_folder(tmp_path / "set", 3)
    made.write(root / "c0" / "large.png", made.encoded(Image.new("L", (400, 300)), "PNG"))
    assert len(opened(root)) == 4
    images = opened(root, limits=Limits(max_pixels=119_999))
    assert len(images) == 3
    said = "too large: 400 x 300 pixels, over data.max_pixels = 119999"
    assert reasons(images) == {"large.png": said}
    assert len(opened(root)) == 4  # the index remembers the size, not the verdict
    with pytest.raises(OSError, match=r"data\.max_pixels"):
        formats.decode_rgb((root / "c0" / "large.png").read_bytes(), 119_999)


def test_a_side_that_no_image_has_is_named(tmp_path, opened):
    """It would not fit in the index's 32 bits."""
    root = made.good_folder(tmp_path / "set", 2)
    made.write(root / "c0" / "wide.ppm", b"P6\n3000000000 1\n255\n" + bytes(99))
    bmp = bytearray(made.encoded(made.picture(0), "BMP"))
    bmp[21] ^= 0x80  # the highest bit of the width
    made.write(root / "c0" / "wide.bmp", bytes(bmp))
    png = made.png_with(b"tEXt", b"k\0v")
    header = (2**32 - 1).to_bytes(4, "big") + png[20:29]
    png = png[:8] + made.chunk(b"IHDR", header) + png[33:]
    made.write(root / "c0" / "wide.png", png)
    found = reasons(opened(root))
    assert found["wide.ppm"] == "declares 3000000000 x 1 pixels"
    assert found["wide.bmp"].startswith(f"declares {2**31 + 80} x 60")
    assert found["wide.png"].startswith(f"declares {2**32 - 1} x 60") and len(found) == 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_twelve_bits_in_sixteen_are_warned_of_and_can_be_told(tmp_path, opened, kind):
    levels_HW = (np.arange(64 * 64, dtype=np.uint16)).reshape(64, 64)  # 0 to 4095
    data = made.png(levels_HW)
    if kind == "TIFF":
        data = made.encoded(Image.fromarray(levels_HW), kind)
    made.write(tmp_path / "set" / f"a.{kind.lower()}", data)
    dark = opened(tmp_path / "set")
    assert "data.bit_depth" in opened.said[-1] and "up to 16 of 255" in opened.said[-1]
    assert np.asarray(formats.decode_rgb(dark.read(0))).max() == 16
    opened.said.clear()
    images = opened(tmp_path / "set", limits=Limits(bit_depth=12))
    got = np.asarray(formats.decode_rgb(images.read(0)))[..., 0].astype(float)
    assert np.abs(got - levels_HW.astype(float) * 255 / 4095).max() <= 0.51


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("kind", ["png", "little", "big", "packed"])
def test_twelve_bits_in_sixteen_of_colour_too(tmp_path, opened, kind, alpha):
    """The last ones of a channel count: a higher byte alone has 16 levels of them."""
    levels_HWC = np.stack([np.arange(64 * 64).reshape(64, 64) * k % 4096 for k in range(1, 5)], -1)
    levels_HWC = levels_HWC[..., : 4 if alpha else 3].astype(np.uint16)
    data = made.png(levels_HWC) if kind == "png" else made.tiff(levels_HWC, kind)
    made.write(tmp_path / "set" / f"a.{kind}.png", data)
    made.write(tmp_path / "set" / "b.jpg", jpeg())
    dark = opened(tmp_path / "set")
    assert "data.bit_depth" in opened.said[-1] and dark.bits_N.tolist() == [16, 8]
    assert np.asarray(formats.decode_rgb(dark.read(0))).max() in (15, 16)
    opened.said.clear()
    images = opened(tmp_path / "set", limits=Limits(bit_depth=12))
    got = np.asarray(formats.decode_rgb(images.read(0))).astype(float)
    assert np.abs(got - levels_HWC[..., :3] * (255 / 4095)).max() <= 0.51
    assert images.read(1) == dark.read(1) and not opened.said


def test_numbers_without_black_and_white_are_refused(tmp_path, opened):
    root = made.good_folder(tmp_path / "set", 1)
    for name, kind in (("a.tif", np.int32), ("b.tif", np.float32)):
        data = made.encoded(Image.fromarray(np.ones((8, 8), kind)), "TIFF")
        made.write(root / "c0" / name, data)
    found = reasons(opened(root))
    assert "32-bit numbers" in found["a.tif"]
    assert found["b.tif"] == "an array of 1 channel among pictures"


# ------------------------------------------------------------------------------------------ shards


def test_keys_with_dots(tmp_path, opened):
    files = {"scan.v1.2.jpg": jpeg(1), "scan.v1.2.cls": b"1", "two.v3.jpg": jpeg(2)}
    files |= {"two.cls": b"2", "plain.jpg": jpeg(3), "plain.cls": b"0", "._plain.jpg": b"mac"}
    images = opened(made.write_shard(tmp_path / "x.tar", files))
    found = dict(zip(names(images), images.labels.tolist(), strict=True))
    assert found == {"x.tar/scan.v1.2.jpg": 1, "x.tar/two.v3.jpg": 2, "x.tar/plain.jpg": 0}
    assert images.sidecar(names(images).index("x.tar/scan.v1.2.jpg"), "cls") == b"1"


def test_a_second_picture_of_a_sample_belongs_to_it(tmp_path, opened):
    shard = made.write_shard(tmp_path / "x.tar", {"a.jpg": jpeg(), "a.seg.png": b"a label map"})
    assert reasons(opened(shard)) == {"a.seg.png": "belongs to a.jpg"}


LABELS = {  # of three images -> (numbers, classes, names left out where labels are needed)
    "numbers": ([b"0", b"1.0", b" 2\n"], [0, 1, 2], None, {}),
    "words": ([b"dog", b"cat", b"dog"], [1, 0, 1], ["cat", "dog"], {}),
    "one odd": ([b"0", b"-1", b"1"], [0, 1], None, {"1.jpg": "its label is -1"}),
    "one half": ([b"0", b"0.5", b"1"], [0, 1], None, {"1.jpg": "its label is 0.5"}),
    "one word": ([b"0", b"cat", b"1"], [0, 1], None, {"1.jpg": "a word, others are numbers"}),
    "one number": ([b"a", b"7", b"b"], [0, 1], ["a", "b"], {"1.jpg": "a number, others are"}),
    "one long": ([b"0", b"1" * 5000, b"1"], [0, 1], None, {"1.jpg": "has 5000 letters"}),
    "one large": ([b"0", b"9" * 12, b"1"], [0, 1], None, {"1.jpg": "its label is 9999"}),
    "one missing": ([b"0", None, b"1"], [0, 1], None, {"1.jpg": "no label"}),
    "one no text": ([b"0", b"\xff\xfe", b"1"], [0, 1], None, {"1.jpg": "is no text"}),
}


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("ext", ["cls", "json"])
def test_labels_of_a_shard_are_used_where_they_are_plain(tmp_path, opened, kind, ext):
    given, numbers, classes, out = LABELS[kind]
    files = {}
    for i, label in enumerate(given):
        files[f"{i}.jpg"] = jpeg(i)
        if label is not None and ext == "json" and label.isascii():
            label = json.dumps({"label": label.decode(), "other": [1]}).encode()
        if label is not None:
            files[f"{i}.{ext}"] = label
    shard = made.write_shard(tmp_path / "x.tar", files)
    for _ in range(2):  # the second time by the kept index
        assert len(opened(shard)) == 3  # without labels all are used
        images = opened(shard, labelled=True)
        assert (images.labels.tolist(), images.classes) == (numbers, classes)
        assert reasons(images).keys() == out.keys()
        expected = "its .json is damaged" if ext == "json" and kind == "one no text" else None
        for name, why in out.items():
            assert (expected or why) in reasons(images)[name]


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"label": [1]}', b'{"label": true}', b"{"])
def test_json_of_any_depth_is_an_odd_label(tmp_path, opened, text):
    files = {"0.jpg": jpeg(), "0.json": b'{"label": 3}', "1.jpg": jpeg(1), "1.json": text}
    images = opened(made.write_shard(tmp_path / "x.tar", files), labelled=True)
    assert images.labels.tolist() == [3] and "1.jpg" in reasons(images)


def test_a_label_is_utf_8_with_or_without_a_mark(tmp_path, opened):
    files = {f"{i}.jpg": jpeg(i) for i in range(3)}
    files |= {"0.cls": b"\xef\xbb\xbf1", "1.cls": b"0", "2.cls": b"\xef\xbb\xbf2\r\n"}
    images = opened(made.write_shard(tmp_path / "x.tar", files), labelled=True)
    assert images.labels.tolist() == [1, 0, 2] and not images.skipped


def test_words_by_classes_txt(tmp_path, opened):
    files = {f"{i}.jpg": jpeg(i) for i in range(4)}
    files |= {"0.cls": b"b", "1.cls": b"0", "2.cls": b"zebra", "3.cls": b"9"}
    made.write_shard(tmp_path / "x.tar", files)
    (tmp_path / "classes.txt").write_text("a\nb\n")
    images = opened(tmp_path / "x.tar", labelled=True)
    assert images.labels.tolist() == [1, 0] and images.classes == ["a", "b"]
    assert "no name in classes.txt" in reasons(images)["2.jpg"]
    assert "not below 2 classes" in reasons(images)["3.jpg"]


def test_one_pattern_over_folders_of_other_classes_is_refused(tmp_path, opened):
    classes = {"a": "cat\ndog\n", "b": "ant\ncat\n"}
    for k, (name, text) in enumerate(classes.items()):
        (tmp_path / name).mkdir()
        made.write_shard(tmp_path / name / "x-0.tar", {"0.jpg": jpeg(k), "0.cls": b"0"})
        (tmp_path / name / "classes.txt").write_text(text)
    pattern = tmp_path / "{a,b}" / "x-0.tar"
    with pytest.raises(ValueError, match=r"/a and .*/b differ in classes.txt.* as a list"):
        opened(pattern)
    images = opened([tmp_path / "a", tmp_path / "b"])
    assert [images.classes[k] for k in images.labels] == ["cat", "ant"]
    (tmp_path / "b" / "classes.txt").unlink()
    with pytest.raises(ValueError, match="differ in classes"):
        opened(pattern)
    (tmp_path / "b" / "classes.txt").write_text(classes["a"])
    assert opened(pattern).classes == ["cat", "dog"]


def test_classes_txt_is_utf_8_with_or_without_a_mark(tmp_path, opened):
    made.write_shard(tmp_path / "x.tar", {"0.jpg": jpeg(), "0.cls": "caf\u00e9".encode()})
    listed = tmp_path / "classes.txt"
    for encoding in ("utf-8", "utf-8-sig"):
        listed.write_bytes("caf\u00e9\nbar\n".encode(encoding))
        assert opened(tmp_path / "x.tar").classes == ["caf\u00e9", "bar"]
    listed.write_bytes("caf\u00e9\nbar\n".encode("latin-1"))
    for read in (opened, lambda path: pairs.named_classes(path.parent)):
        with pytest.raises(ValueError, match=r"classes.txt is not UTF-8 .* at byte 3\): write it"):
            read(tmp_path / "x.tar")


def test_a_preview_beside_shards_takes_nothing_away(tmp_path, opened):
    root = made.good_shards(tmp_path / "set", 6)
    made.write(root / "preview.jpg", jpeg())
    assert len(opened(root)) == 6 and "preview.jpg beside them" in opened.said[-1]


def test_photographs_beside_a_small_tar_are_the_set(tmp_path, opened):
    root = tmp_path / "set"
    for i in range(20):
        made.write(root / f"{i}.jpg", made.encoded(made.picture(i, 200, 300)))
    made.write_shard(root / "x.tar", {"0.jpg": jpeg()})
    assert len(opened(root)) == 20 and "x.tar, which is not read" in opened.said[-1]


def test_shards_that_are_not_read_are_named(tmp_path, opened):
    root = made.good_shards(tmp_path / "set", 6)
    made.write(root / "y-0.tar.gz", b"\x1f\x8b")
    made.write(root / "y-1.tar.gz", b"\x1f\x8b")
    assert len(opened(root)) == 6
    said = [line for line in opened.said if line.startswith("WARNING")]
    assert len(said) == 1 and "y-0.tar.gz and 1 more such, which is not read" in said[0]
    (root / "gone.tar").symlink_to(tmp_path / "nowhere")
    (root / "more").mkdir()
    made.write_shard(root / "more" / "z.tar", {"0.jpg": jpeg()})
    opened.said.clear()
    assert len(opened(root)) == 6
    assert "gone.tar and 3 more such, which is not read" in opened.said[-1]
    made.write(root / "preview.jpg", jpeg())  # still the shards
    assert len(opened(root)) == 6 and "gone.tar and 3 more such" in opened.said[-1]


def test_shards_in_sub_folders_alone_are_named_in_the_error(tmp_path, opened):
    for k, folder in enumerate("ab"):
        (tmp_path / "set" / folder).mkdir(parents=True)
        made.write_shard(tmp_path / "set" / folder / f"x-{k}.tar", {"0.jpg": jpeg()})
    with pytest.raises(ValueError, match=r"no usable image in .* It holds a/x-0.tar and 1 more"):
        opened(tmp_path / "set")
    made.write(tmp_path / "set" / "c" / "0.jpg", jpeg())
    assert len(opened(tmp_path / "set")) == 1
    assert any("a/x-0.tar and 1 more such, which is not read" in line for line in opened.said)


@pytest.mark.parametrize("write", [made.good_folder, made.good_shards])
def test_a_file_that_goes_bad_at_its_size_makes_other_usable_images(tmp_path, opened, write):
    here, there = (opened(write(tmp_path / name, 9)) for name in ("here", "there"))
    assert (here.fingerprint, here.usable_fingerprint) == (
        there.fingerprint,
        there.usable_fingerprint,
    )
    file = there.shard(4) or there.root / there.name(4)
    good = there.read_original(4)
    file.write_bytes(file.read_bytes().replace(good, bytes(len(good))))
    there = opened(tmp_path / "there")
    assert len(there) == 8 and here.fingerprint == there.fingerprint
    assert here.usable_fingerprint != there.usable_fingerprint


# ----------------------------------------------------------------------------------------- folders


def test_a_cover_beside_class_folders_has_no_label_and_takes_none(tmp_path, opened):
    root = made.good_folder(tmp_path / "set", 4)
    made.write(root / "cover.jpg", jpeg())
    assert len(opened(root)) == 5
    images = opened(root, labelled=True)
    assert len(images) == 4 and images.classes == ["c0", "c1"] and images.unlabelled == 1
    made.write(root / "empty.jpg", b"")
    assert opened(root, labelled=True).unlabelled == opened(root).unlabelled == 1
    (root / "empty.jpg").unlink()
    assert reasons(images) == {"cover.jpg": "no label: it lies beside the class folders"}
    assert images.fingerprint != opened(root).fingerprint  # the positions are others


def test_a_class_folder_that_is_a_broken_link_is_named_and_warned_of(tmp_path, opened):
    root = made.good_folder(tmp_path / "set", 6, classes=3)
    (root / "empty").mkdir()
    whole = opened(root)
    (root / "c1").rename(tmp_path / "c1")
    gone = opened(root)
    assert not opened.said and gone.classes == ["c0", "c2"]
    (root / "c1").symlink_to(tmp_path / "elsewhere")
    (root / "c9").symlink_to(root / "c9")
    (root / "empty" / "notes").symlink_to(tmp_path / "elsewhere")
    images = opened(root, labelled=True)
    assert images.classes == ["c0", "c2"] and len(images) == 4  # and no class "empty"
    assert images.fingerprint == gone.fingerprint != whole.fingerprint
    why = "a link or a folder that cannot be followed"
    assert reasons(images).keys() == {"c1", "c9", "notes"}
    assert reasons(images)["c1"] == f"{why} (No such file or directory)"
    said = [line for line in opened.said if line.startswith("WARNING")]
    assert len(said) == 1 and f"c1 in {root} cannot be looked at ({why}" in said[0]
    assert "nor can 1 more" in said[0] and "lower by one" in said[0]
    (root / "c1").unlink()
    (root / "c1").symlink_to(tmp_path / "c1")
    assert opened(root).fingerprint == whole.fingerprint


def test_a_broken_link_takes_no_shard_away(tmp_path, opened):
    root = made.good_shards(tmp_path / "set", 6)
    (root / "more").mkdir()
    (root / "more" / "notes").symlink_to(tmp_path / "elsewhere")
    assert len(opened(root)) == 6


def test_a_broken_link_takes_no_array_away(tmp_path, opened):
    for k in range(4):
        folder = tmp_path / "set" / f"c{k % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{k}.npy", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "set" / "latest").symlink_to(tmp_path / "elsewhere")
    images = opened(tmp_path / "set")
    assert len(images) == 4 and reasons(images).keys() == {"latest"}


@pytest.mark.parametrize("stays", [False, True])
def test_an_error_of_the_machine_takes_no_folder_away(monkeypatch, stays):
    class Entry:
        name, path, tries = b"c1", b"set/c1", 0

        def is_dir(self):
            self.tries += 1
            if stays or self.tries < 3:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return True

        is_symlink = is_dir

    monkeypatch.setattr(faults, "PAUSES_S", (0.0, 0.0))
    if not stays:
        assert listing.is_folder(Entry())
    for look in (listing.is_folder, listing._lost) if stays else ():
        with pytest.raises(faults.MachineFailed, match=r"set/c1 cannot be read \(Input/output"):
            look(Entry())


def test_a_folder_of_splits_trains_on_train(tmp_path, opened):
    root = tmp_path / "set"
    made.good_folder(root / "train", 9, classes=3)
    made.good_folder(root / "val", 4, classes=2)
    images = opened(root)
    assert len(images) == 9 and images.classes == ["c0", "c1", "c2"]
    assert opened.said == [f"{root} holds splits: train/ is taken, val/ is left for evaluation"]
    assert images.fingerprint == opened(root / "train").fingerprint
    assert locations.split_beside(root / "train") is None


UNMATCHED = {
    "val/ has extra/, and train/ has not": ["train/a", "train/b", "val/a", "val/extra"],
    "test/ has no folders of classes, nor shards": ["train/a", "test"],
    "names are not in lower case": ["Train/a", "Val/a"],
}


@pytest.mark.parametrize("why", UNMATCHED)
def test_splits_that_do_not_match_are_trained_on_and_warned_of(tmp_path, opened, why):
    root = tmp_path / "set"
    for i, folder in enumerate(UNMATCHED[why]):
        made.write(root / folder / "0.jpg", jpeg(i))
    assert len(opened(root)) == len(UNMATCHED[why])
    (said,) = opened.said
    train = UNMATCHED[why][0].partition("/")[0]
    assert said.startswith(f"WARNING: {root} holds {train}/ and ") and why in said
    assert said.endswith(f"to train on {train}/ alone, name it: data.path = {root / train}")
    opened.said.clear()
    opened(root / train)
    assert opened.said == []


def test_an_empty_folder_beside_train_is_not_warned_of(tmp_path, opened):
    made.good_folder(tmp_path / "set" / "train", 4)
    (tmp_path / "set" / "val").mkdir()
    assert len(opened(tmp_path / "set")) == 4 and opened.said == []


def test_only_regular_files_are_opened(tmp_path, opened):
    """A pipe named as an image would never answer."""
    root = made.good_folder(tmp_path / "set", 3)
    os.mkfifo(root / "c0" / "x.jpg")
    done = threading.Thread(target=lambda: opened(root), daemon=True)
    done.start()
    done.join(60)
    assert not done.is_alive()
    assert reasons(opened(root)) == {"x.jpg": "a pipe or a device, not a file"}
    with pytest.raises(OSError, match="a pipe or a device"):
        index.open_regular(root / "c0" / "x.jpg")
    images = opened(root)
    (root / images.name(0)).unlink()
    os.mkfifo(root / images.name(0))
    with pytest.raises(OSError, match="a pipe or a device"):
        images.read(0)


@pytest.mark.parametrize("path", ["", "  "])
def test_an_empty_path_is_refused(opened, path):
    with pytest.raises(ValueError, match="is empty"):
        opened(path)


# ------------------------------------------------------------------------------- lists, many paths


def test_a_list_names_files_and_labels(tmp_path, opened):
    root = made.good_folder(tmp_path / "set", 4)
    made.write(root / "a b 1.jpg", jpeg())
    other = made.write(tmp_path / "elsewhere.jpg", jpeg(9))
    path = made.write(
        root / "list.csv",
        f'path,label\nc1/0001.jpg,dog\n"a b 1.jpg",cat\n{other},dog\nnone.jpg,cat\n'.encode(),
    )
    images = opened(path)
    assert names(images) == ["c1/0001.jpg", "a b 1.jpg", str(other)]  # in its order
    assert images.classes == ["cat", "dog"] and images.labels.tolist() == [1, 0, 1]
    assert "No such file" in reasons(images)["none.jpg"]
    assert images.read(2) == other.read_bytes() and len(opened(path)) == 3
    path = made.write(root / "list.txt", b"# mine\nc0/0000.jpg 7\na b 1.jpg\n\nc1/0001.jpg 3\r\n")
    images = opened(path, labelled=True)
    assert names(images) == ["c0/0000.jpg", "c1/0001.jpg"] and images.labels.tolist() == [7, 3]
    assert reasons(images) == {"a b 1.jpg": "no label"}


def test_a_line_that_ends_as_an_image_has_no_label(tmp_path):
    """Also where no file of that name is there."""
    text = b"my pic 1.jpg\nmy pic 2.jpg\nmy pic 3.jpg cat\na.jpg dog\n"
    listed = [b"my pic 1.jpg", b"my pic 2.jpg", b"my pic 3.jpg", b"a.jpg"]
    path = made.write(tmp_path / "list.txt", text)
    assert lists.read(path) == (listed, ["", "", "cat", "dog"])


@pytest.mark.parametrize(
    "rows",
    [
        "path,label\na.jpg,dog\nb.jpg,cat",
        "image,width,label\na.jpg,640,dog\nb.jpg,512,cat",
        "image_id,label\na.jpg,dog\nb.jpg,cat",
        "Class,Number,Filename\ndog,1,a.jpg\ncat,2,b.jpg",
        "id,target\na.jpg,dog\nb.jpg,cat",
        ",image,label\n0,a.jpg,dog\n1,b.jpg,cat",  # as pandas writes its index
        "\na.jpg,dog,\nb.jpg,cat,",
        "path,kind\na.jpg,dog\nb.jpg,cat",
    ],
)
def test_a_heading_of_a_csv_names_its_columns(tmp_path, rows):
    listed = lists.read(made.write(tmp_path / "list.csv", rows.encode()))
    assert listed == ([b"a.jpg", b"b.jpg"], ["dog", "cat"])


def test_a_first_row_that_is_an_image_is_no_heading(tmp_path):
    made.write(tmp_path / "a", jpeg())
    for first in ("a", "none.jpg"):
        path = made.write(tmp_path / "list.csv", f"{first},target\nb.jpg,cat".encode())
        assert lists.read(path) == ([first.encode(), b"b.jpg"], ["target", "cat"])


@pytest.mark.parametrize(
    "rows", ["a.jpg,640,dog", "path,width,height\na.jpg,640,480", "a.jpg,1\nb.jpg,,cat"]
)
def test_a_csv_of_columns_that_nothing_names_is_refused(tmp_path, rows):
    line = len(rows.split("\n"))
    with pytest.raises(ValueError, match=f"line {line}: more than two .* such as path,width,label"):
        lists.read(made.write(tmp_path / "list.csv", rows.encode()))


def test_a_file_whose_name_begins_as_a_comment_is_named(tmp_path, opened):
    for name in ("#7.jpg", "# 8.jpg", "a.jpg"):
        made.write(tmp_path / "set" / name, jpeg())
    text = b"# a comment\n#7.jpg cat\n# 8.jpg\n#gone.jpg\n#\na.jpg dog\n"
    images = opened(made.write(tmp_path / "set" / "list.txt", text))
    assert names(images) == ["#7.jpg", "# 8.jpg", "a.jpg"] and not images.skipped
    assert images.label_N.tolist() == [0, -1, 1]


@pytest.mark.parametrize(
    ("text", "says"),
    [(b"", "names no image"), (b"a.jpg\na.jpg\n", "lines 1 and 2"), (b"a\0.jpg", "is no path")],
)
def test_what_is_no_list_is_refused(tmp_path, text, says):
    with pytest.raises(ValueError, match=says):
        lists.read(made.write(tmp_path / "list.txt", text))


def test_several_paths_are_one_set(tmp_path, opened):
    one = made.good_folder(tmp_path / "one", 4)
    two = made.good_folder(tmp_path / "two", 6, classes=3)
    images = opened([one, two])
    assert len(images) == 10 and images.classes == ["c0", "c1", "c2"]
    where = [name.split("/")[:2] for name in names(images)]
    assert [images.classes[k] for k in images.labels.tolist()] == [top for _, top in where]
    assert [source for source, _ in where] == ["one"] * 4 + ["two"] * 6
    assert images.read(4) == opened(two).read(0)
    with pytest.raises(ValueError, match="named twice"):
        opened([one, one])


def test_names_and_numbers_are_not_mixed(tmp_path, opened):
    one = made.good_folder(tmp_path / "one", 4)
    two = made.good_shards(tmp_path / "two", 6)
    assert opened([one, two]).labels is None and len(opened([one, two])) == 10
    assert len(opened([one, two], labelled=True)) == 4


# --------------------------------------------------------------------------- errors of the machine


def failing(
    monkeypatch, code: int, times: float = float("inf"), name: bytes = b"0000.jpg", of=(os, "open")
):
    """os.open, or another function of a path, fails for that name, so many times."""
    real, left = getattr(*of), [times]

    def open_(path, *args, **options):
        if os.fsencode(path).endswith(name) and left[0] > 0:
            left[0] -= 1
            raise OSError(code, os.strerror(code))
        return real(path, *args, **options)

    monkeypatch.setattr(*of, open_)
    monkeypatch.setattr(faults, "PAUSES_S", (0.0, 0.0))


@pytest.mark.parametrize("code", ["EMFILE", "ENFILE", "ENOMEM", "EIO", "ESTALE"])
def test_an_error_of_the_machine_is_no_bad_image(tmp_path, opened, monkeypatch, code):
    root = made.good_folder(tmp_path / "set", 4)
    failing(monkeypatch, getattr(errno, code), times=2)
    images = opened(root)  # the third try is good
    assert len(images) == 4
    monkeypatch.undo()
    failing(monkeypatch, getattr(errno, code))
    for fails in (lambda: images.read(0), lambda: opened(root, workers=1)):
        with pytest.raises(faults.MachineFailed, match=r"c0/0000.jpg cannot be read"):
            fails()
        made.write(root / "c0" / "0000.jpg", jpeg(3))  # so that it is opened anew
    with pytest.raises(ImagesGone, match=r"c0/0000\.jpg cannot be read"):
        read_one(images, 0, 3)
    monkeypatch.undo()
    assert len(opened(root)) == 4


LISTING = [(Path, "stat"), (tarfile, "open"), (os, "open")]


@pytest.mark.parametrize("of", LISTING, ids=["stat", "tarfile", "open"])
def test_an_error_of_the_machine_while_a_shard_is_listed_is_waited_for(tmp_path, monkeypatch, of):
    shard = made.write_shard(tmp_path / "x.tar", {"0.jpg": jpeg(), "0.cls": b"3"})

    def listed():
        with ThreadPoolExecutor(1) as pool:
            return listing.index_shards([shard], tmp_path / "cache", pool, print)

    failing(monkeypatch, errno.EIO, name=b"x.tar", of=of)
    with pytest.raises(faults.MachineFailed, match=r"x\.tar cannot be read \(Input/output"):
        listed()
    monkeypatch.undo()
    failing(monkeypatch, errno.EIO, times=2, name=b"x.tar", of=of)
    ((table,), _) = listed()
    assert table.names() == [b"0.jpg"] and table.entries_N["label"].tolist() == [3]


def test_a_file_that_was_out_of_rights_is_looked_at_again(tmp_path, opened, monkeypatch):
    root = made.good_folder(tmp_path / "set", 40)
    failing(monkeypatch, errno.EACCES)
    assert reasons(opened(root)) == {"0000.jpg": "cannot be read (Permission denied)"}
    before = opened(root).fingerprint
    monkeypatch.undo()
    assert len(opened(root)) == 40 and opened(root).fingerprint != before


def test_a_mount_without_rights_ends_the_start(tmp_path, opened, monkeypatch):
    root = made.good_folder(tmp_path / "set", 20)
    failing(monkeypatch, errno.EACCES, name=b".jpg")
    with pytest.raises((OSError, ValueError), match=r"Permission denied|cannot be read"):
        opened(root)
    monkeypatch.undo()
    failing(monkeypatch, errno.EACCES, name=b"7.jpg")
    root = made.good_folder(tmp_path / "other", 20)
    with pytest.raises(OSError, match=r"2 of 20 files cannot be read, more than data.max_skipped"):
        opened(root)


def test_more_shards_than_handles(tmp_path, opened):
    (tmp_path / "set").mkdir()
    for i in range(150):
        made.write_shard(tmp_path / "set" / f"x-{i:03d}.tar", {"a.jpg": jpeg()})
    images = opened(tmp_path / "set")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (held + 60, hard))
    try:
        assert len({images.read(i) for i in range(150)}) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def three_shards(tmp_path, opened):
    (tmp_path / "set").mkdir()
    for k in range(3):
        made.write_shard(tmp_path / "set" / f"x-{k}.tar", {"a.jpg": jpeg(k)})
    return opened(tmp_path / "set")


def test_the_shard_unused_for_longest_is_closed(three_shards, monkeypatch):
    monkeypatch.setattr(sources, "OPEN_SHARDS", 2)
    for number, kept in ((0, [0]), (1, [0, 1]), (0, [1, 0]), (2, [0, 2]), (1, [2, 1])):
        assert three_shards.read(number) == jpeg(number)
        assert list(three_shards._open) == kept
    handles = [weakref.ref(handle) for handle in three_shards._open.values()]
    three_shards.__dict__.clear()
    assert [handle() for handle in handles] == [None, None]


def test_a_slow_shard_holds_up_no_other(three_shards, monkeypatch):
    real, opening, go_on = index.open_regular, threading.Event(), threading.Event()

    def slowly(path):
        if path.name == "x-0.tar":
            opening.set()
            assert go_on.wait(60)
        return real(path)

    monkeypatch.setattr(index, "open_regular", slowly)
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(three_shards.read, 0)
        assert opening.wait(60)
        try:
            assert pool.submit(three_shards.read, 1).result(timeout=20) == jpeg(1)
        finally:
            go_on.set()
        assert slow.result(timeout=60) == jpeg(0)


@pytest.mark.parametrize("code", ["ESTALE", "ESHUTDOWN", "ECONNABORTED", "ECONNREFUSED"])
def test_a_shard_whose_handle_went_stale_is_opened_anew(three_shards, monkeypatch, code):
    assert three_shards.read(0) == jpeg(0)
    opened_anew, real = [], os.pread

    def pread(fd, *args):
        if not opened_anew:
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
        return real(fd, *args)

    monkeypatch.setattr(faults, "PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(os, "pread", pread)
    monkeypatch.setattr(os, "open", lambda *a, real=os.open: (real(*a), opened_anew.append(1))[0])
    assert three_shards.read(0) == jpeg(0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, faults.MachineFailed])
def test_an_error_ends_the_indexing_at_once(tmp_path, opened, monkeypatch, error):
    """Of 12 tasks on one thread the first fails; the second may have begun, and no other does."""
    begun, ending = [], threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            ending.set()
            super().shutdown(wait=wait)

    def check(*_):
        begun.append(1)
        if len(begun) == 1:
            raise error
        assert ending.wait(60)
        return {}

    monkeypatch.setattr(sources, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(index, "CHUNK", 1)
    monkeypatch.setattr(index, "check", check)
    with pytest.raises(error):
        opened(made.good_folder(tmp_path / "set", 12), workers=1)
    assert len(begun) <= 2


@pytest.mark.parametrize("write", [made.good_folder, made.good_shards])
def test_what_is_known_is_read_though_another_process_indexes(tmp_path, opened, write):
    """Else the ranks of a node wait for each other, however fresh the index is."""
    path, cache = write(tmp_path / "set", 6), tmp_path / "cache"
    for file in filter(os.path.isfile, path.rglob("*")):
        os.utime(file, (1e9, 1e9))  # a change in this very moment would not be told
    first = opened(path)
    with contextlib.ExitStack() as held, ThreadPoolExecutor(1) as pool:
        for file in {index.cache_file(path, cache), *cache.rglob("*.npz")}:
            held.enter_context(index.lock(file))
        again = pool.submit(opened, path)
        try:
            assert names(again.result(timeout=20)) == names(first)
        finally:
            held.close()


@pytest.mark.parametrize("write", [made.good_folder, made.good_shards])
def test_of_two_that_find_no_index_one_checks_and_the_other_reads_its(
    tmp_path, opened, monkeypatch, write
):
    path, loaded, checked = write(tmp_path / "set", 6), threading.Barrier(2, timeout=60), []
    real_load, real_check = index.load, index.check

    def load(file):
        if threading.current_thread().name not in seen:
            seen.add(threading.current_thread().name)
            loaded.wait()  # neither finds what the other has made
        return real_load(file)

    def check(open_fd, entries_N, chunk, name):
        checked.extend(name(i) for i in chunk)
        return real_check(open_fd, entries_N, chunk, name)

    seen: set[str] = set()
    monkeypatch.setattr(index, "load", load)
    monkeypatch.setattr(index, "check", check)
    with ThreadPoolExecutor(2) as pool:
        one, other = (pool.submit(opened, path, workers=1) for _ in range(2))
        assert names(one.result(timeout=60)) == names(other.result(timeout=60))
    assert len(checked) == len(set(checked)) == 6


def test_who_waits_for_another_process_to_index_is_not_stuck(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "LOCK_S", 0.01)
    file = tmp_path / "cache" / "set.npz"

    def wait() -> str:
        with index.lock(file):
            return "held"

    with ThreadPoolExecutor(1) as pool:
        with index.lock(file):
            waiting, before = pool.submit(wait), reads_in_progress.reads()
            tiny.wait_for(lambda: reads_in_progress.reads() > before + 5, "signs of progress")
            assert not waiting.done()
        assert waiting.result(timeout=60) == "held"


@pytest.mark.parametrize("kind", ["folder", "splits", "shards", "list"])
def test_each_entry_of_a_folder_and_each_line_of_a_list_is_a_sign_of_progress(tmp_path, kind):
    root, count = tmp_path / "set", 50
    for split in ("train", "val") if kind == "splits" else (".",):
        for i in range(count):
            (root / split / f"{i}").mkdir(parents=True)
    if kind == "shards":
        made.good_shards(root, count, shards=count)
    (root / "list.txt").write_text("".join(f"{i}\n" for i in range(count)))
    before = reads_in_progress.reads()
    if kind == "list":
        lists.read(root / "list.txt")
    else:
        locations.find(str(root))
    assert reads_in_progress.reads() - before >= count * (1 if kind in ("folder", "list") else 2)


def test_an_indexing_that_was_stopped_goes_on_where_it_was(tmp_path, opened, monkeypatch):
    """Of 12 images the eighth is the first that is not looked at; what was kept on the way, as for
    a kill, grows image by image."""
    root = made.good_folder(tmp_path / "set", 12)
    made.write(root / "c0" / "0000.jpg", b"")
    looked, kept, real = [], [], (formats.inspect, index.save)

    def inspect(*args):
        if len(looked) == 7:
            raise KeyboardInterrupt
        looked.append(1)
        return real[0](*args)

    def save(file, table):
        kept.append(int((table.entries_N["mtime_ns"] != index.NEVER_NS).sum()))
        return real[1](file, table)

    monkeypatch.setattr(index, "CHUNK", 1)
    monkeypatch.setattr(index, "KEEP_S", 0.0)
    monkeypatch.setattr(index, "KEEP_SHARE", 0)
    monkeypatch.setattr(formats, "inspect", inspect)
    monkeypatch.setattr(index, "save", save)
    with pytest.raises(KeyboardInterrupt):
        opened(root, workers=1)
    assert kept == [1, 2, 3, 4, 5, 6, 7, 7]
    looked[:] = [0] * 8
    images = opened(root, workers=1)
    assert len(looked) == 8 + 12 - 7 and len(images) == 11
    assert reasons(images) == {"0000.jpg": "empty file"}


def test_past_its_limit_what_is_skipped_ends_the_run(tmp_path, opened):
    images = opened(made.good_folder(tmp_path / "set", 40))
    said, rows = [], []
    skipped = Skipped(images, print, most=0.05 * 40)
    skipped.attach(said.append, record=rows.append, note=print)
    for i in (0, 1, 1):
        skipped.note(i, "bad")
    with pytest.raises(ImagesGone, match=rf"c0/0004.jpg cannot be used.*{images.root}: more than"):
        skipped.note(2, "bad")
    assert [row["name"] for row in rows] == names(images)[:3] and len(said) == 3


def test_a_file_that_never_comes_is_named(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(reads_in_progress.time, "monotonic", lambda: now[0])
    with reads_in_progress.watched("a\nb.jpg"):
        assert reads_in_progress.longest() == ""
        now[0] += 60
        assert reads_in_progress.longest() == "a\\nb.jpg has been read for 60 s"
    assert reads_in_progress.longest() == ""


# ------------------------------------------------------------------------------------- the report


def test_a_report_keeps_what_failed_while_training(tmp_path):
    report = tmp_path / "unusable.jsonl"
    late = {"name": "late.jpg", "why": "cannot be decoded"} | left_out.WHILE_TRAINING
    assert left_out.write([("a.jpg", "empty file")], report) == ""
    torn = "\n".join([json.dumps(late), json.dumps(late), '{"name": "to'])
    report.write_text(report.read_text() + torn)

    def after(*now):
        assert left_out.write(list(now), report) == ""
        return [json.loads(line) for line in report.read_text().splitlines()]

    b = {"name": "b.jpg", "why": "zeros"}
    assert after() == [late]  # a.jpg is whole by now
    others = [left_out.of_rank(report, rank) for rank in (1, 2)]
    for other in others:  # what each of the other ranks has met
        other.write_text(json.dumps(late) + "\n" + json.dumps(late | {"name": other.name}) + "\n")
    assert [row["name"] for row in after()] == [late["name"], *(other.name for other in others)]
    assert not any(other.exists() for other in others) and left_out.of_rank(report, 0) == report
    report.write_text(json.dumps(late) + "\n")
    assert after(("b.jpg", "zeros")) == [b, late]
    assert after(("late.jpg", "truncated")) == [{"name": "late.jpg", "why": "truncated"}]
    assert left_out.write([], report) == "" and not report.exists()
    made.write(report, b"a file")
    assert "could not be written down" in left_out.write([("a.jpg", "zeros")], report / "below")
