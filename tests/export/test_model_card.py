"""model_card.md: what is known of an encoder is told, and what is not is said to be unknown."""

import json
import re

import pytest
import tiny
import torch

from cjepa_fast import load_encoder
from cjepa_fast.eval.features import digest
from cjepa_fast.export.__main__ import export
from cjepa_fast.export.card import UNKNOWN, card
from cjepa_fast.export.formats import FORMATS, Source
from cjepa_fast.export.origin import origin_of
from cjepa_fast.interop import huggingface

yaml = pytest.importorskip("yaml")

RECORD = {
    "task": "knn",
    "made": "2026-01-02T03:04:05.678+00:00",
    "command": "cjepa-eval knn /home/me/run --data /home/me/flowers",
    "versions": {"torch": "2.13.0"},
    "checkpoint": "/home/me/run",
    "which": "target",
    "settings": {"data": "/home/me/flowers", "test": None, "k": 20, "bf16": False},
    "headings": {"train": "train", "top1": "kNN %", "linear": "linear %"},
    "rows": [
        {"encoder": "untrained", "train": 1020, "top1": 12.5},
        {"encoder": "trained", "train": 1020, "top1": 43.218},
    ],
}


@pytest.fixture
def run(tmp_path, seed):
    return tiny.write_run(tmp_path, tiny.uneven_encoder(), images="1f3a")


def card_of(path, form: str = "hf", which: str = "target") -> str:
    return card(Source(load_encoder(path), which, 1.0), origin_of(path), form, "flowers", [])


def section(text: str, name: str) -> str:
    return text.split(f"## {name}\n\n")[1].split("\n\n## ")[0]


def rows_of(table: str) -> dict[str, str]:
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    return {cells[0]: " | ".join(cells[1:]) for cells in lines}


@pytest.mark.parametrize("form", FORMATS)
def test_the_head_is_what_the_hub_reads(run, form):
    _, head, body = card_of(run, form).split("---\n", 2)
    facts = yaml.safe_load(head)
    assert facts["pipeline_tag"] == "image-feature-extraction" and "i-jepa" in facts["tags"]
    library = {"hf": "transformers", "torch": "pytorch", "safetensors": "cjepa_fast"}
    assert facts["library_name"] == library.get(form, form)
    assert "license" not in facts and "license" in head and "To be filled in" in body
    assert body.startswith("\n# flowers\n")


def test_the_training_of_a_run(run):
    text = card_of(run)
    facts = rows_of(section(text, "Training"))
    assert facts["images"] == "images, 40 images, fingerprint 1f3a"
    duration = "7 steps of 16 images, 1.75 of 2 epochs, 112 images seen; 2 ranks"
    assert facts["duration"] == duration
    assert "beta 0.001, sim 25, std 25, cov 1" in facts["objective"]
    # the log's row at the checkpoint's step, neither the one before nor the one after
    assert "At step 7:" in text and facts["loss"] == "prediction" and facts["0.875"] == "0.5"
    assert "by C-JEPA" in text and "EMA" in text
    assert "2 blocks of width 24 with 3 heads, 15,6" in text
    assert str(run.parent) not in text  # no paths of this machine


def test_without_vicreg_it_is_i_jepa_and_the_context_is_named(tmp_path):
    run = tiny.write_run(tmp_path, tiny.uneven_encoder(), loss={"vicreg": {"beta": 0}})
    text = card_of(run, which="context")
    assert "by I-JEPA" in text and "C-JEPA" not in text and "the context encoder" in text


def test_sigreg_is_told_with_its_own_settings(tmp_path):
    loss = {"regulariser": "sigreg", "sigreg": {"beta": 0.25, "views": "positions"}}
    run = tiny.write_run(tmp_path, tiny.uneven_encoder(), loss=loss)
    text = card_of(run)
    objective = rows_of(section(text, "Training"))["objective"]
    assert objective.endswith('SIGReg on "positions": beta 0.25, directions 256, knots 17, t_max 3')
    assert "by I-JEPA with SIGReg (arXiv 2301.08243, 2511.08544)" in text and "C-JEPA" not in text


def test_starting_weights_are_named_and_not_said_to_be_without_labels(tmp_path, run):
    text = card_of(run)
    assert "pretrained without labels by C-JEPA" in text and "starting weights" not in text
    start = str(tmp_path / "mine" / "deit_s.pth")
    started = tiny.write_run(tmp_path / "x", tiny.uneven_encoder(), run={"init_from": start})
    text = card_of(started)
    assert rows_of(section(text, "Training"))["starting weights"] == "deit_s.pth"
    said = "from starting weights (see Training) without labels in this training by C-JEPA"
    assert said in text and "pretrained without labels" not in text and "mine" not in text
    (started / "checkpoints").rename(tmp_path / "aside")  # nothing says what it is from
    assert "A pretrained Vision Transformer: the target" in card_of(started / "encoder.safetensors")


def test_a_checkpoint_is_told_as_it_was(run):
    """An earlier one of the run, and one that was taken out of it."""
    earlier = run / "checkpoints" / "step_00000005"
    earlier.mkdir()
    state = json.loads((run / "checkpoints" / "step_00000007" / "state.json").read_text())
    (earlier / "state.json").write_text(json.dumps({**state, "step": 5, "epoch": 1.25}))
    origin = origin_of(earlier)
    assert (origin.state["step"], origin.log["step"]) == (5, 5)
    alone = earlier.rename(run.parent / "elsewhere")
    assert origin_of(alone).state["step"] == 5 and origin_of(alone).log == {}
    assert origin_of(run / "encoder.safetensors").state["step"] == 7
    assert origin_of(run / "previous_encoder.safetensors").state == {}


