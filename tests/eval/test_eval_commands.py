"""`python -m cjepa_fast.eval`: the numbers it prints and writes, and one line for what is wrong."""

import argparse
import json
import shutil

import corrupt_images as made
import matplotlib.axes
import pytest
import tiny
import torch
from safetensors.torch import save_file

from cjepa_fast import config as configuration
from cjepa_fast import load_encoder
from cjepa_fast.data.sources import LIMITS, open_images
from cjepa_fast.eval import features, records, splits
from cjepa_fast.eval.__main__ import main
from cjepa_fast.eval.probes import knn, linear
from cjepa_fast.eval.splits import labelled_splits, splits_of
from cjepa_fast.export.__main__ import main as export_main
from cjepa_fast.model.vit import Encoder
from cjepa_fast.telemetry import read_log


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tiny.write_images(tmp_path / "images", count=60, classes=3)


@pytest.fixture
def run(tmp_path, data, seed):
    """A run's folder as training leaves it, with random weights."""
    run = tmp_path / "run"
    run.mkdir()
    config = configuration.load(str(tiny.write_config(tmp_path, eval={"crop": 1.0, "k": 5})))
    (run / "config.json").write_text(config.to_json())
    encoder = Encoder(image_size=24, patch_size=4, width=24, depth=2, heads=3)
    normalisation = {"mean": config.data.mean, "std": config.data.std}
    for name in ("encoder", "context_encoder"):
        weights = {key: p.contiguous() for key, p in encoder.state_dict().items()}
        save_file(weights, run / f"{name}.safetensors")
        (run / f"{name}.json").write_text(json.dumps({**encoder.architecture, **normalisation}))
    return run


def test_labels_of_a_flat_folder_from_a_file(run, data, tmp_path, capsys):
    """The same numbers as with a folder for each class."""
    flat, lines = tmp_path / "flat", []
    flat.mkdir()
    for path in sorted(data.glob("*/*.jpg"))[::5]:
        shutil.copy(path, flat / path.name)
        lines.append(f"{path.stem} {path.parent.name}\n")
    for k in range(3):
        (tmp_path / "sorted" / f"class_{k}").mkdir(parents=True)
    for line in lines:
        name, label = line.split()
        shutil.copy(flat / f"{name}.jpg", tmp_path / "sorted" / label)
    (tmp_path / "labels.txt").write_text("".join(lines))
    command, out = ["knn", str(run), "--data", str(data), "--k", "3"], tmp_path / "knn.json"
    found = []
    for test, more in ("sorted", []), ("flat", ["--test-labels", str(tmp_path / "labels.txt")]):
        options = ["--test", str(tmp_path / test), *more, "--json", str(out)]
        assert main([*command, *options]) == 0
        record = json.loads(out.read_text())
        found.append(record["rows"])
    assert found[0] == found[1] and record["settings"]["test_labels"] == more[1]
    assert main([*command, "--test-labels", more[1]]) == 2
    assert "name the images too, by --test" in capsys.readouterr().err


TAKE_LABELS = ("all", "knn", "linear", "attentive", "semi", "finetune")


@pytest.mark.parametrize("task", TAKE_LABELS)
def test_every_command_that_takes_files_of_labels_reads_them(run, task, monkeypatch):
    asked = []

    def labelled(path, label_list=None, **reading):
        asked.append((path, label_list))
        if len(asked) == 2:
            raise ValueError("both are asked for")
        return []

    monkeypatch.setattr(splits, "labelled", labelled)
    monkeypatch.setenv("LABELS", "/elsewhere")
    words = ["--data", "a", "--test", "b", "--labels", "$LABELS/a", "--test-labels", "$LABELS/b"]
    assert main([task, str(run), *words]) == 2
    assert asked == [("a", "/elsewhere/a"), ("b", "/elsewhere/b")]


