"""The page about a run: whole, self-contained, and what it says."""

import base64
import html
import html.parser
import json
import os
import re
import shutil
import subprocess

import pytest
import tiny
import torch
from safetensors.torch import save_file

from cjepa_fast import config as configuration
from cjepa_fast.model.vit import Encoder
from cjepa_fast.tools import html_page, report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
VOID = {"meta", "img", "br"}


class Reader(html.parser.HTMLParser):
    """Tags that are opened and closed in order, and the text."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.links, self.ids, self.said = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found[key] for key in ("href", "src") if key in found]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.said.append(data)


def read(path) -> Reader:
    found = Reader(path.read_text())
    assert found.open == []  # every tag is closed
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder as training leaves it, with random weights and a log of 900 rows."""
    folder = tmp_path_factory.mktemp("run")
    os.environ.setdefault("XDG_CACHE_HOME", str(folder / "cache"))
    run = folder / "a <run>"
    run.mkdir()
    config = configuration.load(str(tiny.write_config(folder, eval={"crop": 1.0})))
    (run / "config.json").write_text(config.to_json())
    torch.manual_seed(0)
    encoder = Encoder(image_size=24, patch_size=4, width=24, depth=2, heads=3)
    look = {"mean": config.data.mean, "std": config.data.std}
    for name in ("encoder", "context_encoder"):
        save_file(dict(encoder.state_dict()), run / f"{name}.safetensors")
        (run / f"{name}.json").write_text(json.dumps({**encoder.architecture, **look}))
    rows = [
        {"step": s, "epoch": s / 500, "time_s": s * 2.0, "loss": 1 / s, "images_per_s": 9.0 + s % 7,
         "rankme": 1.5 if s < 4 else 9.0, "skipped_steps": 2, "sim": None, "data_wait": 0.25,
         **({"knn": 30.0 + s % 800} if s % 300 == 0 else {})}
        for s in range(1, 901)
    ]  # fmt: skip
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bad = {
        "step": 7,
        "time_s": 1.23456789,
        "applied": False,
        "images": [f"{i}.jpg" for i in range(9)],
    }
    (run / "bad_steps.jsonl").write_text(json.dumps(bad) + "\n")
    (run / "eval").mkdir()
    record = {
        "task": "knn", "made": "2026-01-02T", "which": "context", "inside": "best",
        "settings": {"data": "set <b>", "test": None},
        "headings": {"top1": "kNN %", "absent": "absent"},
        "rows": [{"encoder": "trained", "top1": 43.21}],
    }  # fmt: skip
    (run / "eval" / "knn-00000000.json").write_text(json.dumps(record))
    return run


@pytest.fixture(scope="module")
def whole(run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "SHOWN", 2)
        patch.setattr(report, "SEARCHED", 12)
        return report.write(run, run / "report.html")


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ({}, "C-JEPA, VICReg beta 0.001"),
        ({"vicreg": {"beta": 0}}, "I-JEPA"),
        ({"regulariser": "sigreg"}, "I-JEPA with SIGReg, beta 0.02"),
        ({"regulariser": "sigreg", "sigreg": {"beta": 0}}, "I-JEPA"),
    ],
)
def test_the_method_is_named(loss, said):
    assert report._method(configuration.validate({"loss": loss})) == said


def test_the_page_is_whole_and_fetches_nothing(whole):
    found = read(whole)
    inside = [link[1:] for link in found.links if link.startswith("#")]
    assert inside == [i for i in found.ids if i in inside] and len(inside) == 10
    pictures = [link for link in found.links if not link.startswith("#")]
    assert len(pictures) == 4
    for link in pictures:
        assert base64.b64decode(link.removeprefix("data:image/png;base64,"))[:4] == b"\x89PNG"
    assert not re.search(r"https?://|@import|<script|url\(", whole.read_text())


def test_the_page_says_what_the_files_say(whole):
    said = " ".join(read(whole).said)
    for text in (
        "a <run>", "900", "1.80 of 2", "30.0 min", "finished", "630.0 at step 600",
        "43.2 at set <b> (context encoder)", "43.21",
        "knn, context encoder of best: data set <b> (2026-01-02)", "25.0 % of the time",
        "rankme below its floor of 2 in 3 rows", "2 steps skipped by now",
        "bad_steps: time_s: 1.235, applied: False, images: 0.jpg, 1.jpg, 2.jpg, 3.jpg and 5 more",
        '"min_keep": 4',
    ):  # fmt: skip
        assert text in said, text
    assert "absent" not in said


