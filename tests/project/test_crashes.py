"""A worker that dies names what it was at: the file it imported, or the test."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("xdist")
HERE = Path(__file__).parents[1]


@pytest.fixture
def suite(tmp_path) -> Path:
    shutil.copy(HERE / "crashes.py", tmp_path)
    (tmp_path / "conftest.py").write_text("from crashes import *\n")
    (tmp_path / "test_good.py").write_text("def test_good(): pass\n")
    return tmp_path


def run(suite: Path) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "1",
        "--dist",
        "loadfile",
        "-p",
        "no:cacheprovider",
    ]
    return subprocess.run(command, cwd=suite, capture_output=True, text=True, timeout=100)


def test_a_file_whose_import_ends_the_process_is_named_and_tried_once(suite):
    (suite / "test_bad.py").write_text("import os\nos.abort()\n")
    done = run(suite)
    said = "worker gw0 crashed while test_bad.py was collected"
    assert done.returncode != 0 and said in done.stdout + done.stderr
    assert "[gw1]" not in done.stdout + done.stderr


def test_a_test_that_ends_the_process_is_named_and_tried_once(suite):
    (suite / "test_bad.py").write_text("import os\ndef test_bad(): os.abort()\n")
    done = run(suite)
    assert done.returncode != 0 and "crashed while running 'test_bad.py::test_bad'" in done.stdout
    assert "1 failed" in done.stdout
