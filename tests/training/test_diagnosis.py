"""Whether a training learns, told early and at its end."""

import re
from pathlib import Path

import pytest
import tiny

from cjepa_fast import config
from cjepa_fast.data.sets import scenes
from cjepa_fast.training import diagnosis


def knn_rows(*scores: float) -> list[dict]:
    return [{"step": 10 * i, "knn": score} for i, score in enumerate(scores)]


DEMO = config.load("demo.json")
CONTINUED = config.load("demo.json", ["run.init_from=encoder.safetensors", "model.init=ijepa"])


def test_the_end_says_whether_the_features_beat_those_of_the_start():
    assert (
        diagnosis.knn_summary([{"step": 1}], DEMO)
        is diagnosis.knn_summary(knn_rows(20.0), DEMO)
        is None
    )
    resumed_copy = [{"step": 5, "knn": 1.0}, {"step": 6, "knn": 2.0}]
    assert diagnosis.knn_summary(resumed_copy, DEMO) is None
    said = diagnosis.knn_summary(knn_rows(20.0, 30.0, 50.04), DEMO)
    assert said == "kNN: untrained 20.0 %, best 50.0 % (step 20), at the end 50.0 %"
    twice = [{"step": 0, "knn": 27.1}, *knn_rows(27.1, 24.0, 24.5)]  # two starts at step 0
    assert "best 24.5 % (step 20), at the end 24.5 %." in diagnosis.knn_summary(twice, DEMO)
    assert diagnosis.knn_summary(twice[:2], DEMO) is None
    fallen = diagnosis.knn_summary(knn_rows(20.0, 50.0, 45.0), DEMO)
    assert fallen.endswith("RUN/best is the better checkpoint")
    assert "fell" not in diagnosis.knn_summary(knn_rows(20.0, 50.0, 49.0), DEMO)
    worse = diagnosis.knn_summary(knn_rows(20.0, 25.0, 19.0), DEMO)
    assert worse.startswith("WARNING: kNN: untrained 20.0 %") and "RUN/best" in worse
    assert worse.endswith("The features are no better than untrained: docs/collapse.md")


def test_weights_that_come_from_a_file_are_not_called_untrained():
    ends = {"knn": (60, 50), "by_position": (0.7, 0.8)}
    said = [
        diagnosis.knn_summary(knn_rows(60.0, 50.0), CONTINUED),
        diagnosis.degradation_warning(rows(**ends), CONTINUED, 96, 1152),
    ]
    assert all("at the start" in line and "untrained" not in line for line in said)
    assert "model.init" not in said[1]
    assert diagnosis.weak_init_warning(rows(**ends), CONTINUED, 96) is None


def test_a_log_without_its_first_rows_is_not_compared_with_them():
    later = [
        row | {"step": row["step"] + 500} for row in rows(knn=(60, 50), by_position=(0.7, 0.8))
    ]
    weak = config.load("demo.json", ["model.init=ijepa"])
    assert diagnosis.degradation_warning(later, weak, 96, 1152) is None
    assert diagnosis.weak_init_warning(later, weak, 96) is None
    assert diagnosis.degradation_warning([], weak, 96, 1152) is None


def test_the_end_says_what_it_took_and_what_comes_next():
    rows = [{"step": 0, "knn": 20.0}, {"step": 1, "images_per_s": 10.0},
            {"step": 2, "images_per_s": 1500.0, "knn": 50.0, "time_s": 3723.4},
            {"step": 3, "images_per_s": 1400.0, "time_s": 3724.4}]  # fmt: skip
    done, knn, *following = diagnosis.end_messages(rows, Path("a run"), DEMO)
    assert done == "done: a run/encoder.safetensors (1:02:04, 1,400 images/s)"
    assert knn.startswith("kNN: untrained 20.0 %")
    assert all("'a run'" in line for line in following) and len(following) == 3
    assert (
        diagnosis.end_messages([], Path("run"), DEMO)[0]
        == "done: run/encoder.safetensors (0:00:00)"
    )


def rows(**ends: tuple[float, float]) -> list[dict]:
    """A log with the first and the last value of each, and a row between that has neither."""
    first, last = ({name: pair[i] for name, pair in ends.items()} for i in (0, 1))
    return [{"step": 0}, {"step": 20, **first}, {"step": 40, "rankme": None}, {"step": 60, **last}]


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ({"rankme": (20, 15)}, "RankMe 20 -> 15"),
        ({"rankme": (20, 17)}, None),
        ({"rankme": (20, 30), "by_position": (0.1, 0.7)}, "share of position 0.1 -> 0.7"),
        ({"rankme": (20, 30), "by_position": (0.8, 0.7)}, None),
        ({"rankme": (20, 30), "by_position": (0.66, 0.69)}, None),
        ({"rankme": (20, 30), "by_position": (0.1, 0.4)}, None),
        ({"rankme": (20, 9), "knn": (25, 31)}, None),
        ({"rankme": (20, 30), "knn": (25, 22)}, "kNN % 25 -> 22, RankMe 20 -> 30"),
        ({"rankme": (20, 30), "knn": (25, 24)}, None),
        ({}, None),
    ],
)
def test_features_that_get_worse_are_told_with_their_numbers(ends, said):
    line = diagnosis.degradation_warning(rows(**ends), config.load("demo.json"), 96, 1152)
    assert (line is None) if said is None else said in line and "docs/collapse.md" in line


