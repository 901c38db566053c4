"""bench/report.py: the README says what bench/results/ says, and nothing that was not measured."""

import json
import sys

import pytest
import tiny

sys.path.insert(0, str(tiny.ROOT / "bench"))  # no package: its scripts import each other by name

import report

CUDA_BUILD = {"versions": {"cuda": "13.0"}}  # of torch, on either machine
GPU = {"hardware": {"device": "NVIDIA H200", "kind": "cuda"}, "command": "python x", **CUDA_BUILD}
CPU = {"hardware": {"device": "EPYC", "kind": "cpu"}, "command": "python y", **CUDA_BUILD}
ROW = {"config": "vit_b", "data": "synthetic", "batch": 128}


def test_the_readme_is_what_the_results_say():
    assert report.main(["--check"]) == 0, "python bench/report.py writes it anew"


def test_a_figure_of_the_gpu_replaces_not_measured(tmp_path):
    before = report.table(report.lines(tmp_path))
    assert before.count("not yet") == 3
    rows = [
        ROW | GPU | {"images_per_s": 1.0, "mfu_sheet_pct": 1.0},
        ROW | GPU | {"images_per_s": 4900.4, "mfu_sheet_pct": 42.04},
    ]
    (tmp_path / "throughput.json").write_text(json.dumps(rows))
    (tmp_path / "ops.json").write_text("{}")
    after = report.table(report.lines(tmp_path))
    line = "| vit_b, batch 128, synthetic | NVIDIA H200 | 4900 images/s, MFU 42.0 % | `python x` |"
    assert line in after and after.count("not yet") == 1
    assert "| 1 images/s" not in after  # an earlier row of the same kind


def test_a_row_of_a_gpu_tells_k_and_joules():
    """K, since MFU is of the batch's own counted work."""
    row = ROW | GPU | {"images_per_s": 547.1, "mfu_sheet_pct": 41.49, "overrides": ["run.seed=1"]}
    measured = row | {"context_k": 91.0, "joules_per_image": 1.234}
    lines = [figure for _, _, figure, _ in report.throughput_lines([measured])]
    assert lines == ["547 images/s, MFU 41.5 %, K 91, 1.23 J an image"]
    lines = [figure for _, _, figure, _ in report.throughput_lines([row])]
    assert lines == ["547 images/s, MFU 41.5 %"]


def test_of_a_cpu_only_ratios_are_told(tmp_path):
    rows = [
        ROW | CPU | {"images_per_s": 7.0},
        ROW | CPU | {"step": "ours", "ours_times": 1.0},
        ROW | CPU | {"step": "reference, fp32", "ours_times": 3.612},
    ]
    (tmp_path / "throughput.json").write_text(json.dumps(rows))
    text = report.table(report.lines(tmp_path))
    assert "beside the plain reference, fp32 | EPYC | 3.61 times as fast" in text
    assert "7 images/s" not in text and text.count("EPYC") == 1


def test_only_the_marked_part_of_the_readme_changes():
    readme = f"above\n{report.BEGIN}old\n{report.END}below\n"
    fresh = report.with_table(readme, "new\n")
    assert fresh == f"above\n{report.BEGIN}new\n{report.END}below\n"
    with pytest.raises(ValueError, match="writes from here"):
        report.with_table("no markers", "new\n")


