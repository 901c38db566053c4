"""The limits of a run's data section hold wherever its images are read: bit_depth, max_pixels."""

import json
import shutil
from dataclasses import fields
from types import SimpleNamespace

import dense_sets
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import cjepa_fast as cj
from cjepa_fast.checkpoint.encoders import limits_of, save_encoder, write_encoder
from cjepa_fast.data import sources
from cjepa_fast.data.sources import LIMITS, open_images
from cjepa_fast.eval import online
from cjepa_fast.eval.__main__ import main
from cjepa_fast.eval.dense import segment_training
from cjepa_fast.eval.dense.segmenter import Segmenter
from cjepa_fast.eval.features import extract
from cjepa_fast.interop import huggingface
from cjepa_fast.model.vit import Encoder
from cjepa_fast.runtime.files import read_tensors
from cjepa_fast.tools import report_figures, report_run

OWN = {"bit_depth": 12, "max_pixels": 2000, "min_jpeg": 0.5}


def fresh() -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(24, 4, 24, 4, 2).eval()
    encoder.mean, encoder.std = (0.5,) * 3, (0.25,) * 3
    return encoder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(a run with limits of its own, twelve images of 12 bits in two classes)."""
    folder = tmp_path_factory.mktemp("limits")
    values = np.random.default_rng(0)
    for i in range(12):
        path = folder / "deep" / f"class_{i % 2}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values.integers(0, 4096, (32, 40), dtype=np.uint16)).save(path)
    online = {"data": str(folder / "deep")}
    data = {**OWN, "path": str(folder / "deep")}
    run = tiny.write_run(folder / "runs", fresh(), data=data, eval={"online": online})
    return run, folder / "deep"


@pytest.fixture
def seen(monkeypatch):
    """Limits that a set was opened with; nothing follows it."""
    found = []

    def opened(self, parts, limits=LIMITS, labelled=False):
        found.append(limits)
        raise ValueError("seen")

    monkeypatch.setattr(sources.ImageSet, "__init__", opened)
    return found


COMMANDS = {
    "all --data": [], "knn --data": [], "linear --data": [], "semi --data": [],
    "attentive --data": [], "finetune --data": [], "clevr --data": [], "collapse --data": [],
    "embed": ["--out", "a.npz"], "retrieve --data": ["--out", "a.png"],
    "attention --images": ["--out", "a.png"], "pca --images": ["--out", "a.png"],
    "masks --images": ["--out", "a.png"],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_reads_by_the_run_s_limits(made, seen, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (run, images), (task, *option) = made, command.split()
    assert main([task, str(run), *option, str(images), *COMMANDS[command]]) == 2
    assert seen == [LIMITS._replace(**OWN)]


def test_segment_reads_by_the_run_s_bit_depth(made, seen, tmp_path):
    """And resumes by no other. The other limits are as usual."""
    data = dense_sets.write_pairs(tmp_path / "data", {"train": 2, "val": 1})
    assert main(["segment", str(made[0]), "--data", str(data)]) == 2
    assert seen == [LIMITS._replace(bit_depth=12)]
    images = SimpleNamespace(fingerprint="", limits=seen[0])
    model = Segmenter(fresh(), "linear", 2, layers=1, frozen=True)
    recipe = segment_training.Recipe(*[1] * len(fields(segment_training.Recipe)))
    classes = SimpleNamespace(names=("a", "b"))
    facts = segment_training._facts(model, SimpleNamespace(images=images), classes, recipe)
    assert facts["bit_depth"] == 12


def test_so_do_the_evaluation_while_training_and_the_report(made, seen):
    run, _ = made
    config = cj.config.load_run(run)
    with pytest.raises(ValueError, match="seen"):
        online.build_online(config, torch.device("cpu"), torch.float32, 2)
    record = report_run.RunRecord("run", run, config, [], [])
    assert record.tested_on is None
    report_figures.sections([record], None)
    assert seen == [LIMITS._replace(**OWN)] * 3


def test_features_are_of_all_twelve_bits(made, tmp_path, monkeypatch):
    """And are kept apart from those of another bit depth."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CJEPA_DECODER", "pillow")
    (run, folder), encoder = made, cj.load_encoder(made[0])
    limits = LIMITS._replace(**OWN)
    own = limits, limits._replace(bit_depth=None)
    bright, dark = (open_images(folder, limits=x, log=lambda line: None) for x in own)
    found = [extract(encoder, x, crop=0.875, cache=tmp_path / "f")[0] for x in (dark, bright)]
    assert not torch.allclose(*found) and len([*(tmp_path / "f").iterdir()]) == 2
    out = tmp_path / "a.safetensors"
    assert main(["embed", str(run), str(folder), "--out", str(out)]) == 0
    assert torch.equal(read_tensors(out)["features"], found[1])
    files = [folder / bright.name(i) for i in range(12)]
    arrays = [np.array(Image.open(file)) for file in files]
    assert arrays[0].dtype == np.uint16
    tensors = [torch.from_numpy(array)[None] for array in arrays]
    for given in (files, arrays, tensors, [Image.open(file) for file in files]):
        torch.testing.assert_close(encoder.embed(given), found[1], rtol=0, atol=1e-4)


