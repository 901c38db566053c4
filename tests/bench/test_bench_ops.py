"""bench/ops.py: the work it counts, the rows it makes of times, and the tuner."""

import ast
import json
import math
import sys

import fast_interpreter
import pytest
import tiny
import torch

from cjepa_fast.kernels import tuned
from cjepa_fast.kernels.common import launch
from cjepa_fast.kernels.common.tiles import Tile
from cjepa_fast.kernels.ema import adamw, plain_update
from cjepa_fast.kernels.vicreg import backward, forward

sys.path.insert(0, str(tiny.ROOT / "bench"))  # no package: its scripts import each other by name

import op_cases
import ops
import tune

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cases():
    return op_cases.cases(["T"], 2, rows=12, widths=[8, 16])


def test_every_public_op_is_there_and_ours_is_the_reference(cases):
    names = {case.op for case in cases}
    assert names == {
        "gather_tokens", "embed_gather", "add_positions", "target_gather", "predictor_input",
        "prediction_loss", "ema_update", "adamw_ema_step", "vicreg_terms", "sigreg_statistic",
        "vicreg_position_terms", "quantise_rows", "quantise_norm", "quantise_gelu",
        "ema_update_rows",
        "add_norm", "add_norm_backward", "gelu", "gelu_backward", "attention",
    }  # fmt: skip
    for case in cases:
        if case.op.startswith(("ema", "adamw")):
            continue  # in place
        torch.manual_seed(0)
        inputs = case.make(CPU)
        found, wanted = case.ours(*inputs), case.reference(*inputs)
        if case.op.startswith("quantise"):
            found, wanted = found.wide(), wanted.wide()
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


def test_the_work_is_the_docstrings(cases):
    by_op = {case.op: case for case in cases if not case.shape.startswith("tokens")}
    for op, case in by_op.items():
        inputs = case.make(CPU)
        if op in ("gather_tokens", "predictor_input"):
            x, out = inputs[0], case.ours(*inputs)
            read = x.numel() if op == "predictor_input" else out.numel()
            assert case.work["forward"].bytes == 2 * (read + out.numel())
        if op == "gather_tokens":
            assert case.work["backward"].bytes == 2 * (out.numel() + x.numel())
        if op == "ema_update":
            moved = sum(t.nbytes * 2 for t in inputs[0]) + sum(t.nbytes for t in inputs[1])
            assert case.work["forward"].bytes == moved + sum(t.nbytes for t in inputs[3])
    wide = op_cases.vicreg_tokens(12, 16, torch.bfloat16).work
    assert wide["forward"] == (2 * 12 * 16 * 2 + 12 * 12 * 4, 12 * 16 * 12)
    assert wide["backward"].flop == 2 * wide["forward"].flop
    tall = op_cases.vicreg_tokens(100, 16, torch.bfloat16).work
    assert tall["forward"].flop == 100 * 16 * 16
    (apart,) = (case for case in cases if case.op == "vicreg_position_terms")
    z, _ = apart.make(CPU)
    matrix = 4 * z.shape[1] ** 2
    assert apart.work["forward"].bytes == 2 * z.nbytes + 8 * z.numel() + matrix
    assert apart.work["backward"].bytes == z.nbytes + 4 * z.numel() + matrix
    drawn = op_cases.sigreg_work(100, 16, 4, torch.bfloat16)
    assert drawn["forward"].bytes == 100 * 16 * 2 + 4 * 2 * 16 * 256 * 4 + 16 * 256 * 4
    assert drawn["backward"].bytes - drawn["forward"].bytes == 100 * 16 * 2 + 2 * 100 * 256 * 4


def test_the_roofline_is_what_binds():
    rates = {"bytes_per_s": 4e12, "bfloat16": 8e14, "float32": 4e14}
    assert ops.roofline_us(op_cases.Cost(4e6, 1), torch.bfloat16, rates) == pytest.approx(1)
    assert ops.roofline_us(op_cases.Cost(4e6, 4e9), torch.float32, rates) == pytest.approx(10)


