"""bench/gpu_gate.sh and gpu_more.sh: no part is forgotten, no failure hidden, and nothing is lost
on the way back. A stand-in takes Python's place; its figures are invented and stay in the test."""

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time

import pytest
import tiny

sys.path.insert(0, str(tiny.ROOT / "bench"))  # no package: its scripts import each other by name

import collect
import files
import report

BENCH = tiny.ROOT / "bench"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
MOST_FILES, MOST_BYTES = 8, 16 * 2**20  # of results
BY_SCRIPT = {
    "gpu_gate.sh": {
        "doctor": "tools.doctor", "ceilings": "ceilings.py", "tests": "-m gpu",
        "kernels": "warm_cache.py --fill --config vit_h", "fused": "--variant fused",
        "graph": "--variant graph", "compiled": "--variant compiled", "profile": "--profile",
        "prepare": "--prepare 15/16", "tune": "--tune --only attention add_norm gelu",
        "tuned": "throughput_tuned", "matmuls": "matmuls.py",
        "tanh": "--config vit_h vit_b vit_l --variant tanh",
        "graph-tanh": "--config vit_h vit_b vit_l --variant graph_tanh",
        "graph-fp8": "--variant graph_fp8_k78 graph_tanh_fp8_k78",
        "target-fp8": "--variant fp8 fp8_fast",
        "context-fp8": "--config vit_h --variant graph_fp8 graph_fp8_all",
        "others": "fused k78 weight_stream stream batch256 graph graph_dependent_launch",
        "reference-b": "--against reference", "reference-h": "--batch-size 32",
    },
    "gpu_more.sh": {
        "doctor": "tools.doctor", "decode": "--data decode-only", "from-jpeg": "--data jpeg",
        "tests-gpu": "-m gpu", "train": "train.py", "resume": "--resume auto", "knn": "eval knn",
        "curves": "eval curves", "models": "throughput_shipped",
        "ops": "ops.py", "attention": "attention.py", "fp8": "--config vit_h vit_l vit_b --json",
        "fp8-trained": "bench/fp8.py --encoder",
        "saving": "saving.py", "tests-fast": "not gpu",
    },
}  # fmt: skip


