"""The doctor: each part is told as it is, a broken one does not take the page with it."""

import os

import pytest
import torch

from cjepa_fast.runtime import rates
from cjepa_fast.tools import doctor
from cjepa_fast.tools.doctor import ABSENT, BROKEN, WORKS, Absent, PartState


@pytest.fixture
def parts(monkeypatch):
    """Three parts instead of the real ones."""

    def absent():
        raise Absent("not installed")

    def broken():
        raise OSError("libfoo.so: undefined symbol\nmore")

    found = {"good": lambda: "1.0", "absent": absent, "broken": broken, "DALI": lambda: "2.4"}
    monkeypatch.setattr(doctor, "PARTS", found)
    monkeypatch.setattr(doctor, "trial_apart", doctor.trial)
    monkeypatch.setattr(rates, "measured_tflops", lambda *args: 0.05)
    monkeypatch.setattr(rates, "measured_gb_per_s", lambda *args: 20.0)


def test_a_part_is_told_as_it_is(parts):
    assert doctor.trial("good") == PartState(WORKS, "1.0")
    assert doctor.trial("absent") == PartState(ABSENT, "not installed")
    assert doctor.trial("broken") == PartState(BROKEN, "OSError: libfoo.so: undefined symbol")


def test_the_page_names_what_is_broken_and_what_a_training_would_use(parts, capsys):
    assert doctor.main(["--set", "run.precision=fp32", "--set", "data.batch_size=8"]) == 1
    page = capsys.readouterr().out
    wanted = ["processor", "broken          BROKEN   OSError", "precision       fp32: as run"]
    wanted += ["decoder         DALI", "matmul fp32     50 GFLOP/s", "BROKEN: broken:"]
    for line in wanted:
        assert line in page, line


def test_bad_input_is_a_word(capsys):
    assert doctor.main(["--config", "no_such"]) == 2
    assert "error: --config no_such" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "oneDNN",
        *(pytest.param(n, marks=pytest.mark.long) for n in ("gloo", "flash-attn", "Pillow", "git")),
    ],
)
def test_real_parts_answer_from_a_process_of_their_own(name):
    assert doctor.trial_apart(name).state in (WORKS, ABSENT)


@pytest.mark.slow
def test_a_part_that_takes_its_process_with_it_is_broken(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif '--try' in sys.orig_argv:\n    import os; os.abort()\n"
    )
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    )
    found = doctor.trial_apart("Pillow")
    assert found.state == BROKEN and "status -6" in found.text


def test_a_gpu_that_is_full_is_not_measured(parts, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 4 GiB")

    monkeypatch.setattr(rates, "measured_gb_per_s", full)
    assert doctor.main(["--set", "run.precision=fp32", "--set", "data.batch_size=8"]) == 1
    page = capsys.readouterr().out
    assert "copy            not measured: CUDA out of memory." in page and "50 GFLOP/s" in page


@pytest.mark.parametrize(("free_gib", "copied"), [(130, 2**32), (7, 7 * 2**27)])
def test_what_is_copied_leaves_most_of_a_gpu_free(monkeypatch, free_gib, copied):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_gib * 2**30, 2**38))
    assert rates._copied_bytes(torch.device("cuda", 0)) == copied
    assert rates._copied_bytes(torch.device("cpu")) == 2**28