SIGREG = ["loss.regulariser=sigreg"]


@pytest.mark.parametrize(
    ("overrides", "steps", "said"),
    [
        (["model.init=ijepa", "optim.momentum=0.996"], 1152, 'model.init to "auto"'),
        (["loss.vicreg.beta=0"], 1152, "loss.vicreg.beta from 0 to 0.001"),
        ([*SIGREG, "loss.sigreg.beta=0"], 1152, "loss.sigreg.beta from 0 to 0.02"),
        ([*SIGREG, "loss.sigreg.views=blocks"], 1152, 'loss.sigreg.views to "positions"'),
        (["loss.vicreg.views=blocks"], 1152, "optim.lr"),  # at each position beside it
        (
            ["loss.vicreg.views=blocks", "loss.vicreg.positions_weight=0"],
            1152,
            'loss.vicreg.views to "positions"',
        ),
        (["optim.momentum=0.996"], 9999, "optim.momentum = 0.996, to 0.98"),
        (["optim.momentum=0.996"], 10000, "optim.lr = 0.002, to half"),
        (["optim.momentum=0.996"], None, "optim.lr = 0.002, to half"),
        (["optim.momentum=0.99"], 1152, "optim.lr = 0.002, to half"),
        ([], 1152, "optim.lr = 0.002, to half"),
    ],
)
def test_the_first_change_is_what_is_not_set_yet(overrides, steps, said):
    found = diagnosis.first_change(config.load("demo.json", overrides), 96, steps)
    assert found.startswith(said)
    if change := re.match(r'(\S+) (?:from 0 )?to "?([^",]+)', found):
        config.load("demo.json", [*overrides, "=".join(change.groups())])


@pytest.mark.parametrize(
    ("ends", "overrides", "width", "told"),
    [
        ({"by_position": (0.66, 0.5)}, ["model.init=ijepa"], 96, True),
        ({"by_position": (0.66, 0.5)}, ["model.init=ijepa"], 384, False),
        ({"by_position": (0.66, 0.5)}, [], 96, False),
        ({"by_position": (0.4, 0.45)}, ["model.init=ijepa"], 96, False),
        ({"by_position": (0.66, 0.1), "knn": (21, 24)}, ["model.init=ijepa"], 96, False),
        ({"by_position": (0.66, 0.1), "knn": (21, 20)}, ["model.init=ijepa"], 96, True),
    ],
)
def test_a_start_that_tells_positions_alone_is_told(ends, overrides, width, told):
    line = diagnosis.weak_init_warning(rows(**ends), config.load("demo.json", overrides), width)
    assert (line is not None) == told
    assert line is None or ("share of position 0.66 -> " in line and 'to "auto"' in line)


@pytest.mark.parametrize(
    ("steps", "momentum"), [(9999, ""), (10000, "optim.momentum = 0.98 too low, ")]
)
def test_a_low_momentum_is_a_cause_of_collapse_in_long_runs_alone(steps, momentum):
    said = diagnosis.likely_cause(config.load("demo.json"), steps)
    beta = "or loss.vicreg.beta = 0.01 too small or too large"
    assert said == f"optim.lr = 0.002 too high, {momentum}{beta}"
    none = diagnosis.likely_cause(config.load("demo.json", ["loss.vicreg.beta=0"]), steps)
    assert none.startswith("loss.vicreg.beta is 0")


FAILED = ["model.init=ijepa", "loss.vicreg.views=blocks", "loss.vicreg.beta=0.001"]
FAILED += ["loss.vicreg.positions_weight=0", "optim.momentum=0.996"]


@pytest.mark.slow
def test_the_demo_that_did_not_learn_is_told(tmp_path):
    """Its first 20 steps on images of its own: the patches are weak beside their positions from the
    start. kNN fell from 20.8 to 15.2 % by the end."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(64):
        (images / f"{i}.jpg").write_bytes(scenes.render("train", i)[0])
    sets = [f"data.path={images}", "run.epochs=20", f"run.dir={tmp_path / 'run'}"]
    sets += ["telemetry.every_steps=2", "telemetry.tensorboard=false"]
    done = tiny.train("--config", "demo.json", *(f"--set={one}" for one in [*sets, *FAILED]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('width of 96. First change model.init to "auto"') == 1, done.stdout
