"""What befalls a run: damaged checkpoints, spikes, collapse, a full disk, a second run."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading

import corrupt_images as made
import pytest
import test_outcomes
import test_saver
import tiny
import torch

from cjepa_fast import checkpoint, train
from cjepa_fast.config import ConfigError, validate
from cjepa_fast.data import left_out
from cjepa_fast.data.sources import open_images
from cjepa_fast.model.jepa import JEPA
from cjepa_fast.runtime import distributed, files, run_lock
from cjepa_fast.runtime.watchdog import INDEXING, Watchdog
from cjepa_fast.telemetry.jsonl import drop_rows_after, read_log
from cjepa_fast.training import anomalies, build, diagnosis, start, trainer
from cjepa_fast.training.callbacks import Callback
from cjepa_fast.training.loop import Loop
from cjepa_fast.training.trainer import Trainer

TAKEN = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@pytest.fixture(autouse=True)
def handlers():
    """A run takes the signals, in this process here."""
    before = {number: signal.getsignal(number) for number in TAKEN}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    run_lock.release()


def run(config, *args) -> int:
    return train.main(["--config", str(config), *map(str, args)])


@pytest.fixture
def finished(tmp_path):
    """A run of 4 steps with a checkpoint of each: its config file, its folder."""
    config = tiny.write_config(tmp_path, checkpoint={"every_steps": 1, "keep": 9})
    assert run(config) == 0
    return config, tmp_path / "run"


def test_a_training_runs_without_stdout_and_stderr(tmp_path, monkeypatch):
    """As after `>&- 2>&-`, which leaves None in their place."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert run(tiny.write_config(tmp_path)) == 0


def shard_of(run_folder, step: int):
    return next((run_folder / "checkpoints" / f"step_{step:08d}").glob("shard*"))


