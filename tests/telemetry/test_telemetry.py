"""The log, the progress line, TensorBoard, GPU counters and the collapse measures."""

import collections
import errno
import io
import json
import math
import os
import re
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import tiny
import torch

from cjepa_fast.runtime import hardware
from cjepa_fast.telemetry import (
    Telemetry,
    log,
    position_share,
    progress,
    read_log,
    representation_stats,
    sinks,
)
from cjepa_fast.telemetry.jsonl import JsonlWriter
from cjepa_fast.telemetry.nvml import GpuCounters


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Stands in for time.perf_counter: seconds move only when a test says so."""

    def __init__(self):
        self.now_s = 1000.0

    def perf_counter(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (log, progress):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def started():
    """Starts telemetry with small defaults, and closes all of it after the test."""
    open_ones = []

    def start(folder, **changes):
        defaults = {
            "total_steps": 40, "steps_per_epoch": 20, "images_per_step": 64, "interval": 10,
            "tensorboard": False, "stream": io.StringIO(),
        }  # fmt: skip
        open_ones.append(Telemetry(folder, **(defaults | changes)))
        return open_ones[-1]

    yield start
    for one in open_ones:
        one.close()


def test_a_row_holds_means_rates_and_what_it_is_given(tmp_path, started, clock):
    out = started(tmp_path / "run")
    for step in range(1, 11):
        clock.now_s += 0.5
        loss = torch.tensor(float(step), dtype=torch.bfloat16)
        out.step(step, {"loss": loss, "jepa": torch.tensor(2.0), "context_k": step}, 0.2)
    row = out.log_row({"lr": 1e-3, "rankme": torch.tensor(7.0), "skipped_steps": 2})
    assert read_log(tmp_path / "run") == [row] == read_log(tmp_path / "run" / "log.jsonl")
    expected = {
        "step": 10, "epoch": 0.5, "time_s": 5.0, "images_per_s": 128.0, "loss": 5.5, "jepa": 2.0,
        "context_k": 5.5, "data_wait": 0.4, "lr": 1e-3, "rankme": 7.0, "skipped_steps": 2,
    }  # fmt: skip
    assert {name: row[name] for name in expected} == pytest.approx(expected)


def test_each_row_is_of_its_own_interval(tmp_path, started, clock):
    out = started(tmp_path, interval=2)
    for step, value in enumerate([1.0, 3.0, 10.0, 20.0], 1):
        clock.now_s += 1.0 if step <= 2 else 4.0
        out.step(step, {"loss": torch.tensor(value)}, data_wait_s=0.5)
        if out.due(step):
            out.log_row()
    first, second = read_log(tmp_path)
    assert (first["loss"], second["loss"]) == (2.0, 15.0)
    assert (first["images_per_s"], second["images_per_s"]) == (64.0, 16.0)
    assert (first["data_wait"], second["data_wait"]) == (0.5, 0.125)


def test_the_wait_is_that_of_the_rank_that_waited_longest(tmp_path, started, clock):
    """The others wait for that rank, in the sum of their gradients."""
    out = started(tmp_path)
    clock.now_s += 2.0
    out.step(1, {}, data_wait_s=0.5)
    assert out.log_row({}, longest_wait_s=1.0)["data_wait"] == 0.5


def test_what_an_own_probe_has_no_number_for_is_null(tmp_path, started):
    started(tmp_path).write_row(0, {"knn": 10.0, "auc": math.nan})
    (row,) = read_log(tmp_path)
    assert (row["knn"], row["auc"]) == (10.0, None)


def test_due_each_interval_and_at_the_end(started):
    out = started(None, total_steps=25, interval=10)
    assert [step for step in range(1, 26) if out.due(step)] == [10, 20, 25]


def test_a_pause_is_no_training_time(tmp_path, started, clock):
    out = started(tmp_path, interval=1)
    clock.now_s += 2.0
    with out.pause():
        clock.now_s += 100.0
    out.step(1, {})
    assert out.log_row()["images_per_s"] == 32.0


def test_values_that_are_not_finite_leave_the_mean_and_the_json_whole(tmp_path, started):
    out = started(tmp_path)
    for step, value in enumerate([1.0, math.nan, 3.0, math.inf], 1):
        out.step(step, {"loss": torch.tensor(value), "grad_norm": torch.tensor(math.nan)})
    out.log_row({"rankme": torch.tensor(math.nan)})
    line = (tmp_path / "log.jsonl").read_text()
    assert "NaN" not in line and "Infinity" not in line
    row = json.loads(line)
    assert row["loss"] == 2.0 and row["grad_norm"] is None and row["rankme"] is None


def test_a_term_that_comes_and_goes_is_averaged_over_its_own_steps(tmp_path, started):
    out = started(tmp_path)
    out.step(1, {"loss": torch.tensor(2.0)})
    out.step(2, {"loss": torch.tensor(4.0), "cov": torch.tensor(5.0)})
    row = out.log_row()
    assert row["loss"] == 3.0 and row["cov"] == 5.0


def test_a_buffer_that_is_written_over_does_not_change_what_was_noted(tmp_path, started):
    """Captured graphs give the same output tensor each step."""
    out, loss = started(tmp_path), torch.tensor(1.0)
    out.step(1, {"loss": loss})
    loss.fill_(9.0)
    out.step(2, {"loss": loss})
    assert out.log_row()["loss"] == 5.0


def test_a_step_reads_nothing_from_the_device(tmp_path, started, monkeypatch):
    """.item(), .tolist(), float(), bool() and .cpu() of a tensor would each wait for a GPU."""

    def waits(*_, **__):
        raise AssertionError("a step waited for the device")

    out = started(tmp_path, stream=Terminal())
    out.step(1, {"loss": torch.tensor(1.0)})
    out.log_row()
    reads = ("item", "tolist", "cpu", "numpy", "__float__", "__bool__", "__int__", "__index__")
    with monkeypatch.context() as patched:
        for name in reads:
            patched.setattr(torch.Tensor, name, waits)
        patched.setattr(progress, "REFRESH_S", 0.0)  # draws the line each step, too
        for step in range(2, 8):
            out.step(step, {"loss": torch.tensor(1.0, requires_grad=True), "k": 3}, 0.1)
    assert out.log_row()["loss"] == 1.0


def test_no_graph_is_kept_alive(tmp_path, started):
    out = started(tmp_path)
    weight = torch.ones((), requires_grad=True)
    out.step(1, {"loss": weight * 2})
    assert not any(total.requires_grad for total in out._means._sums.values())


def test_a_resumed_log_has_each_step_once(tmp_path, started, clock):
    out = started(tmp_path)
    for step in range(1, 31):
        clock.now_s += 1.0
        out.step(step, {"loss": torch.tensor(0.0)})
        if out.due(step):
            out.log_row()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # the crash
    assert [row["step"] for row in read_log(tmp_path)] == [10, 20, 30]
    clock.now_s += 500
    again = started(tmp_path, start_step=20)
    for step in range(21, 41):
        clock.now_s += 1.0
        again.step(step, {"loss": torch.tensor(1.0)})
        if again.due(step):
            again.log_row()
    rows = read_log(tmp_path)
    assert [(row["step"], row["loss"]) for row in rows] == [(10, 0), (20, 0), (30, 1), (40, 1)]
    assert [row["time_s"] for row in rows] == [10.0, 20.0, 30.0, 40.0]
    assert rows[2]["images_per_s"] == 64.0  # over the 10 steps since the resume, not all 30
    started(tmp_path)  # from the start: nothing is kept
    assert read_log(tmp_path) == []


def test_a_start_at_step_0_keeps_no_row_of_an_earlier_one(tmp_path, started):
    """Its encoder is evaluated again. A rewind to step 0 keeps that row."""
    out = started(tmp_path, tensorboard=True)
    out.write_row(0, {"knn": 27.1})
    out.close()
    again = started(tmp_path, tensorboard=True)
    said = [row["text"] for row in read_log(tmp_path / "events.jsonl")]
    assert said[-1].endswith("1 row of an earlier start moved to log.jsonl.abandoned")
    again.write_row(0, {"knn": 24.0})
    again.rewind_to(0)
    again.close()
    assert [(row["step"], row["knn"]) for row in read_log(tmp_path)] == [(0, 24.0)]
    assert scalars_of(tmp_path / "tensorboard")["knn"] == [(0, 24.0)]


def test_broken_lines_are_left_out_aloud(tmp_path, capsys):
    text = '{"step": 1}\n{"st\n[]\n{"step": "x"}\n' + "[" * 100_000 + '\n{"step": 3}\n{"torn'
    (tmp_path / "log.jsonl").write_text(text)
    assert [row["step"] for row in read_log(tmp_path)] == [1, 3]
    assert "4 broken lines (the first is line 2) left out" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):
        read_log(tmp_path / "elsewhere")


def test_a_resumed_log_sets_broken_lines_aside(tmp_path, started, capsys):
    (tmp_path / "log.jsonl").write_text('{"step": 10}\nbroken\n{"step": 20}\n{"step": 30}\n')
    started(tmp_path, start_step=20)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 10}\n{"step": 20}\n'
    assert (tmp_path / "log.jsonl.broken").read_text() == "broken\n"
    broken, later = (row["text"] for row in read_log(tmp_path / "events.jsonl"))
    assert "1 broken line (the first is line 2) set aside in log.jsonl.broken" in broken
    assert "1 row after step 20 moved to log.jsonl.abandoned" in later


def test_rows_that_a_resume_or_a_rewind_drops_are_kept_beside_the_log(
    tmp_path, started, monkeypatch
):
    """On the disk before the log is replaced: a cut of the power leaves one of the two whole."""
    synced, real = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")) or real(fd)
    )
    (tmp_path / "log.jsonl").write_text("".join(f'{{"step": {n}}}\n' for n in (10, 20, 30, 40)))
    out = started(tmp_path, start_step=30)
    out.rewind_to(10)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 10}\n'
    kept = (tmp_path / "log.jsonl.abandoned").read_text().splitlines()
    assert [json.loads(line)["step"] for line in kept] == [40, 20, 30]
    said = [row["text"] for row in read_log(tmp_path / "events.jsonl")]
    assert [text.partition("log.jsonl: ")[2] for text in said] == [
        "1 row after step 30 moved to log.jsonl.abandoned",
        "2 rows after step 10 moved to log.jsonl.abandoned",
    ]
    assert [Path(name).name for name in synced] == [".log.jsonl.partial"] * 2


def test_a_bad_step_that_is_made_anew_is_in_the_file_once(tmp_path, started):
    """What a rewind goes back from stays: its images are passed over."""
    for step in (7, 20, 31):
        JsonlWriter(print, tmp_path / "bad_steps.jsonl").write({"step": step})
    out = started(tmp_path, start_step=20)
    out.event("bad_steps.jsonl", {"step": 31}, "again")
    out.rewind_to(20)
    assert [row["step"] for row in read_log(tmp_path / "bad_steps.jsonl")] == [7, 20, 31]
    assert read_log(tmp_path / "bad_steps.jsonl.abandoned") == [{"step": 31}]


def test_a_row_that_does_not_fit_leaves_no_torn_line(tmp_path):
    """The file may grow by a few bytes, as on a disk that is nearly full."""
    path, said = tmp_path / "log.jsonl", []
    lines = JsonlWriter(said.append, path)
    lines.write({"step": 1})
    whole = path.read_bytes()
    with tiny.files_of_at_most(len(whole) + 5):
        lines.write({"step": 2})
        assert path.read_bytes() == whole
    lines.write({"step": 3})
    assert [row["step"] for row in read_log(path)] == [1, 2, 3]
    assert len(said) == 1 and "cannot be written" in said[0]


def test_rows_that_a_full_disk_refused_are_tried_at_the_end_and_what_is_lost_is_counted(tmp_path):
    path, said = tmp_path / "log.jsonl", []
    lines = JsonlWriter(said.append, path)
    with tiny.files_of_at_most(0):
        lines.write({"step": 1})
    lines.close()
    assert [row["step"] for row in read_log(path)] == [1] and len(said) == 1
    with tiny.files_of_at_most(path.stat().st_size):
        lines.write({"step": 2})
        lines.write({"step": 3})
        lines.close()
    lines.close()
    assert [row["step"] for row in read_log(path)] == [1]
    assert len(said) == 3 and f"2 rows of {path} could not be written" in said[2]


def test_a_training_s_end_writes_what_was_refused(tmp_path, started):
    out = started(tmp_path, interval=1)
    with tiny.files_of_at_most(0):
        out.step(1, {"loss": torch.tensor(1.0)})
        out.log_row()
        out.message("said")
    assert read_log(tmp_path) == []
    out.close()
    assert len(read_log(tmp_path)) == 1
    assert "said" in [row["text"] for row in read_log(tmp_path / "events.jsonl")]


def test_what_is_said_is_no_escape_sequence(tmp_path, started):
    stream = io.StringIO()
    started(tmp_path, stream=stream).message("skipped: \x1b[31ma\udce9")
    assert stream.getvalue() == "skipped: \\x1b[31ma\\xe9\n"


@pytest.mark.parametrize(
    ("step_s", "wanted"), [(1.0, [1, 40]), (4.0, [1, 20, 40]), (7.0, [1, 10, 20, 30, 40])]
)
def test_a_plain_line_a_minute_where_there_is_no_terminal(tmp_path, started, clock, step_s, wanted):
    """And the first step's, and the last; all rows are in the log."""
    stream = io.StringIO()
    out = started(tmp_path, stream=stream)
    out.write_row(0, {"knn": 25.0})
    for step in range(1, 41):
        clock.now_s += step_s
        out.step(step, {"loss": torch.tensor(0.25), "sim": torch.tensor(0.5)})
        if out.due(step):
            out.log_row({"lr": 5e-4, "rankme": 12.34})
    out.close()
    lines = [line.split("  ") for line in stream.getvalue().splitlines()]
    assert "\r" not in stream.getvalue()
    assert [line[0] for line in lines] == [f"step {step}/40" for step in wanted]
    assert lines[0] == ["step 1/40", "epoch 0.05", "loss 0.2500", "kNN 25.0 %"]
    assert lines[-1] == [
        "step 40/40", "epoch 2.00", "loss 0.2500", "RankMe 12.3", "kNN 25.0 %",
        f"{64 / step_s:.2g} images/s", "ETA 0:00:00", "lr 5.00e-04",
    ]  # fmt: skip
    assert [row["step"] for row in read_log(tmp_path)] == [0, 10, 20, 30, 40]


