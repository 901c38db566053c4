"""bench/variants.py: which rows it measures, and what a row that fails costs the others."""

import json
import sys

import pytest
import tiny

sys.path.insert(0, str(tiny.ROOT / "bench"))

import throughput
import variants


@pytest.fixture
def measured(monkeypatch):
    """The (configuration, overrides) that were measured; those of `failing` raise."""
    calls, failing = [], []

    def measure_one(name, args):
        calls.append((name, *args.overrides[1:]))
        if calls[-1] in failing:
            raise RuntimeError("operation failed due to a previous error during capture")
        row = {"config": name, "batch": 8, "images_per_s": 10.0, "step_ms": 800.0, "phases_ms": {}}
        return [row | {"overrides": [*args.overrides]}]

    monkeypatch.setattr(throughput, "measure_one", measure_one)
    return calls, failing


def run(tmp_path, *names: str) -> tuple[int, list[dict]]:
    out = tmp_path / "rows.json"
    status = variants.main(["--config", "vit_h", "vit_l", "--variant", *names, "--json", str(out)])
    return status, json.loads(out.read_text())


def test_a_variant_of_one_configuration_is_measured_of_that_alone(tmp_path, measured):
    status, rows = run(tmp_path, "k78", "tanh")
    assert status == 0 and [row["variant"] for row in rows] == ["k78", "tanh", "tanh"]
    tanh = "model.gelu=tanh"
    assert measured[0] == [("vit_h", "mask.keep=78"), ("vit_h", tanh), ("vit_l", tanh)]


@pytest.mark.parametrize("which", variants.VARIANTS)
def test_a_variant_is_a_configuration(which):
    """Also of those that a GPU alone runs."""
    variant = variants.VARIANTS[which]
    args = variants.parse(["--config", "vit_h"])
    config = throughput.configured(
        "vit_h", throughput.changed(args, overrides=[*variant.overrides], batch=[variant.batch]), 1
    )
    assert config.mask.context == "fixed"
    assert config.data.micro_batch_size == (variant.batch or 128)
    for part, asked in (
        ("graph", config.run.cuda_graph), ("tanh", config.model.gelu == "tanh"),
        ("fp8", config.model.target_precision == "fp8"), ("k78", config.mask.keep == 78),
        ("dependent_launch", config.run.dependent_launch),
        ("fp8_all", config.model.context_precision == "fp8"),
    ):  # fmt: skip
        assert asked == (part in which or (part, which) == ("graph", "compiled"))
    exact = "fp8", "graph_fp8", "graph_fp8_all"
    assert variant.fast_sums == ("fp8" in which and which not in exact)


@pytest.mark.parametrize(
    ("name", "which", "gib", "batch"),
    [
        ("vit_h", "compiled", 79.6, 64),
        ("vit_h", "compiled", 139.8, None),
        ("vit_h", "compiled", None, None),
        ("vit_b", "compiled", 79.6, None),
        ("vit_h", "graph", 79.6, None),
        ("vit_h", "batch256", 139.8, 256),
        ("vit_h", "batch256", 79.6, 256),
    ],
)
def test_a_gpu_of_80_gb_takes_half_the_batch_of_the_row_that_needs_it(name, which, gib, batch):
    """None: the configuration's own."""
    assert variants.batch_of(name, which, gib) == batch


def test_a_row_that_fails_leaves_the_others(tmp_path, measured, capsys):
    measured[1].append(("vit_h",))
    status, rows = run(tmp_path, "fused", "graph")
    assert status == 1 and len(rows) == 4
    assert rows[0]["failed"].startswith("fused: RuntimeError: operation failed")
    assert "Traceback" in capsys.readouterr().err


def test_nothing_is_measured_after_a_recording_left_open(tmp_path, measured, monkeypatch, capsys):
    """torch's allocator takes it for open; one that only found no memory leaves the others."""
    measured[1].append(("vit_h", "run.cuda_graph=true"))
    assert len(run(tmp_path, "graph")[1]) == 2
    monkeypatch.setattr(variants, "recording_is_open", lambda: len(measured[0]) > 4)
    status, rows = run(tmp_path, "fused", "graph")
    assert status == 1 and [row["variant"] for row in rows] == ["fused", "fused", "graph"]
    assert "not to be trusted" in capsys.readouterr().out


def test_nothing_is_measured_after_an_error_of_the_device(tmp_path, measured, monkeypatch, capsys):
    """All that the process asks of it fails from then on; a mere refusal leaves it sound."""
    measured[1].append(("vit_h", "model.gelu=tanh"))
    asked = []
    monkeypatch.setattr(variants, "device_has_failed", lambda: asked.append(1) or len(asked) > 1)
    assert len(run(tmp_path, "tanh")[1]) == 2
    status, rows = run(tmp_path, "tanh")
    assert status == 1 and len(rows) == 1
    assert "the device has failed" in capsys.readouterr().out
