"""`make demo` from end to end, at toy size."""

import json

import pytest
import tiny

from cjepa_fast import demo
from cjepa_fast.data.sets import shapes


def test_a_run_that_is_there_is_never_overwritten(tmp_path):
    run = tmp_path / "demo"
    assert demo.free_folder(run) == run
    run.mkdir()
    (run / "config.json").write_text("{}")
    assert demo.free_folder(run) == tmp_path / "demo-2"


@pytest.mark.long
@pytest.mark.slow
def test_the_demo_trains_compares_and_draws(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shapes, "COUNTS", {"train": 48, "val": 16})
    for name, value in tiny.environment().items():
        monkeypatch.setenv(name, value)
    sets = ["run.epochs=2", "optim.warmup_epochs=1", "data.batch_size=16", "data.threads=1"]
    sets += ["model.depth=1", "telemetry.every_steps=1", "telemetry.tensorboard=false"]
    arguments = [part for text in sets for part in ("--set", text)]
    out = tmp_path / "a run"
    assert demo.main(["--out", str(out), *arguments]) == 0
    pictures = [f"{task}.png" for task in ("curves", "attention", "pca", "masks", "retrieve")]
    for name in (*pictures, "encoder.safetensors", "report.html"):
        assert (out / name).stat().st_size > 5_000
    rows = [row["encoder"] for row in json.loads((out / "knn.json").read_text())["rows"]]
    assert rows == ["raw pixels", "mean colour", "untrained", "trained"]
    said = capfd.readouterr().out
    assert "images/s" in said and str(out / "curves.png") in said
    *_, learnt, knn, probe, rank, figures = said.splitlines()
    assert "48 images without labels" in learnt and "chance 12.5 %" in knn
    assert "linear probe" in probe and "RankMe, how many directions the features use, is" in rank
    assert str(out / "report.html") in figures


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([None, 20.0, 31.0], "rose from 20 to 31"), ([20.0, 9.0], "FELL from 20 to 9"),
        ([None, 12.0], "is 12"), ([None], "was not measured"),
    ],
)  # fmt: skip
def test_the_story_tells_how_rankme_came_along(values, told):
    assert demo.spread([{"rankme": value} for value in values]).endswith(f" use, {told}")


def test_the_comparison_with_ijepa_ends_with_a_sentence(tmp_path, monkeypatch, capsys):
    rows = [{"row": name, "knn": 10.0 * i, "rankme": 5.0 + i} for i, name in enumerate("uic")]

    def main(arguments):
        assert arguments[:3] == ["demo", "--out", str(tmp_path)]
        (tmp_path / "table.json").write_text(json.dumps(rows))
        return 0

    monkeypatch.setattr(demo.ablate, "main", main)
    monkeypatch.setattr(shapes, "ensure", lambda split: tmp_path)
    monkeypatch.setattr(demo, "COMPARED", tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert demo.main(["--compare"]) == 0
    del rows[1]["rankme"]  # as where it was resumed just before its end
    assert demo.main(["--compare"]) == 0
    said = capsys.readouterr().out
    assert "I-JEPA came to 10 % and C-JEPA to 20 % (RankMe 7)" in said
    assert "From 0 % of kNN, I-JEPA came to 10 % (RankMe 6) and C-JEPA to 20 % (RankMe 7)" in said


def test_a_folder_by_set_is_refused_and_out_is_named(capsys):
    with pytest.raises(SystemExit) as ended:
        demo.main(["--set", "run.dir=x"])
    assert ended.value.code == 2 and "--out RUN" in capsys.readouterr().err


def test_a_training_that_fails_ends_the_demo_with_its_status(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "ensure", lambda split: tmp_path)
    assert demo.main(["--out", str(tmp_path / "run"), "--set", "optim.lr=-1"]) == 2