def test_the_picture_has_a_bar_a_configuration(tmp_path):
    phases = dict.fromkeys(report.PHASES, 2.0)
    row = ROW | CPU | {"images_per_s": 7.0, "phases_ms": phases}
    report.draw([row, row | {"config": "vit_t"}], tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 5000
    report.draw([ROW | CPU], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def gate_folder(folder, **rows):
    """A gate's results: by file's name, rows."""
    for name, found in rows.items():
        (folder / f"{name}.json").write_text(json.dumps(found))
    return folder


def test_a_gates_figures_are_taken_over_once(tmp_path):
    results, gate = tmp_path / "results", tmp_path / "gate"
    results.mkdir(), gate.mkdir()
    old = ROW | CPU | {"images_per_s": 7.0}
    (results / "throughput.json").write_text(json.dumps([old]))
    full = ROW | GPU | {"images_per_s": 4900.4, "mfu_sheet_pct": 42.04, "overrides": ["run.seed=1"]}
    turn = ROW | GPU | {"step": "reference, bf16 autocast", "ours_times": 2.61, "overrides": []}
    refused = [
        full | CPU,
        full | {"overrides": ["model.width=48"]},
        full | {"overrides": ["predictor.depth=1"]},
        {"config": "vit_g", "failed": "exit status 1"},
    ]
    made = GPU | {"batch": None, "rows": [{"op": "gather_tokens"}]}
    gate_folder(gate, throughput_models=[full, turn], throughput_others=refused, ops=made)
    gate_folder(gate, attention=made | {"batch": 2})
    said = report.collect(gate, results)
    assert json.loads((results / "throughput.json").read_text()) == [old, full, turn]
    assert json.loads((results / "ops.json").read_text()) == made
    assert not (results / "attention.json").exists() and len(said) == 2
    text = report.table(report.lines(results))
    assert (
        "| vit_b, batch 128, run.seed=1, synthetic | NVIDIA H200 | 4900 images/s, MFU 42.0 % |"
        in text
    )
    assert "beside the plain reference, bf16 autocast | NVIDIA H200 | 2.61 times as fast" in text
    report.collect(gate, results)
    assert json.loads((results / "throughput.json").read_text()) == [old, full, turn]


def test_figures_of_a_cpu_or_at_toy_size_are_refused(tmp_path):
    gate_folder(tmp_path, throughput=[ROW | CPU, ROW | GPU | {"overrides": ["model.depth=1"]}])
    with pytest.raises(ValueError, match="no new figures of a GPU"):
        report.collect(tmp_path, tmp_path)


def test_the_ratios_of_a_command_stand_on_one_line(tmp_path):
    speed = ROW | GPU | {"images_per_s": 1.0}
    turn = ROW | GPU | {"step": "reference, fp32", "ours_times": 2.0}
    other = turn | {"config": "vit_t", "ours_times": 3.0}
    rows = [speed, turn, other, other | {"step": "reference, bf16 autocast"}]
    rows.append(other | {"command": "python y"})
    (tmp_path / "throughput.json").write_text(json.dumps(rows))
    found = [line for line in report.lines(tmp_path) if line[0].startswith("vit")]
    assert [(what.partition(", batch")[0], figure) for what, _, figure, _ in found] == [
        ("vit_b", "1 images/s"),
        ("vit_b", "2.00 times as fast"),
        ("vit_t", "3.00 times as fast"),
        ("vit_t", "3.00 times as fast"),
    ]
    (tmp_path / "throughput.json").write_text(json.dumps(rows[:-1]))
    together = next(line for line in report.lines(tmp_path) if line[0].startswith("vit_b, vit_t"))
    assert together[0].endswith("the plain reference, fp32")
    assert together[2] == "2.00, 3.00 times as fast"


def test_an_ablation_s_line_is_the_gap_with_its_spread():
    gains = {"knn_gain": 0.47, "knn_gain_std": 0.74, "linear_gain": -0.93, "linear_gain_std": 0.6}
    rows = [{"row": "none (I-JEPA)", "seeds": 3}, {"row": "all (C-JEPA)", "seeds": 3, **gains}]
    found = {"what": "X", "hardware": "H", "rows": rows}
    ((what, hardware, figure, _),) = report.ablation_lines(found)
    assert what == "X: C-JEPA minus I-JEPA over 3 seeds, points" and hardware == "H"
    assert figure == "kNN +0.5 ± 0.7, ridge probe -0.9 ± 0.6"
    assert not list(report.ablation_lines(found | {"rows": [{"row": "as shipped"}]}))
