"""torchvision's stand-ins: only where its compiled operators do not work, and right there."""

import subprocess
import sys
from pathlib import Path

import pytest
import vision_ops

TESTS = Path(__file__).parents[1]
# A torchvision whose operators "work", are missing, or end the process that loads them.
OPERATORS = """
class ops:
    nms = staticmethod(lambda boxes, scores, threshold: scores.long() - 1)
    roi_align = staticmethod(lambda maps, boxes, size: maps[..., :size, :size])
"""
BUILDS = {
    "compiled": OPERATORS,
    "no operators": "raise RuntimeError('operator torchvision::nms does not exist')",
    "another build": "import os\nos.abort()",
}


@pytest.fixture(params=BUILDS)
def build(request, tmp_path) -> tuple[str, Path]:
    """(name, a folder with that torchvision)."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(BUILDS[request.param])
    return request.param, tmp_path


def load_in_a_fresh_process(folder: Path) -> str:
    """What load() chooses where torchvision lies in that folder; stand_in is noted, not done."""
    code = (
        "import sys, pathlib, importlib.util\n"
        f"sys.path[:0] = [{str(TESTS)!r}]\n"
        "import vision_ops\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name: None if name == 'torchvision' else find(name)\n"
        f"vision_ops.ASIDE = pathlib.Path({str(folder)!r})\n"
        "asked = []\n"
        "vision_ops.stand_in = lambda: asked.append(1)\n"
        "print(vision_ops.load(), len(asked))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True
    )
    return done.stdout.strip()


@pytest.mark.long
def test_stand_ins_only_where_the_compiled_operators_do_not_work(build):
    name, folder = build
    expected = "compiled 0" if name == "compiled" else "stand-ins 1"
    assert load_in_a_fresh_process(folder) == expected


def test_collecting_the_tests_imports_no_torchvision():
    """Its import may end the process, and a crash while tests are collected names none."""
    code = (
        f"import sys; sys.path[:0] = [{str(TESTS)!r}, {str(TESTS / 'eval')!r}]\n"
        "import test_eval_detect\n"
        "print('torchvision' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.long
@pytest.mark.skipif(not vision_ops.installed(), reason="torchvision is an extra (detect)")
def test_the_choice_here_is_what_the_probe_found():
    code = (
        f"import sys; sys.path[:0] = [{str(TESTS)!r}]\n"
        "import vision_ops\n"
        "chosen = vision_ops.load()\n"
        "import torchvision.ops.boxes as boxes, torch\n"
        "kept = boxes.nms(torch.tensor([[0.0, 0, 8, 8], [1, 0, 9, 8], [20, 20, 30, 30]]),"
        " torch.tensor([0.5, 0.9, 0.1]), 0.5)\n"
        "print(chosen, len(vision_ops._libraries), kept.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    works = vision_ops.failure([str(vision_ops.ASIDE)]) is None
    assert done.stdout.strip() == ("compiled 0 [1, 2]" if works else "stand-ins 1 [1, 2]")