@pytest.mark.parametrize("said", test_saver.DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(finished, capfd, said):
    config, folder = finished
    whole = tiny.losses(folder)
    damaged = [shard_of(folder, 4), shard_of(folder, 3)]
    for path in damaged:
        test_saver.DAMAGES[said](path)
    assert run(config, "--resume", "auto") == 0
    out, err = capfd.readouterr()
    assert "WARNING: resuming from the earlier" in err and "step_00000002" in err
    assert all(str(path) in err for path in damaged) and err.count(said) == 2
    assert out.count("set aside") == 2
    assert tiny.losses(folder) == whole
    last = checkpoint.latest(folder)
    assert last.name == "step_00000004" and checkpoint.damage(last) == []


def test_where_all_is_damaged_nothing_begins_anew(finished, capfd):
    config, folder = finished
    for step in range(1, 5):
        test_saver.flip_a_bit(shard_of(folder, step))
    log = (folder / "log.jsonl").read_text()
    assert run(config, "--resume", "auto") == 2
    error = capfd.readouterr().err
    assert (
        error.startswith("error: ") and "nothing else is left" in error and "step_00000001" in error
    )
    assert run(config, "--resume", folder / "checkpoints" / "step_00000003") == 2
    assert (folder / "log.jsonl").read_text() == log


@pytest.mark.long
def test_what_failed_while_training_stays_named_after_a_resume_and_a_refused_one(tmp_path, capfd):
    config = tiny.write_config(tmp_path, data={"max_skipped": 0.2}, run={"epochs": 1})
    made.write(tmp_path / "images" / "class_0" / "empty.jpg", b"")
    made.write(tmp_path / "images" / "class_0" / "late.jpg", made.damaged_tables(1))
    other = tiny.write_images(tmp_path / "other")
    made.write(other / "class_1" / "other.jpg", b"")
    report = tmp_path / "run" / left_out.FILE

    def named():
        rows = [json.loads(line) for line in report.read_text().splitlines()]
        return {row["name"].partition("/")[2]: row["why"] for row in rows}

    assert run(config) == 0
    assert set(named()) == {"late.jpg", "empty.jpg"}
    before = report.read_bytes()
    assert run(config, "--resume", "auto", "--set", f"data.path={other}") == 2
    assert "another training" in capfd.readouterr().err and report.read_bytes() == before
    assert run(config, "--resume", "auto") == 0
    assert named() == {"late.jpg": "cannot be decoded", "empty.jpg": "empty file"}
    accepted = "--resume", "auto", "--set", f"data.path={other}", "--accept-changes"
    assert run(config, *accepted) == 0
    assert named() == {"late.jpg": "cannot be decoded", "other.jpg": "empty file"}


def test_a_resume_after_an_image_went_bad_at_its_size_is_another_training(finished, capfd):
    config, _ = finished
    file = config.parent / "images" / "class_0" / "004.jpg"
    good = file.read_bytes()
    file.write_bytes(bytes(len(good)))
    assert run(config, "--resume", "auto") == 2
    told = capfd.readouterr().err
    assert "39 images in" in told and "saved with 40" in told and "other ones are usable" in told
    file.write_bytes(good)
    assert run(config, "--resume", "auto") == 0


def test_a_rank_whose_copy_of_an_image_is_corrupt_is_refused(tmp_path, monkeypatch):
    folders = [tiny.write_images(tmp_path / name) for name in ("first", "good", "corrupt")]
    file = folders[2] / "class_0" / "004.jpg"
    file.write_bytes(bytes(file.stat().st_size))
    first, good, corrupt = (open_images(one, cache=tmp_path / "cache") for one in folders)
    ranks = []
    monkeypatch.setattr(distributed, "all_gather_objects", lambda own: ranks.append(own) or ranks)
    build.check_same_images(["set"], first)
    build.check_same_images(["set"], good)
    with pytest.raises(ConfigError, match=r"other ones are usable: 40 images .*, 39 images"):
        build.check_same_images(["set"], corrupt)


def test_the_watchdog_knows_when_images_are_indexed(tmp_path, monkeypatch):
    """Those to train on, and those of eval.online, after which nothing more is built here."""
    phases, mark = [], Watchdog.mark

    def end(*_):
        assert phases == [INDEXING, "building the networks", INDEXING]
        raise ValueError("the end")

    def build_loader(*given):
        assert phases == [INDEXING]
        return build.build_loader(*given)

    monkeypatch.setattr(Watchdog, "mark", lambda *a: (phases.append(a[1]), mark(*a)))
    monkeypatch.setattr(start, "build_loader", build_loader)
    monkeypatch.setattr(train, "build_online", end)
    assert run(tiny.write_config(tmp_path)) == 2 and len(phases) == 3


def test_a_run_that_has_saved_nothing_yet_begins_anew_and_says_so(finished, capfd):
    config, folder = finished
    for path in checkpoint.newest_first(folder):
        (path / "manifest.json").unlink()  # as if killed before it was written
    assert run(config, "--resume", "auto") == 0
    assert "holds no checkpoint: beginning at step 0" in capfd.readouterr().out


def test_a_run_that_fails_keeps_the_checkpoint_that_was_being_written(tmp_path, monkeypatch, capfd):
    """However slow the disk: what the user is told to resume from is the newest there can be."""
    failing, written = threading.Event(), files.write_tensors
    slow = lambda *args: failing.wait(tiny.HANG_S) and written(*args)  # noqa: E731
    monkeypatch.setattr(files, "write_tensors", slow)
    step = Trainer.step

    def third_fails(self, batches, index, *more):
        if index == 2:
            threading.Timer(0.2, failing.set).start()  # after the run has begun to end
            raise RuntimeError("boom")
        return step(self, batches, index, *more)

    monkeypatch.setattr(Trainer, "step", third_fails)
    assert run(tiny.write_config(tmp_path)) == 1
    assert checkpoint.latest(tmp_path / "run").name == "step_00000002"
    said = capfd.readouterr().err
    assert "RuntimeError: boom" in said and "step_00000002" in said


def test_a_second_run_in_the_same_folder_is_refused(finished, capfd):
    config, folder = finished
    before = (folder / "log.jsonl").read_text()
    run_lock.take(folder)
    command = [sys.executable, str(tiny.ROOT / "cjepa_fast" / "train.py"), "--config", str(config)]
    second = subprocess.run(
        [*command, "--resume", "auto"], capture_output=True, text=True, env=tiny.environment()
    )
    assert second.returncode == 2, second.stderr
    assert (
        f"process {os.getpid()} on" in second.stderr and "a run is writing there" in second.stderr
    )
    assert (folder / "log.jsonl").read_text() == before
    run_lock.release()
    assert run(config, "--resume", "auto") == 0


@pytest.mark.parametrize(
    ("saves", "steps"),
    [
        ({"every_steps": 0, "every_minutes": 1e-6, "keep": 9}, [1, 2, 3, 4]),
        ({"every_steps": 3, "keep_every_epochs": 1, "keep": 1}, [2, 4]),
        ({"every_steps": 0}, [4]),
    ],
)
def test_when_it_saves_and_what_is_kept(tmp_path, saves, steps):
    """By steps, by the clock, by epochs (of 2 steps), at the end."""
    assert run(tiny.write_config(tmp_path, checkpoint=saves)) == 0
    kept = checkpoint.newest_first(tmp_path / "run")
    assert [checkpoint.step_of(path) for path in kept] == steps[::-1]


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        (["checkpoint.keep_every_epochs=0", "run.epochs=3"], [2, 4, 6]),
        (["data.batch_size=8"], [2, 4, 5, 10]),  # epochs of 5 steps instead of 2
    ],
)
def test_what_was_kept_for_good_outlives_a_resume(tmp_path, changed, kept):
    saves = {"every_steps": 1, "keep_every_epochs": 1, "keep": 1}
    config = tiny.write_config(tmp_path, checkpoint=saves)
    assert run(config) == 0
    given = [one for key in changed for one in ("--set", key)]
    assert run(config, "--resume", "auto", "--accept-changes", *given) == 0
    there = checkpoint.newest_first(tmp_path / "run")
    assert [checkpoint.step_of(path) for path in there] == kept[::-1]


