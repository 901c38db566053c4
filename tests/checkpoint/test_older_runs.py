"""A run of an earlier version resumes: its keys, its defaults, its state are what they were.

runs_of_0629fb0.tar.gz: 20 images, and a run of 8 steps in bf16 and in fp32, stopped at the
checkpoint of step 4, with the log of all 8. Its config.json has every key there was.
"""

import json
import tarfile
from pathlib import Path

import pytest
import tiny
import torch

from cjepa_fast import checkpoint
from cjepa_fast import config as configuration
from cjepa_fast.checkpoint.format import owned_tensors
from cjepa_fast.config import Config, Section
from cjepa_fast.export.__main__ import export
from cjepa_fast.runtime import distributed
from cjepa_fast.training import build
from cjepa_fast.training.trainer import Trainer

PACKED = Path(__file__).with_name("runs_of_0629fb0.tar.gz")
STEP, STEP_FOLDER = 4, "step_00000004"
# What a step may be off where another processor sums in another order.
AGREE = {"fp32": 2e-5, "bf16": 4e-3}


# What its user had written, but for the paths and the precision.
GIVEN = {
    "run": {"epochs": 4},
    "data": {"image_size": 24, "batch_size": 8, "micro_batch_size": 4, "threads": 1},
    "mask": {"min_keep": 4},
    "model": {"name": "vit_tiny", "patch_size": 4, "width": 8, "depth": 1, "heads": 1},
    "predictor": {"width": 8, "depth": 1},
    "optim": {"warmup_epochs": 0.5},
    "checkpoint": {"every_steps": 2, "keep": 9},
    "telemetry": {"every_steps": 1, "tensorboard": False},
}


@pytest.fixture
def unpacked(tmp_path) -> Path:
    with tarfile.open(PACKED) as file:
        file.extractall(tmp_path, filter="data")
    return tmp_path


def saved_config(folder: Path, precision: str) -> dict:
    return checkpoint.state_of(folder / precision / "checkpoints" / STEP_FOLDER)["config"]


def user_config(folder: Path, which: str, **run) -> Path:
    values = json.loads(json.dumps(GIVEN))
    values["data"]["path"] = str(folder / "images")
    values["run"] |= {"dir": str(folder / which), **run}
    path = folder / f"{which}.json"
    path.write_text(json.dumps(values))
    return path


def leaves(section: type[Section], prefix: str = ""):
    for key, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from leaves(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", field


def at(values: dict, key: str):
    """The value at a dotted path, None where there is none."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def test_each_key_says_what_the_code_did_before_it_and_before_its_default(unpacked):
    saved, now = saved_config(unpacked, "bf16"), Config().model_dump(mode="json")
    own = {"run.dir", "data.path"}  # given, but not in GIVEN
    changed = [
        (key, field)
        for key, field in leaves(Config)
        if at(GIVEN, key) is None and key not in own and at(saved, key) != at(now, key)
    ]
    assert "run.precision" in dict(changed)
    for key, field in changed:
        assert "was" in (field.json_schema_extra or {}), f"{key}: new, or of another default"
        assert at(saved, key) in (None, field.json_schema_extra["was"]), key


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_restored_state_is_bit_for_bit_the_saved_one(unpacked, precision):
    path = unpacked / precision / "checkpoints" / STEP_FOLDER
    saved = configuration.with_saved_defaults(saved_config(unpacked, precision))
    config = configuration.keep_saved_values(
        configuration.load(str(user_config(unpacked, precision))), saved
    )
    assert config.run.precision == precision
    trainer = Trainer(config, distributed.start(0), 2, restoring=True, linear={})
    checkpoint.restore(path, trainer.engine)
    stored = checkpoint.StoredCheckpoint(path)
    owned = owned_tensors(trainer.engine)
    kinds = {key.partition("/")[0] for key in owned}
    assert kinds == {"master", "exp_avg", "exp_avg_sq", "ema"}
    for key, values in owned.items():
        kind, _, rest = key.partition("/")
        assert torch.equal(values, stored.whole(kind, rest.partition("@")[0])), key
    dtype = build.compute_dtype(config)
    for name, p in trainer.engine.module.named_parameters():
        if p.requires_grad:
            assert torch.equal(p.flatten(), stored.whole("master", name).to(dtype)), name


@pytest.mark.slow
@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=pytest.mark.long), "fp32"])
def test_it_resumes_to_the_steps_of_then(unpacked, precision):
    """By a configuration without run.precision: the run keeps its own."""
    expected = tiny.losses(unpacked / precision)
    done = tiny.train("--config", user_config(unpacked, precision), "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert f"precision: {precision}" in done.stdout
    found = tiny.losses(unpacked / precision)
    assert found.keys() == expected.keys() == set(range(1, 9))
    for step in range(STEP + 1, 9):
        assert found[step] == pytest.approx(expected[step], rel=AGREE[precision], abs=1e-6)
    assert configuration.load_run(unpacked / precision).run.precision == precision
    another = [line for line in done.stdout.splitlines() if "resumed with another" in line]
    assert all("dir" in line or "path" in line for line in another), another


def test_its_encoder_is_exported_with_all_that_is_known(unpacked):
    """The card tells of keys that the run's configuration has not."""
    made = unpacked / "made"
    export(unpacked / "fp32", "safetensors", made)
    text = (made / "model_card.md").read_text()
    assert "by C-JEPA (I-JEPA with VICReg's regularisation" in text and "Unknown" not in text


def test_what_the_user_sets_otherwise_is_still_another_training(unpacked):
    changed = user_config(unpacked, "bf16", precision="fp32")
    done = tiny.train("--config", changed, "--resume", "auto")
    assert done.returncode == 2
    assert "run.precision: fp32, saved with bf16" in done.stderr
    assert "--accept-changes" in done.stderr
