"""Whether a training learns, told early and at its end."""

from pathlib import Path

import pytest

from cjepa_fast import config
from cjepa_fast.training import learning


def knn_rows(*scores: float) -> list[dict]:
    return [{"step": 10 * i, "knn": score} for i, score in enumerate(scores)]


def test_the_end_says_whether_the_features_beat_untrained_ones():
    assert learning.learnt([{"step": 1}]) is learning.learnt(knn_rows(20.0)) is None
    resumed_copy = [{"step": 5, "knn": 1.0}, {"step": 6, "knn": 2.0}]
    assert learning.learnt(resumed_copy) is None
    said = learning.learnt(knn_rows(20.0, 30.0, 50.04))
    assert said == "kNN: untrained 20.0 %, best 50.0 % (step 20), at the end 50.0 %"
    fallen = learning.learnt(knn_rows(20.0, 50.0, 45.0))
    assert fallen.endswith("RUN/best is the better checkpoint")
    assert "fell" not in learning.learnt(knn_rows(20.0, 50.0, 49.0))
    worse = learning.learnt(knn_rows(20.0, 25.0, 19.0))
    assert worse.startswith("WARNING: kNN: untrained 20.0 %")


def test_the_end_says_what_it_took_and_what_comes_next():
    rows = [{"step": 0, "knn": 20.0}, {"step": 1, "images_per_s": 10.0},
            {"step": 2, "images_per_s": 1500.0, "knn": 50.0, "time_s": 3723.4},
            {"step": 3, "images_per_s": 1400.0, "time_s": 3724.4}]  # fmt: skip
    done, knn, *following = learning.ended(rows, Path("a run"))
    assert done == "done: a run/encoder.safetensors (1:02:04, 1,400 images/s)"
    assert knn.startswith("kNN: untrained 20.0 %")
    assert all("'a run'" in line for line in following) and len(following) == 3
    assert learning.ended([], Path("run"))[0] == "done: run/encoder.safetensors (0:00:00)"


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
        ({"rankme": (20, 30), "by_position": (0.1, 0.4)}, None),
        ({"rankme": (20, 9), "knn": (25, 31)}, None),
        ({"rankme": (20, 30), "knn": (25, 22)}, "kNN % 25 -> 22, RankMe 20 -> 30"),
        ({"rankme": (20, 30), "knn": (25, 24)}, None),
        ({}, None),
    ],
)
def test_features_that_get_worse_are_told_with_their_numbers(ends, said):
    line = learning.getting_worse(rows(**ends), config.load("demo.json"), 96)
    assert (line is None) if said is None else said in line and "docs/collapse.md" in line


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.init=ijepa"], 'model.init to "auto"'),
        (["loss.vicreg.beta=0"], "loss.vicreg.beta from 0"),
        (["loss.vicreg.views=blocks"], 'loss.vicreg.views to "positions"'),
        ([], "optim.lr = 0.002, to half"),
    ],
)
def test_the_first_change_is_what_is_not_set_yet(overrides, said):
    assert learning.first_change(config.load("demo.json", overrides), 96).startswith(said)
