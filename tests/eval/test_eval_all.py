"""`cjepa-eval all`: its numbers are those of the tasks alone, from one reading of each image."""

import json

import pytest
import tiny
import torch

from cjepa_fast import load_encoder
from cjepa_fast.data.sources import open_images
from cjepa_fast.eval import all_tasks, features
from cjepa_fast.eval.__main__ import main
from cjepa_fast.eval.probes import collapse, knn, linear
from cjepa_fast.eval.probes.probe_sweep import ProbePlan

pytestmark = pytest.mark.long

FIGURES = {"attention", "pca", "retrieve", "masks", "curves", "collapse"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run, its labelled images, and what `all` wrote; how often features were computed."""
    folder = tmp_path_factory.mktemp("all")
    torch.manual_seed(0)
    run = tiny.write_run(folder, tiny.uneven_encoder(), eval={"crop": 1.0, "k": 5})
    tiny.write_images(folder / "train", count=60, classes=3)
    tiny.write_images(folder / "test", count=21, classes=3)
    computed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        compute = features._compute

        def counted(encoder, images, **options):
            computed.append((images.root.name, options["pooled"]))
            return compute(encoder, images, **options)

        patch.setattr(features, "_compute", counted)
        words = ["--data", str(folder / "train"), "--test", str(folder / "test"), "--no-cache"]
        assert main(["all", str(run), *words, "--count", "30"]) == 0
    return folder, run, computed


def rows(run) -> dict[str, dict]:
    record = json.loads((run / "eval" / "all" / "table.json").read_text())
    return {row["encoder"]: row for row in record["rows"]}


def test_features_are_computed_once_for_all_tasks(made):
    _, _, computed = made
    once = [("train", True), ("test", True), ("train", False)]  # False: tokens, for collapse
    assert sorted(computed) == sorted(2 * once)  # trained, and untrained


def test_the_numbers_are_those_of_the_tasks_alone(made):
    folder, run, _ = made
    encoder, found = load_encoder(run), []
    for name in ("train", "test"):
        images = open_images(folder / name)
        vectors, index = features.extract(encoder, images, crop=1.0)
        found += [vectors, images.labels[index]]
    row = rows(run)["trained"]
    assert row["top1"] == pytest.approx(knn.top1(*found, k=5))
    assert row["ridge"] == pytest.approx(linear.percent(linear.ridge(*found[:3]), found[3]))
    assert row["logistic"] == pytest.approx(linear.top1(*found))
    (lars,) = linear.sweep(tuple(found), [24], ProbePlan("lars"))
    assert row["lars"] == pytest.approx(lars["top1"])
    images = open_images(folder / "train")
    alone = collapse.measure(
        encoder, images, count=30, device="cpu", batch_size=128, threads=2, crop=1.0
    )
    for name in ("rankme", "lidar", "by_position", "dead"):
        assert row[name] == pytest.approx(alone[name], rel=1e-4)


def test_beside_it_stand_untrained_pixels_and_chance(made):
    _, run, _ = made
    found = rows(run)
    assert list(found) == ["chance", "raw pixels", "untrained", "trained"]
    assert found["chance"]["top1"] == pytest.approx(100 / 3)
    assert "rankme" not in found["raw pixels"] and found["raw pixels"]["test_images"] == 21
    assert found["untrained"]["rankme"] != found["trained"]["rankme"]


def test_every_figure_is_drawn(made):
    _, run, _ = made
    assert {path.stem for path in (run / "eval" / "all").glob("*.png")} == FIGURES


def test_chance_is_that_of_the_commonest_class():
    found = all_tasks.chance(torch.tensor([2, 2, 1]), torch.tensor([2, 1, 0, 0]))
    assert set(found.values()) == {25.0}


def test_without_a_run_a_folder_is_asked_for(made, tmp_path, capsys):
    folder, run, _ = made
    for name in ("encoder.safetensors", "encoder.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    words = ["all", str(tmp_path / "encoder.safetensors"), "--data", str(folder / "train")]
    assert main(words) == 2
    assert "name a folder for the figures, --out FOLDER" in capsys.readouterr().err
