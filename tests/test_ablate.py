"""Ablations: what is trained, that it goes on, and what the table says."""

import json
import statistics

import pytest
import tiny

from cjepa_fast import ablate, config
from cjepa_fast.config import ConfigError

ROWS = {"none": {"loss.vicreg.beta": 0}, "All of it": {}}


@pytest.fixture
def file(tmp_path):
    tiny.write_images(tmp_path / "images", count=40, classes=2)
    base = tiny.write_config(tmp_path, run={"epochs": 1}, eval={"k": 3})
    online = {"data": str(tmp_path / "images"), "every_epochs": 1, "share": 1.0}
    shared = {f"eval.online.{key}": value for key, value in online.items()}
    path = tmp_path / "two.json"
    path.write_text(json.dumps({"base": str(base), "set": shared, "seeds": [0, 1], "rows": ROWS}))
    return path


def finish(trial, *marks) -> None:
    """As a training with these marks of kNN leaves its folder."""
    trial.folder.mkdir(parents=True)
    rows = [
        {"step": i, "epoch": float(i), "time_s": 1.0, **dict.fromkeys(ablate.MEASURES, mark)}
        for i, mark in enumerate(marks)
    ]
    (trial.folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (trial.folder / "encoder.safetensors").write_bytes(b"")


def test_the_table_has_means_spreads_and_paired_differences(file, tmp_path):
    ablation = ablate.read(str(file))
    trials = ablate.trials_of(ablation, tmp_path / "out")
    ends = {("none", 0): 20.0, ("none", 1): 30.0, ("All of it", 0): 23.0, ("All of it", 1): 35.0}
    for trial in trials:
        finish(trial, 10.0 + trial.seed, ends[trial.row, trial.seed])
    untrained, none, whole = ablate.table(ablation, trials)
    assert (untrained["row"], untrained["knn"]) == ("untrained", 10.5)
    assert (none["knn"], none["knn_std"]) == (25.0, statistics.stdev([20, 30]))
    assert "knn_gain" not in none
    assert (whole["knn_gain"], whole["knn_gain_std"]) == (4.0, statistics.stdev([3, 5]))
    assert "29.00 +- 8.49 (+4.00 +- 1.41)" in ablate.markdown(ablation, [untrained, none, whole])
    assert ablate.draw(ablation, trials, tmp_path / "c.png").stat().st_size > 5000


def test_a_seed_that_only_one_row_has_is_not_compared(file, tmp_path):
    ablation = ablate.read(str(file))
    trials = ablate.trials_of(ablation, tmp_path / "out")
    for trial in trials:
        if (trial.row, trial.seed) != ("All of it", 1):
            finish(trial, 10.0, 20.0 if trial.row == "none" else 23.0)
    *_, whole = ablate.table(ablation, trials)
    assert (whole["seeds"], whole["knn_gain"], whole["knn_gain_std"]) == (1, 3.0, None)


@pytest.mark.slow
def test_it_trains_what_is_missing_and_no_more(file, tmp_path, capsys):
    out = tmp_path / "out"
    ablation = ablate.read(str(file))
    done, *_ = ablate.trials_of(ablation, out)
    finish(done, 10.0, 90.0)
    sets = ["--set", "mask.min_keep=3"]
    assert ablate.main([str(file), "--out", str(out), "--parallel", "2", *sets]) == 0
    said = capsys.readouterr().out
    assert "3 of 4 trainings to do, 2 at a time" in said
    for trial in ablate.trials_of(ablation, out)[1:]:
        made = json.loads((trial.folder / "config.json").read_text())
        assert made["run"]["seed"] == trial.seed and made["mask"]["min_keep"] == 3
        assert made["loss"]["vicreg"]["beta"] == (0 if trial.row == "none" else 0.001)
        assert len(ablate.marks_of(trial)) == 2
    lines = json.loads((out / "table.json").read_text())
    assert [line["seeds"] for line in lines] == [2, 2, 2]
    none = [trial for trial in ablate.trials_of(ablation, out) if trial.row == "none"]
    ends = [ablate.marks_of(trial)[-1]["knn"] for trial in none]
    assert ends[0] == 90.0 and lines[1]["knn"] == statistics.fmean(ends)
    assert (out / "curves.png").is_file()
    assert ablate.main([str(file), "--out", str(out), *sets]) == 0
    assert "0 of 4 trainings to do" in capsys.readouterr().out


@pytest.mark.slow
def test_a_training_that_fails_is_named(file, tmp_path, capsys):
    file.write_text(json.dumps({**json.loads(file.read_text()), "seeds": [1]}))
    out = tmp_path / "out"
    broken = ["--set", f"data.path={tmp_path / 'nowhere'}"]
    assert ablate.main([str(file), "--out", str(out), "--parallel", "2", *broken]) == 1
    said = capsys.readouterr().out
    assert said.count("failed; see ") == 2
    assert "nowhere" in (out / "all_of_it" / "seed_1" / "said.txt").read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": {"x": {"loss.vicreg.bate": 0}}}, "row 'x': loss.vicreg.bate = 0: no such key"),
        ({"set": {}}, "eval.online.data=SET"),
        ({"rows": {"a b": {}, "a-b": {}}}, "differ in their names"),
        ({"seeds": []}, "takes a seed"),
        ({"more": 1}, "must be an object of base, rows, seeds, set"),
    ],
)
def test_a_file_that_is_wrong_is_refused(file, change, said):
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ConfigError, match=said):
        ablate.read(str(file))


def test_an_unknown_one_is_told_what_there_is():
    with pytest.raises(ConfigError, match="vicreg"):
        ablate.read("vicrag")


@pytest.mark.parametrize("path", [*(config.configs_folder() / "ablations").glob("*.json")])
def test_shipped_ablations_load(path):
    ablation = ablate.read(path.stem)
    assert len(ablation.seeds) == 3 and len(ablation.rows) >= 2