def test_evaluations_of_the_run_become_tables(run):
    assert section(card_of(run), "Evaluation") == "None is known."
    (run / "eval").mkdir()
    own = {**RECORD, "weights": digest(load_encoder(run))}
    (run / "eval" / "knn-0a1b.json").write_text(json.dumps(own))
    (run / "eval" / "knn-0a1c.json").write_text(json.dumps({**own, "weights": "others"}))
    collapse = {"headings": {"rankme": "RankMe"}, "rows": [{"encoder": "trained", "rankme": 8}]}
    later = {**own, "task": "collapse", "made": "2026-02-02", **collapse}
    (run / "eval" / "collapse-1.json").write_text(json.dumps(later))
    first, second = section(card_of(run), "Evaluation").split("\n\n`")
    assert first.startswith("`knn` of `run`, target encoder (data flowers, k 20), 2026-01-02:")
    assert rows_of(first)["encoder"] == "train | kNN %"  # no row has a linear probe
    assert rows_of(first)["trained"] == "1020 | 43.22"
    assert second.startswith("collapse` of") and rows_of(second)["trained"] == "8"


EVIL = "x\n# Owned\n<img onerror=alert(1)>|`[a](b)"


def test_what_comes_from_outside_stays_text(run):
    """A path, a version, a name: none begins a heading, an image, a link or a cell."""
    newest = next((run / "checkpoints").iterdir())
    state = json.loads((newest / "state.json").read_text())
    state["config"]["data"]["path"] = state["images"] = state["versions"]["torch"] = EVIL
    (newest / "state.json").write_text(json.dumps(state))
    (run / "eval").mkdir()
    own = {**RECORD, "weights": digest(load_encoder(run, "target")), "checkpoint": EVIL}
    own |= {"settings": {"data": EVIL}, "rows": [{"encoder": EVIL, "top1": EVIL}], "which": EVIL}
    (run / "eval" / "knn-0a1b.json").write_text(json.dumps(own | {"task": EVIL, "made": EVIL}))
    text = card(Source(load_encoder(run), "target", 1.0), origin_of(run), "hf", EVIL, [])
    assert "\n# Owned" not in text and r"\# Owned" in text
    spans = re.sub(r"(?<!\\)`[^`\n]*`", "", text.replace("```python", "").replace("```", ""))
    assert not re.search(r"(?<!\\)<img|(?<!\\)\[a", spans), spans
    assert all(line.endswith(" |") for line in text.splitlines() if line.startswith("| "))


def test_of_an_encoder_alone_what_is_unknown_is_said(run, tmp_path):
    export(run, "safetensors", tmp_path / "alone")
    export(tmp_path / "alone", "timm", tmp_path / "again")
    text = (tmp_path / "again" / "model_card.md").read_text()
    assert section(text, "Training").startswith("Unknown: it was exported from an encoder's files")
    assert section(text, "Evaluation") == "None is known."
    versions = rows_of(section(text, "Versions"))
    assert "exported with" in versions and "trained with" not in versions


@pytest.mark.parametrize("name", ["context_encoder", "previous_2_context_encoder"])
def test_a_context_encoder_s_file_leaves_as_the_context_encoder(run, tmp_path, name):
    for suffix in (".json", ".safetensors"):
        (run / f"context_encoder{suffix}").rename(run / f"{name}{suffix}")
    for which in ("target", "context"):  # the default, and what it is
        export(run / f"{name}.safetensors", "safetensors", tmp_path / which, which)
        assert (tmp_path / which / "context_encoder.safetensors").is_file()
        assert not (tmp_path / which / "encoder.safetensors").exists()
        text = (tmp_path / which / "model_card.md").read_text()
        assert ": the context encoder, " in text and "the target encoder" not in text
    with pytest.raises(ValueError, match="holds a target encoder"):
        export(run / "encoder.safetensors", "safetensors", tmp_path / "other", "context")


def test_a_run_is_known_by_its_name_in_runs(tmp_path, monkeypatch, seed):
    tiny.write_run(tmp_path / "runs", tiny.uneven_encoder())
    monkeypatch.chdir(tmp_path)
    assert origin_of("run").state["step"] == 7 and UNKNOWN not in card_of("run")


def test_arrays_in_their_own_units_are_no_shares_of_a_range(tmp_path, seed):
    grey = {"channels": 1, "mean": [-500.0], "std": [300.0]}
    run = tiny.write_run(tmp_path, tiny.uneven_encoder(channels=1), data=grey)
    used = section(card_of(run), "Use")
    assert "Images are of 1 channel," in used and "the numbers of their arrays normalised" in used
    assert "Image.open" not in used and "0..1" not in used
    huggingface.write_encoder(load_encoder(run), tmp_path, 1.0)
    assert json.loads((tmp_path / huggingface.PROCESSOR).read_text())["do_rescale"] is False


def test_bits_in_use_are_told(tmp_path, run):
    assert "values in 0..1 normalised" in section(card_of(run), "Use")
    deep = tiny.write_run(tmp_path / "x", tiny.uneven_encoder(), data={"bit_depth": 12})
    used = section(card_of(deep), "Use")
    assert "values in 0..1 (of more than 8 bits: value / 4095) normalised" in used


def test_the_versions_name_the_code_s_commit(run, monkeypatch):
    monkeypatch.setattr("cjepa_fast.export.card.own_commit", lambda: "abc123+changes")
    versions = rows_of(section(card_of(run), "Versions"))
    assert versions["exported with"].endswith("abc123+changes")
    assert torch.__version__ in versions["exported with"]
    assert versions["trained with"] == "0.1.0 | 2.13.0 | 3.11.7 | unknown"
