"""`compare`: whose records, which columns, which is best."""

import json
from pathlib import Path

import pytest
import tiny
import torch

from cjepa_fast import config as configuration
from cjepa_fast.checkpoint.encoders import load_encoder, save_encoder
from cjepa_fast.config import Config
from cjepa_fast.eval import compare, records, seeds, uncertainty
from cjepa_fast.eval.__main__ import main
from cjepa_fast.eval.features import digest

OWN = "those of the run that it is written to"


def record(task="knn", top1=50.0, made="2026-01-01", weights=OWN, **settings):
    row = {"encoder": "trained", "train_images": 9, "top1": top1, "top1_centred": 40.0}
    return {
        "task": task, "made": made, "inside": ".", "which": "target", "weights": weights,
        "settings": {"data": "set", "k": 20, **settings},
        "headings": {"train_images": "train", "top1": "kNN %", "top1_centred": "mean-subtracted"},
        "rows": [{"encoder": "untrained", "top1": 99.0}, row],
    }  # fmt: skip


def write(run, *records):
    (run / "eval").mkdir(parents=True)
    (run / "config.json").write_text(Config().to_json())
    encoder = tiny.uneven_encoder()
    encoder.mean, encoder.std = (0.5,) * 3, (0.25,) * 3
    save_encoder(encoder, run / "encoder.safetensors")
    for i, one in enumerate(records):
        weights = digest(encoder) if one["weights"] == OWN else one["weights"]
        file = run / "eval" / f"{one['task']}-{i:08x}.json"
        file.write_text(json.dumps({**one, "weights": weights}))
    return run


def test_a_column_for_each_way_a_task_was_run():
    values, headings = compare.measures([[record(top1=1.0), record(top1=2.0, k=5)], [record()]])
    assert list(headings.values()) == [
        "knn: kNN % (k 20)", "knn: mean-subtracted (k 20)",
        "knn: kNN % (k 5)", "knn: mean-subtracted (k 5)",
    ]  # fmt: skip
    assert values[0]["knn", "top1", "k 20"] == 1.0 and values[0]["knn", "top1", "k 5"] == 2.0
    assert ("knn", "top1", "k 5") not in values[1]
    _, alike = compare.measures([[record()], [record()]])
    assert list(alike.values()) == ["knn: kNN %", "knn: mean-subtracted"]  # no count of images


def test_each_row_of_an_encoder_has_its_column():
    probed = record(task="linear")
    probed["rows"] = [
        {"encoder": name, "layers": layers, "top1": top1}
        for name, layers, top1 in (
            ("untrained", "last", 9.0), ("trained", "last", 1.0), ("trained", "last 4", 2.0)
        )
    ]  # fmt: skip
    (values,), headings = compare.measures([[probed]])
    assert values == {("linear", "top1", "last"): 1.0, ("linear", "top1", "last 4"): 2.0}
    assert list(headings.values()) == ["linear: kNN % (last)", "linear: kNN % (last 4)"]


def test_the_later_of_two_of_one_kind_counts():
    values, _ = compare.measures([[record(top1=1.0), record(top1=2.0, made="2026-01-02")]])
    assert values[0]["knn", "top1", ""] == 2.0


def test_only_records_of_the_weights_as_they_are_now(tmp_path):
    """Not those of the context encoder, of another checkpoint or of the run before it went on."""
    run = write(tmp_path / "run", record(), record(top1=1.0, weights="others"))
    (found,) = compare.found_in(run, "target")
    assert found["rows"][1]["top1"] == 50.0
    encoder = load_encoder(run)
    with torch.no_grad():
        encoder.norm.bias.add_(1.0)
    save_encoder(encoder, run / "encoder.safetensors")
    assert compare.found_in(run, "target") == []


