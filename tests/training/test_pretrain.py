"""`cjepa_fast.pretrain`: the command's training, called from Python."""

import contextlib
import signal

import matplotlib.pyplot as plt
import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from PIL import Image

import cjepa_fast
from cjepa_fast import config as configuration
from cjepa_fast.checkpoint.encoders import FINAL
from cjepa_fast.config import ConfigError
from cjepa_fast.runtime import distributed


@pytest.mark.slow
def test_it_trains_as_the_command_does_and_resumes(tmp_path, one_thread):  # sums are rounded alike
    config = tiny.write_config(tmp_path / "a", run={"epochs": 2})
    images = tmp_path / "a" / "images"
    online = {"online": {"data": str(images), "every_epochs": 1, "share": 1.0}}
    by_command = tiny.train("--config", config)
    assert by_command.returncode == 0, by_command.stderr
    config, seen = tiny.write_config(tmp_path / "b", eval=online), Noting()
    run = cjepa_fast.pretrain(config, images, 2, callbacks=[seen])
    assert seen.steps == [1, 2, 3, 4] and {"loss", "jepa"} <= seen.terms.keys()
    assert [step for step, _ in seen.scores] == [0, 2, 4] and seen.scores[0][1].keys() >= {"knn"}
    assert seen.saved[-1] == (4, run.folder / "checkpoints" / "step_00000004")
    assert run.status == 0 and run.folder == tmp_path / "b" / "run"
    name = "encoder.safetensors"
    assert (run.folder / name).read_bytes() == (tmp_path / "a" / "run" / name).read_bytes()
    assert [row["step"] for row in run.log()] == sorted({row["step"] for row in run.log()})
    assert run.encoder().width == run.encoder("context").width
    again = cjepa_fast.pretrain(config, epochs=2, resume="auto")
    assert again == run


@pytest.mark.slow
def test_a_finished_run_that_is_called_again_keeps_its_encoders(tmp_path):
    """Under their names, and no second time; those of another end go to previous_*."""
    config = tiny.write_config(tmp_path, run={"epochs": 1})
    run = cjepa_fast.pretrain(config).folder
    names = [f"{name}{s}" for name in FINAL.values() for s in (".safetensors", ".json")]
    written = {name: (run / name).read_bytes() for name in names}
    for _ in range(2):
        assert cjepa_fast.pretrain(config, resume="auto").status == 0
        assert {name: (run / name).read_bytes() for name in names} == written
        assert list(run.glob("previous_*")) == []
    (run / "encoder.safetensors").write_bytes(written["context_encoder.safetensors"])
    assert cjepa_fast.pretrain(config, resume="auto").status == 0
    assert {name: (run / name).read_bytes() for name in names} == written
    assert {path.name for path in run.glob("previous_*")} == {f"previous_{n}" for n in names}


class Noting(cjepa_fast.Callback):
    """All that it is called with."""

    def __init__(self):
        self.steps, self.terms, self.scores, self.saved = [], {}, [], []

    def on_step(self, step, terms):
        self.steps.append(step)
        self.terms = terms

    def on_evaluate(self, step, scores):
        self.scores.append((step, scores))

    def on_save(self, step, checkpoint):
        assert (checkpoint / "manifest.json").is_file()
        self.saved.append((step, checkpoint))


class Enough(cjepa_fast.Callback):
    def on_step(self, step, terms):
        return step == 2


def test_a_callback_may_ask_to_stop(tmp_path, capsys):
    config = tiny.write_config(tmp_path)
    signals = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
    taken = [signal.getsignal(number) for number in signals]
    stopped = cjepa_fast.pretrain(config, callbacks=[Enough(), cjepa_fast.Callback()])
    assert taken == [signal.getsignal(number) for number in signals]
    assert stopped.status == 0 and not (stopped.folder / "encoder.safetensors").exists()
    assert "stopped after step 2; resume with" in capsys.readouterr().out
    assert (stopped.folder / "checkpoints" / "step_00000002").is_dir()


