"""A run that is killed and goes on is, bit for bit, the run that was never killed."""

import functools

import harness
import pytest
from harness import Moment, assert_same, drive, some_moments


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return harness.write_images(tmp_path_factory.mktemp("set") / "images")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, images):
    """The undisturbed run on so many processes."""
    folder = tmp_path_factory.mktemp("whole")
    return functools.cache(lambda n: drive(folder / f"{n}", images, [], n))


@pytest.mark.slow
def test_killed_in_a_save_and_in_the_loader_and_asked_to_stop_in_a_save(tmp_path, images, whole):
    moments = [
        Moment("disk", after=4, nth=3),
        Moment("disk", after=6, nth=2, act=harness.ask_to_stop),
        Moment("read", after=9, nth=5),
    ]
    struck = drive(tmp_path / "run", images, moments)
    assert [start.status for start in struck.starts] == [-9, 0, -9, 0]
    assert "go on with" in struck.starts[1].said
    assert_same(struck, whole(1))


@pytest.mark.multiprocess
def test_one_of_two_processes_killed(tmp_path, images, whole):
    moments = [Moment("disk", after=6, nth=1, rank=1, act=harness.kill_one)]
    struck = drive(tmp_path / "run", images, moments, processes=2)
    assert struck.starts[0].status not in (0, -9)  # the launcher's own: the other did not hang
    assert_same(struck, whole(2))


@pytest.mark.faults
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("campaign", "processes", "kills"), [(0, 1, 5), (1, 1, 4), (2, 2, 4), (3, 2, 4)]
)
def test_killed_again_and_again(tmp_path, images, whole, seed, campaign, processes, kills):
    """With the three above, 20 moments."""
    moments = some_moments(seed + campaign, kills, processes)
    print("; ".join(f"{moment} {moment.act.__name__}" for moment in moments))
    assert_same(drive(tmp_path / "run", images, moments, processes), whole(processes))
