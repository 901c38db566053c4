"""Parquet files with images, as Hugging Face's datasets are: packed whole, or refused by name."""

import errno
import json
import os
import sys

import corrupt_images as made
import pytest

from cjepa_fast.data import faults, pack, parquet
from cjepa_fast.data.sources import open_images
from cjepa_fast.eval.splits import labelled_splits

TRAIN = "data/train-{:05d}-of-{:05d}.parquet"


def image(seed, path="x.jpg"):
    return {"bytes": made.encoded(made.picture(seed)), "path": path}


def write(file, rows, classes=("cat", "dog", "a bird"), group=4, **columns):
    """A file of (image, label) rows. classes: None leaves Hugging Face's metadata out."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    labels = [label for _, label in rows]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = {"image": pa.array([image for image, _ in rows], struct), "label": pa.array(labels)}
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": classes}}
    table |= {name: pa.array(values) for name, values in columns.items()}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if classes else None
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table(table).replace_schema_metadata(metadata), file,
        row_group_size=group, write_page_checksum=True, use_dictionary=False, compression="none",
    )  # fmt: skip
    return file


def packed(tmp_path, *more):
    return pack.main([str(tmp_path / "hf"), str(tmp_path / "out"), *more])


def opened(tmp_path, name="out"):
    images = open_images(tmp_path / name, cache=tmp_path / "cache", log=lambda line: None)
    return images, [images.read_original(i) for i in range(len(images))]


def test_rows_labels_classes_and_splits_survive(tmp_path, capsys):
    root = tmp_path / "hf"
    rows = [(image(k), k % 3) for k in range(23)]
    write(root / TRAIN.format(0, 2), rows[:10])
    write(root / TRAIN.format(1, 2), rows[10:])
    test = write(root / "data" / "test-00000-of-00001.parquet", [(image(k), 2) for k in (40, 41)])
    write(root / ".cache" / "x.parquet", rows)  # is not looked at
    assert packed(tmp_path, "--shard-size", "7") == 0
    images, data = opened(tmp_path, "out/train")
    assert data == [row["bytes"] for row, _ in rows]
    assert images.labels.tolist() == [k % 3 for k in range(23)]
    assert images.classes == ["cat", "dog", "a bird"]
    record = json.loads((tmp_path / "out" / "train" / "shard-000001.json").read_text())
    assert record["names"]["000000010.jpg"] == "train-00001-of-00002.parquet/0: x.jpg"
    train, held_out = labelled_splits(str(tmp_path / "out"), None)  # as cjepa-eval --data out
    assert (len(train[1]), len(held_out[1])) == (23, 2)
    assert held_out[0].labels.tolist() == [2, 2]
    assert "23 rows of 2 files, labels of 3 classes with names" in capsys.readouterr().out
    assert pack.main([str(test), str(tmp_path / "one")]) == 0
    assert len(opened(tmp_path, "one")[1]) == 2
    assert pack.main([str(root), str(tmp_path / "chosen"), "--split", "test"]) == 0
    assert len(opened(tmp_path, "chosen")[1]) == 2


def test_rows_that_cannot_be_used_are_named(tmp_path, capsys):
    rows = [(image(k), 0) for k in range(20)]
    rows[3], rows[5] = ({"bytes": None, "path": "far/away.jpg"}, 0), (None, 1)
    rows[6] = ({"bytes": b"no image at all", "path": None}, 1)
    file = write(tmp_path / "hf" / "train.parquet", rows)
    whole = file.read_bytes()
    at = whole.index(rows[9][0]["bytes"]) + 200
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
    left_out = pack.pack_parquet(tmp_path / "hf", tmp_path / "out", log=print)
    why = {int(name.split("/")[1].split(":")[0]): why for name, why in left_out}
    assert sorted(why) == [3, 5, 6, 8, 9, 10, 11]  # a damaged row group, and none after it
    assert why[3] == "the row has no bytes, only a path: far/away.jpg"
    assert why[5] == "the row has no bytes" and "cannot be decoded" in why[6]
    assert all("damaged there" in why[i] for i in (8, 9, 10, 11))
    assert capsys.readouterr().out.count("left out: train.parquet/") == 7
    assert len(opened(tmp_path)[1]) == 13


def test_labels_without_names_as_words_and_missing(tmp_path):
    """-1 and null are no label, as in a test split."""
    cases = {
        "numbers": ([4, -1, None, 0], None, [4, -1, -1, 0], None),
        "words": (["dog", None, "cat", "dog"], None, [1, -1, 0, 1], ["cat", "dog"]),
        "named": ([0, 2, -1, 1], ("a", "b", "c"), [0, 2, -1, 1], ["a", "b", "c"]),
    }
    for name, (given, classes, label_N, names) in cases.items():
        file = write(
            tmp_path / name / "x.parquet", [(image(k), given[k]) for k in range(4)], classes
        )
        assert pack.main([str(file), str(tmp_path / f"{name}-out")]) == 0
        images, _ = opened(tmp_path, f"{name}-out")
        assert images.label_N.tolist() == label_N and images.class_names == names


def test_classes_that_a_list_cannot_hold_stay_numbers(tmp_path, capsys):
    write(tmp_path / "hf" / "x.parquet", [(image(0), 1)], ("good", "two\nlines"))
    assert packed(tmp_path) == 0
    assert "cannot hold the class 'two\\nlines'" in capsys.readouterr().out
    images, _ = opened(tmp_path)
    assert images.labels.tolist() == [1] and images.classes is None


@pytest.mark.parametrize(("case", "said"), [
    ("damaged", "is no Parquet file, or a damaged one"),
    ("no images", "has no column of images (its columns: label)"),
    ("two columns", "choose one by --image-column: left, right"),
    ("two labels", "choose one by --label-column: fine, coarse"),
    ("no such column", "no column 'photo' for --image-column: image"),
    ("odd labels", "holds 0.5, which is no class"),
    ("too large", "a label is 7, of 3 classes"),
    ("other classes", "differ in their columns or classes"),
    ("no such split", "has no split 'val': it has 'train'"),
    ("metadata", "metadata 'huggingface' is damaged"),
])  # fmt: skip
def test_what_is_not_plain_is_refused(tmp_path, capsys, case, said):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    root, rows, more = tmp_path / "hf", [(image(k), k) for k in range(3)], []
    file = root / "train.parquet"
    write(file, rows)
    if case == "damaged":
        file.write_bytes(file.read_bytes()[:-20])
    elif case == "no images":
        pq.write_table(pa.table({"label": [1]}), file)
    elif case == "two columns":
        pq.write_table(pa.table({"left": [b"x"], "right": [b"y"]}), file)
    elif case == "two labels":
        names = {n: {"_type": "ClassLabel", "names": ["a"]} for n in ("fine", "coarse")}
        metadata = {"huggingface": json.dumps({"info": {"features": names}})}
        table = pa.table({"img": [b"x"], "fine": [0], "coarse": [0]})
        pq.write_table(table.replace_schema_metadata(metadata), file)
    elif case == "no such column":
        more = ["--image-column", "photo"]
    elif case == "odd labels":
        write(file, [(image(0), 0.5)], None)
    elif case == "too large":
        write(file, [(image(0), 7)])
    elif case == "other classes":
        write(root / "z.parquet", rows, ("dog", "cat", "a bird"))
        (root / "z.parquet").rename(root / "train-00001-of-00002.parquet")
        file.rename(root / "train-00000-of-00002.parquet")
    elif case == "no such split":
        more = ["--split", "val"]
    else:
        table = pq.read_table(file).replace_schema_metadata({"huggingface": "[" * 10_000})
        pq.write_table(table, file)
    assert packed(tmp_path, *more) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and said in err and err.count("\n") == 1
    assert not list((tmp_path / "out").rglob("*.tar"))


def test_columns_are_chosen(tmp_path):
    rows = [(image(k), k) for k in range(3)]
    write(tmp_path / "hf" / "x.parquet", rows, None, depth=[b"a", b"b", b"c"], target=[2, 1, 0])
    assert packed(tmp_path, "--label-column", "target") == 0
    assert opened(tmp_path)[0].labels.tolist() == [2, 1, 0]
    assert pack.main([str(tmp_path / "hf"), str(tmp_path / "none"), "--label-column", ""]) == 0
    assert opened(tmp_path, "none")[0].labels is None


def test_a_part_that_is_missing_is_said(tmp_path, capsys):
    write(tmp_path / "hf" / TRAIN.format(1, 3), [(image(0), 0)])
    assert packed(tmp_path) == 0
    assert "2 of 3 parts of train are missing, the first is number 0" in capsys.readouterr().out


def test_a_packing_goes_on_where_it_stopped(tmp_path):
    rows = [(image(k), 0) for k in range(150)]
    write(tmp_path / "hf" / "x.parquet", rows, group=70)
    options = {"shard_size": 40, "log": lambda line: None}
    pack.pack_parquet(tmp_path / "hf", tmp_path / "out", **options)
    shards = {p.name: p.read_bytes() for p in (tmp_path / "out").glob("*.tar")}
    (tmp_path / "out" / "shard-000002.json").unlink()
    pack.pack_parquet(tmp_path / "hf", tmp_path / "out", **options)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").glob("*.tar")} == shards


def test_rows_are_read_in_any_order(tmp_path):
    rows = [(image(k % 7, f"{k}.jpg"), 0) for k in range(200)]
    images = parquet.ParquetImages([write(tmp_path / "x.parquet", rows, group=90)])
    assert isinstance(images, pack.PackableImages)
    for i in (199, 0, 150, 89, 90, 91, 3, 199):
        assert images.read_original(i) == rows[i][0]["bytes"]
        assert images.name(i) == f"x.parquet/{i}: {i}.jpg"


def test_two_files_are_open_at_most(tmp_path):
    files = [write(tmp_path / f"{k}.parquet", [(image(k), 0)]) for k in range(8)]
    before = len(os.listdir("/proc/self/fd"))
    images = parquet.ParquetImages(files)
    assert len(os.listdir("/proc/self/fd")) <= before
    for i in (0, 1, 2, 1, 7, 6, 5, 4, 3):
        assert images.read_original(i) == image(i)["bytes"]
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    write(files[0], [(image(1), 0), (image(2), 0)])
    for change in (lambda: None, files[0].unlink):
        change()
        with pytest.raises(faults.MachineFailed, match="has changed or gone since its"):
            images.read_original(0)


class Failing:
    """pyarrow's ParquetFile, of which so many opens and reads fail as on a lost disk."""

    def __init__(self, monkeypatch, code: int):
        pq = pytest.importorskip("pyarrow.parquet")
        self.opens = self.reads = 0
        self.error = OSError(code, os.strerror(code))
        outer, real = self, pq.ParquetFile

        class File(real):
            def __init__(self, *args, **options):
                if outer.opens > 0:
                    outer.opens -= 1
                    raise outer.error
                super().__init__(*args, **options)

            def iter_batches(self, *args, **options):
                if outer.reads > 0:
                    outer.reads -= 1
                    raise outer.error
                return super().iter_batches(*args, **options)

        monkeypatch.setattr(pq, "ParquetFile", File)
        monkeypatch.setattr(faults, "PAUSES_S", (0.0, 0.0))


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EIO, errno.ESTALE])
def test_an_error_of_the_machine_is_no_damage(tmp_path, monkeypatch, capsys, code):
    file = write(tmp_path / "hf" / "x.parquet", [(image(k), 0) for k in range(3)])
    failing = Failing(monkeypatch, code)
    failing.opens = 2
    images = parquet.ParquetImages([file])
    failing.opens, failing.reads = 1, 1
    assert [images.read_original(i) for i in range(3)] == [image(i)["bytes"] for i in range(3)]
    failing.opens = 99
    with pytest.raises(faults.MachineFailed, match=r"x.parquet cannot be read .*after a few"):
        parquet.ParquetImages([file])
    failing.opens, failing.reads = 0, 99
    assert packed(tmp_path) == 2  # and no image is left out for it
    captured = capsys.readouterr()
    assert "x.parquet cannot be read" in captured.err and "left out" not in captured.out


def test_where_images_are_asked_for_the_way_is_named(tmp_path, monkeypatch, capsys):
    """Training and evaluation name the command; without pyarrow that names the extra."""
    made.write(tmp_path / "hf" / "data" / "train.parquet", b"PAR1")
    for path in (tmp_path / "hf", tmp_path / "hf" / "data" / "train.parquet"):
        with pytest.raises(ValueError, match=r"python -m cjepa_fast.data.pack .*hf"):
            open_images(path, cache=tmp_path / "cache", log=lambda line: None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert packed(tmp_path) == 2
    assert "pip install '.[parquet]'" in capsys.readouterr().err


def test_images_beside_parquet_are_the_set(tmp_path):
    """As Hugging Face's image folders with a metadata.parquet."""
    made.good_folder(tmp_path / "hf", 4)
    made.write(tmp_path / "hf" / "metadata.parquet", b"PAR1")
    assert packed(tmp_path) == 0 and len(opened(tmp_path)[1]) == 4
    assert packed(tmp_path, "--split", "train") == 2
