"""An error that nobody expected: one line, a report, status 1, and no traceback on the screen."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from cjepa_fast.runtime import error_report

FAILING = """
import sys
from cjepa_fast import train
from cjepa_fast.runtime import distributed
from cjepa_fast.model.jepa import JEPA

whole, calls = JEPA.forward, []
def forward(self, *args):
    calls.append(1)
    if len(calls) == int(sys.argv[1]):
        raise RuntimeError("could not create a primitive\\nsecond line")
    return whole(self, *args)

JEPA.forward = forward
distributed.leave(train.main(sys.argv[2:]))
"""


@pytest.fixture
def failing(tmp_path) -> Path:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    return script


@pytest.mark.slow
def test_an_unexpected_error_in_a_step_is_one_line_and_a_report(tmp_path, failing):
    config = tiny.write_config(tmp_path, checkpoint={"every_steps": 1})
    done = tiny.run(failing, 5, "--config", config)  # two micro-batches a step: the third step
    assert done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout and "second line" not in done.stderr
    line = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert line.startswith("error: rank 0, step 3, in the step: RuntimeError: could not create")
    report = tmp_path / "run" / "error_rank_0.txt"
    assert str(report) in done.stderr and "cjepa_fast.tools.doctor" in done.stderr
    assert "model.attention=plain" in done.stderr and "step_00000002" in done.stderr
    text = report.read_text()
    for part in (
        "Traceback",
        "second line",
        '"precision": "',
        "torch",
        "where: step 3",
        "machine:",
    ):
        assert part in text, part


@pytest.mark.slow
def test_a_dry_run_leaves_its_report_elsewhere(tmp_path, failing):
    config = tiny.write_config(tmp_path)
    done = tiny.run(failing, 1, "--config", config, "--dry-run")
    assert done.returncode == 1 and not (tmp_path / "run").exists()
    assert "error_rank_0.txt" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.multiprocess
def test_of_several_ranks_each_leaves_its_own(tmp_path, failing):
    done = tiny.run(failing, 3, "--config", tiny.write_config(tmp_path), ranks=2)
    assert done.returncode == 1
    for rank in range(2):
        assert "Traceback" in (tmp_path / "run" / f"error_rank_{rank}.txt").read_text()


def test_the_line_in_our_code_is_named():
    from cjepa_fast.config import find

    with pytest.raises(ValueError) as caught:
        find("no_such_file")
    assert "ConfigError: --config no_such_file" in error_report.summary(caught.value)
    assert "(in find, cjepa_fast/config/load.py line " in error_report.summary(caught.value)
    with pytest.raises(ZeroDivisionError) as foreign:
        1 / 0  # noqa: B018
    assert error_report.summary(foreign.value) == "ZeroDivisionError: division by zero"


def test_a_folder_that_cannot_be_written_does_not_lose_the_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(error_report.tempfile, "gettempdir", lambda: str(tmp_path))
    gone = tmp_path / "gone"
    path = error_report.write(ValueError("x"), [gone], 3, {"a": "b"})
    assert path == tmp_path / "error_rank_3.txt" and "a: b" in path.read_text()
    monkeypatch.setattr(error_report.tempfile, "gettempdir", lambda: str(gone))
    assert error_report.write(ValueError("told"), [gone], 0, {}) is None
    assert "ValueError: told" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupt_before_the_first_step_is_a_word(tmp_path):
    code = (
        "import signal, os, sys, time; from cjepa_fast import train\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # not so in the background
        "train.start.begin = lambda *a: (os.kill(os.getpid(), signal.SIGINT), time.sleep(60))\n"
        "sys.exit(train.main(sys.argv[1:]))"
    )
    config = tiny.write_config(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", code, "--config", str(config)],
        capture_output=True, text=True, env=tiny.environment(), cwd=tiny.ROOT,
    )  # fmt: skip
    assert done.returncode == 128 + signal.SIGINT
    assert "stopped before the first step" in done.stderr and "Traceback" not in done.stderr


def test_where_no_folder_at_all_can_be_written_to_stderr_has_it(tmp_path, monkeypatch, capsys):
    def none():
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(error_report.tempfile, "gettempdir", none)
    assert error_report.write(ValueError("lost"), [tmp_path], 0, {}) is not None
    assert error_report.write(ValueError("lost"), [tmp_path / "nowhere"], 0, {}) is None
    assert "ValueError: lost" in capsys.readouterr().err
