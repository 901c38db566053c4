"""The bench: what its figures are made of, and that the GPU gate tells a failure."""

import json
import sys

import pytest
import tiny
import torch

from cjepa_fast.model.flops import StepSizes, step_gflop
from cjepa_fast.runtime import memory
from cjepa_fast.training.trainer import Trainer

sys.path.insert(0, str(tiny.ROOT / "bench"))  # no package: its scripts import each other by name

import hardware
import masks
import measure
import phases
import reference
import tables
import throughput
import timeline

BENCH = tiny.ROOT / "bench"


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
def test_data_sheet_peaks(name, tflops):
    assert hardware.peak_tflops(name) == tflops


def test_provenance_names_what_a_repetition_needs():
    about = hardware.provenance(torch.device("cpu"))
    assert about["versions"]["torch"] == torch.__version__
    assert about["versions"]["deepspeed"] and about["hardware"]["cores"] >= 1
    assert about["command"].startswith("python ")
    assert about["commit"] is None or len(about["commit"].removesuffix("+changes")) == 40


def timed_row(step_ms: list[float], total_s: float) -> dict:
    """row_of for a small encoder and synthetic times."""
    from types import SimpleNamespace

    from cjepa_fast.config import validate
    from cjepa_fast.training import build

    config = validate(tiny.CONFIG)
    encoder = build.build_networks(config).encoder
    trainer = SimpleNamespace(micro_batch=8, ema=SimpleNamespace(module=encoder), attention={})
    sizes = {"context_k": 9.5, "targets_m": 4, "targets_p": 6.0}
    timed = {"step_ms": step_ms, "total_s": total_s, "waited_s": total_s / 4, **sizes}
    return measure.row_of(config, "synthetic", trainer, timed)


def test_a_rows_figures():
    row = timed_row([100.0, 300.0, 200.0, 400.0, 500.0], total_s=2.0)
    assert row["images_per_s"] == pytest.approx(8 * 5 / 2.0)
    assert (row["step_ms"], row["step_ms_p10"], row["step_ms_p90"]) == (300, 140, 460)
    assert row["data_wait_pct"] == pytest.approx(25)
    sizes = StepSizes(
        image_size=24, patch_size=4, width=24, depth=2, mlp_ratio=4.0,
        predictor_width=12, predictor_depth=1, context_k=9.5, targets_m=4, targets_p=6.0,
    )  # fmt: skip
    work = step_gflop(sizes)
    assert row["gflop_per_image"] == pytest.approx(work["total"])
    assert row["tflops"] == pytest.approx(work["total"] * 20 / 1000)


def test_mfu_is_of_the_sheet_and_of_the_measured_matmul(monkeypatch):
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
    from cjepa_fast.config import validate
    from cjepa_fast.runtime import distributed
    from cjepa_fast.training import build

    sections = {"run": {"precision": "fp32"}, "loss": {"vicreg": {"beta": 0}}}
    sections["data"] = tiny.CONFIG["data"] | {"batch_size": 8}
    config = validate(tiny.CONFIG | {**sections, "optim": {"warmup_epochs": 0, "lr": 0.01}})
    trainer = Trainer(config, distributed.start(0), steps_per_epoch=10)
    return trainer, build.build_masks(config)


def test_the_reference_is_the_same_step(trainer):
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
    emas = zip(ours.ema.module.parameters(), plain.target.parameters(), strict=True)
    for one, other in emas:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_steps_take_turns_against_the_reference(trainer, monkeypatch):
    ours, _ = trainer
    known = measure.machine.Choice("bf16", "it multiplies it")
    monkeypatch.setattr(measure.machine, "best_precision", lambda device: known)
    rows = measure.measure_against(ours.config, ours.device, steps=3, warmup=1)
    assert [row["step"] for row in rows] == [
        "ours", "reference, fp32", "reference, bf16 autocast",
    ]  # fmt: skip
    assert rows[0]["ours_times"] == 1 and all(row["steps"] == 3 for row in rows)
    made = {"config": "tiny"} | measure.against_row("it", [20.0, 40.0, 30.0], [10.0] * 3, ours)
    assert (made["step_ms"], made["ours_times"]) == (30, 3)
    assert made["images_per_s"] == pytest.approx(8 / 0.030)
    assert "times" in tables.table([made], tables.AGAINST_COLUMNS)
    kept, step = ([row[name] for row in rows] for name in ("kept_gib", "step_gib"))
    assert 0 < kept[0] < kept[1] and 0 < kept[2] < kept[1]  # ours keeps less than the reference
    assert all(a < b for a, b in zip(kept, step, strict=True))