def test_a_finished_run_can_be_taken_over_into_another_folder(finished, tmp_path):
    config, folder = finished
    assert run(config, "--resume", folder, "--set", f"run.dir={tmp_path / 'other'}") == 0
    same = [(path / "encoder.safetensors").read_bytes() for path in (folder, tmp_path / "other")]
    assert same[0] == same[1]


def test_a_run_that_gave_up_gives_up_again_at_the_same_step(tmp_path, capfd, monkeypatch):
    """From step 3 on nothing is finite; a checkpoint of each step, the bad ones too."""
    whole = Trainer.step

    def poisoned(self, batches, index, *more):
        if index >= 2:
            batches = [
                dataclasses.replace(b, images_BCHW=b.images_BCHW * math.nan) for b in batches
            ]
        return whole(self, batches, index, *more)

    monkeypatch.setattr(Trainer, "step", poisoned)
    config = tiny.write_config(
        tmp_path, run={"epochs": 9, "max_bad_steps": 3}, checkpoint={"every_steps": 1, "keep": 2}
    )
    for resume in ([], ["--resume", "auto"]):
        assert run(config, *resume) == 1
        assert "The last good state is saved as step 2;" in capfd.readouterr().out
        state = checkpoint.state_of(checkpoint.latest(tmp_path / "run"))
        assert (state["step"], state["optimizer_step"]) == (2, 2)


SPIKY = {"run": {"epochs": 30, "spike_z": 50.0}, "telemetry": {"every_steps": 1}}
SPIKE = 45  # steps; two micro-batches each


@pytest.fixture
def spike(monkeypatch):
    """The loss of one step, by the count of steps made, is a thousand times what it is."""
    whole, calls = JEPA.forward, []

    def spiking(self, *args):
        terms = whole(self, *args)
        calls.append(1)
        if (len(calls) - 1) // 2 == SPIKE - 1:
            terms["loss"] = terms["loss"] * 1000
        return terms

    monkeypatch.setattr(JEPA, "forward", spiking)


def spiky_run(folder, on_spike: str) -> dict[int, tuple]:
    sections = {name: dict(keys) for name, keys in SPIKY.items()}
    sections["run"]["on_spike"] = on_spike
    config = tiny.write_config(folder, checkpoint={"every_steps": 10, "keep": 9}, **sections)
    assert run(config) == 0
    return tiny.losses(folder / "run")