def test_another_test_set_is_another_evaluation(tmp_path, monkeypatch):
    run = write(tmp_path / "run", record(test="held_out"), record(task="linear", test="elsewhere"))
    asked = []
    monkeypatch.setattr(compare, "_compute", lambda of, missing, args: asked.extend(missing) or [])
    assert main(["compare", str(run), "--data", "set", "--test", "held_out"]) == 0
    assert asked == ["linear", "collapse"]


def test_a_score_of_images_read_by_other_limits_is_made_anew(tmp_path, monkeypatch):
    """As of 12 bits that an earlier version read as 16, and whose record says none."""
    records = record(test="set"), record(task="linear", test="set", limits={"bit_depth": 12})
    run = write(tmp_path / "run", *records, record(task="collapse"))
    of_12 = Config(data={"bit_depth": 12})
    (run / "config.json").write_text(of_12.to_json())
    asked = []
    monkeypatch.setattr(compare, "_compute", lambda of, missing, args: asked.extend(missing) or [])
    assert main(["compare", str(run), "--data", "set", "--test", "set"]) == 0
    assert asked == ["knn", "collapse"]
    _, headings = compare.measures([[record()], [record(limits={"bit_depth": 12})]])
    assert list(headings.values()) == ["knn: kNN %", "knn: mean-subtracted"]


OTHER = [("knn", {"k": 5}), ("knn", {"temperature": 0.1}), ("knn", {"max_train": 100}),
         ("knn", {"crop": 0.5}), ("linear", {"bf16": True}), ("linear", {"epochs": 2}),
         ("linear", {"choose": "test"}), ("collapse", {"count": 10})]  # fmt: skip


def test_a_score_with_other_settings_is_made_anew(tmp_path, monkeypatch):
    """Than those of the command that would compute it; k is at most the training images."""
    asked = []
    monkeypatch.setattr(compare, "_compute", lambda of, missing, args: asked.extend(missing) or [])
    alike = {"knn": {"k": 9}, "linear": {"epochs": 50, "layers": [1, 4]}, "collapse": {"views": 5}}
    run = write(tmp_path / "run", *(record(task, **more) for task, more in alike.items()))
    assert main(["compare", str(run), "--data", "set"]) == 0 and asked == []
    for i, (task, settings) in enumerate(OTHER):
        run = write(
            tmp_path / str(i), *(record(t, **(settings if t == task else {})) for t in alike)
        )
        assert main(["compare", str(run), "--data", "set"]) == 0
        assert asked == [task], settings
        asked.clear()


def test_the_best_is_high_or_low_by_what_is_measured():
    def of(key, *values):
        measure = ("task", key, "")
        return compare.best(measure, [{measure: value} for value in values] + [{}])

    assert of("top1", 1.0, 3.0, 2.0) == 3.0
    assert of("alignment", 1.0, 3.0, 2.0) == of("j_decay", 1.0, 3.0, 2.0) == 1.0
    assert of("by_image", 1.0, 3.0) is None
    assert of("top1", 1.0) is None  # nothing to be better than


def test_the_table_marks_the_best_and_what_is_missing(tmp_path, capsys):
    a = write(tmp_path / "a", record(top1=60.0))
    b = write(tmp_path / "b", record(top1=50.0), record(task="linear", top1=70.0))
    out, bars = tmp_path / "c.json", tmp_path / "c.png"
    assert main(["compare", str(a), str(b), "--json", str(out), "--out", str(bars)]) == 0
    head, first, second, *_ = capsys.readouterr().out.strip().splitlines()
    assert head.split("  ")[0] == "checkpoint" and "linear: kNN %" in head
    assert first.split() == ["a", "60.00*", "40.00*", "-", "-"]
    assert second.split() == ["b", "50.00", "40.00*", "70.00", "40.00"]
    rows = json.loads(out.read_text())["rows"]
    assert rows[0]["values"] == {"knn: kNN %": 60.0, "knn: mean-subtracted": 40.0}
    assert bars.stat().st_size > 5_000