def test_parts_of_another_bit_depth_are_not_resumed(made, tmp_path, capsys):
    """Nor those of a bit depth by an encoder that has none."""
    (run, folder), out = made, tmp_path / "a.npz"
    parts = tmp_path / "a.npz.parts"
    for before, now in ((12, None), (None, 12)):
        parts.mkdir()
        config = json.loads((run / "config.json").read_text())
        config["data"]["bit_depth"] = now
        (tmp_path / "run").mkdir(exist_ok=True)
        shutil.copy(run / "encoder.safetensors", tmp_path / "run")
        shutil.copy(run / "encoder.json", tmp_path / "run")
        (tmp_path / "run" / "config.json").write_text(json.dumps(config))
        (parts / "facts.json").write_text(json.dumps({"bit_depth": before} if before else {}))
        assert main(["embed", str(tmp_path / "run"), str(folder), "--out", str(out)]) == 2
        assert "bit_depth" in capsys.readouterr().err
        shutil.rmtree(parts)


def test_a_checkpoint_alone_and_a_run_older_than_a_limit_say_theirs(tmp_path):
    saved = {"data": {"bit_depth": 12, "max_pixels": 7}, "model": {}, "run": {}}
    for folder, file, text in (
        ("step", "state.json", {"config": saved}),
        ("run", "config.json", saved),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text(json.dumps(text))
        found = limits_of(tmp_path / folder)
        assert (found.bit_depth, found.max_pixels, found.min_jpeg) == (12, 7, LIMITS.min_jpeg)


def test_an_encoder_takes_its_limits_along(made, tmp_path, monkeypatch):
    """In the .json of its weights; where that has none, they are as usual, and so is the file."""
    run, _ = made
    encoder = cj.load_encoder(run)
    assert encoder.limits == LIMITS._replace(**OWN)
    save_encoder(encoder, tmp_path / "encoder.safetensors")
    alone = cj.load_encoder(tmp_path / "encoder.safetensors")
    assert alone.limits == encoder.limits and alone.transform.limits.bit_depth == 12
    assert cj.load_encoder(tmp_path).limits == encoder.limits
    huggingface.write_encoder(encoder, tmp_path, 0.875)
    assert cj.load_encoder(tmp_path).limits == encoder.limits
    monkeypatch.chdir(tmp_path)
    assert cj.load_encoder(".").limits == encoder.limits
    huggingface.write_encoder(fresh(), tmp_path, 0.875)
    assert cj.load_encoder(tmp_path).limits == LIMITS
    save_encoder(fresh(), tmp_path / "plain.safetensors")
    assert "limits" not in json.loads((tmp_path / "plain.json").read_text())
    assert cj.load_encoder(tmp_path / "plain.safetensors").limits == LIMITS
    described = json.loads((tmp_path / "encoder.json").read_text())
    for wrong in ({"bit_depth": 99}, {"bits": 12}, {"max_pixels": "9"}, [12]):
        (tmp_path / "encoder.json").write_text(json.dumps({**described, "limits": wrong}))
        with pytest.raises(ValueError, match=r"encoder\.json: its limits .* are none of the data"):
            cj.load_encoder(tmp_path / "encoder.safetensors")


def test_the_encoder_that_a_training_writes_has_them(made, tmp_path, monkeypatch):
    run, _ = made
    monkeypatch.setattr("cjepa_fast.checkpoint.encoders._read", lambda *_: fresh())
    write_encoder(tmp_path / "a.safetensors", "target", run / "checkpoints" / "step_00000007")
    assert cj.load_encoder(run).limits.bit_depth == 12
    assert json.loads((tmp_path / "a.json").read_text())["limits"] == OWN


@pytest.mark.parametrize("task", ["pca --images", "retrieve --data"])
def test_a_second_run_with_other_limits_is_named(made, seen, task, tmp_path, capsys):
    run, folder = made
    other = tiny.write_run(tmp_path, fresh())
    words = [str(folder), "--count", "2", "--out", str(tmp_path / "a.png")]
    task, option = task.split()
    assert main([task, str(run), str(other), option, *words]) == 2
    said = capsys.readouterr().err
    assert f"{other} was trained with data.max_pixels 89478485" in said and str(run) in said
