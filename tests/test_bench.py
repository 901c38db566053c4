"""The bench: what its figures are made of, and that the GPU gate tells a failure."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from cjepa_fast.flops import step_gflop

BENCH = tiny.ROOT / "bench"


def bench_module(name: str):
    """A file of bench/, which is no package: its scripts import each other by name."""
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hardware():
    return bench_module("hardware")


@pytest.fixture(scope="module")
def reference(hardware):
    return bench_module("reference")


@pytest.fixture(scope="module")
def measure(hardware, reference):
    bench_module("phases")
    return bench_module("measure")


@pytest.fixture(scope="module")
def throughput(measure):
    return bench_module("throughput")


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_data_sheet_peaks(hardware, name, tflops):
    assert hardware.peak_tflops(name) == tflops


def test_provenance_names_what_a_repetition_needs(hardware):
    about = hardware.provenance(torch.device("cpu"))
    assert about["versions"]["torch"] == torch.__version__
    assert about["versions"]["deepspeed"] and about["hardware"]["cores"] >= 1
    assert about["command"].startswith("python ")
    assert about["commit"] is None or len(about["commit"].removesuffix("+changes")) == 40


def timed_row(measure, step_ms: list[float], total_s: float) -> dict:
    """row_of for a small encoder and made-up times."""
    from types import SimpleNamespace

    from cjepa_fast import build
    from cjepa_fast.config import validate

    config = validate(tiny.CONFIG)
    encoder = build.build_networks(config).encoder
    trainer = SimpleNamespace(micro_batch=8, ema=SimpleNamespace(module=encoder))
    sizes = {"context_k": 9.5, "targets_m": 4, "targets_p": 6.0}
    timed = {"step_ms": step_ms, "total_s": total_s, "waited_s": total_s / 4, **sizes}
    return measure.row_of(config, "synthetic", trainer, timed)


def test_a_rows_figures(measure):
    row = timed_row(measure, [100.0, 300.0, 200.0, 400.0, 500.0], total_s=2.0)
    assert row["images_per_s"] == pytest.approx(8 * 5 / 2.0)
    assert (row["step_ms"], row["step_ms_p10"], row["step_ms_p90"]) == (300, 140, 460)
    assert row["data_wait_pct"] == pytest.approx(25)
    work = step_gflop(
        image_size=24, patch_size=4, width=24, depth=2, heads=3, mlp_ratio=4.0,
        predictor_width=12, predictor_depth=1, context_k=9.5, targets_m=4, targets_p=6.0,
    )  # fmt: skip
    assert row["gflop_per_image"] == pytest.approx(work["total"])
    assert row["tflops"] == pytest.approx(work["total"] * 20 / 1000)


def test_mfu_is_of_the_sheet_and_of_the_measured_product(measure, monkeypatch):
    monkeypatch.setattr(measure, "measured_tflops", lambda device, dtype: 790.0)
    row = {"tflops": 395.0}
    measure.add_mfu(row, "bf16", torch.device("cpu"), "NVIDIA H200")
    assert row["mfu_matmul_pct"] == pytest.approx(50)
    assert row["mfu_sheet_pct"] == pytest.approx(100 * 395 / 989)
    measure.add_mfu(row, "fp32", torch.device("cpu"), "NVIDIA H200")
    assert row["mfu_sheet_pct"] is None  # the sheet's rate is bf16's


@pytest.fixture
def trainer(tmp_path):
    """A tiny trainer in fp32 without VICReg, whose step is I-JEPA's, and its batches."""
    from cjepa_fast import build, engine, train
    from cjepa_fast.config import validate

    sections = {"run": {"precision": "fp32"}, "loss": {"vicreg": {"beta": 0}}}
    sections["data"] = tiny.CONFIG["data"] | {"batch_size": 8}
    config = validate(tiny.CONFIG | {**sections, "optim": {"warmup_epochs": 0, "lr": 0.01}})
    trainer = train.Trainer(config, engine.start(0), steps_per_epoch=10)
    return trainer, build.build_masks(config)