@pytest.fixture
def gate(tmp_path, monkeypatch):
    """Starts one of the scripts, from a copy of the folder, since it writes kernels/tuned.py."""
    python = tmp_path / "python"
    stand_in = tiny.ROOT / "tests" / "bench" / "gate_stand_in.py"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I "{stand_in}" "$@"\n')
    python.chmod(0o755)
    copy = tmp_path / "copy"
    for folder in ("configs", "kernels"):
        shutil.copytree(tiny.ROOT / folder, copy / folder)
    (copy / "tests").mkdir()
    (copy / "tests" / "test_it.py").write_text("kernel_device")
    (copy / "bench").mkdir()
    for path in BENCH.glob("*.sh"):
        shutil.copy(path, copy / "bench")
    monkeypatch.delenv("CJEPA_REAL_IMAGES", raising=False)

    def start(script: str, **settings) -> subprocess.Popen:
        names = {"PYTHON": str(python), "CALLS": str(tmp_path / "calls"), "FAILING": "nothing"}
        names |= {"TRITON_CACHE_DIR": str(tmp_path / "triton")}
        env = os.environ | names | {"NO_GPU": "0"} | settings
        command = ["bash", str(copy / "bench" / script), str(tmp_path / "out"), str(tmp_path)]
        return subprocess.Popen(
            command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    return start


@pytest.mark.parametrize("no_gpu", ["0", "1"])
@pytest.mark.parametrize("script", BY_SCRIPT)
def test_every_part_runs(tmp_path, gate, script, no_gpu):
    assert gate(script, NO_GPU=no_gpu).wait(tiny.HANG_S) == 0
    summary, calls = (tmp_path / "out" / "summary.txt").read_text(), (tmp_path / "calls")
    parts = {line.split()[0] for line in summary.splitlines() if " passed " in line}
    own = {"compile-ops", "memcheck", "racecheck"} if shutil.which("compute-sanitizer") else set()
    only_gpu = {"kernels", "prepare", "tune", "tuned", "graph", "compiled"}
    only_gpu |= {"target-fp8", "context-fp8", "graph-tanh", "graph-fp8"}
    only_gpu = only_gpu if no_gpu == "1" else set()
    assert parts - own == BY_SCRIPT[script].keys() - only_gpu
    called = calls.read_text()
    for part in parts - own if no_gpu == "0" else ():
        assert BY_SCRIPT[script][part] in called, part
    assert ("model.width=48" in called) == (no_gpu == "1")  # toy size
    shipped = (tiny.ROOT / "configs").glob("vit_*.json") if script == "gpu_more.sh" else ()
    for config in shipped:
        assert no_gpu == "1" or config.stem in called.split()


@pytest.mark.parametrize(
    ("script", "failing", "parts"),
    [
        (
            "gpu_gate.sh",
            "variants.py",
            [
                *("fused", "graph", "tanh", "graph-tanh", "graph-fp8", "tuned", "target-fp8"),
                *("others", "profile", "compiled", "context-fp8"),
            ],
        ),
        ("gpu_more.sh", "--resume", ["resume"]),
    ],
)
def test_a_failing_part_is_told_and_the_others_run(tmp_path, gate, script, failing, parts):
    assert gate(script, FAILING=failing).wait(tiny.HANG_S) == 1
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert [line.split()[0] for line in summary.splitlines() if "FAILED" in line] == parts
    assert f"parts failed: {len(parts)}" in summary


def test_what_the_goals_are_stated_in_and_the_tuner_fit_one_call():
    """By the parts' limits, where Triton's cache came along (else `kernels` is a part more)."""
    text = (BENCH / "gpu_gate.sh").read_text()
    limits = {name: int(s) for name, s in re.findall(r"^ *part ([\w-]+) (\d+) ", text, re.M)}
    names = list(limits)
    goals = {"reference-b", "reference-h", "graph", "graph-tanh", "graph-fp8"}
    until_tuned = names[: names.index("tune") + 1]
    assert goals < {*until_tuned}
    assert sum(limits[name] for name in until_tuned) <= 560


@pytest.mark.parametrize("script", BY_SCRIPT)
def test_no_part_is_started_without_time(tmp_path, gate, script):
    assert gate(script, BUDGET_S="0").wait(tiny.HANG_S) == 1
    calls = (tmp_path / "calls").read_text()
    assert "bench/" not in calls and "train.py" not in calls
    assert "no time was left" in (tmp_path / "out" / "summary.txt").read_text()


def test_only_the_parts_asked_for_run(tmp_path, gate):
    """And what makes the machine ready."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("pydantic-2-py3-none-any.whl", "triton_cache.tar.xz"):
        (wheels / name).touch()
    asked = {"PARTS": "matmuls doctor", "WHEELS": str(wheels)}
    assert gate("gpu_gate.sh", **asked).wait(tiny.HANG_S) == 0
    lines = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    passed = [line.split()[0] for line in lines if " passed " in line]
    assert passed == ["wheels", "cache", "doctor", "matmuls"]


@pytest.mark.parametrize("serves", [True, False])
def test_a_cache_that_does_not_serve_is_filled_there(tmp_path, gate, serves):
    """Although it left a folder."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "triton_cache.tar.xz").touch()
    failing = "nothing" if serves else "--unpack"
    gate("gpu_gate.sh", WHEELS=str(wheels), FAILING=failing).wait(tiny.HANG_S)
    assert ("--fill" in (tmp_path / "calls").read_text()) != serves


def test_a_missing_package_is_told_before_the_first_part(tmp_path, gate):
    assert gate("gpu_gate.sh", FAILING="cjepa_fast.training.build").wait(tiny.HANG_S) == 2
    assert "imports" in (tmp_path / "out" / "summary.txt").read_text()
    assert "bench/" not in (tmp_path / "calls").read_text()


def test_all_comes_back_in_few_small_files_and_is_taken_over(tmp_path, gate, monkeypatch):
    """Into the table, the README's rows, the plots and the kernels' configurations."""
    assert gate("gpu_gate.sh").wait(tiny.HANG_S) == 0
    out, results, table = tmp_path / "out", tmp_path / "results", tmp_path / "tuned.py"
    came = {path.name: path.stat().st_size for path in out.iterdir()}
    assert came.keys() == {"summary.txt", "results.tar.gz"}
    assert len(came) <= MOST_FILES and max(came.values()) < MOST_BYTES
    with tarfile.open(out / "results.tar.gz") as tar:
        names = {name.removeprefix("./") for name in tar.getnames()}
    assert {"gate.log", "tuned.py", "tuned.json", "profile_fused_vit_h_synthetic.txt"} <= names
    assert not [name for name in names if "trace" in name]

    results.mkdir()
    said = report.collect(out, results, table)
    assert "throughput_graph.json: 3 of 3 rows appended" in said
    assert '"gelu": (4096, 8)' in table.read_text() and '"x 5": 3' in table.read_text()
    text = (results / "h200" / "gate_profile_fused_vit_h_synthetic.txt").read_text()
    assert text.startswith("a step: 180000 us")
    assert (results / "h200" / "matmuls.json").exists()
    found = report.lines(results)
    best = "vit_h, batch 128, mask.context=fixed, run.cuda_graph=true, synthetic"
    shown = report.headline(found)
    figures = "735 images/s, MFU 52.5 %, K 91, 0.91 J an image"
    assert f"| {best} | NVIDIA H200 | {figures} |" in shown  # neither FP8 nor mask.keep
    assert "vit_h, batch 128, mask.context=fixed, mask.keep=78, synthetic" in report.table(found)
    assert "model.target_precision=fp8, fast sums, synthetic" in report.table(found)
    assert "2.50, 2.50 times as fast" not in shown  # of two commands
    rows = json.loads((results / "throughput.json").read_text())
    plain = [row for row in rows if row.get("mfu_sheet_pct") and not row["also"]]
    assert len(report.measured_rows(rows)) == len(plain)  # whose configurations cjepa-plan loads
    assert report.draw(rows, results / "a.png") and (results / "a.png").stat().st_size > 5000
    assert report.draw_beside_reference(rows, results / "b.png")


@pytest.mark.parametrize("script", BY_SCRIPT)
def test_all_that_a_script_writes_is_collected(script):
    """By name: what nobody knows would be left behind."""
    written = re.findall(r"\$FOUND/([\w.]+\.json)", (BENCH / script).read_text())
    known = (collect.APPENDED, *collect.REPLACED, *collect.OF_A_GPU, *collect.AS_THEY_ARE)
    assert len(written) > 5
    assert not [n for n in written if not any(fnmatch.fnmatch(n, k) for k in known)]


def test_a_machine_that_stops_loses_one_part(tmp_path, gate):
    running = gate("gpu_gate.sh", HANGING="matmuls.py")
    calls, until = tmp_path / "calls", time.monotonic() + tiny.HANG_S
    while not (calls.exists() and "matmuls.py" in calls.read_text()):
        assert time.monotonic() < until
        time.sleep(0.05)
    os.killpg(running.pid, 9)
    running.wait()
    (tmp_path / "results").mkdir()
    said = report.collect(tmp_path / "out" / "results.tar.gz", tmp_path / "results")
    assert any(line.startswith("throughput_tuned.json") for line in said)
    assert "tuned" in (tmp_path / "out" / "summary.txt").read_text()


@pytest.mark.parametrize(
    "wrong",
    [
        {"architecture": "sm_90", "table": {'a": 0}\nimport os': 1}},
        {"architecture": "sm_90", "table": {"gelu": "__import__('os')"}},
        {"architecture": "sm_90", "table": {"gelu": [True]}},
        {"architecture": '"', "table": {}},
        {"architecture": "sm_90"},
    ],
)
def test_configurations_are_numbers_and_nothing_else(tmp_path, wrong):
    """They become the source of kernels/tuned.py."""
    table = tmp_path / "tuned.py"
    with pytest.raises(ValueError, match=r"tuned\.json"):
        collect.take_configurations(wrong, table)
    assert not table.exists()


def test_wheels_in_pieces_are_joined(tmp_path, gate):
    """A machine is sent so much at a time."""
    pieces = tmp_path / "pieces"
    pieces.mkdir()
    for number, text in enumerate(("ab", "cd", "e")):
        (pieces / f"dali-1-py3-none-any.whl.0{number}").write_text(text)
    copy = tmp_path / "joined"
    python = tmp_path / "pip"
    python.write_text(f'#!/bin/sh\nfor last; do :; done\n[ -f "$last" ] && cp "$last" {copy}\n')
    python.chmod(0o755)
    done = gate("gpu_gate.sh", PARTS="wheels", WHEELS=str(pieces), PYTHON=str(python))
    done.wait(tiny.HANG_S)
    assert copy.read_text() == "abcde"


@pytest.mark.parametrize("name", ["../x.json", "/tmp/x.json", "a/b/x.json"])
def test_an_archive_chooses_no_place(tmp_path, name):
    (tmp_path / "x.json").write_text("{}")
    with tarfile.open(tmp_path / "results.tar.gz", "w:gz") as tar:
        member = tar.gettarinfo(tmp_path / "x.json")
        member.name = name
        tar.addfile(member)
    with pytest.raises(ValueError, match=r"x\.json does not belong"):
        files.unpack(tmp_path / "results.tar.gz", tmp_path / "into")
