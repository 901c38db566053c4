"""What is tried of a run's folder before anything is trained for it."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

from cjepa_fast.config import ConfigError
from cjepa_fast.runtime import run_lock
from cjepa_fast.runtime.provenance import machine
from cjepa_fast.training import start


def test_a_folder_that_serves_is_left_as_it_was(tmp_path):
    start._try_renaming(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_start_left_is_no_fault_of_the_disk(tmp_path):
    for name in (".trial", ".trial.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a file").touch()
    start._try_renaming(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_run_that_came_while_this_one_started_is_not_overwritten(tmp_path, resume):
    """Before the folder was there it could not be held; resume "auto": what has no checkpoint."""
    loader = SimpleNamespace(images=SimpleNamespace(skipped=[]))
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    try:
        refusal = pytest.raises(ConfigError, match="already holds a run: resume with")
        with contextlib.nullcontext() if resume else refusal:
            assert start._taken(run, loader, resume, resumed=False) == ""
    finally:
        run_lock.release()


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """The folder of the runs a, and b beside it; b's checkpoints lie on another disk."""
    for name in ("a", "b"):
        disk = tmp_path / "disk" if name == "b" else tmp_path / name / "checkpoints"
        (disk / "step_00000002").mkdir(parents=True)
        for file in ("manifest.json", "state.json"):
            (disk / "step_00000002" / file).touch()
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "b" / "checkpoints").symlink_to(tmp_path / "disk")
    (tmp_path / "a" / "of_b").symlink_to(tmp_path / "b" / "checkpoints" / "step_00000002")
    monkeypatch.chdir(tmp_path)
    return tmp_path


OF_B = ["b", "b/checkpoints/step_00000002", "a/../b/checkpoints/step_00000002", "a/of_b"]


@pytest.mark.parametrize("resume", OF_B)
def test_no_run_is_overwritten_by_another_ones_checkpoint(runs, resume):
    """At the start, and where the folder came to hold a run while this one started."""
    loader = SimpleNamespace(images=SimpleNamespace(skipped=[]))
    for run in (Path("a"), runs / "a"):
        refusal = r"run\.dir = .*a: already holds a run, and --resume .* another .*, or remove"
        with pytest.raises(ConfigError, match=refusal):
            start.starting_points(run, resume)
        with pytest.raises(ConfigError, match=refusal):
            start._taken(run, loader, resume, resumed=True)
        run_lock.release()
    (runs / "c").mkdir()
    assert len(start.starting_points(Path("c"), str(runs / "b"))) == 1


def test_a_run_resumes_from_each_of_its_own_checkpoints_also_after_a_move(runs):
    """By any path to them: below a link, kept on another disk, in a copy of the run."""
    shutil.copytree("a", "copy", symlinks=True)
    (runs / "a").rename(runs / "moved")
    (runs / "a").symlink_to("moved")
    (runs / "moved" / "best").symlink_to("checkpoints/step_00000002")
    step = "checkpoints/step_00000002"
    shutil.move(runs / "copy" / step, runs / "archived")
    (runs / "copy" / step).symlink_to(runs / "archived")
    for run, resume in [
        *[(Path("a"), f"{own}/{step}") for own in ("a", "moved", runs / "moved")],
        *[("moved", own) for own in ("a", "a/best", f"a/{step}", "auto")],
        *[("copy", own) for own in (f"copy/{step}", "auto")],
        *[("b", own) for own in (f"b/{step}", "disk/step_00000002", "auto")],
    ]:
        (found,) = start.starting_points(Path(run), resume)
        assert found.resolve().is_dir(), (run, resume)


def test_a_full_disk_keeps_no_folder_from_being_held(tmp_path):
    """Only its holder is not named. What needs room there is refused after it, by name."""
    with tiny.files_of_at_most(0):
        run_lock.take(tmp_path)
        try:
            with open(tmp_path / ".lock") as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with pytest.raises(ConfigError, match=r"run\.dir = .*/a file'\)"):
                start._try_renaming(tmp_path)
        finally:
            run_lock.release()
    run_lock.take(tmp_path)
    run_lock.release()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_full_disk_is_told_before_the_first_step(tmp_path):
    """An empty file would still fit there."""
    refusal = pytest.raises(ConfigError, match=r"run\.dir = .* renamed there \(.*/a file'\)")
    with tiny.files_of_at_most(start.TRIAL_BYTES // 2), refusal:
        start._try_renaming(tmp_path)
    assert not list(tmp_path.iterdir())


def test_where_no_folder_can_be_renamed_nothing_is_trained(tmp_path, monkeypatch):
    """As on some buckets that are mounted as folders: no checkpoint would ever be saved."""

    def refuse(*args):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ConfigError, match=r"run\.dir = .* renamed there \(.*Too many open files"):
        start._try_renaming(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_a_decoder_says_is_noted_once_and_by_each_rank_in_its_own_file(tmp_path, monkeypatch):
    """Rank 0 has noted a, rank 1 notes b; what cannot be read is noted again."""
    monkeypatch.setattr(start.distributed, "rank", lambda: 1)
    (tmp_path / "events.jsonl").write_text('{"text": "a"}\n')
    note = start._noting(None, tmp_path)
    for text in ("a", "b", "b"):
        note(text)
    assert (tmp_path / "events_rank_1.jsonl").read_text() == '{"text": "b"}\n'

    def lost(*args, **options):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "read_text", lost)
    note("b")
    monkeypatch.undo()
    assert (tmp_path / "events_rank_1.jsonl").read_text() == '{"text": "b"}\n' * 2


def test_another_machine_than_the_checkpoints_is_told_once():
    """Only where the kernels are the same are the bits of a resumed run those of one in one go."""
    cpu = torch.device("cpu")
    same = {"machine": machine(cpu), "versions": {"torch": torch.__version__}}
    assert not list(start._machine_message(same, cpu))
    assert not list(start._machine_message({}, cpu))  # of an earlier version
    for other in ({"machine": "2 x another"}, {"versions": {"torch": "1.0"}}):
        (line,) = start._machine_message(same | other, cpu)
        assert "the bits that follow may differ" in line
        assert ("2 x another" in line) == ("machine" in other)
