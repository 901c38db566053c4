"""No file that the project reads is unpickled: a pickle instead of any runs none of its code.

But foreign weights that a user names are, by torch.load(weights_only=True) in interop/ alone
(test_interop.py). `cjepa-export --to torch` writes a program of torch's own format and opens it
once, right after.
"""

import ast
import contextlib
import importlib.util
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import dense_sets
import pytest
import rectangles
import tiny
import torch
import vision_ops
from safetensors.torch import load_file, save_file

from cjepa_fast import config as configuration
from cjepa_fast.checkpoint import format as stored
from cjepa_fast.eval.__main__ import main
from cjepa_fast.export.__main__ import main as export_main
from cjepa_fast.model.vit import Encoder
from cjepa_fast.tools import ablate

EVAL = tiny.ROOT / "cjepa_fast" / "eval" / "__main__.py"

PICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
CALLS = {"torch.load", "torch.save", "torch.jit.load", "torch.export.load", "torch.export.save"}
METHODS = {"load_checkpoint", "save_checkpoint", "read_pickle", "Unpickler"}


def suspects(tree: ast.AST) -> set[str]:
    """What of the above a module imports or names, and each `allow_pickle`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.partition(".")[0] in PICKLERS}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{a.name}" for a in node.names}
            found |= {n for n in names if n in CALLS or n.partition(".")[0] in PICKLERS}
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.add(node.arg)
        elif isinstance(node, ast.Attribute):
            found |= {ast.unparse(node)} & CALLS | {node.attr} & METHODS
    return found


def test_suspects_are_seen_in_all_forms():
    code = "import pickle\nfrom torch import load\nx.load_checkpoint()\nnp.load(a, allow_pickle=1)"
    expected = {"pickle", "torch.load", "load_checkpoint", "allow_pickle"}
    assert suspects(ast.parse(code)) == expected
    assert suspects(ast.parse("import torch\ny = torch.save")) == {"torch.save"}


def test_the_source_unpickles_nothing_but_foreign_weights():
    files = [*(tiny.ROOT / "cjepa_fast").rglob("*.py"), *(tiny.ROOT / "kernels").rglob("*.py")]
    trees = {str(path.relative_to(tiny.ROOT)): ast.parse(path.read_text()) for path in files}
    assert {name: found for name, tree in trees.items() if (found := suspects(tree))} == {
        "cjepa_fast/interop/weights.py": {"torch.load"},
        "cjepa_fast/export/formats.py": {"torch.export.load", "torch.export.save"},
    }
    calls = [node for node in ast.walk(trees["cjepa_fast/interop/weights.py"])
             if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"]  # fmt: skip
    assert calls and all("weights_only=True" in ast.unparse(call) for call in calls)


# ------------------------------------------------------------------------------------------- bombs


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.fixture
def marker(tmp_path):
    """The file that a bomb makes; none may have gone off when the test ends."""
    marker = tmp_path / "unpickled"
    yield marker
    assert not marker.exists()


def files_below(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


@contextlib.contextmanager
def replaced(path: Path, content: bytes) -> Iterator[None]:
    good = path.read_bytes()
    path.write_bytes(content)
    yield
    path.write_bytes(good)


@pytest.mark.parametrize("how", ["pickle", "torch.load"])
def test_a_bomb_goes_off_where_it_is_unpickled(tmp_path, how):
    path, made = tmp_path / "bomb", tmp_path / "made"
    path.write_bytes(pickle.dumps(Bomb(made)))
    with contextlib.suppress(pickle.UnpicklingError, RuntimeError):  # it was no checkpoint
        pickle.loads(path.read_bytes()) if how == "pickle" else torch.load(path, weights_only=False)
    assert made.exists()


# --------------------------------------------------------------------------- trainings with labels


class Training(NamedTuple):
    """A command that trains, what resumes it, and the folder of what it keeps."""

    words: list[str]
    resume: list[str]
    kept: Path


def finetune(tmp_path: Path) -> Training:
    images = tiny.write_images(tmp_path / "images")
    words = ["finetune", dense_sets.write_encoder(tmp_path), "--data", images, "--out"]
    words += [tmp_path / "out", "--threads", 1, "--crop", 1]
    words += ["--set", "epochs=1", "batch=8", "rand_augment=null"]
    return Training(list(map(str, words)), ["--resume"], tmp_path / "out" / "trained")


def attentive(tmp_path: Path) -> Training:
    words, *rest = finetune(tmp_path)
    return Training(["attentive", *words[1:]], *rest)


def segment(tmp_path: Path) -> Training:
    pairs = dense_sets.write_pairs(tmp_path / "pairs", {"train": 4, "val": 1})
    words = ["segment", dense_sets.write_encoder(tmp_path), "--data", pairs, "--short-side", 40]
    words += ["--batch-size", 2, "--steps", 2, "--save", tmp_path / "out"]
    return Training(list(map(str, words)), ["--resume"], tmp_path / "out" / "trained")


def detect(tmp_path: Path) -> Training:
    if not vision_ops.installed() or importlib.util.find_spec("pycocotools") is None:
        pytest.skip("torchvision and pycocotools are an extra (detect)")
    vision_ops.load()
    folder = rectangles.write(tmp_path / "coco", "train", count=3, seed=1)
    rectangles.write(folder, "val", count=1, seed=2)
    words = ["detect", dense_sets.write_encoder(tmp_path), "--data", folder, "--train", "train"]
    words += ["--val", "val", "--image-size", 64, "--epochs", 1, "--batch-size", 3]
    words += ["--channels", 8, "--threads", 0, "--out", tmp_path / "out"]
    return Training(list(map(str, words)), [], tmp_path / "out" / "trained")


TRAININGS = {"finetune": finetune, "attentive": attentive, "segment": segment, "detect": detect}
SHORTER = [pytest.param(t, marks=pytest.mark.long if t != "finetune" else ()) for t in TRAININGS]
OTHER = (b"[" * 200_000, b"")  # instead of a file: JSON too deep, and nothing


@pytest.fixture
def training(request, tmp_path, monkeypatch, seed) -> Training:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return TRAININGS[getattr(request, "param", "finetune")](tmp_path)


def refused(words: list[str], path: Path, capsys) -> str:
    """The one line that says why, which names the file."""
    capsys.readouterr()
    assert main(words) == 2, path
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and str(path) in said and "\n" not in said, said
    return said


@pytest.mark.parametrize("training", SHORTER, indirect=True)
def test_whatever_lies_where_a_training_was_is_refused_by_name(training, marker, capsys):
    words, resume, kept = training
    assert main(words) == 0, capsys.readouterr().err
    left, used = files_below(kept / "checkpoints"), sorted(kept.glob("classifier.*"))
    names = {"encoder.json", "manifest.json", "shard_00000_of_00001.safetensors", "state.json"}
    assert {path.name for path in left} == names and {*left, *used} == {*files_below(kept)}
    endings = {".json", ".safetensors"} if words[0] in ("finetune", "attentive") else set()
    assert {path.suffix for path in used} == endings
    predict = ["predict", str(kept), words[3], "--out", str(kept.with_name("classes.csv"))]
    for path in left + used:
        cut = path.read_bytes()[:-1]
        for content in (pickle.dumps(Bomb(marker)), cut, *OTHER):
            with replaced(path, content):
                refused(predict if path in used else words + resume, path, capsys)
    assert main(words + resume) == 0
    assert main(predict) == (0 if used else 2)


@pytest.mark.parametrize("training", TRAININGS, indirect=True)
@pytest.mark.parametrize("asked", [True, False], ids=["resume", "anew"])
def test_what_an_earlier_version_saved_is_refused(training, marker, capsys, asked):
    words, resume, kept = training
    old = kept / "epoch_0001" / "training" / "mp_rank_00_model_states.pt"
    old = old if words[0] == "finetune" else kept.with_name("trained.pt")
    old.parent.mkdir(parents=True)
    old.write_bytes(pickle.dumps(Bomb(marker)))
    named = kept / "epoch_0001" if words[0] == "finetune" else old
    said = refused(words + (resume if asked else []), named, capsys)
    assert "was saved by an earlier version" in said and "to start anew" in said


def forge(checkpoint: Path, tensors: dict | None = None, **state) -> None:
    """Change a checkpoint's tensors or state.json, and have its manifest bear that out."""
    (shard,) = checkpoint.glob("shard_*")
    if tensors:
        save_file({**load_file(shard), **tensors}, shard)
    known = json.loads((checkpoint / "state.json").read_text()) | state
    (checkpoint / "state.json").write_text(json.dumps(known))
    stored.write_manifest(checkpoint, [stored.receipt(shard)])