def test_quiet_is_messages_alone(tmp_path, started):
    stream = io.StringIO()
    out = started(tmp_path, stream=stream, quiet=True, interval=1)
    out.step(1, {"loss": torch.tensor(0.25)})
    out.log_row()
    out.message("done")
    out.close()
    assert stream.getvalue() == "done\n" and len(read_log(tmp_path)) == 1


class Refusing(io.StringIO):
    """A terminal whose window is closed, or a file on a full disk, as long as it has an error."""

    def __init__(self, live: bool):
        super().__init__()
        self.live, self.error = live, 0

    def isatty(self) -> bool:
        return self.live

    def write(self, text: str) -> int:
        if self.error:
            raise OSError(self.error, "the stream is gone")
        return super().write(text)


@pytest.mark.parametrize("live", [False, True], ids=["file", "terminal"])
@pytest.mark.parametrize("fault", ["ENOSPC", "EPIPE", "EIO"])
def test_a_stream_that_takes_nothing_ends_no_training(tmp_path, started, live, fault):
    stream = Refusing(live)
    out = started(tmp_path, stream=stream, interval=1)
    stream.error = getattr(errno, fault)
    out.step(1, {"loss": torch.tensor(0.25)})
    out.log_row()
    out.message("lost")
    stream.error = 0
    out.message("there again")
    stream.close()
    out.message("lost too")
    out.close()
    events = read_log(tmp_path / "events.jsonl")
    assert [row["text"] for row in events] == ["lost", "there again", "lost too"]
    assert len(read_log(tmp_path)) == 1