@pytest.mark.long
def test_a_spike_is_told_with_its_images(tmp_path, spike, capfd):
    spiky_run(tmp_path, "log")
    out = capfd.readouterr().out
    assert out.count(f"step {SPIKE} is a spike: loss") == 1 and "grad_norm" in out
    row = json.loads((tmp_path / "run" / "bad_steps.jsonl").read_text().splitlines()[0])
    assert row["step"] == SPIKE and row["applied"] and len(row["images"]) == 16


def test_a_spike_is_skipped(tmp_path, spike, capfd, monkeypatch):
    applied = []
    step = Trainer.step
    monkeypatch.setattr(
        Trainer, "step", lambda self, *args: applied.append(step(self, *args)) or applied[-1]
    )
    spiky_run(tmp_path, "skip")
    assert [i for i, (_, good) in enumerate(applied, 1) if not good] == [SPIKE]
    assert f"step {SPIKE} is a spike" in (out := capfd.readouterr().out)
    assert "update and EMA skipped (1 in a row)" in out
    state = checkpoint.state_of(checkpoint.latest(tmp_path / "run"))
    assert state["optimizer_step"] == 59 and state["progress"]["skipped_steps"] == 1


def test_a_stop_changes_no_limit_of_spikes(tmp_path, monkeypatch):
    """On a GPU a step's outcome is known a step later, but at once where the state is saved."""
    limits: dict[int, list[float]] = {}
    step = Trainer.step

    def record(self, batches, index, *more):
        limits[index + 1] = self.engine._limits.tolist()
        return step(self, batches, index, *more)

    class Stop(Callback):
        def on_step(self, step, terms):
            return step == 4

    monkeypatch.setattr(Trainer, "step", record)
    monkeypatch.setattr(anomalies, "DeferredScalars", test_outcomes.Late)
    monkeypatch.setattr(anomalies, "MIN_HISTORY", 2)
    found = []
    for name, stops in (("whole", []), ("stopped", [Stop()])):
        config = tiny.write_config(
            tmp_path,
            run={"epochs": 4, "on_spike": "skip", "spike_z": 50.0, "dir": str(tmp_path / name)},
            checkpoint={"every_steps": 3 if stops else 0},
        )
        limits.clear()
        train.pretrain(config, callbacks=stops)
        if stops:
            assert list(limits) == [1, 2, 3, 4]
            train.pretrain(config, resume="auto")
        found.append(dict(limits))
    assert found[0] == found[1] and list(found[0]) == list(range(1, 9))
    assert [math.isfinite(found[0][n][0]) for n in (3, 4)] == [False, True]


def test_a_spike_is_gone_back_from_and_its_images_passed_over(tmp_path, spike, capfd, monkeypatch):
    shown, step = [], Trainer.step

    def record(self, batches, index, *more):
        shown.append((index + 1, batches[0].epoch * 2 + batches[0].step + 1))
        return step(self, batches, index, *more)

    left, go_on = [], Loop._load_progress

    def remains(self, state):
        left.append((len(self.trainer.features), self.waited_s))
        go_on(self, state)

    monkeypatch.setattr(Trainer, "step", record)
    monkeypatch.setattr(Loop, "_load_progress", remains)
    losses = spiky_run(tmp_path, "rewind")
    assert left == [(0, 0.0)] * 2  # at the start, and after the spike nothing of the steps undone
    assert f"rewound to step 40; the images of the {SPIKE - 40} steps" in capfd.readouterr().out
    # (step, the step whose images it saw): after the spike, step 41 sees those of step 46.
    plain = [(i, i) for i in range(1, SPIKE + 1)]
    assert shown == plain + [(i, i + 5) for i in range(41, 61)]
    assert list(losses) == list(range(1, 61)) and max(loss[0] for loss in losses.values()) < 100
    state = checkpoint.state_of(checkpoint.latest(tmp_path / "run"))
    assert state["progress"]["data_offset"] == 5 and state["optimizer_step"] == 60
    # A resume from a step before the spike keeps its row: its images are not met again.
    kept = drop_rows_after(tmp_path / "run" / "bad_steps.jsonl", 41, print)
    assert [row["step"] for row in kept] == [SPIKE]


