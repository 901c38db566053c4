"""What a training that failed says, on rank 0 and on the others."""

import pytest

from cjepa_fast.config import ConfigError
from cjepa_fast.training import failures
from cjepa_fast.training.session import Options


@pytest.mark.parametrize(("rank", "prefix"), [("0", "error: "), ("3", "error: rank 3: ")])
def test_every_rank_says_what_was_wrong_the_first_before_the_others(
    monkeypatch, capsys, rank, prefix
):
    """Where rank 0 had the same error, a launcher ends the others while they wait."""
    monkeypatch.setenv("RANK", rank)
    waited = []

    def wait(seconds: float) -> None:
        assert not capsys.readouterr().err  # nothing before
        waited.append(seconds)

    monkeypatch.setattr(failures.time, "sleep", wait)
    with failures.report_failures(Options()) as outcome:
        raise ConfigError("data.path: no such folder here")
    assert outcome.status == 2
    assert waited == ([] if rank == "0" else [failures.TIME_TO_SPEAK_S])
    assert capsys.readouterr().err == f"{prefix}data.path: no such folder here\n"