def test_what_is_said_on_a_full_disk_is_lost_and_changes_no_exit_status():
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    code = (
        "from cjepa_fast.runtime import distributed, printable\n"
        "printable.say('lost')\n"
        "distributed.leave(7)"
    )
    buffered = tiny.environment() | {"PYTHONUNBUFFERED": ""}
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=full, env=buffered
        )
    assert result.returncode == 7


def test_a_mistake_and_a_hang_end_as_they_should_where_stderr_takes_nothing(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    mistake = "import sys; from cjepa_fast import train; sys.exit(train.main(['--config', 'none']))"
    hang = (
        "from pathlib import Path; from cjepa_fast.runtime.watchdog import Watchdog\n"
        f"dog = Watchdog(60, stacks=Path({str(tmp_path / 'stacks.txt')!r}))\n"
        "dog._end('it hangs')"
    )
    with open("/dev/full", "w") as full:
        found = [
            subprocess.run([sys.executable, "-c", code], stderr=full, env=tiny.environment())
            for code in (mistake, hang)
        ]
    assert [result.returncode for result in found] == [2, 1]
    assert (tmp_path / "stacks.txt").read_text().startswith("it hangs")


def test_a_terminal_line_redraws_itself_between_rows(tmp_path, started, clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    stream = Terminal()
    out = started(tmp_path, stream=stream)
    for step in range(1, 16):
        clock.now_s += 0.1
        out.step(step, {"loss": torch.tensor(0.25)})
        if out.due(step):
            out.log_row({"lr": 5e-4})
    out.message("skipped corrupt.jpg")
    out.close()
    text = stream.getvalue()
    shown = [part.split("\x1b[K")[0] for part in text.split("\r")[1:]]
    steps = [line.split("/")[0] for line in shown if line.startswith("step")]
    # 0.5 s after the first step, and after the row, no oftener
    assert steps == ["step 1", "step 6", "step 10", "step 15"]
    assert all(len(line) < 60 for line in shown)
    assert text.count("\n") == 2  # one ends the message, one the run
    assert "\r\x1b[Kskipped corrupt.jpg\nstep 15" in text


def test_a_long_step_shows_its_micro_batches(tmp_path, started, clock):
    """On a terminal twice a second, elsewhere once a minute."""
    for stream, each_s, wanted in ((Terminal(), 1.0, 5), (io.StringIO(), 20.0, 2)):
        out = started(tmp_path, stream=stream)
        out.show_progress("micro-batch 1/5")  # before the first step nothing is known yet
        out.step(1, {"loss": torch.tensor(0.25)})
        for i in range(1, 6 if each_s == 1.0 else 8):
            clock.now_s += each_s
            out.show_progress(f"micro-batch {i}/5")
        assert stream.getvalue().count("micro-batch ") == wanted
        assert "step 1/40  micro-batch " in stream.getvalue()


def test_the_time_left_follows_the_recent_rate(tmp_path, started, clock):
    stream = io.StringIO()
    out = started(tmp_path, stream=stream, total_steps=1000)
    for step in range(1, 31):
        clock.now_s += 70.0 if step <= 10 else 7.0
        out.step(step, {})
        if out.due(step):
            out.log_row()
    step_s = 0.7 * (0.7 * 70 + 0.3 * 7) + 0.3 * 7
    minutes = 970 * step_s / 60
    assert (
        f"ETA {int(minutes // 60)}:{int(minutes % 60):02d}:" in stream.getvalue().splitlines()[-1]
    )


def test_a_silent_rank_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = Telemetry(None, total_steps=4, steps_per_epoch=2, images_per_step=2, interval=1)
    with out.pause():
        out.step(1, {"loss": torch.tensor(1.0)}, 0.1)
    assert out.log_row({"lr": 1.0}) is None
    out.message("nothing")
    out.close()
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []


def test_an_interval_below_one_is_refused():
    with pytest.raises(ValueError, match="interval 0"):
        Telemetry(None, total_steps=4, steps_per_epoch=2, images_per_step=2, interval=0)


def scalars_of(folder) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path, started):
    for start, end, loss in ((0, 30, 0.0), (20, 40, 1.0)):
        out = started(tmp_path, start_step=start, tensorboard=True)
        for step in range(start + 1, end + 1):
            out.step(step, {"loss": torch.tensor(loss), "std": torch.tensor(math.nan)})
            if out.due(step):
                out.log_row({"lr": 0.5})
        out.close()
    shown = scalars_of(tmp_path / "tensorboard")
    assert shown["loss"] == [(10, 0.0), (20, 0.0), (30, 1.0), (40, 1.0)]
    assert shown["lr"][0] == (10, 0.5) and "std" not in shown and "step" not in shown


def test_a_dying_tensorboard_is_said_once_and_the_run_goes_on(tmp_path, started, monkeypatch):
    stream = io.StringIO()
    out = started(tmp_path, tensorboard=True, interval=1, stream=stream)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(out._sinks[0]._writer, "add_scalar", full)
    for step in (1, 2, 3):
        out.step(step, {"loss": torch.tensor(1.0)})
        out.log_row()
    out.close()
    assert len(read_log(tmp_path)) == 3
    assert stream.getvalue().count("TensorBoard is off") == 1
    assert "No space left" in stream.getvalue()


@pytest.mark.parametrize("broken", ["missing package", "file in the way"])
def test_a_tensorboard_that_cannot_start_is_said(tmp_path, started, monkeypatch, broken):
    stream = io.StringIO()
    if broken == "missing package":
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    else:
        (tmp_path / "tensorboard").write_text("not a folder")
    out = started(tmp_path, tensorboard=True, stream=stream)
    out.step(1, {"loss": torch.tensor(1.0)})
    out.log_row()
    assert "TensorBoard is off" in stream.getvalue()
    assert len(read_log(tmp_path)) == 1


def test_weights_and_biases_gets_the_numbers_of_each_row(tmp_path, started, monkeypatch):
    logged, opened = [], {}

    class Run:
        log = staticmethod(lambda scalars, step: logged.append((step, scalars)))
        finish = staticmethod(lambda: logged.append("finished"))

    fake = types.ModuleType("wandb")
    fake.init = lambda **options: opened.update(options) or Run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    ids = []
    for start in (0, 2, 0):  # a resume, and another training in the same folder
        out = started(tmp_path, wandb="mine", interval=1, start_step=start)
        out.step(start + 1, {"loss": torch.tensor(2.0), "std": torch.tensor(math.nan)})
        out.log_row({"lr": 0.5})
        out.close()
        ids.append(opened["id"])
    assert opened["project"] == "mine" and ids[0] == ids[1] != ids[2]
    assert [entry[0] for entry in logged[::2]] == [1, 3, 1] and logged[1] == "finished"
    assert logged[0][1]["loss"] == 2.0 and logged[0][1]["lr"] == 0.5 and "std" not in logged[0][1]


class MLflowServer:
    """A stand-in for the package with its server: experiments by name, runs by id."""

    def __init__(self, monkeypatch, broken: str = ""):
        self.experiments, self.runs, self.broken = {}, {}, broken
        package, entities = types.ModuleType("mlflow"), types.ModuleType("mlflow.entities")
        package.MlflowClient = lambda: self
        entities.Metric = collections.namedtuple("Metric", "key value timestamp step")
        monkeypatch.setitem(sys.modules, "mlflow", package)
        monkeypatch.setitem(sys.modules, "mlflow.entities", entities)

    def __getattribute__(self, name):
        if name == object.__getattribute__(self, "broken"):
            raise ConnectionError("no route to host")
        return object.__getattribute__(self, name)

    def get_experiment_by_name(self, name):
        known = self.experiments.get(name)
        return known and types.SimpleNamespace(experiment_id=known)

    def create_experiment(self, name):
        self.experiments[name] = f"of {name}"
        return self.experiments[name]

    def create_run(self, experiment_id, tags, run_name):
        run_id = str(len(self.runs))
        run = {"in": experiment_id, "tags": tags, "name": run_name, "metrics": []}
        self.runs[run_id] = run | {"status": "RUNNING"}
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id))

    def search_runs(self, experiment_ids, filter_string, max_results):
        key, value = re.fullmatch(r"tags\.`(.+)` = '(.+)'", filter_string).groups()
        return [
            types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id))
            for run_id, run in self.runs.items()
            if run["in"] in experiment_ids and run["tags"].get(key) == value
        ][:max_results]

    def update_run(self, run_id, status):
        self.runs[run_id]["status"] = status

    def log_batch(self, run_id, metrics):
        assert self.runs[run_id]["status"] == "RUNNING"
        self.runs[run_id]["metrics"] += [(m.step, m.key, m.value) for m in metrics]

    def set_terminated(self, run_id):
        self.runs[run_id]["status"] = "FINISHED"