FORGED = {
    "no facts": ({"facts": None}, {}, "saved by no such training"),
    "other facts": ({"facts": {"recipe": 1}}, {}, "another training: recipe was 1, is"),
    "a step of letters": ({"step": "x"}, {}, "cannot be resumed (TypeError"),
    "no count of updates": ({"optimizer_step": None}, {}, "cannot be resumed (TypeError"),
    "a weight of two columns": (
        {},
        {"master/norm.bias@0": torch.zeros(24, 2)},
        "cannot be resumed",
    ),
    "a weight too many": ({}, {"master/norm.bias@x": torch.zeros(1)}, "cannot be resumed"),
}


def test_a_forged_training_is_refused(training, marker, capsys):
    words, resume, kept = training
    assert main(words) == 0
    (checkpoint,) = (kept / "checkpoints").iterdir()
    for name, (state, tensors, why) in FORGED.items():
        shutil.copytree(checkpoint, kept / "good")
        forge(checkpoint, tensors, **state)
        assert why in refused(words + resume, checkpoint, capsys), name
        shutil.rmtree(checkpoint)
        (kept / "good").rename(checkpoint)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_ranks_refuse_together(training, marker):
    """And neither waits for the other."""
    words, resume, kept = training
    done = tiny.run(EVAL, *words, ranks=2)
    assert done.returncode == 0, done.stderr
    left = files_below(kept / "checkpoints")
    assert "shard_00001_of_00002.safetensors" in {path.name for path in left}
    for path in left:
        with replaced(path, pickle.dumps(Bomb(marker))):
            done = tiny.run(EVAL, *words, *resume, ranks=2)
        assert done.returncode and str(path) in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    assert tiny.run(EVAL, *words, *resume, ranks=2).returncode == 0


