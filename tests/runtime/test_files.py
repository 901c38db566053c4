"""What is read from the disk: a description is an object of JSON, or the file is named."""

import pickle
import resource

import pytest
import tiny

from cjepa_fast.runtime import files

DAMAGED = {
    "deep": b'{"a": ' + b"[" * 200_000,
    "cut": b'{"step": 1',
    "a pickle": pickle.dumps({"step": 1}),
    "a list": b"[1, 2]",
    "a number of many digits": b'{"step": ' + b"9" * 10_000 + b"}",
    "empty": b"",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_description_is_named_in_one_line(tmp_path, content):
    path = tmp_path / "state.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"state\.json is damaged") as raised:
        files.read_json(path)
    assert len(str(raised.value)) < len(str(path)) + 200 and "\n" not in str(raised.value)


def test_a_huge_description_is_not_read(tmp_path):
    path = tmp_path / "state.json"
    with path.open("wb") as file:
        file.truncate(files.MOST_JSON_BYTES + 1)  # a hole: no disk is filled
    with pytest.raises(ValueError, match=r"state\.json is damaged: .* bytes"):
        files.read_json(path)


def test_a_description_is_read_and_a_missing_one_is_missing(tmp_path):
    files.write_text(tmp_path / "state.json", '{"step": 3}')
    assert files.read_json(tmp_path / "state.json") == {"step": 3}
    with pytest.raises(FileNotFoundError):
        files.read_json(tmp_path / "other.json")


def test_what_cannot_be_written_is_named(tmp_path):
    with tiny.files_of_at_most(100), pytest.raises(OSError, match=r"'.*/state\.json'"):
        files.write_text(tmp_path / "state.json", "." * 1000)


def test_a_process_may_hold_as_many_files_as_it_is_allowed():
    """A usual login has 1024 of the half million that it may ask for."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(before[1], files.MANY) if before[1] != resource.RLIM_INFINITY else files.MANY
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, wanted), before[1]))
    try:
        files.allow_many_open()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (wanted, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_system_that_allows_fewer_files_than_it_says_is_left_as_it_is(monkeypatch):
    """macOS says infinity, and refuses what is above a limit of its kernel."""

    def refuse(*args):
        raise ValueError("current limit exceeds maximum limit")

    limits = (256, resource.RLIM_INFINITY)
    monkeypatch.setattr(files.resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(files.resource, "setrlimit", refuse)
    files.allow_many_open()
