"""Caches: the user's folder, and the one instead where that cannot be written to."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from cjepa_fast.runtime import caches, trials

VARIABLES = ("XDG_CACHE_HOME", "MPLCONFIGDIR", "TRITON_HOME", "TORCHINDUCTOR_CACHE_DIR")


@pytest.fixture
def no_home(tmp_path, monkeypatch) -> Path:
    """A home folder that not even root can make, and a folder for temporary files."""
    (tmp_path / "file").write_text("")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "")  # so that what is set here is taken back
        monkeypatch.delenv(variable)
    return tmp_path / "tmp"


def test_the_users_cache_folder_is_made_and_said_nothing_of(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a" / "b"))
    assert caches.folder("index") == tmp_path / "a" / "b" / "cjepa_fast" / "index"
    assert (tmp_path / "a" / "b").is_dir() and not any((tmp_path / "a" / "b").iterdir())
    assert capsys.readouterr().err == ""


def test_whether_it_can_be_written_to_is_asked_once(tmp_path, monkeypatch):
    """Not for each of ten thousand shards, on a home folder that all ranks share."""
    asked = []
    monkeypatch.setattr(caches, "_can_be_written_to", lambda path: asked.append(path) or True)
    for home in ("a", "b"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / home))
        for _ in range(3):
            assert caches.root() == tmp_path / home
    assert asked == [tmp_path / "a", tmp_path / "b"]


def test_without_a_home_all_caches_go_to_one_folder_that_is_said_once(no_home, capsys):
    own = no_home / f"cjepa_fast-{os.getuid()}"
    assert caches.root() == caches.root() == own
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and str(own) in said and "XDG_CACHE_HOME" in said
    assert [Path(os.environ[name]).is_relative_to(own) for name in VARIABLES] == [True] * 4
    assert own.stat().st_mode & 0o77 == 0  # nobody else's


def test_what_the_user_set_for_another_package_stays(no_home, monkeypatch):
    monkeypatch.setenv("TRITON_HOME", "/mine")
    caches.root()
    assert os.environ["TRITON_HOME"] == "/mine"


def test_a_link_that_somebody_laid_is_not_followed(no_home):
    (no_home / "theirs").mkdir()
    (no_home / f"cjepa_fast-{os.getuid()}").symlink_to(no_home / "theirs")
    assert caches.root().resolve().parent == no_home and not any((no_home / "theirs").iterdir())
    assert caches.root().name != "theirs"


@pytest.mark.long
def test_training_needs_no_home(no_home, tmp_path):
    """Nothing at all is written outside the run's folder and the temporary one."""
    config = tiny.write_config(tmp_path, run={"epochs": 1}, telemetry={"tensorboard": True})
    command = [sys.executable, tiny.ROOT / "cjepa_fast" / "train.py", "--config", config]
    env = {**tiny.environment(), "TMPDIR": str(no_home)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "caches go to" in done.stderr, done.stderr
    assert any((no_home / f"cjepa_fast-{os.getuid()}" / "cjepa_fast" / "index").iterdir())


def test_a_full_disk_beneath_stderr_ends_no_start(no_home, monkeypatch):
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "the disk is full")

    monkeypatch.setattr(sys, "stderr", Full())
    assert caches.root() == no_home / f"cjepa_fast-{os.getuid()}"


@pytest.mark.parametrize("named", ["XDG_CACHE_HOME", "HOME"])
def test_no_folder_is_named_like_a_home_that_nobody_has(no_home, monkeypatch, named):
    monkeypatch.chdir(no_home)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without HOME and a user
    if named == "XDG_CACHE_HOME":
        monkeypatch.setenv(named, "~/mine")
    assert caches.root() == no_home / f"cjepa_fast-{os.getuid()}"
    assert not (no_home / "~").exists()


def test_a_home_in_the_folder_s_name_is_put_in(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "~/mine")
    assert caches.root() == tmp_path / "mine"


@pytest.mark.parametrize("left", ["", '{"facts": {}', "null", "{}"])
def test_a_record_that_a_crash_left_is_replaced(tmp_path, monkeypatch, left):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    facts, tried = {"processor": "x"}, []

    def decide():
        tried.append(1)
        return {"fastest": len(tried)}

    assert trials.remembered(facts, decide, {}) == {"fastest": 1}
    (record,) = (tmp_path / "cjepa_fast" / "trials").iterdir()
    record.write_text(left)
    for _ in range(2):
        assert trials.remembered(facts, decide, {}) == {"fastest": 2}