@pytest.fixture
def early_spike(tmp_path, monkeypatch):
    """Runs of 8 steps, which go back from a spike. The loss of step `at`, where it is made first,
    is a thousand times what it is, its gradient not finite; a checkpoint comes every `saves`."""
    monkeypatch.setattr(anomalies, "MIN_HISTORY", 2)
    whole = Trainer.step

    def trained(at: int, saves: int):
        steps = []

        def spiking(self, batches, index, *more):
            terms, applied = whole(self, batches, index, *more)
            steps.append(index + 1)
            if len(steps) == at:
                terms["loss"], applied = terms["loss"] * 1000, False
            return terms, applied

        monkeypatch.setattr(Trainer, "step", spiking)
        own = {"epochs": 4, "on_spike": "rewind", "spike_z": 50.0}
        assert run(tiny.write_config(tmp_path, run=own, checkpoint={"every_steps": saves})) == 0
        return steps, tmp_path / "run"

    return trained


def test_a_rewind_restores_the_counts_of_bad_steps(early_spike):
    steps, folder = early_spike(at=5, saves=4)
    assert steps == [1, 2, 3, 4, 5, 5, 6, 7, 8]
    progress = checkpoint.state_of(checkpoint.latest(folder))["progress"]
    assert (progress["skipped_steps"], progress["skipped_in_row"]) == (0, 0)


@pytest.mark.parametrize(("saves", "rewound"), [(4, True), (0, False)])
def test_a_spike_says_whether_it_was_gone_back_from(early_spike, capfd, saves, rewound):
    """Before the first checkpoint it cannot be: a resume makes such a step anew."""
    steps, folder = early_spike(at=5, saves=saves)
    (row,) = read_log(folder / "bad_steps.jsonl")
    assert row["step"] == 5 and ("rewound" in row) == rewound and len(steps) == 8 + rewound
    assert ("no checkpoint before step 5" in capfd.readouterr().out) != rewound


def test_features_that_are_not_finite_are_no_collapse(tmp_path, capfd, monkeypatch):
    stats = {"feature_std": torch.tensor(math.nan), "rankme": torch.tensor(math.nan)}
    monkeypatch.setattr(trainer, "representation_stats", lambda features: stats)
    monkeypatch.setattr("cjepa_fast.training.collapse_monitor.LEAST_FEATURES", 1)
    assert run(tiny.write_config(tmp_path)) == 0
    assert "collapsing" not in capfd.readouterr().out