def test_mlflow_gets_the_numbers_of_each_row_in_one_run_after_a_resume(
    tmp_path, started, monkeypatch
):
    server = MLflowServer(monkeypatch)
    for folder, start in (("a", 0), ("b", 0), ("a", 2), ("c", 2)):  # c: resumed from another's
        out = started(tmp_path / folder, mlflow="mine", interval=1, start_step=start)
        out.step(start + 1, {"loss": torch.tensor(2.0), "std": torch.tensor(math.nan)})
        out.log_row({"lr": 0.5})
        out.close()
    assert [run["name"] for run in server.runs.values()] == ["a", "b", "c"]
    drawn = {(tmp_path / folder / "service_id").read_text() for folder in "abc"}
    assert drawn == {run["tags"][sinks.MLflowSink.TAG] for run in server.runs.values()}
    assert {run["status"] for run in server.runs.values()} == {"FINISHED"}
    metrics = server.runs["0"]["metrics"]
    assert [m for m in metrics if m[1] == "loss"] == [(1, "loss", 2.0), (3, "loss", 2.0)]
    assert (3, "lr", 0.5) in metrics and not any(key in ("std", "step") for _, key, _ in metrics)


def test_a_run_from_before_its_id_was_kept_is_known_by_its_folder(tmp_path):
    own = sinks.service_id(tmp_path, fresh=False)
    assert (
        own
        == sinks.service_id(tmp_path, fresh=False)
        != sinks.service_id(tmp_path / "b", fresh=False)
    )
    assert len(own) == 16 and not list(tmp_path.iterdir())


