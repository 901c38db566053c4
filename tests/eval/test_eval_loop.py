"""The loop of the trainings with labels, on a model of one weight: learning rates, saved state."""

import contextlib
import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

from cjepa_fast.eval.finetuning import loop, recipe
from cjepa_fast.eval.finetuning.saved import Learner, SavedTraining
from cjepa_fast.model.vit import Encoder


class Model(nn.Module):
    """Its encoder, and a weight and a BatchNorm that learn beside it."""

    def __init__(self):
        super().__init__()
        self.encoder = Encoder(image_size=8, patch_size=4, width=12, depth=1, heads=3)
        self.encoder.mean, self.encoder.std = (0.5,) * 3, (0.25,) * 3
        self.norm = nn.BatchNorm1d(1)
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x_B1: torch.Tensor) -> torch.Tensor:
        total = sum(p.square().mean() for p in self.encoder.parameters())
        return self.norm(total * x_B1 * self.weight + x_B1 * x_B1)


class Draws:
    """loop.Task: a step's loss is of what it draws, and `bad` from step `bad_from` on."""

    def __init__(self, bad_from: int | None = None):
        self.bad_from, self.seen, self.closed = bad_from, [], False

    def begin(self, step):
        torch.manual_seed(step)

    def batches(self, start):
        try:
            yield from range(start, 10**6)
        finally:
            self.closed = True

    def loss(self, model, batch):
        self.seen.append(batch)
        bad = self.bad_from is not None and batch >= self.bad_from
        return model(torch.randn(4, 1)).square().mean() * (float("nan") if bad else 1 + batch)


def plan(steps: int = 6, period: int = 2, unit: str = "epoch", **options) -> loop.TrainingPlan:
    known = {"lr": lambda step: 0.1 / (1 + step), "advice": "lower it"}
    return loop.TrainingPlan("tiny", steps, period, unit, **{**known, **options})


def learner_of(most: float = 0.5) -> Learner:
    torch.manual_seed(0)
    model = Model()
    return Learner(model, model.encoder, 0.5, 0.1, recipe.averaged(model, most))


def state_of(learner: Learner) -> dict[str, torch.Tensor]:
    parts = {"model": learner.module.state_dict(), "average": learner.average.state_dict()}
    found = {f"{part}.{name}": x for part, state in parts.items() for name, x in state.items()}
    for i, state in enumerate(learner.optimizer.state.values()):
        found |= {f"{name}.{i}": x for name, x in state.items()}
    return {name: x.clone() for name, x in found.items()}


def test_all_of_the_state_comes_back(tmp_path):
    """Weights, moments, counts of updates, EMA, BatchNorm's buffers."""
    first, again = learner_of(), learner_of()
    loop.train(first, Draws(), plan(), SavedTraining(tmp_path / "kept", {"a": 1}))
    assert SavedTraining(tmp_path / "kept", {"a": 1}).restore(again) == 6
    whole, back = state_of(first), state_of(again)
    assert whole.keys() == back.keys()
    for name, value in whole.items():
        assert torch.equal(back[name], value), name
    assert back["model.norm.num_batches_tracked"] == back["average.n_averaged"] == 6
    assert not torch.equal(back["model.weight"], torch.ones(1))


def test_a_training_goes_on_from_its_last_period(tmp_path, capsys):
    whole = learner_of()
    loop.train(whole, Draws(), plan(), SavedTraining(None, {}))
    assert capsys.readouterr().out.count("epoch ") == 3
    kept, task = SavedTraining(tmp_path / "kept", {}), Draws(bad_from=5)
    with pytest.raises(ValueError, match="the loss of epoch 3 of 3 is nan: lower it") as raised:
        loop.train(learner_of(), task, plan(), kept)
    assert task.closed and raised.tb  # not by the end of the frames that the traceback holds
    assert [path.name for path in (tmp_path / "kept/checkpoints").iterdir()] == ["step_00000004"]
    again, task = learner_of(), Draws()
    loop.train(again, task, plan(), SavedTraining(tmp_path / "kept", {}))
    assert task.seen == [4, 5]
    assert "epoch 2 of 3 is done, from" in capsys.readouterr().out
    for name, value in state_of(whole).items():
        assert torch.equal(state_of(again)[name], value), name
    loop.train(again, task, plan(), SavedTraining(tmp_path / "kept", {}))
    assert task.seen == [4, 5]  # nothing is left to do


def test_each_step_has_its_rate_and_each_depth_its_share(monkeypatch):
    learner, rates = learner_of(), []
    step = learner.optimizer.step

    def noted():
        rates.append({group["lr_scale"]: group["lr"] for group in learner.optimizer.param_groups})
        step()

    monkeypatch.setattr(learner.optimizer, "step", noted)
    loop.train(learner, Draws(), plan(steps=2), SavedTraining(None, {}))
    expected = [{share: share * rate for share in (1, 0.5, 0.25)} for rate in (0.1, 0.05)]
    assert [dict(sorted(r.items(), reverse=True)) for r in rates] == expected