def test_collapse_is_warned_of_once_with_its_numbers(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(diagnosis, "RANKME_DROP", 100.0)  # any RankMe counts as a fall
    monkeypatch.setattr(trainer, "FEATURE_ROWS", 64)  # as four of the eight steps have
    config = tiny.write_config(
        tmp_path,
        data={"batch_size": 16, "micro_batch_size": 16, "threads": 1, "image_size": 24},
        run={"epochs": 4},
        telemetry={"every_steps": 1, "tensorboard": False, "rankme_floor": 100.0},
        loss={"vicreg": {"beta": 0}},
    )
    assert run(config) == 0
    out = capfd.readouterr().out
    assert out.count("WARNING: the target's features are collapsing") == 1
    assert out.count("WARNING: the features get worse than untrained (RankMe") == 1
    assert "First change loss.vicreg.beta from 0" in out
    assert "floor 100" in out and "feature_std" not in out and "loss.vicreg.beta is 0" in out


@contextlib.contextmanager
def small_disk(folder, megabytes: int):
    """A file system of that size, mounted there."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_stops_no_training(tmp_path, capfd):
    """Two checkpoints fit: saves fail from then on, the log too, and go on when there is room."""
    disk = tmp_path / "disk"
    with small_disk(disk, 1):
        config = tiny.write_config(
            tmp_path,
            run={"epochs": 3, "dir": str(disk / "run")},
            checkpoint={"every_steps": 1, "keep": 9},
        )
        status = run(config)
        out = capfd.readouterr().out
        assert status == 1  # the last state is not on the disk
        assert "could not be saved" in out and "No space left" in out
        good = checkpoint.newest_first(disk / "run")
        assert good and all(not checkpoint.damage(path) for path in good)
        reached = checkpoint.step_of(good[0])
        assert reached < 6
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert run(config, "--resume", "auto") == 0
        assert list(tiny.losses(disk / "run")) == list(range(1, 7))


@pytest.mark.long
@pytest.mark.multiprocess
def test_a_run_resumes_on_another_number_of_ranks_and_another_stage(tmp_path):
    """The same images in the same order, to fp32 rounding the same losses; what would change the
    maths is refused, with the way out."""
    sections = {
        "run": {"epochs": 3, "precision": "fp32"},
        "mask": {"min_keep": 4, "context": "fixed"},  # "random" cuts contexts by micro-batch
        "checkpoint": {"every_steps": 3, "keep": 9},
        "loss": {"vicreg": {"beta": 0.1}},
    }
    config = tiny.write_config(tmp_path, **sections)
    assert run(config) == 0
    held = tmp_path / "run" / "checkpoints" / "step_00000003"
    elsewhere = ["--resume", held, "--set", f"run.dir={tmp_path / 'two'}"]
    elsewhere += ["--set", 'deepspeed={"zero_optimization":{"stage":3}}']
    refused = tiny.train("--config", config, *elsewhere, ranks=2)
    assert refused.returncode != 0
    assert "images a VICReg statistic: 16, saved with 8" in refused.stderr
    elsewhere += ["--set", "data.micro_batch_size=4"]
    resumed = tiny.train("--config", config, *elsewhere, ranks=2)
    assert resumed.returncode == 0, resumed.stderr
    one, two = tiny.losses(tmp_path / "run"), tiny.losses(tmp_path / "two")
    assert list(two) == [4, 5, 6]
    for step, terms in two.items():
        assert terms == pytest.approx(one[step], rel=2e-5, abs=1e-7)


@pytest.mark.multiprocess
def test_what_zero_3_leaves_no_room_for_is_refused(tmp_path):
    config = tiny.write_config(tmp_path, run={"compile": "blocks"})
    stage = ["--set", "deepspeed.zero_optimization.stage=3"]
    result = tiny.train("--config", config, *stage, ranks=2)
    assert result.returncode != 0
    assert 'error: run.compile = "blocks": not with ZeRO stage 3' in result.stderr


@pytest.mark.multiprocess
def test_ranks_whose_contexts_differ_in_length_do_the_same_collectives(tmp_path):
    """Each cuts its own micro-batch's, under the stage that gathers most often."""
    config = tiny.write_config(tmp_path)
    masks = build.build_masks(validate(json.loads(config.read_text())))
    lengths = [masks(0, 0, torch.arange(8) + 8 * rank).context_k for rank in range(2)]
    assert lengths[0] != lengths[1]
    stage = ["--set", "deepspeed.zero_optimization.stage=3", "--set", "run.timeout_s=600"]
    result = tiny.train("--config", config, *stage, ranks=2)
    assert result.returncode == 0, result.stderr
    assert len(tiny.losses(tmp_path / "run")) == 4


MARKED = """
import sys
from cjepa_fast import train
from cjepa_fast.runtime import distributed
from cjepa_fast.runtime.watchdog import Watchdog

whole = Watchdog.mark
def mark(self, phase, step=None):
    print(f"mark: {phase}")
    whole(self, phase, step)

Watchdog.mark = mark
distributed.leave(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_the_watchdog_hears_of_every_micro_batch(tmp_path):
    """So a step may take longer than run.timeout_s: on a CPU it may take hours."""
    script = tmp_path / "marked.py"
    script.write_text(MARKED)
    sizes = {**tiny.CONFIG["data"], "micro_batch_size": 4}  # four micro-batches a step
    done = tiny.run(script, "--config", tiny.write_config(tmp_path, data=sizes))
    assert done.returncode == 0, done.stderr
    steps = "".join(done.stdout).split("mark: waiting for data")[1:5]
    assert [step.count("mark: in the step") for step in steps] == [5] * 4