def test_an_id_that_cannot_be_kept_is_said(tmp_path, started, monkeypatch):
    MLflowServer(monkeypatch)
    (tmp_path / "service_id").mkdir()
    stream = io.StringIO()
    started(tmp_path, mlflow="mine", stream=stream).close()
    assert "service_id" in stream.getvalue() and "for another training" in stream.getvalue()
    (tmp_path / "service_id").rmdir()
    (tmp_path / "service_id").write_bytes(b"\x80\x04")
    (tmp_path / "log.jsonl").touch()
    started(tmp_path, mlflow="mine", stream=stream, start_step=2).close()
    assert "service_id holds no id of a training" in stream.getvalue()


def test_what_a_rewind_leaves_elsewhere_is_hidden_or_said(tmp_path, started, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    MLflowServer(monkeypatch)
    stream = io.StringIO()
    out = started(tmp_path, tensorboard=True, mlflow="mine", interval=1, stream=stream)
    for loss, steps in ((1.0, range(1, 6)), (2.0, range(3, 5))):
        for step in steps:
            out.step(step, {"loss": torch.tensor(loss)})
            out.log_row()
        if loss == 1:
            out.rewind_to(2)
    out.close()
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in shown] == [(1, 1), (2, 1), (3, 2), (4, 2)]
    assert [row["loss"] for row in read_log(tmp_path)] == [1, 1, 2, 2]
    assert "MLflow keeps its rows beyond step 2" in stream.getvalue()


