"""Evaluation while training: what it finds, when it may, and that the training is the same."""

import contextlib
import errno
import functools
import itertools
import json
import os
import shutil
import signal
import time

import pytest
import test_run
import tiny
import torch

from cjepa_fast import Callback, checkpoint, load_encoder, pretrain, train
from cjepa_fast import config as configuration
from cjepa_fast.data.sources import open_images
from cjepa_fast.eval import features, online
from cjepa_fast.eval.probes import knn, linear
from cjepa_fast.runtime import files
from cjepa_fast.runtime.watchdog import Watchdog
from cjepa_fast.telemetry import read_log
from cjepa_fast.training import diagnosis
from cjepa_fast.training.build import build_masks

handlers = test_run.handlers
MARKS = {"knn", "knn_centred", "linear"}


def write_config(folder, **own):
    images = tiny.write_images(folder / "images", count=44, classes=3)
    evaluation = {"data": str(images), "every_epochs": 1, "share": 1.0, **own}
    return tiny.write_config(
        folder,
        run={"epochs": 3, "precision": "fp32"},
        eval={"crop": 1.0, "k": 3, "online": evaluation},
    )


def test_the_target_is_evaluated_before_between_and_at_the_end(tmp_path):
    config = write_config(tmp_path)
    assert train.main(["--config", str(config)]) == 0
    run = tmp_path / "run"
    events = (run / "events.jsonl").read_text().splitlines()
    told = json.loads(events[-4])["text"]  # after it, what comes next in three lines
    assert json.loads(events[0])["text"].endswith(f"; torch {torch.__version__}")
    assert "kNN: untrained" in told and "at the end" in told
    rows = {row["step"]: row for row in read_log(run)}
    marked = [step for step, row in rows.items() if row.keys() >= MARKS]
    assert marked == [0, 2, 4, 6]
    images = open_images(tmp_path / "images")
    train_keep, test_keep = features.split_by_name(images)
    found = []
    for keep in (train_keep, test_keep):
        vectors, index = features.extract(load_encoder(run), images, keep=keep)
        found += [vectors, images.labels[index]]
    assert rows[6]["knn"] == pytest.approx(knn.top1(*found, k=3), abs=1e-3)
    right = linear.ridge(*found[:3]) == found[3]
    assert rows[6]["linear"] == pytest.approx(100 * right.double().mean().item(), abs=1e-3)


def test_a_fall_of_knn_is_told_once_by_the_evaluation_that_finds_it(tmp_path, monkeypatch, capfd):
    """Also after a tenth of the run, and before RankMe is known, which takes 1,024 images."""
    monkeypatch.setattr(diagnosis, "KNN_DROP", -200.0)  # any kNN counts as a fall
    assert train.main(["--config", str(write_config(tmp_path))]) == 0
    out = capfd.readouterr().out
    assert out.count("WARNING: the features get worse than untrained (kNN %") == 1
    told = out.index("WARNING: the features")
    assert out.index("after step 2:") < told < out.index("after step 4:")


def test_nothing_is_drawn_that_nobody_shows(tmp_path, monkeypatch):
    monkeypatch.setattr(online.SnapshotImages, "draw", lambda *_: pytest.fail("drawn"))
    config = write_config(tmp_path)
    assert train.main(["--config", str(config), "--set", "run.epochs=1"]) == 0


def test_figures_need_tensorboard_and_all_weights_on_a_rank(tmp_path, monkeypatch):
    images = open_images(tiny.write_images(tmp_path / "set", 4), cache=tmp_path / "cache")
    said = []

    def built(stage=0, **telemetry):
        own = {"data": str(images.root), "pictures": 2}
        file = tiny.write_config(tmp_path, eval={"online": own}, telemetry=telemetry)
        config = configuration.load(str(file))
        return online.build_snapshots(config, images, build_masks(config), stage, said.append)

    assert built(tensorboard=True) and built(stage=3, tensorboard=True)
    assert built(tensorboard=False, wandb="project") is None and not said  # W&B takes no figures
    monkeypatch.setattr(online, "world_size", lambda: 2)
    assert built(stage=2, tensorboard=True) and not said
    assert built(stage=3, tensorboard=True) is None
    assert len(said) == 1 and "under ZeRO stage 3 no rank has all weights" in said[0]


OWN_PROBES = """
def classes(train, train_labels, test, test_labels):
    assert train.shape[1] == test.shape[1] and len(test) == len(test_labels)
    return len(train_labels.unique())

def several(*vectors):
    return {"one": 1, "two": vectors[0].sum() * 0 + 2}
"""