def test_a_reference_that_cannot_be_fast_is_left_out_with_a_word(trainer, monkeypatch, capsys):
    ours, _ = trainer
    known = measure.machine.Choice("fp32", "an old processor multiplies no bf16")
    monkeypatch.setattr(measure.machine, "best_precision", lambda device: known)
    rows = measure.measure_against(ours.config, ours.device, steps=3, warmup=1)
    assert [row["step"] for row in rows] == ["ours", "reference, fp32"]
    assert "left out: the reference in bf16, since an old processor" in capsys.readouterr().err


def test_memory_is_what_was_held_at_once():
    weight = torch.nn.Linear(256, 256)
    x, made = torch.randn(64, 256, requires_grad=True), []

    def call():
        made.append(torch.ones(1000, 256))  # goes before the next is made
        made.clear()
        made.append((weight(x) * 2).exp().sum())

    saved = memory.SavedActivations(weight)
    with saved.counting():
        call()
    assert saved.bytes == 2 * 64 * 256 * 4  # x and the exponential: not the weight
    assert memory.peak_bytes(call, torch.device("cpu")) == pytest.approx(1000 * 256 * 4, rel=0.01)


def test_the_masks_time_is_of_the_calls_asked_for():
    calls = []
    times_ms = masks.calls_ms(lambda *index: calls.append(index), 4, 5)
    assert len(times_ms) == 5 and all(ms >= 0 for ms in times_ms)
    assert len(calls) == 5 + masks.WARMUP and calls[2][2].tolist() == [8, 9, 10, 11]


@pytest.mark.parametrize(
    "override",
    [
        *("predictor.mode=one_pass", "mask.context=packed"),
        *("model.target_precision=fp8", "model.context_precision=fp8"),
    ],
)
def test_other_maths_are_not_compared_with_the_reference(override):
    from cjepa_fast.config import load

    with pytest.raises(ValueError, match=override.partition("=")[0]):
        measure.check_comparable(load("vit_b", [override]))
    measure.check_comparable(load("vit_b"))


def test_the_phases_are_parts_of_the_step(trainer):
    ours, masks = trainer
    parts = phases.Phases(ours)
    batches = measure.synthetic_batches(ours.config, ours.device, masks)
    before = vars(ours.engine).keys() | vars(ours).keys() | vars(ours.ema).keys()
    with parts.timed():
        for index in range(3):
            ours.step(next(batches), index)
    names = ["target", "context", "predictor", "loss", "backward", "optimiser", "average", "rest"]
    found = parts.median_ms()
    assert list(found) == names and all(ms > 0 for name, ms in found.items() if name != "average")
    assert len(parts.steps_ms) == 3
    for step in parts.steps_ms:
        timed = [step[name] for name in ("target", "forward", "backward", "optimiser")]
        assert sum(timed) < step["step"]
        assert step["context"] + step["predictor"] < step["forward"]
    assert vars(ours.engine).keys() | vars(ours).keys() | vars(ours.ema).keys() == before
    ours.step(next(batches), 3)
    assert len(parts.steps_ms) == 3  # it times no more


def test_several_ranks_are_held_against_one():
    row = {"data": "jpeg", "images_per_s": 300.0, "processes": 4}
    throughput.add_scaling(row, {"synthetic": 10.0, "jpeg": 100.0})
    assert (row["images_per_s_each"], row["scaling_pct"]) == (75, 75)
    alone = {"data": "jpeg", "images_per_s": 300.0, "processes": 4}
    throughput.add_scaling(alone, {})
    assert alone["images_per_s_each"] == 75 and "scaling_pct" not in alone
    columns = tables.columns_of([alone])
    assert "images/s each" in columns and not {"scaling %", "W"} & columns.keys()


@pytest.mark.parametrize("wrong", [["--against", "reference"], ["--alone", "0"]])
def test_what_several_ranks_cannot_do_is_told(monkeypatch, capsys, wrong):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        throughput.parse(wrong)
    assert wrong[0] in capsys.readouterr().err


@pytest.mark.parametrize(("text", "found"), [("8", [8]), ("8,16", [8, 16])])
def test_batches_are_numbers(text, found):
    assert throughput.parse(["--batch-size", text]).batch == found


@pytest.mark.parametrize("text", ["0", "8,x", "auto"])
def test_wrong_batches_are_told(capsys, text):
    if text == "auto" and torch.cuda.is_available():
        pytest.skip("a GPU is here, where auto is right")
    with pytest.raises(SystemExit):
        throughput.parse(["--batch-size", text])
    assert "--batch-size" in capsys.readouterr().err


