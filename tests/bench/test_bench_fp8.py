"""bench/fp8.py: at toy size, what it says is what it measured."""

import importlib.util
import json
import sys

import pytest
import tiny
import torch

from cjepa_fast.model import fp8
from cjepa_fast.model.vit import Encoder

sys.path.insert(0, str(tiny.ROOT / "bench"))  # no package: its scripts import each other by name


# A second thread gains these small matmuls nothing, and waits where the cores are busy.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_fp8", tiny.ROOT / "bench" / "fp8.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_measures_and_writes_what_it_saw(bench, tmp_path, capsys):
    out = tmp_path / "new" / "fp8.json"
    assert bench.main(["--config", "vit_b", "vit_t", "--seconds", "0", "--json", str(out)]) == 0
    saved = json.loads(out.read_text())
    assert [row["encoder"] for row in saved["rows"]] == ["vit_b", "vit_t"]
    for row in saved["rows"]:
        assert 0.001 < row["errors"]["bf16"] < 0.02 and 0.001 < row["errors"]["fp8"] < 0.05
        assert row["ms"].keys() == row["tflops"].keys() == {"bf16", "fp8", "fp8, fast sums"}
        assert row["speedup"]["fp8"] == pytest.approx(row["ms"]["bf16"] / row["ms"]["fp8"])
    assert not fp8.FAST_SUMS
    assert capsys.readouterr().out.count("| vit_") == 2


def test_the_error_is_that_of_8_bits(bench, monkeypatch):
    """None where the layers stay as they were."""
    monkeypatch.setattr(fp8, "linears_to_fp8", lambda encoder: {})
    row = bench.row_of("x", Encoder(32, 8, 48, 1, 3), 2, torch.device("cpu"), 0.0)
    assert row["errors"]["fp8"] == 0 < row["errors"]["bf16"]


def test_a_trained_encoder_is_scored_on_as_many_images_as_asked_for(bench, monkeypatch, tmp_path):
    one = ("a run", Encoder(32, 8, 48, 1, 3), 2)
    monkeypatch.setattr(bench, "encoders", lambda names, trained, device: [one])
    monkeypatch.setattr(bench, "labelled_splits", lambda *asked: [asked])
    monkeypatch.setattr(bench, "row_of", lambda *args: {"splits": args[-1]})
    monkeypatch.setattr(bench, "table", lambda rows, about: "")
    out = tmp_path / "fp8_trained.json"
    options = ["--encoder", "a run", "--data", "here", "--test", "there", "--most", "7"]
    assert bench.main([*options, "--json", str(out)]) == 0
    assert json.loads(out.read_text())["rows"] == [{"splits": [["here", "there", 7, 7]]}]


def test_a_missing_encoder_is_told(bench, capsys, tmp_path):
    assert bench.main(["--encoder", str(tmp_path)]) == 2
    assert "error: " in capsys.readouterr().err