def test_the_reference_is_the_same_step(measure, reference, trainer):
    """Same weights, same batches: the losses of several updates agree, so that times compare."""
    ours, masks = trainer
    plain = reference.ReferenceTrainer(ours, autocast=False)
    rounded = reference.ReferenceTrainer(ours, autocast=True)
    losses = []
    batches = measure.synthetic_batches(ours.config, ours.device, masks)
    for index in range(4):
        step = next(batches)
        terms, applied = ours.step(step, index)
        losses.append((terms["loss"].item(), plain.step(step, index), rounded.step(step, index)))
        assert applied
    for exact, same, near in losses:
        assert same == pytest.approx(exact, rel=1e-5)
        assert near == pytest.approx(exact, rel=0.05)
    assert losses[-1][0] < 0.9 * losses[0][0]
    averages = zip(ours.ema.module.parameters(), plain.target.parameters(), strict=True)
    for one, other in averages:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_steps_take_turns_against_the_reference(measure, throughput, trainer):
    ours, _ = trainer
    rows = measure.measure_against(ours.config, ours.device, steps=3, warmup=1)
    assert [row["step"] for row in rows] == [
        "ours", "reference, fp32", "reference, bf16 autocast",
    ]  # fmt: skip
    assert rows[0]["ours_times"] == 1 and all(row["steps"] == 3 for row in rows)
    made = {"config": "tiny"} | measure.against_row("it", [20.0, 40.0, 30.0], [10.0] * 3, ours)
    assert (made["step_ms"], made["ours_times"]) == (30, 3)
    assert made["images_per_s"] == pytest.approx(8 / 0.030)
    assert "times" in throughput.table([made], throughput.AGAINST_COLUMNS)


def test_the_phases_are_parts_of_the_step(measure, trainer):
    ours, masks = trainer
    phases = sys.modules["phases"].Phases(ours)
    batches = measure.synthetic_batches(ours.config, ours.device, masks)
    before = vars(ours.engine).keys() | vars(ours).keys() | vars(ours.ema).keys()
    with phases.timed():
        for index in range(3):
            ours.step(next(batches), index)
    names = ["target", "context", "predictor", "loss", "backward", "optimiser", "average", "rest"]
    found = phases.median_ms()
    assert list(found) == names and all(ms > 0 for ms in found.values())
    assert len(phases.steps_ms) == 3
    for step in phases.steps_ms:
        parts = [step[name] for name in ("target", "forward", "backward", "optimiser", "average")]
        assert sum(parts) < step["step"]
        assert step["context"] + step["predictor"] < step["forward"]
    assert vars(ours.engine).keys() | vars(ours).keys() | vars(ours.ema).keys() == before
    ours.step(next(batches), 3)
    assert len(phases.steps_ms) == 3  # it times no more


@pytest.mark.parametrize(("text", "found"), [("8", [8]), ("8,16", [8, 16])])
def test_batches_are_numbers(throughput, text, found):
    assert throughput.parse(["--batch", text]).batch == found


@pytest.mark.parametrize("text", ["0", "8,x", "auto"])
def test_wrong_batches_are_told(throughput, capsys, text):
    if text == "auto" and torch.cuda.is_available():
        pytest.skip("a GPU is here, where auto is right")
    with pytest.raises(SystemExit):
        throughput.parse(["--batch", text])
    assert "--batch" in capsys.readouterr().err


def test_the_table_lines_up_and_names_failures(throughput):
    row = {key: 1.0 for key, _ in throughput.COLUMNS.values()}
    row |= {"config": "vit_b", "data": "jpeg", "mfu_sheet_pct": None}
    text = throughput.table([row, {"config": "vit_g", "failed": "exit status 1"}])
    lines = text.splitlines()
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1
    assert "vit_b" in lines[1] and " - " in lines[1]
    assert "vit_g" in lines[2] and "exit status 1" in lines[2]


def test_saving_appends(throughput, tmp_path):
    path = tmp_path / "results" / "rows.json"
    throughput.save([{"a": 1}], path)
    throughput.save([{"a": 2}], path)
    assert json.loads(path.read_text()) == [{"a": 1}, {"a": 2}]
    assert [p.name for p in path.parent.iterdir()] == ["rows.json"]


def test_the_batch_is_one_micro_batch(throughput, tmp_path):
    path = str(tiny.write_config(tmp_path, data={"batch_size": 64, "micro_batch_size": 16}))
    for asked, expected in (([], 16), (["--batch", "24"], 24)):
        config = throughput.configured(path, throughput.parse(["--config", path, *asked]), 2)
        assert (config.data.micro_batch_size, config.data.batch_size) == (expected, 2 * expected)


def test_wrong_settings_are_told_without_a_traceback(throughput, capsys):
    assert throughput.main(["--config", "vit_x"]) == 2
    assert "vit_x" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        throughput.parse(["--steps", "0"])