def test_the_table_lines_up_and_names_failures():
    row = {key: 1.0 for key, _ in tables.COLUMNS.values()}
    row |= {"config": "vit_b", "data": "jpeg", "mfu_sheet_pct": None}
    text = tables.table([row, {"config": "vit_g", "failed": "exit status 1"}])
    lines = text.splitlines()
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1
    assert "vit_b" in lines[1] and " - " in lines[1]
    assert "vit_g" in lines[2] and "exit status 1" in lines[2]


def test_saving_appends(tmp_path):
    path = tmp_path / "results" / "rows.json"
    throughput.save([{"a": 1}], path)
    throughput.save([{"a": 2}], path)
    assert json.loads(path.read_text()) == [{"a": 1}, {"a": 2}]
    assert [p.name for p in path.parent.iterdir()] == ["rows.json"]


def test_the_batch_is_one_micro_batch(tmp_path):
    path = str(tiny.write_config(tmp_path, data={"batch_size": 64, "micro_batch_size": 16}))
    for asked, expected in (([], 16), (["--batch-size", "24"], 24)):
        config = throughput.configured(path, throughput.parse(["--config", path, *asked]), 2)
        assert (config.data.micro_batch_size, config.data.batch_size) == (expected, 2 * expected)


def test_wrong_settings_are_told_without_a_traceback(capsys):
    assert throughput.main(["--config", "vit_x"]) == 2
    assert "vit_x" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        throughput.parse(["--steps", "0"])


@pytest.mark.long
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
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])
    assert "aten::" in done.stdout and "perfetto" in done.stdout


@pytest.mark.long
@pytest.mark.slow
def test_throughput_measures_several_configs_past_a_failing_one(tmp_path):
    good = tiny.write_config(tmp_path)
    out, plot = tmp_path / "rows.json", tmp_path / "bars.png"
    done = tiny.run(
        BENCH / "throughput.py", "--config", good, "no_such", "--data", "both",
        "--data-path", tmp_path / "images", "--steps", "3", "--warmup", "1", "--json", out,
        "--plot", plot,
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
        assert row["ahead_ms"]["masks"] > 0 and row["overrides"] == []
    assert jpeg["ahead_ms"]["decode"] > 0 and "decode" not in synthetic["ahead_ms"]
    assert failed == {"config": "no_such", "failed": "exit status 2"}
    assert "no_such" in done.stdout and "images/s" in done.stdout
    assert "made ahead, ms a batch: decode" in done.stdout
    assert plot.stat().st_size > 5000


@pytest.mark.long
@pytest.mark.multiprocess
def test_two_ranks_are_measured_together_and_against_one(tmp_path):
    good, out = tiny.write_config(tmp_path), tmp_path / "rows.json"
    done = tiny.run(
        BENCH / "throughput.py", "--config", good, "--data", "synthetic", "--steps", "2",
        "--warmup", "1", "--json", out, ranks=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())
    assert (row["processes"], row["batch"]) == (2, 16)
    assert row["images_per_s_each"] == pytest.approx(row["images_per_s"] / 2)
    share = 100 * row["images_per_s_each"] / row["images_per_s_alone"]
    assert row["scaling_pct"] == pytest.approx(share)
    assert row["command"].startswith("torchrun --nproc_per_node=2 ")
    assert "scaling %" in done.stdout and done.stdout.count("images/s each") == 1


def test_a_trace_s_kernels_are_summed_and_their_overlap_counts_once(tmp_path):
    def kernel(name: str, ts: float, dur: float, cat: str = "kernel") -> dict:
        return {"name": name, "ts": ts, "dur": dur, "cat": cat}

    events = [
        kernel("b", 130, 20),  # on another stream: 10 of it beside the second a
        kernel("a", 100, 10),
        kernel("a", 120, 20),
        kernel("copy", 190, 10, "gpu_memcpy"),
        kernel("a CPU's", 0, 1000, "cpu_op"),
        {"name": "metadata"},
    ]
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps({"traceEvents": events}))
    first, _, *lines = timeline.summary(trace, 2).splitlines()
    assert first == "a step: 50 us, busy 50.0 %, 2 kernels and copies"
    assert [line.split() for line in lines] == [
        ["15.0", "30.0", "1.0", "15.0", "a"],
        ["10.0", "20.0", "0.5", "20.0", "b"],
        ["5.0", "10.0", "0.5", "10.0", "copy"],
    ]
    trace.write_text(json.dumps({"traceEvents": events[-2:]}))
    assert timeline.summary(trace, 2) == ""
