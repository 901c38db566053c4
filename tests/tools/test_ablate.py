"""Ablations: what is trained, that it resumes, and what the table says."""

import json
import statistics
import threading

import pytest
import test_run
import tiny

from cjepa_fast import config
from cjepa_fast.config import ConfigError
from cjepa_fast.tools import ablate

handlers = test_run.handlers
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


def finish(trial, *scores) -> None:
    """As a training with these kNN scores leaves its folder."""
    trial.folder.mkdir(parents=True)
    rows = [
        {"step": i, "epoch": float(i), "time_s": 1.0, **dict.fromkeys(ablate.MEASURES, score)}
        for i, score in enumerate(scores)
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


def test_a_training_that_was_not_scored_at_its_start_is_not_the_untrained_encoder_s(file, tmp_path):
    ablation = ablate.read(str(file))
    trials = ablate.trials_of(ablation, tmp_path / "out")
    for trial in trials:
        finish(trial, 10.0, 20.0)
        if trial.seed == 1:
            log = trial.folder / "log.jsonl"
            log.write_text(log.read_text().splitlines()[1] + "\n")
    untrained, *_ = ablate.table(ablation, trials)
    assert (untrained["seeds"], untrained["knn"]) == (1, 10.0)


def test_a_seed_that_only_one_row_has_is_not_compared(file, tmp_path):
    ablation = ablate.read(str(file))
    trials = ablate.trials_of(ablation, tmp_path / "out")
    for trial in trials:
        if (trial.row, trial.seed) != ("All of it", 1):
            finish(trial, 10.0, 20.0 if trial.row == "none" else 23.0)
    *_, whole = ablate.table(ablation, trials)
    assert (whole["seeds"], whole["knn_gain"], whole["knn_gain_std"]) == (1, 3.0, None)


def test_a_measure_that_a_resumed_end_lacks_is_left_out(file, tmp_path, capsys):
    """RankMe soon after a resume: of the first row, which others are compared with, too."""
    ablation = ablate.read(str(file))
    trials = ablate.trials_of(ablation, tmp_path / "out")
    for trial in trials:
        finish(trial, 10.0, 20.0)
        if trial.row == "none":
            log = trial.folder / "log.jsonl"
            log.write_text(log.read_text().replace('"rankme": 20.0', '"rankme": null'))
        ablate.tell(trial, 0, 60.0)
    _, none, whole = ablate.table(ablation, trials)
    assert "rankme" not in none and whole["rankme"] == 20 and "rankme_gain" not in whole
    assert whole["knn_gain"] == 0 and "RankMe 20.00" in capsys.readouterr().out


def test_a_training_that_ends_without_scores_is_told_and_left_out(
    file, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    lost, *_ = ablate.trials_of(ablate.read(str(file)), out)

    def start(ablation, trial, environment):
        finish(trial, *([] if trial == lost else [10.0, 20.0]))
        return ablate.subprocess.Popen(["true"])

    monkeypatch.setattr(ablate, "start", start)
    for table in ([], ["--table"]):
        assert ablate.main([str(file), "--out", str(out), *table]) == 1
        said = capsys.readouterr()
        assert f"error: {lost.folder}/log.jsonl has no scores" in said.err
        assert ("none, seed 0: failed: " in said.out) == (not table)
    untrained, *rows = json.loads((out / "table.json").read_text())
    assert untrained["seeds"] == 1 and [row["seeds"] for row in rows] == [1, 2]


@pytest.mark.parametrize(
    ("said", "gpu", "parallel", "threads"),
    [(None, False, 2, "4"), (None, False, 9, "1"), (None, False, 1, None), (None, True, 2, None),
     ("3", False, 2, None)],
)  # fmt: skip
def test_trainings_at_a_time_share_the_cores(monkeypatch, said, gpu, parallel, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if said:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    monkeypatch.setattr(ablate.hardware, "cores", lambda: 8)
    monkeypatch.setattr(ablate.hardware, "has_gpu", lambda: gpu)
    found = ablate.environments_of(ablate.parse(["demo", "--parallel", str(parallel)]))
    assert found == [{"OMP_NUM_THREADS": threads} if threads else {}] * parallel


@pytest.mark.long
@pytest.mark.slow
def test_it_trains_what_is_missing_and_goes_on_after_a_failure(file, tmp_path, capsys):
    file.write_text(json.dumps({**json.loads(file.read_text()), "seeds": [7]}))
    out = tmp_path / "out"
    done, missing = ablate.trials_of(ablate.read(str(file)), out)
    finish(done, 10.0, 90.0)
    command = [str(file), "--out", str(out), "--set", "mask.min_keep=3"]
    assert ablate.main([*command, "--set", f"data.path={tmp_path / 'nowhere'}"]) == 1
    said = capsys.readouterr().out
    assert "1 of 2 trainings to do" in said and f"failed; see {missing.folder}/said.txt" in said
    assert "nowhere" in (missing.folder / "said.txt").read_text()
    assert ablate.main(command) == 0
    assert "1 of 2 trainings to do" in capsys.readouterr().out
    made = json.loads((missing.folder / "config.json").read_text())
    assert (made["run"]["seed"], made["mask"]["min_keep"]) == (7, 3)
    assert made["loss"]["vicreg"]["beta"] == 0.001
    assert len(ablate.scores_of(missing)) == 2
    _, none, whole = json.loads((out / "table.json").read_text())
    assert none["knn"] == 90.0
    assert whole["knn"] == ablate.scores_of(missing)[-1]["knn"] == 90 + whole["knn_gain"]
    assert (out / "curves.png").is_file()
    assert ablate.main([*command, "--table"]) == 0


def test_an_interrupted_one_is_not_done(file, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    trials = ablate.trials_of(ablate.read(str(file)), out)
    finish(trials[0], 10.0, 20.0)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(ablate, "train_all", interrupted)
    assert ablate.main([str(file), "--out", str(out)]) == 130
    assert "20.00" in capsys.readouterr().out  # of what there is


def test_a_folder_with_another_training_is_refused(file, tmp_path, capsys):
    """What is finished counts only with the settings it was trained with."""
    out = tmp_path / "out"
    ablation = ablate.read(str(file))
    for trial in ablate.trials_of(ablation, out):
        finish(trial, 10.0, 20.0)
        made = config.load(ablation.base, ablation.settings_of(trial))
        (trial.folder / "config.json").write_text(made.to_json())
    command = [str(file), "--out", str(out)]
    assert ablate.main(command) == 0
    others = ["optim.lr=0.5", f"data.path={tmp_path}", "eval.online.max_test=7"]
    others += ["data.micro_batch_size=4", "run.on_spike=skip"]
    for other in others:
        assert ablate.main([*command, "--set", other]) == 2
        said = capsys.readouterr().err
        assert "holds another training" in said and other.partition("=")[0] in said
    assert ablate.main([*command, "--set", "telemetry.every_steps=7"]) == 0


def test_a_training_on_each_gpu(file, tmp_path, monkeypatch):
    """Never two on one at a time, and all of them used."""
    busy, used, both = set(), [], threading.Barrier(2)

    class Started:
        def __init__(self, command, env, **_):
            self.gpu = env["CUDA_VISIBLE_DEVICES"]
            assert self.gpu not in busy
            busy.add(self.gpu)
            used.append(self.gpu)

        def wait(self):
            both.wait(tiny.HANG_S)  # none ends before one has started on the other
            busy.discard(self.gpu)
            return 1

    monkeypatch.setattr(ablate.subprocess, "Popen", Started)
    assert ablate.main([str(file), "--out", str(tmp_path / "out"), "--gpus", "3,5"]) == 1
    assert len(used) == 4 and set(used) == {"3", "5"}
    assert ablate.main([str(file), "--gpus", "a"]) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": {"x": {"loss.vicreg.bate": 0}}}, "row 'x': loss.vicreg.bate = 0: no such key"),
        ({"set": {}}, "eval.online.data=SET"),
        ({"rows": {"a b": {}, "a-b": {}}}, "differ in their names"),
        ({"seeds": []}, "takes a seed"),
        ({"more": 1}, "must be an object of base, rows, seeds, set"),
        ({"seeds": 3}, "seeds = 3"),
        ({"seeds": ["x"]}, 'seeds: "x" is no whole number'),
        ({"rows": {"A": None}}, "row 'A': null must be an object of keys"),
    ],
)
def test_a_file_that_is_wrong_is_refused(file, change, said):
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ConfigError, match=said):
        ablate.read(str(file))


def test_a_folder_by_set_is_refused_and_out_is_named(file, capsys):
    assert ablate.main([str(file), "--set", "run.dir=x"]) == 2
    assert "below --out" in capsys.readouterr().err


def test_an_unknown_one_is_told_what_there_is():
    with pytest.raises(ConfigError, match="vicreg"):
        ablate.read("vicrag")


@pytest.mark.parametrize("path", [*(config.configs_folder() / "ablations").glob("*.json")])
def test_shipped_ablations_load(path):
    ablation = ablate.read(path.stem)
    assert len(ablation.seeds) == (1 if path.stem in ("claim", "demo") else 3)
    assert len(ablation.rows) >= 2
