"""The page about a run: whole, self-contained, and what it says."""

import base64
import dataclasses
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
from cjepa_fast.tools import html_charts, report, report_events, report_figures, report_run

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
         **({"knn": 20.0 + s % 800 / 20} if s % 300 == 0 else {})}
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
        "rows": [{"encoder": "trained", "top1": 43.21, "test_images": 200}],
    }  # fmt: skip
    (run / "eval" / "knn-00000000.json").write_text(json.dumps(record))
    return run


@pytest.fixture(scope="module")
def whole(run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_figures, "SHOWN", 2)
        patch.setattr(report_figures, "SEARCHED", 12)
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
    text = whole.read_text()
    assert not re.search(r"https?://|@import|<script\s|<link|url\(|fetch\(|XMLHttp|import\(", text)
    assert "default-src 'none'" in text  # the page's own policy


def test_the_page_says_what_the_files_say(whole):
    said = " ".join(read(whole).said)
    for text in (
        "a <run>", "900", "1.80 of 2", "30.0 min", "finished", "43.21 ± 6.8",
        "best 50.0 % (step 600)",
        "knn, context encoder of best: images set <b> (2026-01-02)", "25.0 % of the time",
        "RankMe below its floor of 2, in 3 rows of the log", "2 steps skipped in all",
        "step not applied; its images: 0.jpg, 1.jpg, 2.jpg, 3.jpg and 5 more", "0:00:01",
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
    (found,) = re.findall(rf'<{kind} class="\w+" style="[^"]*" points="([^"]*)"', svg)
    return [tuple(map(float, pair.split(","))) for pair in found.split()]


def chart(steps, values, **options) -> str:
    return html_charts.chart("name", {0: html_charts.Line("run", steps, values)}, **options)


def held(svg: str) -> list[dict]:
    """What the script reads of a chart."""
    (found,) = re.findall(r'data-lines="([^"]*)"', svg)
    return json.loads(html.unescape(found))


def test_a_curve_by_hand():
    svg = chart([0, 10, 20], [0.0, 4.0, 2.0])
    right, bottom = html_charts.WIDTH - html_charts.RIGHT, html_charts.HEIGHT - html_charts.BOTTOM
    middle = (html_charts.LEFT + right) / 2, (html_charts.TOP + bottom) / 2
    expected = [(html_charts.LEFT, bottom), (middle[0], html_charts.TOP), (right, middle[1])]
    assert points(svg, "polyline") == [pytest.approx(point, abs=0.06) for point in expected]
    assert "<b>2</b>" in svg
    (line,) = held(svg)
    assert line["x"] == [0, 10, 20] and line["y"] == [0, 4, 2]
    assert list(zip(line["px"], line["py"], strict=True)) == points(svg, "polyline")


def test_a_logarithmic_curve_tells_its_values():
    (line,) = held(chart([1, 2], [0.01, 100.0], logarithmic=True))
    assert line["y"] == pytest.approx([0.01, 100])


def test_a_band_and_the_line_of_the_start_by_hand():
    own = html_charts.Line("run", [0, 10], [2.0, 3.0], [1.0, 2.0], [3.0, 5.0])
    svg = html_charts.chart("name", {0: own}, level=1.0)
    top, bottom = html_charts.TOP, html_charts.HEIGHT - html_charts.BOTTOM
    ys = [y for _, y in points(svg, "polygon")]
    assert (min(ys), max(ys)) == pytest.approx((top, bottom), abs=0.06)
    assert f'class="level" d="M{html_charts.LEFT} {bottom:.1f}H' in svg and "at the start" in svg
    assert held(svg)[0]["high"] == [3.0, 5.0]


def test_two_runs_have_lines_of_two_looks():
    lines = {i: html_charts.Line(f"run {i}", [0, 1], [1.0, 2.0]) for i in range(2)}
    svg = html_charts.chart("name", lines)
    one, two = re.findall(r'class="line" style="([^"]*)"', svg)
    for part in ("stroke:", "stroke-dasharray:", "stroke-width:"):
        assert re.search(f"{part}[^;]*", one)[0] != re.search(f"{part}[^;]*", two)[0]
    assert [line["label"] for line in held(svg)] == ["run 0", "run 1"]
    assert "run &lt;b&gt;" in html_charts.key(["run <b>"])


def test_a_long_curve_is_means_within_a_band_that_keeps_the_spikes():
    values = [1.0] * 3000
    values[1234] = 9.0
    svg = chart(list(range(3000)), values)
    line, band = points(svg, "polyline"), points(svg, "polygon")
    assert len(line) == html_charts.MOST_POINTS and len(band) == 2 * html_charts.MOST_POINTS
    assert min(y for _, y in band) == pytest.approx(html_charts.TOP)  # the spike's top
    assert min(y for _, y in line) > html_charts.TOP + 50


def test_curves_of_one_point_of_equal_values_and_of_zeros_on_a_log_scale():
    for steps, values in (([5], [3.0]), ([1, 2], [3.0, 3.0]), ([1, 2], [0.0, 5.0])):
        assert "nan" not in chart(steps, values, logarithmic=True)
    assert "nan" not in chart([1, 2], [1e-9, 1e5], logarithmic=True)


# ------------------------------------------------------------------------- the words of a report


def record_of(knn=None, rankme=(20.0, 50.0), finished=True, records=(), std=0.7, tmp=None, **loss):
    """A run that logged RankMe and, from step 0 on, kNN."""
    settings = configuration.validate({"loss": {"vicreg": loss}})
    rows = [
        {"step": 10 * i, "epoch": i, "time_s": 60.0 * i, "images_per_s": 9.0, "feature_std": std,
         "rankme": value}
        for i, value in enumerate(rankme, 1)
    ]  # fmt: skip
    for row, value in zip(rows, (knn or ())[1:], strict=False):
        row["knn"] = value
    rows = [{"step": 0, "time_s": 0.0, "knn": knn[0]}, *rows] if knn else rows
    if finished and tmp:
        (tmp / "encoder.safetensors").write_bytes(b"")
    return report_run.RunRecord("run", tmp, settings, rows, list(records))


def knn_record(trained: float, untrained: float, images: int = 2000) -> dict:
    rows = [
        {"encoder": name, "top1": value, "test_images": images}
        for name, value in (("raw pixels", 13.0), ("untrained", untrained), ("trained", trained))
    ]
    return {"task": "knn", "which": "target", "inside": ".", "rows": rows}


def test_the_words_of_a_run_that_learnt(tmp_path):
    run = record_of(records=[knn_record(76.0, 25.8)], tmp=tmp_path)
    kind, headline, said = report_run.story(run)
    assert (kind, headline) == ("good", "It learnt")
    assert said[0] == (
        "kNN on the features is right for 76.0 ± 1.9 % of 2,000 test images; an untrained encoder "
        "25.8 ± 1.9 %, raw pixels 13.0 ± 1.5 %."
    )
    assert said[1] == "RankMe, how many directions the features use, rose from 20 to 50."
    assert said[-1] == "20 steps, 2 of 300 epochs, in 2.0 min at 9 images/s."


def test_best_and_last_are_at_the_steps_of_their_evaluations(tmp_path):
    """Of equal scores the first is RUN/best; rows without an evaluation follow the last one."""
    run = record_of(knn=(20.0, 60.0, 50.0, 60.0), rankme=(2.0,) * 5, tmp=tmp_path)
    assert (run.online.best_step, run.online.last_step) == (10, 30)
    table = re.sub(r"<[^>]+>", " ", report._best_and_last([run]))
    assert re.search(r"best\s+10\s+60.0", table) and re.search(r"last\s+30\s+60.0", table)


def test_the_words_of_a_run_that_collapsed(tmp_path):
    """A collapse counts, whatever kNN says of noise."""
    run = record_of(
        rankme=(5.0, 1.6, 1.2), std=0.005, beta=0.0, records=[knn_record(76.0, 25.8)], tmp=tmp_path
    )
    kind, headline, said = report_run.story(run)
    assert (kind, headline) == ("bad", "The features collapsed")
    assert said[0].endswith(
        "directions the features use, ended at 1.2; it fell below 2 at step 20."
    )
    assert said[1].endswith("ended at 0.005; it fell below 0.02 at step 10.")
    assert any("loss.vicreg.beta from 0 to 0.001" in text for text in said)


@pytest.mark.parametrize(
    ("made", "kind", "headline"),
    [
        ({"records": [knn_record(26.0, 25.8)]}, "bad", "Hardly better than untrained"),
        ({"records": [knn_record(25.0, 25.8)]}, "bad", "No better than untrained"),
        ({"knn": (20.0, 30.0, 60.0)}, "good", "It learnt"),
        ({"rankme": (20.0, 10.0)}, "bad", "The features got worse"),
        ({}, "", "It trained; what the features are worth is not known yet"),
    ],
)
def test_the_headline(tmp_path, made, kind, headline):
    assert report_run.story(record_of(tmp=tmp_path, **made))[:2] == (kind, headline)


def test_weights_that_come_from_a_file_are_not_called_untrained(tmp_path):
    made = record_of(knn=(60.0, 61.0, 50.0), tmp=tmp_path)
    run = made.settings.run.model_copy(update={"init_from": "encoder.safetensors"})
    made = dataclasses.replace(made, settings=made.settings.model_copy(update={"run": run}))
    _, headline, sentences = report_run.story(made)
    assert headline == "No better than at the start"
    told = " ".join([*sentences, report._best_and_last([made])])
    assert "at the start 60.0 %" in told and "untrained" not in told and "model.init" not in told


def test_a_run_that_fell_and_one_that_goes_on(tmp_path):
    fell = record_of(knn=(20.0, 60.0, 50.0), tmp=tmp_path)
    assert any(
        "best at step 10 (60.0 %) and fell to 50.0 %" in x for x in report_run.story(fell)[2]
    )
    (tmp_path / "on").mkdir()
    goes_on = record_of(knn=(20.0, 60.0), finished=False, tmp=tmp_path / "on")
    assert report_run.story(goes_on)[1] == "So far: it learnt"
    table = report._best_and_last([fell])
    assert "The best was chosen on them" in table
    assert re.findall(r"<td>([^<]*)</td>", table) == [
        "untrained", "0", "20.0 %", "+0.0", "best", "10", "60.0 %", "+40.0",
        "last", "20", "50.0 %", "+30.0",
    ]  # fmt: skip


def test_events_are_sentences(tmp_path):
    rows = [
        {"step": 5, "time_s": 65.0, "text": "WARNING: rankme 1.2; telemetry.rankme_floor"},
        {"step": 9, "time_s": 70.0, "text": "next: cjepa-eval"},
        {"step": 9, "time_s": 70.0, "text": "      cjepa-embed"},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "events.jsonl").write_text(lines)
    (tmp_path / "unusable_rank_1.jsonl").write_text('{"name": "a.jpg", "why": "empty"}\n')
    found = report_events.events(record_of(tmp=tmp_path))
    assert found == [
        ("", "", "image left out: a.jpg: empty"),
        ("0:01:05", "5", "WARNING: RankMe 1.2; telemetry.rankme_floor"),
    ]


def test_runs_side_by_side(run, tmp_path):
    """One page: a column, a line and a word for each, and what their settings differ in."""
    other = tmp_path / "other"
    shutil.copytree(run, other)
    config = json.loads((other / "config.json").read_text())
    config["optim"]["lr"] = 0.125
    (other / "config.json").write_text(json.dumps(config))
    words = [str(run), str(other), "--images", str(tmp_path / "nowhere")]
    assert report.main(words) == 0
    page = run / "side_by_side.html"
    found, text = read(page), page.read_text()
    said = " ".join(found.said)
    assert "a <run> beside other" in said and "what differs" in said and "0.125" in said
    assert text.count('class="story') == 2
    charts = re.findall(r'data-lines="([^"]*)"', text)
    assert all(len(json.loads(html.unescape(chart))) == 2 for chart in charts)
    page.unlink()


def test_knn_has_the_band_of_its_test_images(tmp_path):
    run = record_of(knn=(20.0, 60.0), tmp=tmp_path)
    vars(run)["tested_on"] = 100
    svg = report._chart([run], "knn")
    low, high = held(svg)[0]["low"][-1], held(svg)[0]["high"][-1]
    assert (low, high) == pytest.approx((50.2, 69.1), abs=0.05)  # Wilson, 60 of 100
    assert "low" not in held(report._chart([run], "rankme"))[0]
    assert "RankMe (directions)" in report._chart([run], "rankme")


def test_the_value_at_the_pointer_has_its_zeros():
    if (node := shutil.which("node")) is None:
        pytest.skip("no node is here, which runs the page's script")
    (said,) = re.findall(r"const said = .*;", html_charts.SCRIPT)
    shown = f"{said} console.log([1000, 120, 10, 0.25, 0.1000, 12345, 1e-7, null].map(said))"
    done = subprocess.run([node, "-e", shown.replace("])", "]))")], capture_output=True, text=True)
    words = re.findall(r"'([^']*)'", done.stdout)
    assert words == ["1000", "120", "10", "0.25", "0.1", "12350", "1e-7", "-"], done.stderr


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