def test_knn_writes_what_the_parts_compute(run, data, tmp_path, capsys):
    out = tmp_path / "deep" / "knn.json"
    test = shutil.copytree(data, tmp_path / "copy")
    options = ["--k", "3", "--untrained", "--pixels", "--linear", "--json", str(out)]
    assert main(["knn", str(run), "--data", str(data), "--test", str(test), *options]) == 0
    rows = {row["encoder"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["raw pixels", "mean colour", "untrained", "trained"]

    images = open_images(data)
    found, _ = features.extract(load_encoder(run), images)
    expected = knn.top1(found, images.labels, found, images.labels, k=3)
    assert rows["trained"]["top1"] == pytest.approx(expected, abs=2)
    probe = linear.top1(found, images.labels, found, images.labels)
    assert rows["trained"]["linear"] == pytest.approx(probe, abs=2)
    assert rows["trained"]["train_images"] == rows["trained"]["test_images"] == 60
    printed = capsys.readouterr().out
    assert f"{rows['trained']['top1']:.2f}" in printed and "train  test" in printed


def test_the_run_s_settings_hold_where_the_command_names_none(run, data, tmp_path):
    out = tmp_path / "knn.json"
    for options, k in (([], 5), (["--k", "3"], 3)):
        main(["knn", str(run), "--data", str(data), "--json", str(out), *options])
        written = json.loads(out.read_text())["settings"]
        assert (written["crop"], written["k"], written["temperature"]) == (1.0, k, 0.07)


def test_more_neighbours_than_images_are_as_many_as_there_are(run, data, tmp_path, capsys):
    out, most = tmp_path / "knn.json", []
    for k in ("7", "500"):
        words = ["knn", str(run), "--data", str(data), "--max-train", "7", "--k", k]
        assert main([*words, "--json", str(out)]) == 0
        most.append(json.loads(out.read_text()))
    assert "k = 500: there are 7 training images" in capsys.readouterr().out
    assert most[0]["rows"] == most[1]["rows"] and most[1]["settings"]["k"] == 7


def test_test_labels_follow_the_names_of_the_classes(tmp_path, capsys):
    """Two lists may number their classes in other orders; one that has no images for training is
    refused, one that has none for testing is said."""
    named = {
        "a": "cat\ndog\nowl\n",
        "b": "owl\ncat\ndog\n",
        "c": "owl\ncat\ncow\n",
        "d": "owl\ncat\n",
    }
    for folder, text in named.items():
        files = {f"{i}.jpg": made.encoded(made.picture(i)) for i in range(6)}
        files |= {f"{i}.cls": str(i % text.count("\n")).encode() for i in range(6)}
        (tmp_path / folder).mkdir()
        made.write_shard(tmp_path / folder / "x.tar", files)
        (tmp_path / folder / "classes.txt").write_text(text)
    one, two, three, four = (str(tmp_path / folder) for folder in named)
    (train, _), (test, _) = labelled_splits(one, two)
    assert train.classes == test.classes == ["cat", "dog", "owl"]
    assert test.labels.tolist() == [2, 0, 1, 2, 0, 1]
    with pytest.raises(ValueError, match=rf"'cow' only in {three}"):
        labelled_splits(one, three)
    (train, _), (test, _) = labelled_splits(one, four)
    assert test.classes == train.classes and test.labels.tolist() == [2, 0, 2, 0, 2, 0]
    assert f"{four} has no image of 1 of the 3 classes: 'dog'" in capsys.readouterr().out


def test_two_lists_of_labels_split_one_folder(tmp_path, monkeypatch):
    """Documented as a way to name splits; the same labels for both are refused."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "flat"
    lines = []
    for i in range(8):
        made.write(folder / f"{i}.jpg", made.encoded(made.picture(i)))
        lines.append(f"{i}.jpg {'owl' if i % 2 else 'cat'}\n")
    files = [tmp_path / f"{name}.txt" for name in ("train", "test", "other")]
    for file, text in zip(files, (lines[:5], lines[5:], ["7.jpg cow\n"]), strict=True):
        file.write_text("".join(text))
    one, two, other = map(str, files)
    path = str(folder)
    (train, keep), (test, test_keep) = labelled_splits(path, path, labels=one, test_labels=two)
    assert (len(keep), len(test_keep)) == (5, 3) and train.classes == test.classes == ["cat", "owl"]
    assert [test.name(i) for i in range(3)] == ["5.jpg", "6.jpg", "7.jpg"]
    with pytest.raises(ValueError, match=rf"{one} and {other} .* 'cow' only in {other}"):
        labelled_splits(path, path, labels=one, test_labels=other)
    files[2].write_text("".join(lines[4:]))
    with pytest.raises(
        ValueError, match=rf"{one} and {other}: 1 images are in both, .*flat/4.jpg among"
    ):
        labelled_splits(path, path, labels=one, test_labels=other)
    with pytest.raises(ValueError, match=r"both with the labels of .*train\.txt: name"):
        labelled_splits(path, f"{path}/", labels=one, test_labels=one)
    with pytest.raises(ValueError, match=rf"{path} is the training set and the test set, both"):
        labelled_splits(path, path)


def test_an_image_for_testing_is_in_no_other_list_or_folder(tmp_path):
    made.good_folder(tmp_path / "set", 6)
    names = [f"c{i % 2}/{i:04d}.jpg" for i in range(6)]
    (tmp_path / "link").symlink_to(tmp_path / "set")
    files = {
        "set/train.csv": names[:4],
        "set/test.csv": names[3:],
        "other.csv": [f"link/{name}" for name in names[4:]],
        "absolute.csv": [str(tmp_path / "set" / name) for name in names[2:]],
    }
    for file, chosen in files.items():
        rows = [f"{name},{name.split('/')[-2]}\n" for name in chosen]
        (tmp_path / file).write_text("".join(rows))
    train, test, other, absolute = (str(tmp_path / file) for file in files)
    with pytest.raises(
        ValueError, match=rf"{train} and {test}: 1 images are in both, .*{names[3]}"
    ):
        labelled_splits(train, test)
    with pytest.raises(ValueError, match=r"2 images are in both"):
        labelled_splits(other, str(tmp_path / "set"))
    with pytest.raises(ValueError, match=r"2 images are in both"):
        labelled_splits(train, absolute)
    (_, keep), (_, test_keep) = labelled_splits(train, other)
    assert (len(keep), len(test_keep)) == (4, 2)


def test_splits_are_no_classes_and_val_is_the_test_set(tmp_path):
    for split in ("train", "val"):
        made.good_folder(tmp_path / "set" / split, 6)
    (train, keep), (test, _) = labelled_splits(str(tmp_path / "set"), None)
    assert (train.root.name, test.root.name) == ("train", "val") and len(keep) == 6
    named = dict.fromkeys(("test", "labels", "test_labels", "max_train"))
    args = argparse.Namespace(data=str(tmp_path / "set"), limits=LIMITS, **named)
    splits_of(args)
    assert args.test == str(tmp_path / "set" / "val")  # for the record
    for name, folders in (("flat", ("train", "val")), ("other", ("Train", "Val"))):
        for split in folders:
            made.write(tmp_path / name / split / "a.jpg", made.encoded(made.picture(1)))
        with pytest.raises(ValueError, match="holds splits, not classes"):
            labelled_splits(str(tmp_path / name), None)


def test_test_images_of_classes_without_a_training_image_are_counted(data, capsys):
    (images, keep), (_, test_keep) = labelled_splits(str(data), None, 1)
    learnt = images.labels[keep].item()
    strange = sum(label != learnt for label in images.labels[test_keep].tolist())
    assert capsys.readouterr().out == (
        f"2 of the 3 classes tested have no training image, so {strange} of {len(test_keep)} test "
        "images cannot be named rightly: train on more images\n"
    )
    labelled_splits(str(data), None)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("words", [["knn", "--pixels"], ["knn", "--linear"], ["linear"], ["all"]])
def test_too_little_memory_is_said_before_any_work(run, data, monkeypatch, capsys, words):
    monkeypatch.setattr(splits, "free_bytes", lambda: 10_000)
    for name in "extract", "image_vectors":
        monkeypatch.setattr(features, name, lambda *args, **options: pytest.fail("computed"))
    monkeypatch.setattr(splits, "extract", features.extract)
    monkeypatch.setattr(knn, "image_vectors", features.image_vectors)
    assert main([words[0], str(run), "--data", str(data), *words[1:]]) == 2
    assert "GiB of memory at once, of 0.0 free: use fewer, --max-train N" in capsys.readouterr().err


BY_RANKS = """
import sys
from pathlib import Path
from cjepa_fast.eval.__main__ import main
from cjepa_fast.eval.probes import linear
from cjepa_fast.runtime import distributed

notes, ends, *words = sys.argv[1:]
top1 = linear.top1

def noted(*vectors, **options):
    (Path(notes) / str(distributed.rank())).touch()
    if ends == "fail":
        raise ValueError("the first rank failed")
    return top1(*vectors, **options)

linear.top1 = noted
distributed.leave(main(words))
"""


@pytest.mark.multiprocess
def test_one_rank_trains_the_probes_and_its_error_ends_all(run, data, tmp_path):
    (tmp_path / "by_ranks.py").write_text(BY_RANKS)
    words = ["knn", run, "--data", data, "--linear", "--pixels", "--no-cache", "--json"]
    for ranks, ends in (1, "well"), (2, "well"), (2, "fail"):
        (notes := tmp_path / f"{ranks}_{ends}").mkdir()
        own = [notes, ends, *words, notes / "knn.json"]
        done = tiny.run(tmp_path / "by_ranks.py", *own, ranks=ranks)
        assert (done.returncode == 0) is (ends == "well"), done.stderr
        assert {path.name for path in notes.iterdir()} - {"knn.json"} == {"0"}
    assert "error: the first rank failed" in done.stderr
    one, two = (
        json.loads((tmp_path / f"{ranks}_well" / "knn.json").read_text())["rows"]
        for ranks in (1, 2)
    )
    for row, other in zip(one, two, strict=True):
        assert row == pytest.approx(other, abs=10)  # an image or two may lie on an edge


def test_linear_and_a_limit_of_images(run, data, tmp_path):
    """A row for the last layer and one for the last two, which are all that there are."""
    out = tmp_path / "linear.json"
    options = ["--max-train", "21", "--epochs", "2", "--json", str(out)]
    assert main(["linear", str(run), "--data", str(data), *options]) == 0
    record = json.loads(out.read_text())
    assert [row["layers"] for row in record["rows"]] == ["last", "last 2"]
    for row in record["rows"]:
        assert row["train_images"] == 21
        assert 0 <= row["top1"] <= 100 and "top5" not in row  # of three classes
        assert len(row["probes"]) == 6 and row["settings"].keys() == {"lr", "wd"}
    assert record["headings"]["top1"] == "LARS %"
    main(["linear", str(run), "--data", str(data), "--choose", "test", *options])
    assert json.loads(out.read_text())["headings"]["top1"] == "best on test %"


def test_without_a_test_set_the_two_sides_share_no_image(data):
    (train, train_keep), (test, test_keep) = labelled_splits(str(data), None, None)
    assert train is test
    assert sorted([*train_keep.tolist(), *test_keep.tolist()]) == list(range(60))
    _, (_, again) = labelled_splits(str(data), None, 10)
    assert torch.equal(again, test_keep)


def test_what_is_found_lies_in_the_run_s_folder_too(run, data):
    """A file for each set of settings: the same settings replace it."""
    for k in (3, 4, 3):
        assert main(["knn", str(run), "--data", str(data), "--k", str(k)]) == 0
    found = records.records_in(run)
    assert [record["settings"]["k"] for record in found] == [4, 3]
    assert found[0]["task"] == "knn" and found[0]["rows"][0]["encoder"] == "trained"
    assert set(found[0]["headings"]) >= {"top1", "top1_centred"}


def test_a_shorter_command_keeps_what_a_longer_one_found(run, data, tmp_path):
    """With the same weights and images; of others nothing is kept."""
    test = shutil.copytree(data, tmp_path / "test")
    words = ["knn", str(run), "--data", str(data), "--test", str(test), "--k", "3"]
    assert main([*words, "--untrained", "--pixels", "--linear"]) == 0
    (before,) = records.records_in(run)
    assert main([*words, "--json", str(tmp_path / "own.json")]) == 0
    (after,) = records.records_in(run)
    assert after["rows"] == before["rows"] and after["made"] > before["made"]
    own = json.loads((tmp_path / "own.json").read_text())["rows"]
    assert [row["encoder"] for row in own] == ["trained"] and "linear" not in own[0]
    next(test.rglob("*.jpg")).unlink()
    assert main(words) == 0
    assert [row["encoder"] for row in records.records_in(run)[0]["rows"]] == ["trained"]


def test_an_earlier_record_of_other_weights_adds_nothing(tmp_path):
    file = tmp_path / "knn-0.json"
    rows = [{"encoder": name, "train_images": 9, "top1": 5.0} for name in ("untrained", "trained")]
    before = {"task": "knn", "made": "1", "settings": {}, "headings": {"a": "A"}, "rows": rows}
    new = before | {"weights": "w", "headings": {"b": "B"}, "rows": [rows[1] | {"top1": 6.0}]}
    for weights, kept in ("v", []), ("w", rows[:1]):
        file.write_text(json.dumps(before | {"weights": weights}))
        found = records._with_earlier(file, new)
        assert found["rows"] == [*kept, *new["rows"]]
    assert found["headings"] == {"a": "A", "b": "B"}
    file.write_text("{")
    assert records._with_earlier(file, new) == new


def test_the_untrained_encoder_is_the_same_each_time(run, data, tmp_path):
    tops = []
    for name in ("a.json", "b.json"):
        torch.rand(1)
        out = tmp_path / name
        main(["knn", str(run), "--data", str(data), "--untrained", "--json", str(out)])
        rows = json.loads(out.read_text())["rows"]
        tops.append([row["top1"] for row in rows if row["encoder"] == "untrained"])
    assert tops[0] == tops[1]


def picture(words, tmp_path) -> tuple[list[dict], list[str]]:
    """The rows that a picture's --json has, and the headings drawn over its columns."""
    out, numbers = tmp_path / "p.png", tmp_path / "p.json"
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        original = matplotlib.axes.Axes.set_title
        patch.setattr(
            matplotlib.axes.Axes, "set_title",
            lambda axes, text, **more: drawn.append(text) or original(axes, text, **more),
        )  # fmt: skip
        assert main([*map(str, words), "--out", str(out), "--json", str(numbers)]) == 0
    assert out.stat().st_size > 5_000
    return json.loads(numbers.read_text())["rows"], drawn


@pytest.fixture
def other(run, tmp_path):
    return shutil.copytree(run, tmp_path / "other" / run.name)


@pytest.mark.parametrize(("task", "number"), [("attention", "evenness"), ("pca", "first")])
def test_checkpoints_and_both_encoders_side_by_side(run, other, data, tmp_path, task, number):
    few = ["--images", data, "--count", 2]
    rows, headings = picture([task, run, other, *few], tmp_path)
    assert len(rows) == 4 and all(0 < row[number] <= 100 for row in rows)
    assert rows[0][number] == pytest.approx(rows[2][number])  # the same weights
    assert headings[0] == "image" and len(headings) == 5
    assert [heading.split("\n")[1] for heading in headings[1:]] == [
        "target encoder", "context encoder"
    ] * 2  # fmt: skip
    # an encoder by itself, as an export leaves it
    (only,), _ = picture([task, run / "encoder.safetensors", *few], tmp_path)
    assert only[number] == pytest.approx(rows[0][number])


def test_neighbours_of_several_encoders(run, other, data, tmp_path):
    few = ["--data", data, "--count", 2, "--neighbours", 3]
    rows, headings = picture(["retrieve", run, *few], tmp_path)
    assert len(headings) == 2 * 4 and 0 <= rows[0]["agreement"] <= 100
    rows, headings = picture(["retrieve", run, other, "--which", "both", *few], tmp_path)
    assert len(rows) == 4 and len(headings) == 2 * (1 + 4 * 3)
    assert rows[0]["similarity"] == pytest.approx(rows[2]["similarity"])


def test_masks_of_runs_and_of_a_configuration(run, other, data, tmp_path, capsys):
    few = ["--images", data, "--count", 2]
    (row,), headings = picture(["masks", run, *few], tmp_path)
    assert headings[:3] == ["image", "context", "context and targets"]
    assert row["patches"] == 36 and row["blocks"] == len(headings) - 3
    rows, headings = picture(["masks", run, "--config", "demo.json", *few], tmp_path)
    assert len(rows) == 2 and len(headings) == 6
    (row,), _ = picture(["masks", "--config", "demo.json", *few], tmp_path)
    assert main(["masks", *map(str, few), "--out", str(tmp_path / "m.png")]) == 2
    assert "whose masks?" in capsys.readouterr().err


def test_curves_tell_their_ends(run, tmp_path):
    rows = [{"step": step, "loss": 1 / step, "rankme": None} for step in (1, 2)]
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (row,), _ = picture(["curves", run], tmp_path)
    last = read_log(run)[-1]
    assert (row["step"], row["loss"]) == (last["step"], last["loss"])


def test_settings_are_the_run_s_or_another_configuration_s(run, data, tmp_path):
    config = tmp_path / "own.json"
    config.write_text(json.dumps({"eval": {"k": 2}}))
    tops = [
        main(["knn", str(run), "--data", str(data), *more])
        for more in ([], ["--config", str(config)])
    ]
    assert tops == [0, 0]
    assert [record["settings"]["k"] for record in records.records_in(run)] == [5, 2]


def test_an_export_shows_the_encoder_that_it_holds(run, data, tmp_path):
    few = ["--images", data, "--count", 2]
    for which in ("target", "context"):
        out = tmp_path / which
        assert (
            export_main([str(run), "--which", which, "--to", "safetensors", "--out", str(out)]) == 0
        )
        (row,), headings = picture(["pca", out, *few], tmp_path)
        assert row["encoder"] == f"{which}, {which}" and headings[0] == "image"
        (drawn,) = headings[1:]
        assert drawn.startswith(f"{which} encoder\n")


def test_a_file_of_the_context_encoder_is_recorded_as_such(run, data):
    for name in ("encoder", "context_encoder"):
        assert main(["knn", str(run / f"{name}.safetensors"), "--data", str(data)]) == 0
    assert [record["which"] for record in records.records_in(run)] == ["target", "context"]


def test_what_is_written_is_of_the_weights_that_were_read(run, data, monkeypatch):
    """Though the folder holds others by the time that the figures are there."""
    read = features.digest(load_encoder(run))
    original = records.print_table

    def move_on(*given):
        for path in run.glob("*encoder.safetensors"):
            path.unlink()
        original(*given)

    monkeypatch.setattr(records, "print_table", move_on)
    assert main(["knn", str(run), "--data", str(data)]) == 0
    assert records.records_in(run)[-1]["weights"] == read


def test_collapse_of_an_encoder_in_another_project_s_folder(run, data, tmp_path, monkeypatch):
    assert export_main([str(run), "--to", "hf", "--out", str(tmp_path / "hf")]) == 0
    out = tmp_path / "c.json"
    few = ["--data", str(data), "--count", "8", "--views", "2", "--json", str(out)]
    assert main(["collapse", str(tmp_path / "hf"), *few]) == 0
    assert [row["encoder"] for row in json.loads(out.read_text())["rows"]] == ["trained"]
    assert main(["collapse", str(run), *few]) == 0
    assert len(json.loads(out.read_text())["rows"]) == 2
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "named").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    assert main(["collapse", "named", *few]) == 0
    assert len(json.loads(out.read_text())["rows"]) == 2


def test_what_is_wrong_is_said_in_one_line(run, data, tmp_path, capsys):
    unlabelled = tmp_path / "unlabelled"
    unlabelled.mkdir()
    for i, path in enumerate(sorted(data.rglob("*.jpg"))[:4]):
        shutil.copy(path, unlabelled / f"{i}.jpg")
    one = tmp_path / "one" / "class"
    one.mkdir(parents=True)
    shutil.copy(unlabelled / "0.jpg", one / "0.jpg")
    cases = {
        "no labels": ["knn", str(run), "--data", str(unlabelled)],
        "splitting its 1 images": ["knn", str(run), "--data", str(one.parent)],
        "does not exist": ["knn", str(run), "--data", str(tmp_path / "absent")],
        "nowhere": ["knn", str(tmp_path / "nowhere"), "--data", str(data)],
        "'class' only in": ["knn", str(run), "--data", str(data), "--test", str(one.parent)],
        "no such run": ["curves", str(tmp_path / "nowhere"), "--out", "c.png"],
        "no config.json": ["masks", str(tmp_path / "nowhere"), "--out", "m.png"],
        "cannot draw": ["masks", str(run), "--images", str(data), "--out", "m.docx"],
    }
    for expected, words in cases.items():
        assert main(words) == 2, words
        said = capsys.readouterr().err
        assert expected in said and said.startswith("error: ")
        assert len(said.splitlines()) == 1, said
