"""`cjepa_fast.pretrain`: the command's training, called from Python."""

import pytest
import tiny

import cjepa_fast
from cjepa_fast.config import ConfigError


@pytest.mark.slow
def test_it_trains_as_the_command_does_and_resumes(tmp_path, one_thread):  # sums are rounded alike
    by_command = tiny.train("--config", tiny.write_config(tmp_path / "a", run={"epochs": 2}))
    assert by_command.returncode == 0, by_command.stderr
    config = tiny.write_config(tmp_path / "b")
    run = cjepa_fast.pretrain(config, run={"epochs": 2})
    assert run.status == 0 and run.folder == tmp_path / "b" / "run"
    name = "encoder.safetensors"
    assert (run.folder / name).read_bytes() == (tmp_path / "a" / "run" / name).read_bytes()
    assert [row["step"] for row in run.log()] == sorted({row["step"] for row in run.log()})
    assert run.encoder().width == run.encoder("context").width
    again = cjepa_fast.pretrain(config, run={"epochs": 2}, resume="auto")
    assert again == run


def test_what_is_wrong_is_a_ConfigError(tmp_path):
    with pytest.raises(ConfigError, match=r"optim.learning_rate = 1: no such key; nearest is"):
        cjepa_fast.pretrain("vit_s", optim={"learning_rate": 1})
    with pytest.raises(ConfigError, match="no such file"):
        cjepa_fast.pretrain("vit_z")
    with pytest.raises(ConfigError, match="nowhere"):
        cjepa_fast.pretrain("demo", data=tmp_path / "nowhere", run={"dir": str(tmp_path / "run")})