@pytest.mark.parametrize("where", ["search_runs", "log_batch", "set_terminated"])
def test_a_dead_mlflow_is_said_once_and_the_run_goes_on(tmp_path, started, monkeypatch, where):
    MLflowServer(monkeypatch, broken=where)
    stream = io.StringIO()
    out = started(tmp_path, mlflow="mine", stream=stream, interval=1)
    for step in range(1, 11):
        out.step(step, {"loss": torch.tensor(1.0)})
        out.log_row()
    out.close()
    assert len(read_log(tmp_path)) == 10
    assert stream.getvalue().count("MLflow is off") == 1 and "no route" in stream.getvalue()


@pytest.mark.parametrize(("extra", "name"), [("wandb", "Weights & Biases"), ("mlflow", "MLflow")])
def test_without_its_package_a_service_is_off(tmp_path, started, monkeypatch, extra, name):
    stream = io.StringIO()
    monkeypatch.setitem(sys.modules, extra, None)
    out = started(tmp_path, stream=stream, **{extra: "mine"})
    out.step(1, {"loss": torch.tensor(1.0)})
    out.log_row()
    out.close()
    assert f"{name} is off" in stream.getvalue() and len(read_log(tmp_path)) == 1
    assert f"pip install '.[{extra}]'" in stream.getvalue()


