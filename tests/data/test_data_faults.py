"""Files that change or go away while a run reads them, slow reading, tars that reach outside."""

import ast
import contextlib
import io
import json
import tarfile

import corrupt_images as made
import pytest
import tiny
import torch
from PIL import Image
from test_data_loader import indices, loader, take

from cjepa_fast.data.decode_pipeline import ImagesGone
from cjepa_fast.data.sources import open_images

COUNT, SHARDS, BATCH = 45, 3, 12  # images; 15 of them a shard; 3 steps an epoch, 9 dropped


def write_shard(path, shard: int, first_seed: int = 0):
    """Pictures of one size in bytes, so that another shard fits over this one, member on member."""
    pictures = {
        f"{shard}_{k:02d}.png": made.encoded(
            made.picture(first_seed + 100 * shard + k, 24, 32), "PNG", compress_level=0
        )
        for k in range(COUNT // SHARDS)
    }
    return made.write_shard(path, pictures)


@pytest.fixture
def shards(tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    for k in range(SHARDS):
        write_shard(root / f"x-{k}.tar", k)
    return root


def overwrite(path):
    size = path.stat().st_size
    other = write_shard(path.with_name("other"), 1, first_seed=7).read_bytes()
    path.write_bytes(other)
    assert path.stat().st_size == size  # the time alone tells them apart


def replace(path):
    write_shard(path.with_name("other"), 1, first_seed=7).replace(path)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


FAULTS = {"overwritten": overwrite, "truncated": truncate, "replaced": replace}
FAULTS["deleted"] = lambda path: path.unlink()


@pytest.mark.parametrize("opened", ["opened", "unopened"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_shard_that_changes_feeds_no_wrong_image(tmp_path, shards, fault, opened, monkeypatch):
    """A shard deleted or replaced while it is open is read on as it was; else it is left out."""
    if opened == "unopened":
        monkeypatch.setattr("cjepa_fast.data.sources.OPEN_SHARDS", 0)
    images = open_images(shards, cache=tmp_path / "cache")
    options = {"micro_batch": BATCH, "seed": 11, "crop_scale": (1, 1)}
    whole = take(loader(images, BATCH, **options), 18)
    said = []
    source = loader(images, BATCH, said=said, **options)
    iterator = source.iterate(0)
    batches = [next(iterator)]
    FAULTS[fault](shards / "x-1.tar")
    batches += [next(iterator) for _ in range(17)]
    iterator.close()
    assert set(indices(whole)) == set(range(COUNT))
    holes = 0
    for got, want in zip(batches, whole, strict=True):
        same_B = got.index_B == want.index_B
        holes += int((~same_B).sum())
        assert torch.equal(got.images_BCHW[same_B], want.images_BCHW[same_B])
    harmless = opened == "opened" and fault in ("replaced", "deleted")
    assert (holes == 0) == harmless == (said == [])
    if not harmless:
        assert all("x-1.tar/" in line for line in said[:15]) and holes >= 20
        assert all(images.name(i).startswith("x-1.tar/") for i in source.skipped.reasons)
        expected = {"overwritten": "changed since", "replaced": "changed since"}
        expected |= {"truncated": "changed since", "deleted": "No such file"}
        assert expected[fault] in said[0]


def test_every_shard_that_goes_bad_is_named_however_many_images_were(tmp_path, shards):
    images = open_images(shards, cache=tmp_path / "cache")
    said = []
    source = loader(images, BATCH, micro_batch=BATCH, said=said)
    skipped = source.skipped
    for shard in ("x-0.tar", "x-1.tar"):  # 30 images: more than are named one by one
        for i in (i for i in range(COUNT) if images.name(i).startswith(shard)):
            skipped.note(i, "bad")
    skipped.note(next(i for i in range(COUNT) if images.name(i).startswith("x-2.tar")), "bad")
    assert len(said) == 22 and "without being named" in said[20] and "x-2.tar/" in said[21]


@pytest.mark.parametrize("fault", ["deleted", "truncated", "replaced", "touched"])
def test_a_file_that_changes_is_skipped_and_named(tmp_path, fault):
    root = made.good_folder(tmp_path / "set", 20)
    images = open_images(root, cache=tmp_path / "cache")
    path = root / "c0" / "0004.jpg"
    i = next(i for i in range(20) if images.name(i) == "c0/0004.jpg")
    data = path.read_bytes()
    if fault == "deleted":
        path.unlink()
    elif fault == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif fault == "replaced":
        path.write_bytes((root / "c1" / "0009.jpg").read_bytes())
    else:
        path.write_bytes(data)  # of the same length, at another time: what is in it is not known
    said = []
    assert i not in indices(take(loader(images, 4, 4, said), 5))
    assert len(said) == 1 and "bad image skipped: c0/0004.jpg" in said[0]
    assert ("No such file" if fault == "deleted" else "changed since it was indexed") in said[0]
    anew = open_images(root, cache=tmp_path / "cache")
    usable = {anew.name(i) for i in indices(take(loader(anew, 4, 4), len(anew) // 4))}
    assert ("c0/0004.jpg" in usable) == (fault in ("replaced", "touched"))


def test_a_bad_tail_does_not_stop_an_epoch_of_good_images(tmp_path):
    """One hole and, as the only image that the epoch would drop, another."""
    root = made.good_folder(tmp_path / "set", 13)
    images = open_images(root, cache=tmp_path / "cache")
    source = loader(images, 12, 12)
    order = source.order(0).tolist()
    for i in (order[3], order[12]):
        (root / images.name(i)).unlink()
    (batch,) = take(source, 1)
    got = batch.index_B.tolist()
    assert [a == b for a, b in zip(got, order, strict=False)].count(False) == 1
    assert order[3] not in got and order[12] not in got


def test_a_set_that_is_gone_is_named(tmp_path):
    root = made.good_folder(tmp_path / "set", 20)
    images = open_images(root, cache=tmp_path / "cache")
    root.rename(tmp_path / "gone")
    with pytest.raises(ImagesGone, match=rf"c\d/\d+\.jpg cannot be used.*{root}"):
        next(loader(images, 4, 4).iterate(0))


# ------------------------------------------------------------------------------- a slow disk

SLOW = """
import sys, time
from cjepa_fast import train
from cjepa_fast.runtime import distributed
from cjepa_fast.data.sources import ImageSet

read = ImageSet.read
def slow(self, i, channels):
    time.sleep(0.5)
    return read(self, i, channels)
ImageSet.read = slow
distributed.leave(train.main(sys.argv[1:]))
"""


@pytest.mark.long
@pytest.mark.slow
def test_a_slow_disk_shows_in_the_log(tmp_path):
    """Reading a step's 16 images takes 4 threads 2 s, computing it some hundredths."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    result = tiny.run(script, "--config", tiny.write_config(tmp_path, run={"epochs": 4}))
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    waits = [row["data_wait"] for row in rows]
    assert len(waits) == 8 and min(waits[-3:]) > 0.5  # what had been read ahead is used up


# ------------------------------------------------------------------------- dead telemetry

DEAD = """
def init(**options):
    raise ConnectionError("api.wandb.ai does not answer")
"""


@pytest.mark.slow
def test_dead_services_do_not_stop_a_run(tmp_path):
    """A file where TensorBoard's folder should be, and a Weights & Biases that cannot start."""
    made.write(tmp_path / "run" / "tensorboard", b"a file")
    script = tmp_path / "train.py"
    script.write_text("import sys\nfrom cjepa_fast import train\nsys.exit(train.main())\n")
    (tmp_path / "wandb.py").write_text(DEAD)  # beside the script: found before any other
    config = tiny.write_config(tmp_path, telemetry={"tensorboard": True, "wandb": "mine"})
    result = tiny.run(script, "--config", config)
    assert result.returncode == 0, result.stderr
    assert len(tiny.losses(tmp_path / "run")) == 4
    for name, why in (("TensorBoard", "tensorboard"), ("Weights & Biases", "does not answer")):
        told = [line for line in result.stdout.splitlines() if f"{name} is off" in line]
        assert len(told) == 1 and why in told[0]


# ---------------------------------------------------------------- tars that reach outside

OUTSIDE = ("../up.jpg", "a/../../up.jpg", "/tmp/absolute.jpg")


def test_members_that_leave_the_folder_and_links_are_refused_and_named(tmp_path):
    picture = made.encoded(made.picture(0))
    shard = made.write_shard(tmp_path / "x.tar", dict.fromkeys(("good.jpg", *OUTSIDE), picture))
    with tarfile.open(shard, "a") as tar:
        for name, kind in (("soft.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "/etc/passwd"
            tar.addfile(link)
    said = []
    for _ in range(2):  # the second time by the kept index
        images = open_images(shard, cache=tmp_path / "cache", log=said.append)
        assert [images.name(i) for i in range(len(images))] == ["x.tar/good.jpg"]
        reasons = dict(images.skipped)
        assert {reasons[f"x.tar/{name}"] for name in OUTSIDE} == {
            "its path leaves the shard's folder"
        }
        assert reasons["x.tar/soft.jpg"] == reasons["x.tar/hard.jpg"] == "a link, not a file"
        assert images.read(0) == picture
    assert len(said) == 12 and sum("unusable image left out" in line for line in said) == 10


def test_a_link_beside_a_file_of_its_name_takes_nothing_away(tmp_path):
    picture = made.encoded(made.picture(0))
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        member = tarfile.TarInfo("a.jpg")
        member.size = len(picture)
        tar.addfile(member, io.BytesIO(picture))
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "a.jpg"
        tar.addfile(link)
    images = open_images(tmp_path / "x.tar", cache=tmp_path / "cache")
    assert len(images) == 1 and images.skipped == [] and images.read(0) == picture


# ---------------------------------------------------------------- tars that hold more than is read


def test_a_sparse_member_is_named_and_not_read(tmp_path):
    """What lies in the tar is the member without its zeros, and a map of where they were."""
    picture = made.encoded(made.picture(0))
    holes = tarfile.TarInfo("holes.jpg")
    holes.size = len(picture)
    size = len(picture) + 10**6
    sparse_map = f"0,100,{10**6 + 100},{len(picture) - 100}"
    holes.pax_headers = {"GNU.sparse.size": str(size), "GNU.sparse.map": sparse_map}
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(holes, io.BytesIO(picture))
        good = tarfile.TarInfo("good.jpg")
        good.size = len(picture)
        tar.addfile(good, io.BytesIO(picture))
    images = open_images(tmp_path / "x.tar", cache=tmp_path / "cache")
    assert len(images) == 1 and images.read(0) == picture
    assert images.skipped == [("x.tar/holes.jpg", "stored sparse: pack again without --sparse")]


def test_of_two_members_of_one_name_the_first_is_named_and_the_last_is_used(tmp_path):
    first, last = (made.encoded(made.picture(seed)) for seed in (0, 1))
    members = [
        ("a.jpg", first),
        ("a.cls", b"1"),
        ("b.jpg", first),
        ("a.jpg", last),
        ("a.cls", b"2"),
    ]
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    images = open_images(tmp_path / "x.tar", cache=tmp_path / "cache")
    assert images.skipped == [("x.tar/a.jpg", "another member has this name")]
    assert {images.name(i): images.read(i) for i in range(2)} == {
        "x.tar/a.jpg": last,
        "x.tar/b.jpg": first,
    }
    assert images.label_N.tolist() == [2, -1] and images.found == 3
    (tmp_path / "once").mkdir()
    once = made.write_shard(tmp_path / "once" / "x.tar", dict(members))
    assert open_images(once, cache=tmp_path / "cache").fingerprint == images.fingerprint


@pytest.mark.parametrize("more", ["archive", "bytes", "zeros"])
def test_what_follows_the_end_of_a_shard_is_told(tmp_path, more):
    shards = [tmp_path / name for name in ("a.tar", "b.tar")]
    for k, shard in enumerate(shards):
        made.write_shard(shard, {f"{k}.jpg": made.encoded(made.picture(k))})
    rest = {"archive": shards[1].read_bytes(), "bytes": b"x", "zeros": bytes(2**21)}
    shards[0].write_bytes(shards[0].read_bytes() + rest[more])
    said = r"a.tar does not end where its list of members does, at byte \d+: another archive"
    with contextlib.nullcontext() if more == "zeros" else pytest.raises(ValueError, match=said):
        assert len(open_images(shards[0], cache=tmp_path / "cache")) == 1


def test_nothing_unpacks_an_archive():
    """Members are read by position; there is no path on disk that they could choose."""
    unpackers = {"extractall", "unpack_archive"}
    for path in [*(tiny.ROOT / "cjepa_fast").rglob("*.py"), *(tiny.ROOT / "bench").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            used = getattr(node, "attr", getattr(node, "id", None))
            assert used not in unpackers, path
            assert used != "extract" or "tarfile" not in path.read_text(), path


def test_an_image_of_a_refused_size_stays_unread(tmp_path):
    """Sizes are checked against the file before anything of that size is made."""
    shard = made.write_shard(tmp_path / "x.tar", {"a.jpg": made.encoded(made.picture(0))})
    data = bytearray(shard.read_bytes())
    header = tarfile.TarInfo("a.jpg")
    header.size = 2**50
    data[: tarfile.BLOCKSIZE] = header.tobuf(tarfile.GNU_FORMAT)[: tarfile.BLOCKSIZE]
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.tar is cut short"):
        open_images(shard, cache=tmp_path / "cache")
    assert Image.MAX_IMAGE_PIXELS  # and a picture's declared size by formats.MAX_PIXELS
