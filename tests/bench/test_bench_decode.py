"""bench/decode.py: the loader beside DALI's own reader, and the memory of many epochs."""

import json
import sys

import pytest
import tiny
import torch

sys.path.insert(0, str(tiny.ROOT / "bench"))  # no package: its scripts import each other by name

import decode

CPU = torch.device("cpu")


def test_sides_take_turns_and_only_what_is_asked_for_is_timed():
    made = []

    def side(name):
        def begin():
            for _ in range(7):
                made.append(name)
                yield torch.zeros(4, 1)

        return begin

    found = decode.take_turns({"ours": side("a"), "DALI": side("b")}, 2, 5, 2, CPU)
    assert made == [*"a" * 7, *"b" * 7] * 2
    assert all(len(values) == 2 for figures in found.values() for values in figures.values())


def test_the_ratio_is_of_the_medians():
    ours = {"images_per_s": [90.0, 10.0, 100.0], "cpu_ms_per_image": [2.0, 2.0, 8.0]}
    theirs = {"images_per_s": [100.0, 100.0, 500.0], "cpu_ms_per_image": [4.0, 1.0, 4.0]}
    row = decode.summary({"ours": ours, "DALI": theirs})
    assert row["ours_over_dali"] == {"images_per_s": 0.9, "cpu_ms_per_image": 0.5}
    assert "pillow_over_ours" not in row
    pillow = {"images_per_s": [45.0], "cpu_ms_per_image": [3.0]}
    row = decode.summary({"ours": ours, "DALI": theirs, "Pillow": pillow})
    assert row["pillow_over_ours"] == {"images_per_s": 0.5, "cpu_ms_per_image": 1.5}


@pytest.mark.long
@pytest.mark.slow
def test_it_measures_a_folder(tmp_path):
    config, out = tiny.write_config(tmp_path), tmp_path / "decode.json"
    done = tiny.run(
        tiny.ROOT / "bench" / "decode.py", "--data-path", tmp_path / "images", "--config", config,
        "--turns", "2", "--batches", "2", "--epochs", "3", "--json", out, "--pillow",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    row = json.loads(out.read_text())
    assert (row["images"], row["batch"], len(row["resident_mib"])) == (40, 8, 3)
    assert all(mib > 50 for mib in row["resident_mib"])
    for ratios in ("ours_over_dali", "pillow_over_ours"):
        assert all(ratio > 0 for ratio in row[ratios].values())
    assert "MiB held after each epoch" in done.stdout


def test_wrong_settings_are_told(tmp_path, capsys):
    with pytest.raises(SystemExit):
        decode.parse(["--data-path", str(tmp_path / "none")])
    assert "none: no folder" in capsys.readouterr().err