def test_what_is_missing_is_computed(tmp_path, monkeypatch):
    """The commands that would be run: for the set asked for, and only what is not there."""
    run = write(tmp_path / "run", record(data="other"), record(task="linear"))
    ran = []

    def stand_in(words, **_):
        ran.append(words[3:])
        made = record(task=words[3], top1=12.0)
        with open(words[words.index("--json") + 1], "w") as file:
            json.dump(made, file)
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(compare.subprocess, "run", stand_in)
    assert main(["compare", str(run), "--data", "set", "--test", "held_out"]) == 0
    assert [words[0] for words in ran] == ["knn", "collapse"]
    assert "held_out" in ran[0] and "held_out" not in ran[1]
    assert ran[0][1:4] == [str(run), "--data", "set"]


def test_nothing_evaluated_is_said(tmp_path, capsys):
    run = write(tmp_path / "run")
    assert main(["compare", str(run)]) == 2
    assert "no evaluations of these weights" in capsys.readouterr().err


@pytest.mark.long
def test_a_task_that_fails_ends_it(tmp_path, capfd):
    run = write(tmp_path / "run")
    assert main(["compare", str(run), "--data", str(tmp_path / "absent")]) == 2
    assert f"knn of {run} failed" in capfd.readouterr().err


def run_of(folder, seed: int, top1: float, **changes):
    """A finished run with a seed of its own, and one evaluation."""
    kept = record(top1=top1, seed=seed)
    kept["rows"][1]["test_images"] = 400
    run = write(folder, kept)
    made = configuration.from_values(
        Config(), {"run.seed": seed, "run.dir": str(folder), **changes}
    )
    (run / "config.json").write_text(made.to_json())
    return run


def two_groups(folder, first, second) -> list[str]:
    """Runs with and without VICReg: {seed: kNN} of either."""
    runs = [run_of(folder / f"a{s}", s, x) for s, x in first.items()]
    beta = {"loss.vicreg.beta": 0.0}
    return [
        *map(str, runs),
        *(str(run_of(folder / f"b{s}", s, x, **beta)) for s, x in second.items()),
    ]


def test_seeds_of_one_configuration_are_one_group_and_compared_pair_by_pair(tmp_path, capsys):
    """By hand: the differences are 1, 2 and 3, so t = 2 / (1 / sqrt 3) with two degrees of
    freedom; the seeds themselves lie far further apart."""
    runs = two_groups(tmp_path, {0: 10.0, 1: 50.0, 2: 90.0}, {2: 93.0, 0: 11.0, 1: 52.0})
    out = tmp_path / "c.json"
    assert main(["compare", *runs, "--json", str(out)]) == 0
    made = json.loads(out.read_text())
    names = [group["name"] for group in made["groups"]]
    assert names == ["loss.vicreg.beta=0.001", "loss.vicreg.beta=0.0"]
    (gap,) = [d for d in made["differences"] if d["measure"] == "knn: kNN %"]
    assert gap["mean"] == pytest.approx(2.0) and gap["error"] == pytest.approx(1 / 3**0.5)
    t = 2 * 3**0.5
    assert gap["p"] == pytest.approx(1 - t / (t * t + 2) ** 0.5)  # Student's with 2 degrees
    assert gap["high"] - gap["mean"] == pytest.approx(4.30265 / 3**0.5, rel=1e-4)
    assert gap["seeds"] == 3 and gap["how"] == seeds.PAIRED
    said = capsys.readouterr().out
    assert "50.00 +- 40.00" in said and "+2.00" in said and "400 leave" in said


def test_other_seeds_are_compared_unpaired(tmp_path):
    gap = seeds.difference({0: 1.0, 1: 3.0}, {5: 10.0, 6: 12.0, 7: 14.0})
    assert gap.how == seeds.APART and gap.mean == pytest.approx(10.0)
    assert gap.error == pytest.approx((2 / 2 + 4 / 3) ** 0.5)
    assert gap.low < 10.0 < gap.high and 0 < gap.p < 0.05