@pytest.mark.parametrize("where", ["init", "log", "finish"])
@pytest.mark.parametrize("fault", ["raises", "hangs"])
def test_a_dead_service_holds_nobody_up_and_is_said_once(
    tmp_path, started, monkeypatch, where, fault
):
    over = threading.Event()

    def fail(*_, **__):
        if fault == "raises":
            raise ConnectionError("no route to host")
        over.wait(tiny.HANG_S)

    run = types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
    fake = types.ModuleType("wandb")
    fake.init = lambda **_: run
    setattr(fake if where == "init" else run, where, fail)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(sinks, "ANSWER_S", 0.2 if fault == "hangs" else 60)
    stream = io.StringIO()
    out = started(tmp_path, wandb="mine", stream=stream, interval=1)
    for step in range(1, 41):
        out.step(step, {"loss": torch.tensor(1.0)})
        out.log_row()
    out.close()
    out.close()
    over.set()
    assert len(read_log(tmp_path)) == 40
    assert stream.getvalue().count("Weights & Biases is off") == 1
    assert ("no route to host" if fault == "raises" else "does not answer") in stream.getvalue()


def test_a_service_that_hangs_long_is_given_up_before_the_end(tmp_path, started, monkeypatch):
    over, stream = threading.Event(), io.StringIO()
    fake = types.ModuleType("wandb")
    fake.init = lambda **_: over.wait(tiny.HANG_S)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(sinks, "ROWS_WAITING", 5)
    out = started(tmp_path, wandb="mine", stream=stream, interval=1)
    for step in range(1, 8):
        assert ("is off" in stream.getvalue()) == (step > 6)
        out.step(step, {"loss": torch.tensor(1.0)})
        out.log_row()
    over.set()


def test_a_tensorboard_folder_that_goes_away_is_said_once(tmp_path, started):
    stream = io.StringIO()
    out = started(tmp_path, tensorboard=True, interval=1, stream=stream)
    for step in (1, 2, 3):
        if step == 2:
            (tmp_path / "tensorboard").rename(tmp_path / "moved")
            (tmp_path / "tensorboard").write_text("a file")
        out.step(step, {"loss": torch.tensor(1.0)})
        out.log_row()
    assert stream.getvalue().count("TensorBoard is off") == 1 and len(read_log(tmp_path)) == 3


class FakeNVML(types.ModuleType):
    """NVML with one GPU; `missing` names the calls that this one does not support."""

    class NVMLError(Exception):
        pass

    class NotSupported(NVMLError):
        pass

    def __init__(self, missing=()):
        super().__init__("pynvml")
        self.missing = set(missing)

    def __getattr__(self, name):
        values = {
            "nvmlInit": None,
            "nvmlDeviceGetPowerUsage": 654_321,
            "nvmlDeviceGetUtilizationRates": types.SimpleNamespace(gpu=83),
            "nvmlDeviceGetMemoryInfo": types.SimpleNamespace(used=3 * 2**30),
        }
        if name == "nvmlDeviceGetHandleByUUID":
            return lambda uuid: uuid
        if name not in values:
            raise AttributeError(name)

        def call(*_):
            if name in self.missing:
                raise self.NotSupported(name)
            return values[name]

        return call


