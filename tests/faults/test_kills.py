"""A run that is killed, or loses its images, resumes to the undisturbed run, bit for bit."""

import functools

import harness
import pytest
from harness import Driven, Moment, assert_same, drive, some_moments, start

from cjepa_fast.data import rng
from cjepa_fast.telemetry import read_log


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return harness.write_images(tmp_path_factory.mktemp("set") / "images")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, images):
    """The undisturbed run on so many ranks."""
    folder = tmp_path_factory.mktemp("whole")
    return functools.cache(lambda n: drive(folder / f"{n}", images, [], n))


@pytest.mark.long
def test_killed_in_a_save_and_in_the_loader(tmp_path, images, whole):
    moments = [Moment("disk", after=4, nth=3), Moment("read", after=9, nth=5)]
    struck = drive(tmp_path / "run", images, moments)
    assert [one.status for one in struck.starts] == [-9, -9, 0]
    assert_same(struck, whole(1))


@pytest.mark.slow
def test_asked_to_stop_in_a_save(tmp_path, images, whole):
    moment = Moment("disk", after=6, nth=2, act=harness.ask_to_stop)
    struck = drive(tmp_path / "run", images, [moment])
    assert [one.status for one in struck.starts] == [0, 0]
    assert "resume with" in struck.starts[0].said and 6 <= struck.starts[0].steps[-1] < 16
    assert_same(struck, whole(1))


@pytest.mark.long
@pytest.mark.multiprocess
def test_one_of_two_ranks_killed(tmp_path, images, whole):
    moments = [Moment("disk", after=6, nth=1, rank=1, act=harness.kill_one)]
    struck = drive(tmp_path / "run", images, moments, ranks=2)
    assert struck.starts[0].status not in (0, -9)  # the launcher's own: the other did not hang
    assert_same(struck, whole(2))


@pytest.mark.multiprocess
def test_skipped_images_are_counted_over_all_ranks(images, whole):
    """An epoch has a hole where the corrupt image is not in its dropped tail."""
    listed = sorted(path.relative_to(images) for path in images.rglob("*.jpg"))
    corrupt = [path.name for path in listed].index("tables.jpg")
    indices = [
        rng.permutation(0, epoch, len(listed)).tolist().index(corrupt)
        for epoch in range(harness.STEPS // 2)
    ]
    holes = [index for index in indices if index < 32]
    assert {index % 16 // 8 for index in holes} == {0, 1}  # on both ranks
    counted = read_log(whole(2).run)[-1]["skipped_images"]
    assert counted == len(holes)  # though the loaders read ahead


@pytest.mark.slow
def test_images_that_go_away_and_come_back(tmp_path, images, whole):
    away = images.with_name("away")

    def take_away(launcher, pid):
        images.rename(away)

    config = harness.write_config(tmp_path, images)
    try:
        lost = start(tmp_path, 0, Moment("read", after=5, nth=3, act=take_away), config)
    finally:
        away.rename(images)
    found = start(tmp_path, 1, None, [*config, "--resume", "auto"])
    assert (lost.status, found.status) == (1, 0) and "Traceback" not in lost.said
    told = next(line for line in lost.said.splitlines() if line.startswith("error: "))
    assert told.startswith("error: class_") and str(images) in told and "--resume auto" in told
    assert_same(Driven(tmp_path / "run", [lost, found]), whole(1))


@pytest.mark.faults
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("campaign", "ranks", "kills"), [(0, 1, 5), (1, 1, 4), (2, 2, 4), (3, 2, 4)]
)
def test_killed_again_and_again(tmp_path, images, whole, seed, campaign, ranks, kills):
    """With the three above, 20 moments."""
    moments = some_moments(seed + campaign, kills, ranks)
    print("; ".join(f"{moment} {moment.act.__name__}" for moment in moments))
    assert_same(drive(tmp_path / "run", images, moments, ranks), whole(ranks))