# ------------------------------------------------------------------------------- runs and features


def knn(images: Path, checkpoint: Path, out: Path, *options: str) -> int:
    words = ["knn", checkpoint, "--data", images, "--crop", 1, "--threads", 1, "--json", out]
    return main([*map(str, words), *options])


@pytest.mark.long
@pytest.mark.slow
def test_the_files_of_a_run(tmp_path, monkeypatch, marker, capsys):
    """What decides is refused, or named and the checkpoint before it is used; no more is read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config, run, good = tiny.write_config(tmp_path), tmp_path / "run", tmp_path / "good"
    assert tiny.train("--config", config).returncode == 0
    more = ["--config", config, "--resume", "auto", "--set", "run.epochs=3", "--accept-changes"]
    shutil.copytree(run, good, symlinks=True)
    for path in files_below(run):
        path.write_bytes(pickle.dumps(Bomb(marker)))
        encoder = path.parent == run and path.stem == "encoder"
        capsys.readouterr()
        status = knn(tmp_path / "images", run, tmp_path / "knn.json", "--no-cache")
        said = capsys.readouterr().err
        assert (status, str(path) in said) == ((2, True) if encoder else (0, False)), said
        newest = path.parent.name == "step_00000004"
        if newest:
            assert knn(tmp_path / "images", path.parent, tmp_path / "knn.json", "--no-cache") == 2
            assert str(path) in capsys.readouterr().err
        done = tiny.train(*more)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        assert (str(path) in done.stderr) == newest, done.stderr
        shutil.rmtree(run)
        shutil.copytree(good, run, symlinks=True)


def test_features_and_indexes_kept_on_disk_are_made_anew(tmp_path, monkeypatch, marker, seed):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images, encoder = tiny.write_images(tmp_path / "images"), dense_sets.write_encoder(tmp_path)
    out = tmp_path / "knn.json"

    def rows() -> list[dict]:
        assert knn(images, encoder, out) == 0
        return json.loads(out.read_text())["rows"]

    first, left = rows(), files_below(tmp_path / "cache")
    assert {path.suffix for path in left} >= {".safetensors", ".npz"}
    for path in left:
        path.write_bytes(pickle.dumps(Bomb(marker)))
        assert rows() == first


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_ranks_resume_from_the_checkpoint_before(tmp_path, marker):
    """A bomb instead of what one rank alone reads, then instead of all but that checkpoint."""
    config, run = tiny.write_config(tmp_path), tmp_path / "run"
    done = tiny.train("--config", config, ranks=2)
    assert done.returncode == 0, done.stderr
    newest, good = run / "checkpoints" / "step_00000004", run / "checkpoints" / "step_00000002"
    shutil.copytree(run, tmp_path / "good", symlinks=True)
    assert "shard_00001_of_00002.safetensors" in {path.name for path in files_below(newest)}
    for bombed in [newest / "shard_00001_of_00002.safetensors"], files_below(run):
        for path in bombed:
            if good not in path.parents:
                path.write_bytes(pickle.dumps(Bomb(marker)))
        done = tiny.train("--config", config, "--resume", "auto", ranks=2)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        assert str(newest) in done.stderr, done.stderr
        shutil.rmtree(run)
        shutil.copytree(tmp_path / "good", run, symlinks=True)


# ------------------------------------------------------------------------------ ablate and export


def test_the_files_of_an_ablation(tmp_path, marker, capsys, monkeypatch):
    """Those that are its input are refused by name; what it writes is written anew."""
    base, out = tiny.write_config(tmp_path, eval={"k": 3}), tmp_path / "out"
    shared = {"eval.online.data": str(tmp_path / "images"), "data.decoder": "pillow"}
    rows = {"first": {}, "second": {"optim.lr": 1e-3}}
    file = tmp_path / "two.json"
    file.write_text(json.dumps({"base": str(base), "set": shared, "seeds": [0], "rows": rows}))
    ablation = ablate.read(str(file))
    for trial in ablate.trials_of(ablation, out):
        trial.folder.mkdir(parents=True)
        row = {"step": 0, "epoch": 0.0, "time_s": 1.0, **dict.fromkeys(ablate.MEASURES, 10.0)}
        (trial.folder / "log.jsonl").write_text(json.dumps(row) + "\n")
        (trial.folder / "encoder.safetensors").write_bytes(b"")
        made = configuration.load(ablation.base, ablation.settings_of(trial))
        (trial.folder / "config.json").write_text(made.to_json())
    words = [str(file), "--out", str(out), "--table"]
    assert ablate.main(words) == 0, capsys.readouterr().err
    monkeypatch.setattr(ablate, "draw", lambda ablation, trials, path: path)  # only written
    for path in [file, base, *files_below(out)]:
        kept = path.read_bytes()
        for content in (pickle.dumps(Bomb(marker)), *OTHER):
            path.write_bytes(content)
            capsys.readouterr()
            status, err = ablate.main(words), capsys.readouterr().err
            asked = path in (file, base) or path.name in ("config.json", "log.jsonl")
            if asked and content:
                assert status and str(path) in err and "Traceback" not in err, (path, err)
            path.write_bytes(kept)
    assert ablate.main(words) == 0


@pytest.mark.parametrize("form", ["safetensors", "hf"])
def test_what_export_reads_and_writes(tmp_path, marker, capsys, seed, form):
    """Instead of a run's files, of an encoder's and of an export's: none runs."""
    encoder = Encoder(image_size=24, patch_size=4, width=24, depth=1, heads=3)
    run, out = tiny.write_run(tmp_path, encoder), tmp_path / "out"
    (run / "eval").mkdir()
    record = {"task": "knn", "made": "now", "settings": {}, "headings": {}, "rows": []}
    (run / "eval" / "knn-0.json").write_text(json.dumps(record))

    def export(source: Path, to: Path) -> int:
        capsys.readouterr()
        shutil.rmtree(to, ignore_errors=True)
        return export_main([str(source), "--to", form, "--out", str(to)])

    if not importlib.util.find_spec("transformers") and form == "hf":
        pytest.skip("transformers is an extra (export)")
    assert export(run, out) == 0, capsys.readouterr().err
    for path in files_below(run):
        with replaced(path, pickle.dumps(Bomb(marker))):
            status, err = export(run, tmp_path / "again"), capsys.readouterr().err
        assert status == 0 or (err.startswith("error: ") and str(path) in err), (path, err)
        assert status == 2 or not path.name.startswith("encoder"), path
    for path in files_below(out):
        with replaced(path, pickle.dumps(Bomb(marker))):
            status, err = export(out, tmp_path / "again"), capsys.readouterr().err
        assert (status == 0) == (path.name == "model_card.md"), path
        assert status == 0 or str(path) in err, (path, err)
