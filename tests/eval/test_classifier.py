"""A trained classifier is used: what finetune leaves, load_classifier and cjepa-eval predict."""

import csv
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import cjepa_fast as cj
from cjepa_fast.checkpoint.encoders import save_encoder
from cjepa_fast.data.sources import LIMITS
from cjepa_fast.eval import predict
from cjepa_fast.eval.__main__ import main
from cjepa_fast.eval.finetuning import classifier, classify
from cjepa_fast.eval.finetuning.recipe import Classifier
from cjepa_fast.eval.probes.attentive import AttentiveProbe
from cjepa_fast.model.vit import Encoder

CLASSES = ["blue", "grün", "red"]
RECIPE = ["epochs=4", "batch=10", "lr=0.2", "layer_decay=1", "rand_augment=null", "cutmix=0",
          "erasing=0", "drop_path=0.5"]  # fmt: skip


def fresh(**changes) -> Encoder:
    torch.manual_seed(0)
    made = {"image_size": 24, "patch_size": 8, "width": 12, "depth": 2, "heads": 3, **changes}
    encoder = Encoder(**made)
    encoder.mean, encoder.std = (0.5,) * encoder.channels, (0.25,) * encoder.channels
    return encoder.eval()


def write(folder: Path, counts: dict[str, int], seed: int) -> None:
    """Noisy images in the class's colour, of several sizes; every third is gray."""
    random = np.random.default_rng(seed)
    for name, count in counts.items():
        for i in range(count):
            height, width = [(24, 32), (40, 24), (30, 90), (24, 24)][i % 4]
            pixels = random.integers(0, 190, (height, width, 3), dtype=np.uint8)
            pixels[..., 2 - CLASSES.index(name)] += 60
            image = Image.fromarray(pixels)
            file = folder / name / f"{name}_{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            (image.convert("L") if i % 3 == 2 else image).save(file)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A fine-tuning that has ended, of the command: its folder, its row, the weights that it ended
    with, their EMA, and the test images. No test image is of the second class."""
    folder = tmp_path_factory.mktemp("classifier")
    write(folder / "train", {"blue": 15, "grün": 5, "red": 15}, 0)
    write(folder / "test", {"blue": 16, "red": 17}, 1)
    save_encoder(fresh(), folder / "encoder.safetensors")
    kept, tune = SimpleNamespace(), classify.tune

    def noted(*args):
        kept.model, kept.ema = tune(*args)
        return kept.model, kept.ema

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("CJEPA_DECODER", "pillow")
        patch.setattr(classify, "tune", noted)
        words = ["finetune", str(folder / "encoder.safetensors"), "--data", str(folder / "train")]
        words += ["--test", str(folder / "test"), "--out", str(folder / "out"), "--crop", "0.6"]
        words += ["--json", str(folder / "row.json"), "--threads", "1"]
        kept.words = words
        assert main([*words, "--set", *RECIPE]) == 0
    (kept.row,) = json.loads((folder / "row.json").read_text())["rows"]
    kept.folder, kept.test = folder / "out" / "trained", folder / "test"
    return kept


@pytest.fixture(autouse=True)
def pillow(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CJEPA_DECODER", "pillow")


@pytest.fixture
def copy(made, tmp_path) -> Path:
    """The two files alone."""
    for file in made.folder.glob("classifier.*"):
        shutil.copy(file, tmp_path / file.name)
    return tmp_path


def predicted(folder: Path, images: Path, out: Path, *more: str) -> int:
    words = [str(folder), str(images), "--out", str(out), "--threads", "1"]
    return main(["predict", *words, *more])


def rows_of(out: Path) -> list[dict]:
    return list(csv.DictReader(out.open(encoding="utf-8", newline="")))


# ------------------------------------------------------------------------------------------ files


def test_what_is_left_is_the_ema_and_no_fragment(made):
    assert {p.name for p in made.folder.iterdir()} == {
        "classifier.safetensors", "classifier.json", "checkpoints"
    }  # fmt: skip
    loaded, wanted = cj.load_classifier(made.folder), made.ema.state_dict()
    assert loaded.network.state_dict().keys() == wanted.keys()
    for name, values in loaded.network.state_dict().items():
        assert torch.equal(values, wanted[name]), name
    assert not torch.equal(wanted["head.weight"], made.model.state_dict()["head.weight"])
    assert not any(module.training for module in loaded.modules())


def test_the_description_is_the_encoder_s_with_a_head(made):
    described = json.loads((made.folder / "classifier.json").read_text())
    head = {"pooling": "mean", "head": "linear", "classes": CLASSES, "crop": 0.6}
    images = {"mean": [0.5] * 3, "std": [0.25] * 3}
    assert described.pop("sha256")
    assert described == {**fresh().architecture, **images, **head}


def test_the_folder_given_as_out_is_enough(made):
    places = made.folder, made.folder.parent, made.folder / "classifier.safetensors"
    for place in (*places, str(made.folder)):
        assert cj.load_classifier(place).classes == CLASSES


def test_a_training_that_had_ended_leaves_it_by_resuming(made, tmp_path, capsys):
    shutil.copytree(made.folder.parent, tmp_path / "out")
    for file in (tmp_path / "out" / "trained").glob("classifier.*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="the same command with --resume"):
        cj.load_classifier(tmp_path / "out")
    words = [*made.words, "--out", str(tmp_path / "out"), "--resume", "--set", *RECIPE]
    assert main(words) == 0, capsys.readouterr().err
    again, first = (cj.load_classifier(f).state_dict() for f in (tmp_path / "out", made.folder))
    assert all(torch.equal(again[name], values) for name, values in first.items())


def test_a_disk_that_is_full_costs_no_score(made, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError("No space left on device")

    shutil.copytree(made.folder.parent, tmp_path / "out")
    monkeypatch.setattr(classifier, "save_described", full)
    words = [*made.words, "--out", str(tmp_path / "out"), "--resume", "--set", *RECIPE]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "classifier could not be kept" in said.err and "No space left" in said.err
    assert "EMA weights %" in said.out


def described(folder: Path, **changes) -> None:
    file = folder / "classifier.json"
    found = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: x for name, x in found.items() if x is not None}))


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 64
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda d: flipped(d / "classifier.safetensors"), "classifier.safetensors is damaged: it"),
        (lambda d: (d / "classifier.safetensors").write_bytes(b"x" * 40), "no safetensors file"),
        (lambda d: (d / "classifier.json").write_text("{"), "classifier.json is damaged"),
        (lambda d: (d / "classifier.json").unlink(), "classifier.json is missing"),
        (lambda d: (d / "classifier.safetensors").unlink(), "classifier.safetensors is missing"),
        (lambda d: described(d, classes=CLASSES[:2]), "head.weight (3, 12) where (2, 12) belongs"),
        (lambda d: described(d, classes=[1, 2, 3]), "classifier.json: its classes must be"),
        (lambda d: described(d, classes=None), "classifier.json describes no classifier"),
        (lambda d: described(d, pooling="max"), "classifier.json: pooling 'max'"),
        (lambda d: described(d, pooling="attentive"), "missing: query"),
        (lambda d: described(d, pooling=[]), "classifier.json: pooling []"),
        (lambda d: described(d, depth=3), "missing: encoder.blocks.2."),
        (lambda d: described(d, width="wide"), "classifier.json does not describe an encoder"),
        (lambda d: described(d, image_size=25), "classifier.json does not describe an encoder"),
        (lambda d: described(d, mean=[0.5]), "classifier.json: mean and std must have 3 numbers"),
        (lambda d: described(d, crop=7), "classifier.json: its crop 7"),
        (lambda d: described(d, sha256=None), "classifier.safetensors is damaged: it has not"),
    ],
)
def test_what_is_damaged_or_does_not_fit_is_named(copy, capsys, break_it, said):
    break_it(copy)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        cj.load_classifier(copy)
    assert said in str(error.value) and str(copy) in str(error.value)
    assert predicted(copy, copy, copy / "a.csv") == 2
    assert said in capsys.readouterr().err


def test_another_folder_is_refused_with_the_way_out(made, tmp_path):
    with pytest.raises(FileNotFoundError, match="give the --out FOLDER of `cjepa-eval finetune`"):
        cj.load_classifier(tmp_path / "nothing")
    save_encoder(fresh(), tmp_path / "encoder.safetensors")
    with pytest.raises(ValueError, match=r"encoder\.json describes no classifier"):
        cj.load_classifier(tmp_path / "encoder.safetensors")
    for share in ("0.1", "0.2"):  # as semi leaves them
        shutil.copytree(made.folder, tmp_path / share / "trained")
    with pytest.raises(FileNotFoundError, match=r"0\.1/trained or \S+0\.2/trained"):
        cj.load_classifier(tmp_path)
    with pytest.raises(ValueError, match="does not describe an encoder"):
        cj.load_encoder(made.folder / "classifier.safetensors")


# -------------------------------------------------------------------------------------- the command


def test_predictions_have_the_accuracy_that_the_training_told(made, tmp_path, capsys):
    out = tmp_path / "classes.csv"
    assert predicted(made.folder, made.test, out) == 0
    rows = rows_of(out)
    names = sorted(f"{p.parent.name}/{p.name}" for p in made.test.rglob("*.png"))
    assert [row["name"] for row in rows] == names and len(names) == made.row["test_images"] == 33
    right = sum(row["class"] == row["name"].partition("/")[0] for row in rows)
    assert 100 * right / 33 == pytest.approx(made.row["average_top1"])
    assert made.row["average_top1"] not in (100, 100 * 16 / 33, 100 * 17 / 33)  # it says something
    assert list(rows[0]) == ["name", "class", "probability"]
    assert "classes of 33 images\n" in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {"classes.csv", "cache"}


@pytest.mark.parametrize("ending", predict.WRITERS)
def test_the_most_probable_classes_in_each_kind_of_file(made, tmp_path, ending):
    out, images = tmp_path / f"a{ending}", made.test / "blue"
    if ending == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
    assert predicted(made.folder, images, out, "--top", "9") == 0  # of three classes
    loaded, files = cj.load_classifier(made.folder), sorted(images.iterdir())
    best, number = loaded.probabilities(files).sort(1, descending=True)
    names, classes = [p.name for p in files], [[CLASSES[c] for c in row] for row in number.tolist()]
    if ending == ".npz":
        found = np.load(out, allow_pickle=False)
        assert found["names"].tolist() == names and found["classes"].tolist() == classes
        np.testing.assert_allclose(found["probabilities"], best, rtol=1e-5)
        return
    rows = rows_of(out) if ending == ".csv" else parquet.read_table(out).to_pylist()
    heads = ["name", "class", "probability", "class_2", "probability_2", "class_3", "probability_3"]
    assert list(rows[0]) == heads
    assert [row["name"] for row in rows] == names
    assert [[row[head] for head in heads[1::2]] for row in rows] == classes
    shares = [[float(row[head]) for head in heads[2::2]] for row in rows]
    np.testing.assert_allclose(shares, best, rtol=1e-5)


def test_images_that_cannot_be_read_are_named_and_counted(made, tmp_path, monkeypatch, capsys):
    """One that is known for it when the set is opened, and one that goes while it is read."""
    images, opened = shutil.copytree(made.test, tmp_path / "images"), predict.open_images
    (images / "red" / "text.png").write_text("no image")

    def then_gone(*args, **options):
        found = opened(*args, **options)
        (images / "blue" / "blue_3.png").unlink()
        return found

    monkeypatch.setattr(predict, "open_images", then_gone)
    assert predicted(made.folder, images, tmp_path / "a.csv") == 0
    report = tmp_path / "a.csv.unusable.jsonl"
    unusable = {row["name"]: row["why"] for row in map(json.loads, report.open())}
    assert unusable.keys() == {"red/text.png", "blue/blue_3.png"} and all(unusable.values())
    said = capsys.readouterr().out
    assert "a.csv: classes of 32 images; 2 left out (" in said
    assert f"all are named in {report}" in said
    names = {row["name"] for row in rows_of(tmp_path / "a.csv")}
    assert len(names) == 32 and not names & unusable.keys()
    monkeypatch.setattr(predict, "open_images", opened)
    (images / "red" / "text.png").unlink()
    (tmp_path / "a.csv").unlink()
    assert predicted(made.folder, images, tmp_path / "a.csv") == 0
    assert not report.exists()


def test_what_cannot_be_written_is_said_before_any_image_is_read(
    made, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(predict, "open_images", lambda *args, **options: pytest.fail("it is read"))
    (tmp_path / "mine.csv").write_text("mine")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    cases = {"mine.csv": "is there already", "a.txt": "must be one of .csv, .parquet, .npz",
             "a.parquet": "pip install pyarrow"}  # fmt: skip
    for name, said in cases.items():
        assert predicted(made.folder, made.test, tmp_path / name) == 2
        assert said in capsys.readouterr().err
    assert (tmp_path / "mine.csv").read_text() == "mine"


@pytest.mark.multiprocess
def test_two_ranks_write_the_file_of_one(made, tmp_path):
    images = shutil.copytree(made.test, tmp_path / "images")
    (images / "red" / "text.png").write_text("no image")
    script = tmp_path / "predict.py"
    script.write_text("import sys\nfrom cjepa_fast.eval.__main__ import main\nsys.exit(main())\n")
    assert predicted(made.folder, images, tmp_path / "one.csv") == 0
    done = tiny.run(script, "predict", made.folder, images, "--out", tmp_path / "two.csv", ranks=2)
    assert done.returncode == 0, done.stderr
    one, two = (rows_of(tmp_path / f"{name}.csv") for name in ("one", "two"))
    for row, other in zip(one, two, strict=True):
        assert (row["name"], row["class"]) == (other["name"], other["class"])
        assert float(row["probability"]) == pytest.approx(float(other["probability"]), rel=1e-4)
    assert "text.png" in (tmp_path / "two.csv.unusable.jsonl").read_text()


# -------------------------------------------------------------------------------------- from Python


def test_images_as_they_are(made, tmp_path):
    """Files, gray and oblong ones among them, PIL images, arrays and tensors; one as a list of
    one."""
    assert predicted(made.folder, made.test, tmp_path / "a.csv") == 0
    told = [(row["class"], float(row["probability"])) for row in rows_of(tmp_path / "a.csv")]
    loaded = cj.load_classifier(made.folder)
    files = sorted(made.test.rglob("*.png"), key=lambda p: f"{p.parent.name}/{p.name}")
    assert {Image.open(file).mode for file in files} == {"L", "RGB"}
    found = loaded.predict(files, batch_size=4)
    assert [name for name, _ in found] == [name for name, _ in told]
    assert [p for _, p in found] == pytest.approx([p for _, p in told], rel=1e-4)
    for file, wanted in list(zip(files, found, strict=True))[:3]:
        pixels = np.asarray(Image.open(file))
        tensor = torch.from_numpy(np.atleast_3d(pixels).copy()).permute(2, 0, 1)
        for image in (file, str(file), Image.open(file), pixels, tensor):
            (one,) = loaded.predict(image)
            assert one[0] == wanted[0] and one[1] == pytest.approx(wanted[1], rel=1e-4)
    with pytest.raises(ValueError, match=r"gone\.png does not exist"):
        loaded.predict([files[0], tmp_path / "gone.png"])


def test_it_is_a_module_of_normalised_batches(made):
    loaded, files = cj.load_classifier(made.folder), sorted(made.test.rglob("*.png"))[:3]
    batch = torch.stack([loaded.transform(file) for file in files])
    assert batch.shape == (3, 3, 24, 24) and loaded.transform.crop == 0.6
    with torch.no_grad():
        logits = loaded(batch)
        torch.testing.assert_close(logits, made.ema.eval()(batch))
    torch.testing.assert_close(loaded.probabilities(files), logits.softmax(1))
    assert logits.shape == (3, len(loaded.classes))


def kept(folder: Path, network: torch.nn.Module, pooling: str, **labels) -> Path:
    images = SimpleNamespace(**{"classes": None, "limits": LIMITS, **labels})
    numbers = torch.tensor([3, 700])
    classifier.keep_classifier(network, pooling, network.encoder, images, numbers, 0.8, folder)
    return folder


@pytest.mark.parametrize(("kind", "pooling"), [(Classifier, "mean"), (AttentiveProbe, "attentive")])
def test_an_oblong_of_any_channels_without_names_of_classes(tmp_path, kind, pooling):
    """Learned positions and limits are kept; the classes are called by their numbers."""
    encoder = fresh(image_size=(16, 32), channels=1, learned_positions=True)
    network = kind(encoder, 2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    limits = LIMITS._replace(bit_depth=12)
    loaded = cj.load_classifier(kept(tmp_path / "new" / "one", network, pooling, limits=limits))
    assert loaded.classes == ["3", "700"] and loaded.limits == limits
    assert loaded.image_size == (16, 32) and loaded.crop == 0.8
    pixels = np.random.default_rng(0).integers(0, 4096, (40, 90), dtype=np.uint16)
    batch = loaded.transform(pixels)[None]
    assert batch.shape == (1, 1, 16, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(batch), network.eval()(batch))
    assert loaded.predict(pixels)[0][0] in ("3", "700")


def test_names_are_by_number_where_not_all_are_used():
    images = SimpleNamespace(classes=["a", "b", "c", "d"])
    assert classifier.names_of(images, torch.tensor([0, 3])) == ["a", "d"]


def test_an_attentive_probe_is_used_as_well(made, tmp_path):
    out = tmp_path / "probe"
    words = ["attentive", *made.words[1:], "--out", str(out), "--json", str(tmp_path / "row.json")]
    assert main([*words, "--set", "epochs=1", "erasing=0"]) == 0
    (row,) = json.loads((tmp_path / "row.json").read_text())["rows"]
    assert predicted(out, made.test, tmp_path / "a.csv") == 0
    rows = rows_of(tmp_path / "a.csv")
    right = sum(line["class"] == line["name"].partition("/")[0] for line in rows)
    assert 100 * right / len(rows) == pytest.approx(row["top1"])