def test_training_is_the_same_with_and_without(tmp_path, monkeypatch):
    """Evaluated, by probes of the user's own too, and drawn for TensorBoard."""
    (tmp_path / "own_probes.py").write_text(OWN_PROBES)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    own = ["own_probes:classes", "own_probes:several"]
    with_it = write_config(tmp_path / "a", pictures=2, probes=own)
    without = write_config(tmp_path / "b", data=None)
    for config in (with_it, without):
        assert train.main(["--config", str(config), "--set", "telemetry.tensorboard=true"]) == 0
    one, other = (
        {row["step"]: row["loss"] for row in read_log(config.parent / "run") if row["step"]}
        for config in (with_it, without)
    )
    assert one == other and len(one) == 6
    last = read_log(tmp_path / "a" / "run")[-1]
    assert (last["classes"], last["several_one"], last["several_two"]) == (3, 1, 2)
    both = [
        checkpoint.StoredCheckpoint(checkpoint.latest(c.parent / "run")) for c in (with_it, without)
    ]
    weights = [stored.encoder_weights("target") for stored in both]
    assert all(torch.equal(p, weights[1][name]) for name, p in weights[0].items())


@pytest.mark.parametrize("path", ["no_such_module:x", "math:no_such", "math", ""])
def test_a_probe_that_is_not_there_is_told_before_the_first_step(tmp_path, capsys, path):
    config = write_config(tmp_path, probes=[path])
    assert train.main(["--config", str(config)]) == 2
    said = capsys.readouterr().err
    assert f"eval.online.probes: {path} cannot be imported" in said and "module:function" in said


def own(*vectors):
    return 1.0


@pytest.mark.parametrize(("probes", "said"), [
    ([lambda *vectors: 1.0], "has no name to log its scores by: write a function"),
    ([functools.partial(own)], "has no name to log its scores by"),
    ([own, own], "is named twice: give it a name of its own"),
])  # fmt: skip
def test_a_probe_has_a_name_of_its_own(probes, said):
    with pytest.raises(ValueError, match=f"eval.online.probes: .*{said}"):
        online._distinct(probes)