@pytest.fixture
def one_gpu(monkeypatch):
    """Torch believes in a GPU; returns a function that installs a fake NVML."""
    monkeypatch.setattr(hardware, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    found = types.SimpleNamespace(uuid="ffc79498-8ff3-c2dc-3b0d-fafd804516ae")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    return lambda *missing: monkeypatch.setitem(sys.modules, "pynvml", FakeNVML(missing))


def test_gpu_counters_come_in_the_units_of_their_names(one_gpu, tmp_path, started):
    one_gpu()
    counters = GpuCounters()
    assert counters._handle == "GPU-ffc79498-8ff3-c2dc-3b0d-fafd804516ae"
    assert counters.read() == {"gpu_power_w": 654.321, "gpu_util": 0.83, "gpu_mem_gib": 3.0}
    out = started(tmp_path)
    assert out.log_row()["gpu_power_w"] == 654.321


def test_a_missing_counter_is_left_out_and_a_missing_nvml_leaves_out_all(one_gpu):
    one_gpu("nvmlDeviceGetPowerUsage")
    assert set(GpuCounters().read()) == {"gpu_util", "gpu_mem_gib"}
    one_gpu("nvmlInit")
    assert GpuCounters().read() == {}


def test_no_gpu_no_counters(tmp_path, started, monkeypatch):
    monkeypatch.setattr(hardware, "has_gpu", lambda: False)
    assert not [name for name in started(tmp_path).log_row() if name.startswith("gpu")]


@pytest.mark.gpu
def test_a_real_gpu_is_counted_and_a_step_does_not_wait_for_it(tmp_path, started):
    out = started(tmp_path)
    loss = torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 11):
            out.step(step, {"loss": loss, "cov": loss.bfloat16(), "k": 3}, 0.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    row = out.log_row(representation_stats(torch.randn(64, 32, device="cuda")))
    assert row["loss"] == 1.0 and row["rankme"] > 20
    assert 0 < row["gpu_mem_gib"] < 1000 and 0 < row["gpu_power_w"] < 5000


def test_rankme_counts_equal_directions_and_std_is_the_raw_one(seed):
    basis = torch.linalg.qr(torch.randn(64, 64))[0]
    for rank in (1, 5, 64):
        stats = representation_stats(3.0 * basis[:, :rank] @ torch.eye(rank, 64))
        assert stats["rankme"].item() == pytest.approx(rank, rel=1e-4)
    features = torch.randn(4000, 32) * torch.arange(1, 33) + 100
    stats = representation_stats(features)
    assert stats["feature_std"].item() == pytest.approx(features.std(0).mean().item(), rel=1e-5)
    assert stats["feature_std"].item() == pytest.approx(16.5, rel=0.05)
    assert stats["rankme"].ndim == stats["feature_std"].ndim == 0


def test_rankme_equals_its_definition(seed):
    features = torch.randn(50, 20, dtype=torch.float64) @ torch.randn(20, 20, dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(features.T @ features).clamp(min=0)
    share = eigenvalues.sqrt() / eigenvalues.sqrt().sum()
    expected = math.exp(-sum(p * math.log(p) for p in share.tolist() if p > 0))
    assert representation_stats(features)["rankme"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("images", [2, 4, 32])
@pytest.mark.parametrize(("position", "image", "both"), [(0, 0, 1), (1, 0, 1), (1, 1, 2)])
def test_the_share_of_position_is_right_of_few_images_too(seed, images, position, image, both):
    N, D = 36, 24
    found = []
    for _ in range(100):
        parts = torch.randn(1, N, D), torch.randn(images, 1, D), torch.randn(images, N, D)
        scales = position**0.5, image**0.5, both**0.5
        tokens = sum(part * scale for part, scale in zip(parts, scales, strict=True))
        found.append(position_share(tokens + 5).item())
    expected = position / (position + image + both)
    assert sum(found) / len(found) == pytest.approx(expected, abs=0.02)


def test_the_share_of_position_where_there_is_none():
    assert position_share(torch.randn(1, 9, 4).expand(3, 9, 4)).item() == pytest.approx(1)
    for tokens in (torch.randn(1, 9, 4), torch.randn(3, 1, 4), torch.ones(3, 9, 4)):
        assert math.isnan(position_share(tokens).item())


def test_collapse_and_bad_features_never_raise():
    same = representation_stats(torch.ones(16, 8))
    assert same["rankme"].item() == pytest.approx(1, abs=1e-3)
    assert same["feature_std"].item() == 0
    zeros = representation_stats(torch.zeros(16, 8))
    assert zeros["rankme"].isfinite() and zeros["feature_std"].item() == 0
    assert representation_stats(torch.randn(1, 8))["feature_std"].item() == 0
    for bad in (math.nan, math.inf):
        features = torch.ones(4, 4)
        features[1, 2] = bad
        assert not any(value.isfinite() for value in representation_stats(features).values())
    half = representation_stats(torch.randn(16, 8, requires_grad=True).bfloat16())
    assert not half["rankme"].requires_grad


def test_importing_telemetry_does_not_import_tensorboard():
    code = "import sys, cjepa_fast.telemetry; print('tensorboard' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