def test_a_rows_figures():
    times = {"eager": [300.0, 200.0, 400.0], "ours": [100.0, 90.0, 110.0], "compiled": [150.0] * 3}
    row = ops.row_of(times, op_cases.Cost(1e6, 2e9), 25.0)
    assert row["us"] == {"eager": 300, "ours": 100, "compiled": 150}
    assert row["speedup"] == {"eager": 3, "compiled": 1.5}
    assert (row["gb_per_s"], row["tflops"]) == (pytest.approx(10), pytest.approx(20))
    assert row["roofline_pct"] == 25 and row["turns"] == 3
    assert row["us_p10"]["ours"] == pytest.approx(92) and row["us_p90"]["ours"] == pytest.approx(
        108
    )


def test_it_measures_and_writes_what_it_saw(tmp_path, capsys, monkeypatch):
    rates = {"bytes_per_s": 1e10, "bfloat16": 1e11, "float32": 1e11}
    monkeypatch.setattr(ops, "measured_rates", lambda device: rates)
    found = {"json": tmp_path / "new" / "ops.json", "markdown": tmp_path / "ops.md"}
    small = ["--model", "T", "--batch-size", "2", "--rows", "12", "--widths", "8", "--seconds", "0"]
    files = [part for name, path in found.items() for part in (f"--{name}", str(path))]
    assert ops.main([*small, "--no-compile", "--only", "vicreg", *files]) == 0
    saved = json.loads(found["json"].read_text())
    assert saved["commit"] is None or saved["commit"]
    assert [row["pass"] for row in saved["rows"]] == ["forward", "backward", "both"] * 3
    assert all(row["us"]["ours"] > 0 and row["turns"] >= 5 for row in saved["rows"])
    text = found["markdown"].read_text()
    assert text in capsys.readouterr().out and text.count("| vicreg_terms |") == 6


def test_a_prediction_is_of_all_models_on_any_machine():
    asked = ops.parse(["--predict"])
    assert (asked.model, asked.widths) == (list(ops.MODELS), ops.WIDTHS)
    assert (asked.batch, asked.rows) == (None, ops.ROWS)


def test_what_is_predicted_says_so(capsys):
    assert ops.main(["--predict", "--model", "T", "--batch-size", "2", "--widths", "384"]) == 0
    text = capsys.readouterr().out
    assert "predicted, not measured" in text and "| vicreg_terms | tokens:" in text


@pytest.mark.parametrize("wrong", [["--only", "no_such"], ["--tune"]])
def test_wrong_settings_are_told(capsys, wrong):
    if wrong == ["--tune"] and torch.cuda.is_available():
        pytest.skip("a GPU is here, so that --tune would run")
    assert ops.main(["--model", "T", "--batch-size", "2", *wrong]) == 2
    assert "error" in capsys.readouterr().err


# --- the tuner


class Fake:
    """A stopwatch by which the second candidate is the fastest of VICReg's, the first of others."""

    def __init__(self, seconds: tuple[float, ...]):
        self.seconds = seconds

    def turns(self, calls, seconds):
        for call in calls.values():
            call()
        return {name: [t] for name, t in zip(calls, self.seconds, strict=False)}


def test_every_knob_turns_and_names_a_choice_the_kernels_make(monkeypatch):
    """In the interpreter, at toy sizes: each key is one that a launcher asks for."""
    for name, size in {"IMAGES": 1, "PATCHES": 4, "CONTEXT": 2, "TARGETS": 1}.items():
        monkeypatch.setattr(tune, name, size)
    monkeypatch.setattr(tune, "PER_TARGET", 2)
    asked = set()

    def chosen(key, candidates, device):
        asked.add(key)
        return candidates[0]

    for module in (forward, backward, plain_update, adamw, launch):
        monkeypatch.setattr(module, "chosen", chosen)
    with fast_interpreter.interpreted():
        knobs = [
            *tune.vicreg_knobs(CPU, [(5, 4), (4, 5)]),
            *tune.gather_knobs(CPU, 1, 64),
            *tune.ema_knobs(CPU, [(5,)]),
        ]
        for knob in knobs:
            knob.call(knob.candidates[-1])  # as the tuner does, with a configuration
            knob.call(None)  # as a launcher does, which asks
            for candidate in knob.candidates:  # as tuned.py and --json write it
                numbers = tune.numbers_of(candidate)
                table = {knob.key: ast.literal_eval(repr(numbers))}
                assert json.dumps(numbers)
                assert launch.named_in(table, knob.key, knob.candidates) is candidate
    assert {knob.key for knob in knobs} == asked


