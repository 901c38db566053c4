"""Trainings with SIGReg: its directions, a resume bit for bit, and two ranks that train as one."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from test_train import same_weights

from cjepa_fast.config import validate
from cjepa_fast.data.loader import Batch
from cjepa_fast.runtime import distributed
from cjepa_fast.training import build
from cjepa_fast.training.trainer import Trainer

SIGREG = {"regulariser": "sigreg", "sigreg": {"views": "positions", "directions": 24, "beta": 0.2}}


def logged(run: Path) -> dict[int, dict]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    names = ("loss", "jepa", "sigreg", "grad_norm")
    return {row["step"]: {name: row[name] for name in names} for row in rows}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> tuple[Path, Path]:
    """4 steps of 2 micro-batches of 8: the configuration's file and the run's folder."""
    folder = tmp_path_factory.mktemp("one")
    config = tiny.write_config(
        folder,
        run={"precision": "fp32", "epochs": 2},
        mask={"min_keep": 4, "context": "packed"},
        checkpoint={"every_steps": 1, "keep": 9},
        loss=SIGREG,
    )
    result = tiny.train("--config", config)
    assert result.returncode == 0, result.stderr
    return config, folder / "run"


def test_the_log_has_sigreg_in_the_place_of_vicregs_terms(one_rank):
    rows = logged(one_rank[1])
    assert list(rows) == [1, 2, 3, 4]
    for row in rows.values():
        assert row["sigreg"] > 0
        assert row["loss"] == pytest.approx(row["jepa"] + 0.2 * row["sigreg"], rel=1e-5)
    row = json.loads((one_rank[1] / "log.jsonl").read_text().splitlines()[0])
    assert not {"sim", "std", "cov"} & row.keys()


@pytest.mark.parametrize("at", [1, 2])
def test_a_resume_is_exact(one_rank, tmp_path, at):
    """The directions follow from the step, so the same are drawn again."""
    config, run = one_rank
    held = run / "checkpoints" / f"step_{at:08d}"
    result = tiny.train("--config", config, "--resume", held, "--set", f"run.dir={tmp_path}")
    assert result.returncode == 0, result.stderr
    whole, resumed = logged(run), logged(tmp_path)
    assert len(resumed) == 4 - at and all(resumed[step] == whole[step] for step in resumed)
    last = "checkpoints/step_00000004"
    assert same_weights(run / last, tmp_path / last)


@pytest.mark.multiprocess
def test_two_ranks_train_as_one(one_rank, tmp_path):
    """The same images share a statistic: micro-batches of 4 on two ranks for 8 on one."""
    config, run = one_rank
    changes = [f"run.dir={tmp_path}", "data.micro_batch_size=4"]
    sets = [part for change in changes for part in ("--set", change)]
    result = tiny.train("--config", config, *sets, ranks=2)
    assert result.returncode == 0, result.stderr
    one, two = logged(run), logged(tmp_path)
    assert list(two) == [1, 2, 3, 4]
    for step, row in two.items():
        assert row == pytest.approx(one[step], rel=2e-4), step
    held, other = run / "checkpoints" / "step_00000001", f"run.dir={tmp_path / 'other'}"
    refused = tiny.train("--config", config, "--resume", held, "--set", other, ranks=2)
    assert "images a SIGReg statistic: 16, saved with 8" in refused.stderr


def test_each_step_draws_its_own_directions_for_all_its_micro_batches(monkeypatch):
    loss = {**SIGREG, "sigreg": {**SIGREG["sigreg"], "projector": [10, 6]}}
    sections = {"run": {"precision": "fp32", "seed": 5}, "loss": loss}
    config = validate(tiny.CONFIG | sections)
    trainer = Trainer(config, distributed.start(0), steps_per_epoch=4)
    masks, seen = build.build_masks(config), []
    engine = trainer.engine.module.forward

    def forward(*inputs):
        seen.append(inputs[-1])
        return engine(*inputs)

    monkeypatch.setattr(trainer.engine.module, "forward", forward)
    for index in range(2):
        batches = [
            Batch(torch.randn(8, 3, 24, 24), masks(0, index, torch.arange(8) + 8 * m),
                  torch.arange(8), 0, index, m)
            for m in range(2)
        ]  # fmt: skip
        terms, applied = trainer.step(batches, index)
        assert terms["sigreg"].isfinite() and applied
    assert [tuple(d.shape) for d in seen] == [(6, 24)] * 4  # of the projector's width
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[0], seen[2])
    assert torch.equal(seen[2], trainer.drawn(1)[0])