def test_the_hardware_is_that_of_the_newest_checkpoint(tmp_path):
    run = tiny.write_run(tmp_path, tiny.uneven_encoder())
    assert report.main([str(run), "--images", str(tmp_path / "nowhere")]) == 0
    said = " ".join(read(run / "report.html").said)
    assert "2 x a GPU" in said and "Version of torch" in said


def test_a_run_that_has_only_begun(run, tmp_path, capsys):
    """No log, no checkpoint, its images elsewhere: the page is there and says so."""
    begun = tmp_path / "begun"
    begun.mkdir()
    text = (run / "config.json").read_text().replace("/images", "/gone")
    (begun / "config.json").write_text(text)
    assert report.main([str(begun)]) == 0
    said = " ".join(read(begun / "report.html").said)
    for text in ("no row in its log yet", "does not exist", "--images SET", "None yet"):
        assert text in said, text
    assert report.main([str(begun), "--images", str(run.parent / "images")]) == 0
    page_ = read(begun / "report.html")
    assert "neither a checkpoint nor encoder.safetensors" in " ".join(page_.said)
    assert sum(link.startswith("data:") for link in page_.links) == 1  # the masks

    assert report.main([str(tmp_path / "nowhere")]) == 2
    assert "no config.json" in capsys.readouterr().err


def points(svg: str, kind: str) -> list[tuple[float, float]]:
    (found,) = re.findall(rf'<{kind} class="\w+" points="([^"]*)"', svg)
    return [tuple(map(float, pair.split(","))) for pair in found.split()]


def test_a_curve_by_hand():
    svg = html_page.curve("name", [0, 10, 20], [0.0, 4.0, 2.0])
    right, bottom = html_page.WIDTH - html_page.RIGHT, html_page.HEIGHT - html_page.BOTTOM
    middle = (html_page.LEFT + right) / 2, (html_page.TOP + bottom) / 2
    expected = [(html_page.LEFT, bottom), (middle[0], html_page.TOP), (right, middle[1])]
    assert points(svg, "polyline") == [pytest.approx(point, abs=0.06) for point in expected]
    assert "<b>2</b>" in svg


def test_a_long_curve_is_means_within_a_band_that_keeps_the_spikes():
    values = [1.0] * 3000
    values[1234] = 9.0
    svg = html_page.curve("name", list(range(3000)), values)
    line, band = points(svg, "polyline"), points(svg, "polygon")
    assert len(line) == html_page.MOST_POINTS and len(band) == 2 * html_page.MOST_POINTS
    assert min(y for _, y in band) == pytest.approx(html_page.TOP)  # the spike's top
    assert min(y for _, y in line) > html_page.TOP + 50


def test_curves_of_one_point_of_equal_values_and_of_zeros_on_a_log_scale():
    for steps, values in (([5], [3.0]), ([1, 2], [3.0, 3.0]), ([1, 2], [0.0, 5.0])):
        assert "nan" not in html_page.curve("name", steps, values, logarithmic=True)
    assert "nan" not in html_page.curve("name", [1, 2], [1e-9, 1e5], logarithmic=True)


def test_a_browser_shows_it(whole, tmp_path):
    """In headless Chromium, wide and narrow: every picture is decoded and nothing sticks out."""
    browser = os.environ.get("CJEPA_BROWSER") or next(
        filter(None, map(shutil.which, BROWSERS)), None
    )
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is here, and CJEPA_BROWSER names none")
    probe = (
        "<script>addEventListener('load', () => { document.body.dataset.seen = JSON.stringify({"
        "pictures: [...document.images].map(i => i.complete && i.naturalWidth > 0),"
        "over: document.documentElement.scrollWidth - innerWidth}) })</script></body>"
    )
    shown = tmp_path / "probed.html"
    shown.write_text(whole.read_text().replace("</body>", probe))
    for width in (1280, 500):
        words = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--window-size={width},900",
        ]
        words += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", shown.as_uri()]
        done = subprocess.run(words, capture_output=True, text=True, timeout=tiny.HANG_S)
        (seen,) = re.findall(r'data-seen="([^"]*)"', done.stdout)
        seen = json.loads(html.unescape(seen))
        assert seen["pictures"] == [True] * 4
        assert seen["over"] <= 0