def test_one_seed_says_nothing_of_seeds(tmp_path, capsys):
    runs = two_groups(tmp_path, {0: 50.0}, {0: 60.0})
    out = tmp_path / "c.json"
    assert main(["compare", *runs, "--json", str(out)]) == 0
    said = capsys.readouterr().out
    assert "of what another seed would give nothing can be said" in said
    assert "400 leave a percentage a standard error of up to 2.5" in said  # sqrt(0.25 / 400)
    assert json.loads(out.read_text())["differences"] == []
    assert seeds.difference({0: 1.0, 1: 2.0}, {0: 1.0}) is None


def test_differences_that_do_not_vary_have_no_p():
    gap = seeds.difference({0: 1.0, 1: 2.0}, {0: 1.5, 1: 2.5})
    assert gap.p is None and gap.mean == gap.low == gap.high == 0.5


def test_what_changes_no_number_of_a_training_makes_no_group(tmp_path):
    a = run_of(tmp_path / "a", 0, 1.0)
    b = run_of(tmp_path / "b", 1, 1.0, **{"data.threads": 7, "telemetry.every_steps": 3})
    c = run_of(tmp_path / "c", 1, 1.0, **{"data.path": "elsewhere"})
    groups = seeds.groups_of([a, b, c], ["a", "b", "c"])
    assert [group.runs for group in groups] == [{0: [0], 1: [1]}, {1: [2]}]


def test_links_to_runs_change_no_group(tmp_path):
    for seed in 0, 1:
        run_of(tmp_path / "disk" / str(seed), seed, 1.0)
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    ends = [Path("0", "checkpoints", "step_1"), Path("1", "checkpoints", "step_1")]
    paths = [tmp_path / "runs" / ends[0], tmp_path / "disk" / ends[1]]
    assert [records.inside(path) for path in paths] == ["checkpoints/step_1"] * 2
    assert len(seeds.groups_of(paths, ["a", "b"])) == 1
    (tmp_path / "disk" / ends[0]).mkdir(parents=True)
    (tmp_path / "disk" / "0" / "best").symlink_to(ends[0].relative_to("0"))
    assert records.inside(tmp_path / "runs" / "0" / "best") == "best"
    assert records.inside(tmp_path / "runs" / "0") == "."


def test_the_bars_have_the_intervals_of_their_test_images(tmp_path, monkeypatch):
    counted = record(top1=20.0)
    counted["rows"][1] |= {"test_images": 400, "rankme": 7.0}
    counted["headings"]["rankme"] = "RankMe"
    (ends,) = compare.intervals([[counted]])
    assert list(ends) == [("knn", "top1", ""), ("knn", "top1_centred", "")]  # RankMe is no share
    assert ends["knn", "top1", ""] == pytest.approx((16.37, 24.20), abs=0.01)  # Wilson, by hand
    drawn = []
    monkeypatch.setattr(compare, "save", lambda figure, out: drawn.append(figure))
    compare.draw(["run"], *compare.measures([[counted]]), tmp_path / "a.png", [ends])
    shares = [axes for axes in drawn[0].axes if axes.get_title() == "knn: kNN %"]
    (line,) = shares[0].collections  # the error bar
    assert line.get_segments()[0][:, 0] == pytest.approx([16.37, 24.20], abs=0.01)
    (said,) = [text.get_text() for text in shares[0].texts]
    assert said == "20.00"


def test_an_interval_stays_within_0_and_100():
    for percent in (0.0, 100.0):
        low, high = uncertainty.interval(percent, 10)
        assert 0 <= low < high <= 100
    with pytest.raises(ValueError, match="0 test images"):
        uncertainty.interval(50.0, 0)
    assert uncertainty.with_interval(76.0, 2048) == "76.0 ± 1.8 %"