@pytest.mark.parametrize(
    ("times", "gain"), [((9.0, 5.0), True), ((5.0, 9.0), False), ((5.0, 4.9), False)]
)
def test_the_fastest_is_written_down_unless_it_may_be_noise(times, gain):
    knob = tune.Knob("a kernel", (Tile(1, 64), Tile(2, 64, 8)), lambda candidate: None)
    ((found, best, us),) = tune.tune(iter([knob]), Fake(times), 0.0)
    assert (found, best, us) == (knob, int(gain), [*times])


def test_a_candidate_that_fails_is_not_the_fastest():
    """One asks for more shared memory than this GPU has: the others are timed all the same."""

    def call(candidate):
        if candidate == 2:
            raise RuntimeError("out of resource")

    knob = tune.Knob("a kernel", (1, 2, 3), call)
    best, times = tune.fastest(knob, Fake((9.0, 5.0)), 0.0)
    assert (best, times) == (2, [9.0, math.inf, 5.0])


class FakeGPU:
    type = "cuda"


def test_the_table_is_written_after_each_kernel(tmp_path, monkeypatch):
    """A lease that ends in the middle of the tuning keeps what was found; other keys stay."""
    tiles = Tile(1, 64), Tile(2, 64, 8)
    python, found = tmp_path / "tuned.py", tmp_path / "tuned.json"

    def knobs(device, only):
        yield tune.Knob("first", tiles, lambda candidate: None)
        assert '"first": (2, 64, 8)' in python.read_text()
        assert json.loads(found.read_text())["table"]["first"] == [2, 64, 8]
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "knobs", knobs)
    monkeypatch.setattr(tune, "TABLE", python)
    monkeypatch.setattr(tune, "Stopwatch", lambda device: Fake((9.0, 5.0)))
    monkeypatch.setattr(tune.launch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tune.hardware, "provenance", lambda device: {"commit": "c"})
    with pytest.raises(KeyboardInterrupt):
        tune.main(FakeGPU(), 0.0, json_file=found)
    assert '"attention 128x64": (64, 32, 4, 2)' in python.read_text()
    (row,) = json.loads(found.read_text())["rows"]
    assert row["candidates"] == [[1, 64, 4], [2, 64, 8]] and row["us"] == [9.0, 5.0]


def test_shares_prepare_every_candidate_once():
    called = []
    knobs = [tune.Knob(key, (1, 2, 3), lambda c, key=key: called.append((key, c))) for key in "ab"]
    assert sum(tune.prepare(iter(knobs), (mine, 4)) for mine in range(4)) == 6
    assert sorted(called) == [(key, c) for key in "ab" for c in (1, 2, 3)]
    assert ops.share("3/4") == (3, 4)
    with pytest.raises(ValueError):
        ops.share("4/4")


def test_a_family_is_made_alone(monkeypatch):
    """Making another's knobs would compile its kernels."""
    kept = [tune.Knob("add_norm 192", (1, 2), None)]
    families = {"add_norm": lambda device: iter(kept), "vicreg": lambda device: 1 / 0}
    monkeypatch.setattr(tune, "FAMILIES", families)
    assert [*tune.knobs(CPU, ["add_norm"])] == kept
    monkeypatch.setattr(tune, "FAMILIES", {"add_norm": families["add_norm"]})
    assert [*tune.knobs(CPU)] == [*tune.knobs(CPU, ["norm 19"])] == kept


def test_the_table_is_source_that_says_the_same():
    table = {"sm_90": {"b": 1024, "a": (2, 64, None)}, "sm_80": {}}
    scope: dict = {}
    exec(tune.source(table), scope)
    assert scope["TUNED"] == {"sm_90": {"a": (2, 64, None), "b": 1024}}
    assert tune.source(tuned.TUNED) == tune.TABLE.read_text()


def test_a_kernel_takes_what_the_table_names(monkeypatch):
    """Wherever it stands in the list; what is no longer there is not guessed."""
    first, other = Tile(1, 64), Tile(2, 64)
    monkeypatch.setattr(
        launch, "TUNED", {"cpu": {"a kernel": (2, 64, 4), "an old one": (3, 64, 4)}}
    )
    for candidates in ((first, other), (first, Tile(4, 64), other)):
        assert launch.chosen("a kernel", candidates, CPU) is other
    assert launch.chosen("an old one", (first, other), CPU) is first
    assert launch.chosen("another", (first, other), CPU) is first