@pytest.fixture
def group():
    """The program's own, of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("error", [None, ConfigError, RuntimeError])
def test_the_program_keeps_its_process_group_and_its_random_numbers(tmp_path, group, error):
    config = tiny.write_config(tmp_path)
    over = {"run.dir": "$NOT_SET_VAR/x"} if error is ConfigError else {}
    callback = Wrong() if error is RuntimeError else Enough()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with contextlib.nullcontext() if error is None else pytest.raises(error):
        cjepa_fast.pretrain(config, overrides=over, callbacks=[callback])
    assert dist.is_initialized()
    assert torch.equal(torch.rand(4), expected)


def test_a_group_that_the_training_made_is_left():
    with torch.random.fork_rng():
        distributed.start(0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    distributed.leave_group()
    assert not dist.is_initialized()


class Wrong(cjepa_fast.Callback):
    def on_step(self, step, terms):
        raise RuntimeError("of mine")


def test_an_error_of_a_callback_ends_the_training(tmp_path):
    with pytest.raises(RuntimeError, match="of mine"):
        cjepa_fast.pretrain(tiny.write_config(tmp_path), callbacks=[Wrong()])


def test_overrides_are_keys_or_sections():
    over = {"optim.lr": 3e-4, "loss": {"vicreg.beta": 1}}
    with pytest.raises(ConfigError, match=r"loss.vicreg.beta.*no such key"):
        cjepa_fast.pretrain("demo", overrides=over)
    over["loss"] = {"vicreg": {"beta": 0.5}}
    config = configuration.from_values("demo", over)
    assert (config.optim.lr, config.loss.vicreg.beta) == (3e-4, 0.5)
    assert config.loss.vicreg.std == configuration.load("demo").loss.vicreg.std


def test_masks_can_be_looked_at():
    over = {"mask.targets": 3, "mask": {"min_keep": 4}, "data.image_size": 64}
    figure = cjepa_fast.masks("demo", count=2, overrides=over)
    axes = [a for a in figure.axes if a.images]
    assert len(axes) == 2 * (3 + 3)  # image, context, both, and each target
    image = torch.rand(3, 80, 90)
    shown = cjepa_fast.masks("demo", [image], overrides=over)
    assert len([a for a in shown.axes if a.images]) == 6
    plt.close("all")


@pytest.mark.parametrize("kind", ["path", "Path", "PIL image", "array", "arrays", "tensor", "list"])
def test_masks_take_images_as_embed_does(tmp_path, kind):
    path = tmp_path / "a.png"
    pixels_HW3 = np.random.default_rng(0).integers(0, 255, (80, 90, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels_HW3)
    picture.save(path)
    images = {
        "path": str(path), "Path": path, "PIL image": picture, "array": pixels_HW3,
        "arrays": pixels_HW3[None], "tensor": torch.from_numpy(pixels_HW3).permute(2, 0, 1),
        "list": [path],
    }  # fmt: skip
    figures = [cjepa_fast.masks("demo", given) for given in (images[kind], [picture])]
    shown, expected = ([a.images[0].get_array() for a in f.axes if a.images] for f in figures)
    assert len(shown) == len(expected) and np.array_equal(shown[0], expected[0])
    plt.close("all")


def test_a_refusal_names_what_python_takes(tmp_path):
    config = tiny.write_config(tmp_path)
    cjepa_fast.pretrain(config, callbacks=[Enough()])
    with pytest.raises(ConfigError, match=r'resume="auto", overrides=\{"run\.dir": FOLDER\}'):
        cjepa_fast.pretrain(config)
    with pytest.raises(ConfigError, match="accept_changes=True"):
        cjepa_fast.pretrain(config, overrides={"optim.lr": 1e-5}, resume="auto")


def test_what_is_wrong_is_a_ConfigError(tmp_path):
    with pytest.raises(ConfigError, match=r"optim.learning_rate = 1: no such key; nearest is"):
        cjepa_fast.pretrain("vit_s", overrides={"optim.learning_rate": 1})
    with pytest.raises(ConfigError, match="no such file"):
        cjepa_fast.pretrain("vit_z")
    with pytest.raises(ConfigError, match="nowhere"):
        over = {"run.dir": str(tmp_path / "run")}
        cjepa_fast.pretrain("demo", data=tmp_path / "nowhere", overrides=over)
