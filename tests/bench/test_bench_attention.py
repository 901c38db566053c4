"""bench/attention.py: every kernel at the shapes at which a run would choose one."""

import json
import sys

import pytest
import tiny
import torch

from cjepa_fast.config import load
from cjepa_fast.model import attention_trial as kernels
from cjepa_fast.training import build

sys.path.insert(0, str(tiny.ROOT / "bench"))  # no package: its scripts import each other by name

import attention as bench


def test_each_kernel_is_tried_at_the_runs_own_shapes(tmp_path, capsys):
    path, out = str(tiny.write_config(tmp_path)), tmp_path / "attention.json"
    assert bench.main(["--config", path, "--batch-size", "2", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    masks = build.build_masks(load(path))(0, 0, torch.arange(2))
    K, (M, P) = masks.context_idx_BK.shape[1], masks.target_idx_BMP.shape[1:]
    shapes = {row["part"]: (row["sequences"], row["keys"], row["trained"]) for row in found["rows"]}
    assert shapes == {
        "target": (2, 36, False), "context": (2, K, True), "predictor": (2 * M, K + P, True),
    }  # fmt: skip
    for row in found["rows"]:
        assert {"plain", "sdpa"} <= row["ms"].keys() <= set(kernels.installed())
        assert row["fastest"] == min(row["ms"], key=row["ms"].get)
    assert found["batch"] == 2 and found["commit"] != ""
    text = capsys.readouterr().out
    assert "sdpa" in text and len(text.splitlines()) == 4


@pytest.mark.parametrize("wrong", [["--config", "vit_x"], ["--set", "model.heads=5"]])
def test_wrong_settings_are_told(capsys, wrong):
    assert bench.main(["--config", "vit_t", *wrong]) == 2
    assert "error" in capsys.readouterr().err