def test_periods_end_with_the_training_and_are_told(capsys):
    loop.train(learner_of(), Draws(), plan(steps=5, unit="step"), SavedTraining(None, {}))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "step 2 of 5",
        "step 4 of 5",
        "step 5 of 5",
    ]


def test_the_loss_told_is_the_period_s_mean(capsys):
    class Steps(Draws):
        def loss(self, model, batch):
            return super().loss(model, batch) * 0 + batch

    both = plan(steps=2, period=1, accumulation=2)
    loop.train(learner_of(), Steps(), both, SavedTraining(None, {}))
    assert capsys.readouterr().out.splitlines() == [
        "epoch 1 of 2: loss 0.5000",
        "epoch 2 of 2: loss 2.5000",
    ]


def test_a_disk_that_is_full_stops_no_training(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("cjepa_fast.runtime.files.write_tensors", full)
    task = Draws()
    loop.train(learner_of(), task, plan(), SavedTraining(tmp_path / "kept", {}))
    assert len(task.seen) == 6
    assert capsys.readouterr().err.count("could not be saved: rank 0: No space left") == 3


def test_a_checkpoint_that_has_lost_a_file_is_refused(tmp_path):
    """Also where that is its manifest: no training begins anew in silence."""
    loop.train(learner_of(), Draws(), plan(), SavedTraining(tmp_path / "kept", {}))
    (checkpoint,) = (tmp_path / "kept" / "checkpoints").iterdir()
    for path in list(checkpoint.iterdir()):
        shutil.move(path, tmp_path / "aside")
        with pytest.raises(ValueError, match=path.name):
            SavedTraining(tmp_path / "kept", {}).restore(learner_of())
        shutil.move(tmp_path / "aside", path)
    assert SavedTraining(tmp_path / "kept", {}).restore(learner_of()) == 6


def test_another_training_is_not_resumed_nor_one_with_other_labels(tmp_path):
    """A fact that earlier versions did not save, such as the labels, counts only where it is."""
    own = {"seed": 0, "labels": "a", "annotations_sha256": "b", "bit_depth": None}
    own |= {"bf16": False, "micro_batch": 64}
    saved = SavedTraining(tmp_path, own)
    for same in (own, {"seed": 0}, {**own, "more": 1}):
        saved._refuse_other_training(tmp_path, same)
    others = {"labels": "x", "annotations_sha256": "x", "bit_depth": 12, "seed": 1}
    others |= {"bf16": True, "micro_batch": 32}
    for name, value in others.items():
        with pytest.raises(ValueError, match=f"another training: {name} was {value}, is"):
            saved._refuse_other_training(tmp_path, {**own, name: value})
    with pytest.raises(ValueError, match="another training: seed was None"):
        saved._refuse_other_training(tmp_path, {})


def test_what_a_killed_save_left_does_no_harm(tmp_path):
    left = tmp_path / "kept" / "checkpoints" / ".step_00000002.partial"
    left.mkdir(parents=True)
    (left / "shard_00000_of_00001.safetensors").write_text("half")
    loop.train(learner_of(), Draws(), plan(), SavedTraining(tmp_path / "kept", {}))
    assert [path.name for path in left.parent.iterdir()] == ["step_00000006"]


def test_gradients_of_a_step_s_micro_batches_pass_between_the_ranks_once(monkeypatch):
    """All but the last stay where they are."""
    seen = []

    class Parallel(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.alone = model, False

        def forward(self, x):
            seen.append(self.alone)
            return self.model(x)

        @contextlib.contextmanager
        def no_sync(self):
            self.alone = True
            yield
            self.alone = False

    monkeypatch.setattr(loop, "DistributedDataParallel", Parallel)
    monkeypatch.setattr(loop, "_spread", Parallel)
    loop.train(learner_of(), Draws(), plan(steps=2, accumulation=3), SavedTraining(None, {}))
    assert seen == [True, True, False] * 2


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("case", "why"),
    [
        ("damaged_for_one", r"manifest\.json cannot be read"),
        ("not_shared", "must be in a folder that all ranks share"),
        ("bad_for_one", "the loss of epoch 3 of 3 is nan"),
    ],
)
def test_what_one_rank_finds_wrong_ends_all(tmp_path, case, why):
    done = tiny.run(Path(__file__).with_name("loop_worker.py"), case, tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert re.search(f"rank {rank}: .*{why}", done.stdout), done.stdout + done.stderr