@pytest.mark.slow
def test_decoding_alone_and_a_trace(tmp_path):
    good, out = tiny.write_config(tmp_path), tmp_path / "rows.json"
    common = ["--config", good, "--data-path", tmp_path / "images", "--steps", "2", "--warmup", "1"]
    script = BENCH / "throughput.py"
    done = tiny.run(script, *common, "--data", "decode-only", "--json", out)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())
    assert (row["data"], row["batch"]) == ("decode-only", 8) and row["images_per_s"] > 0
    done = tiny.run(script, *common, "--data", "synthetic", "--profile", tmp_path / "traces")
    assert done.returncode == 0, done.stderr
    trace = json.loads((tmp_path / "traces" / "tiny_synthetic.json").read_text())
    assert any(event.get("name") == "aten::addmm" for event in trace["traceEvents"])
    assert "aten::addmm" in done.stdout and "perfetto" in done.stdout


@pytest.mark.slow
def test_throughput_measures_several_configs_past_a_failing_one(tmp_path):
    good = tiny.write_config(tmp_path)
    out = tmp_path / "rows.json"
    done = tiny.run(
        BENCH / "throughput.py", "--config", good, "no_such", "--data", "both",
        "--data-path", tmp_path / "images", "--steps", "3", "--warmup", "1", "--json", out,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    synthetic, jpeg, failed = json.loads(out.read_text())
    assert (synthetic["data"], jpeg["data"]) == ("synthetic", "jpeg")
    for row in (synthetic, jpeg):
        assert row["batch"] == 8 and row["steps"] == 3
        assert row["images_per_s"] > 0 and row["step_ms_p10"] <= row["step_ms"]
        assert 4 <= row["context_k"] <= 36 and row["tflops"] > 0 and row["matmul_tflops"] > 0
        assert row["command"].startswith("python ") and "no_such" in row["command"]
        assert sum(row["phases_ms"].values()) > 0
    assert failed == {"config": "no_such", "failed": "exit status 2"}
    assert "no_such" in done.stdout and "images/s" in done.stdout


STAND_IN = """#!/bin/sh
# Stands in for Python: notes how it was called; fails where the test asks for it.
echo "$@" >> "$CALLS"
case "$*" in
  *"not torch.cuda"*) exit 1 ;;
  *$FAILING*) exit 3 ;;
esac
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("failing", ["nothing", "throughput.py", "--resume"])
def test_the_gate_runs_every_part_and_fails_with_any(tmp_path, failing):
    python, calls, out = tmp_path / "python", tmp_path / "calls", tmp_path / "out"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    env = os.environ | {"PYTHON": str(python), "CALLS": str(calls), "FAILING": failing}
    images = str(tmp_path)
    gate = ["bash", str(BENCH / "gpu_gate.sh"), str(out), images]
    done = subprocess.run(gate, env=env, capture_output=True, text=True, timeout=100)
    summary = (out / "summary.txt").read_text()
    failed = [line.split()[0] for line in summary.splitlines() if "FAILED" in line]
    expected = {
        "nothing": [],
        "throughput.py": ["throughput", "target", "from-jpeg"],
        "--resume": ["resume"],
    }
    assert failed == expected[failing]
    assert (done.returncode != 0) == bool(failed)
    called = calls.read_text()
    for needed in (
        "-m gpu",
        "ops.py",
        "bench/fp8.py",
        "--set model.target_precision=fp8 --set run.target_stream=true",
        "--data both",
        "train.py",
        "--resume auto",
        "eval knn",
        "not gpu",
    ):
        assert needed in called
    assert f"data.path={images}" in called
    for config in (tiny.ROOT / "configs").glob("*.json"):
        assert config.stem in called


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_gate_starts_no_part_without_time(tmp_path):
    python, calls, out = tmp_path / "python", tmp_path / "calls", tmp_path / "out"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    env = os.environ | {"PYTHON": str(python), "CALLS": str(calls), "FAILING": "nothing"}
    gate = ["bash", str(BENCH / "gpu_gate.sh"), str(out)]
    done = subprocess.run(gate, env=env | {"BUDGET_S": "0"}, capture_output=True, timeout=100)
    assert done.returncode == 1
    assert "train.py" not in calls.read_text()
    assert "no time was left" in Path(out / "summary.txt").read_text()