def test_a_probe_with_a_taken_name_is_told_before_the_first_step(tmp_path, monkeypatch, capsys):
    (tmp_path / "taken.py").write_text("def linear(*vectors):\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = write_config(tmp_path, probes=["taken:linear"])
    assert train.main(["--config", str(config)]) == 2
    assert "eval.online.probes: linear is a score that is always" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists()


PAUSED, CALLED = [], set()


def paused_probe(*vectors):
    assert PAUSED
    CALLED.add("probe")
    return 0.0


class PausedCallback(Callback):
    def on_step(self, step, terms):
        self.note("step")

    def on_evaluate(self, step, scores):
        self.note("evaluate")

    def on_save(self, step, checkpoint):
        self.note("save")

    def note(self, name):
        assert PAUSED
        CALLED.add(name)


def test_the_watchdog_is_paused_in_the_users_code(tmp_path, monkeypatch):
    @contextlib.contextmanager
    def paused(self):
        PAUSED.append(self)
        yield
        PAUSED.pop()

    monkeypatch.setattr(Watchdog, "paused", paused)
    config = write_config(tmp_path, probes=[f"{__name__}:paused_probe"])
    pretrain(config, epochs=1, callbacks=[PausedCallback()])
    assert sorted(CALLED) == ["evaluate", "probe", "save", "step"] and not PAUSED


def test_a_training_goes_on_where_the_evaluation_s_images_are_gone(tmp_path, monkeypatch):
    evaluate = online.OnlineEvaluation.evaluate
    own = shutil.copytree(tiny.write_images(tmp_path / "images", 44, 3), tmp_path / "own")

    def once(self, encoder):
        found = evaluate(self, encoder)
        shutil.rmtree(own, ignore_errors=True)
        return found

    monkeypatch.setattr(online.OnlineEvaluation, "evaluate", once)
    config = write_config(tmp_path, data=str(own))
    assert train.main(["--config", str(config), "--set", "run.epochs=2"]) == 0
    rows = read_log(tmp_path / "run")
    assert [row["step"] for row in rows if row.keys() >= MARKS] == [0] and rows[-1]["step"] == 4
    warned = (tmp_path / "run" / "events.jsonl").read_text()
    assert f"images in {own} can be read any more (eval.online.data" in warned
    assert not (tmp_path / "run" / "best").exists()


def test_the_checkpoint_with_the_best_knn_is_kept(tmp_path, monkeypatch):
    scores = iter([90.0, 10.0, 30.0, 20.0, 30.0])
    monkeypatch.setattr(online, "_scores", lambda *args, **options: {"knn": next(scores)})
    config = write_config(tmp_path)
    sets = ["--set", "checkpoint.keep=1", "--set", "checkpoint.every_steps=1"]
    assert train.main(["--config", str(config), *sets, "--set", "run.epochs=4"]) == 0
    run = tmp_path / "run"
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == ["step_00000004", "step_00000008"]
    assert (run / "best").resolve() == run / "checkpoints" / "step_00000004"
    assert load_encoder(run / "best").width == 24
    state = json.loads((run / "best" / "state.json").read_text())
    assert state["progress"]["best"] == {"knn": 30.0, "step": 4}
    # and a resumed run remembers it
    scores = iter([29.0, 31.0])
    for path in checkpoint.newest_first(run)[:1]:
        (path / "manifest.json").unlink()
    resumed = ["--resume", str(run / "best"), "--set", "run.epochs=4"]
    assert train.main(["--config", str(config), *sets, *resumed]) == 0
    assert (run / "best").resolve().name == "step_00000008"


def test_the_best_is_found_again_when_a_run_goes_back(tmp_path, monkeypatch):
    """What comes after the step that is gone back to is set aside, RUN/best with it."""
    scores = iter([9.0, 10.0, 30.0])
    monkeypatch.setattr(online, "_scores", lambda *args, **options: {"knn": next(scores)})
    config = write_config(tmp_path)
    sets = ["--set", "checkpoint.every_steps=1", "--set", "checkpoint.keep=9"]
    assert train.main(["--config", str(config), *sets, "--set", "run.epochs=2"]) == 0
    run = tmp_path / "run"
    assert (run / "best").resolve().name == "step_00000004"
    scores = iter([5.0])
    back = ["--resume", str(run / "checkpoints" / "step_00000002"), "--set", "run.epochs=2"]
    assert train.main(["--config", str(config), *sets, *back]) == 0
    assert (run / "best").resolve().name == "step_00000002"
    assert (run / "best" / "state.json").is_file()
    # in another folder the best is sought anew
    scores = iter([5.0, 4.0])
    away = [*back, "--set", f"run.dir={tmp_path / 'away'}", "--set", "run.epochs=3"]
    assert train.main(["--config", str(config), *sets, "--accept-changes", *away]) == 0
    assert (tmp_path / "away" / "best").resolve().name == "step_00000004"


@pytest.mark.parametrize(("last", "best"), [(5.0, 2), (40.0, 6)])
def test_a_best_one_that_could_not_be_saved_is_none(tmp_path, monkeypatch, last, best):
    """Of step 4. What is best is sought among those before and after it."""
    scores = iter([90.0, 30.0, 50.0, last])
    monkeypatch.setattr(online, "_scores", lambda *args, **options: {"knn": next(scores)})
    written = files.write_tensors

    def full(tensors, path, *more):
        if "step_00000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        written(tensors, path, *more)

    monkeypatch.setattr(files, "write_tensors", full)
    sets = ["--set", "checkpoint.keep=1", "--set", "checkpoint.every_steps=1"]
    assert train.main(["--config", str(write_config(tmp_path)), *sets]) == 0
    run = tmp_path / "run"
    assert checkpoint.damage(run / "best") == []
    progress = checkpoint.state_of(checkpoint.latest(run))["progress"]
    assert (run / "best").resolve().name == f"step_{best:08d}" and progress["best"]["step"] == best


@pytest.mark.parametrize("step", [0, 2, 6])
def test_a_stop_is_heard_between_its_batches_and_it_is_made_up_for(tmp_path, monkeypatch, step):
    """A scheduler kills soon after it has asked: the checkpoint comes first."""
    config, seen = write_config(tmp_path), []
    batches, evaluations = online.OnlineEvaluation._batches, itertools.count()

    def stopped_in_one(self, *args):
        number = next(evaluations)  # two splits each
        for batch in batches(self, *args):
            seen.append(number)
            if number == step:  # 0, then 2, 4 and 6: of one evaluation the first split
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(online.OnlineEvaluation, "_batches", stopped_in_one)
    assert train.main(["--config", str(config)]) == 0
    assert seen.count(step) == 1 and max(seen) == step  # the first batch was the last
    run = tmp_path / "run"
    newest = checkpoint.latest(run)
    assert newest is None if step == 0 else checkpoint.step_of(newest) == step
    if step == 6:  # stopped again
        seen.clear()
        evaluations = itertools.count(step)
        assert train.main(["--config", str(config), "--resume", "auto"]) == 0
        assert seen == [step] and load_encoder(run / "encoder.safetensors").width == 24
    monkeypatch.setattr(online.OnlineEvaluation, "_batches", batches)
    assert train.main(["--config", str(config), "--resume", "auto"]) == 0
    marked = [row["step"] for row in read_log(run) if row.keys() >= MARKS]
    assert marked == {0: [0, 2, 4, 6], 2: [0, 3, 4, 6], 6: [0, 2, 4, 6]}[step]
    assert (run / "encoder.safetensors").exists()
    said = "the final evaluation was stopped" in (run / "events.jsonl").read_text()
    assert said == (step == 6)


def test_one_made_up_for_at_the_end_is_made_once(tmp_path, monkeypatch):
    """A stop in the last step, which skips it; its score is the best."""

    class Stop(Callback):
        def on_step(self, step, terms):
            return step == 6

    config, scores = write_config(tmp_path), {"knn": 1.0}
    monkeypatch.setattr(online, "_scores", lambda *_, **__: dict(scores))
    train.pretrain(str(config), callbacks=[Stop()])
    run, resume = tmp_path / "run", ["--config", str(config), "--resume", "auto"]
    assert [row["step"] for row in read_log(run) if "knn" in row] == [0, 2, 4]
    scores["knn"] = 2.0
    for _ in range(2):
        assert train.main(resume) == 0
        assert [row["step"] for row in read_log(run) if "knn" in row] == [0, 2, 4, 6]
        progress = checkpoint.state_of(checkpoint.latest(run))["progress"]
        assert progress["best"] == {"knn": 2.0, "step": 6} and not progress["evaluation_owed"]
        assert (run / "best").resolve().name == "step_00000006"
    assert not list((run / "checkpoints").glob("abandoned*"))


def test_it_takes_no_more_than_its_share(monkeypatch):
    now, said = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    evaluation = online.OnlineEvaluation((), every=10, share=0.1, batch_size=1, k=1, temperature=1)
    evaluation.attach(said.append, stopped=lambda: False, paused=contextlib.nullcontext)
    monkeypatch.setattr(
        online, "_scores", lambda *args, **options: now.__setitem__(0, now[0] + 7) or {}
    )
    with evaluation.counted():
        evaluation.evaluate(None)
    assert not evaluation.due(9)  # not its turn
    now[0] = 60.0
    assert not evaluation.due(10) and not evaluation.due(11) and len(said) == 1
    assert "eval.online.share = 0.1" in said[0]
    now[0] = 70.0
    assert evaluation.due(12)  # late, but not forgotten
    with evaluation.counted():
        evaluation.evaluate(None)
    now[0] = 1000.0
    assert not evaluation.due(13) and evaluation.due(20)


def test_a_set_without_labels_is_refused_at_the_start(tmp_path, capsys):
    config = write_config(tmp_path)
    flat = tmp_path / "flat"
    flat.mkdir()
    next((tmp_path / "images").rglob("*.jpg")).rename(flat / "a.jpg")
    assert train.main(["--config", str(config), "--set", f"eval.online.data={flat}"]) == 2
    assert "has no labels" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists()


ZERO = """
import sys
from cjepa_fast import train
from cjepa_fast.runtime import distributed

distributed.leave(train.main(sys.argv[1:]))
"""


@pytest.mark.long
@pytest.mark.multiprocess
def test_two_ranks_under_zero_3_evaluate_alike(tmp_path):
    """Their shares are uneven, 17 and 18 of 35 images: each runs the same collectives."""
    config = write_config(tmp_path)
    script = tmp_path / "zero.py"
    script.write_text(ZERO)
    rows = {}
    for ranks, run in ((1, "one"), (2, "two")):
        stage = ["--set", f"deepspeed.zero_optimization.stage={3 if ranks > 1 else 0}"]
        where = ["--set", f"run.dir={tmp_path / run}", "--set", "data.micro_batch_size=4"]
        done = tiny.run(script, "--config", config, *stage, *where, ranks=ranks)
        assert done.returncode == 0, done.stderr
        rows[run] = {row["step"]: row for row in read_log(tmp_path / run) if "knn" in row}
    assert rows["one"].keys() == rows["two"].keys() == {0, 2, 4, 6}
    first = ({name: rows[run][0][name] for name in MARKS} for run in rows)
    assert next(first) == next(first)


@pytest.mark.long
def test_tensorboard_has_masks_attention_and_features_at_each(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = write_config(tmp_path, pictures=2)
    assert train.main(["--config", str(config), "--set", "telemetry.tensorboard=true"]) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert set(events.Tags()["images"]) == {"masks", "attention", "pca"}
    shown = events.Images("pca")
    assert [picture.step for picture in shown] == [0, 2, 4, 6] and shown[0].height > 100
