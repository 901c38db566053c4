"""The documentation: its links lead somewhere, its commands name what is there."""

import json
import re
import shlex
import subprocess
import sys

import docs_check
import matplotlib.pyplot as plt
import pytest
import tiny
from PIL import Image

import cjepa_fast as cj
from cjepa_fast import train
from cjepa_fast.data.sources import open_images
from cjepa_fast.eval.__main__ import TASKS

COMMANDS = [command for page in docs_check.PAGES for command in docs_check.commands(page)]


def test_commands_are_found_with_their_ends():
    """Continued lines are one command, comments are cut, trees of folders are none."""
    texts = [command.text for command in COMMANDS]
    assert len(texts) > 30
    assert "python bench/ops.py" in texts
    assert not any("#" in text or text.endswith("\\") or "the package" in text for text in texts)


def test_the_notebooks_training_can_be_run_again(tmp_path, monkeypatch):
    cells = json.loads((tiny.ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    training = next(i for i, source in enumerate(sources) if "cj.pretrain(" in source)
    config, train_one = tiny.write_config(tmp_path), cj.pretrain
    monkeypatch.setattr(cj, "pretrain", lambda name, **options: train_one(config, **options))
    monkeypatch.chdir(tmp_path)
    names = {"cj": cj, "plt": plt}
    for steps in (range(1, 7), ()):
        for source in sources[training : training + 2]:  # and its curves
            exec(source, names)
        assert list(names["losses"].found) == list(steps) and names["run"].status == 0
    plt.close("all")


@pytest.mark.parametrize("page", docs_check.PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target, _, anchor in (m.partition("#") for m in re.findall(r"\]\(([^)]+)\)", text)):
        if "://" not in target:
            path = (page.parent / target).resolve() if target else page
            assert path.exists(), f"{page.name}: {target}"
            if anchor:
                titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
                slugs = {re.sub(r"[^a-z0-9 -]", "", t.lower()).replace(" ", "-") for t in titles}
                assert anchor in slugs, f"{page.name}: #{anchor}"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.text[:60])
def test_commands_name_what_is_there(command):
    words = shlex.split(command.text)
    if "TASK" in words:
        return
    for word in words:
        if re.fullmatch(r"(bench|scripts|cjepa_fast)/\S+\.(py|sh|sbatch)", word):
            assert (docs_check.ROOT / word).is_file(), word
    if "cjepa_fast.eval" in words:
        assert words[words.index("cjepa_fast.eval") + 1] in TASKS
    if words[0] == "cjepa-eval":
        assert words[1] in TASKS
    if "cjepa_fast/train.py" in words:
        train.parse(words[words.index("cjepa_fast/train.py") + 1 :])


def test_the_script_for_cifar10_writes_its_classes_and_pixels(tmp_path):
    docs_check.write_cifar10(tmp_path / "bin")
    script = docs_check.example_module("make_cifar10.py", "choosing_a_config.md")
    out = tmp_path / "cifar10"
    subprocess.run([sys.executable, "-c", script, tmp_path / "bin", out], check=True)
    for split, count in (("train", 40), ("test", 20)):
        images = open_images(out / split, cache=tmp_path / split, log=lambda line: None)
        assert len(images) == count and len(images.classes) == 10 and not images.skipped
    with Image.open(out / "train" / "class7" / "data_batch_2_0017.jpg") as image:
        assert image.size == (32, 32) and image.format == "JPEG"
        assert image.getpixel((5, 9)) == pytest.approx((1, 17, 255), abs=4)
