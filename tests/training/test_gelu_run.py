"""model.gelu: a training by tanh's GELU, its resume, its encoder, and what continues from that."""

import argparse
import json
import shutil

import pytest
import test_run
import tiny
import torch

from cjepa_fast import load_encoder, train
from cjepa_fast.config import ConfigError
from cjepa_fast.eval.__main__ import main as evaluate
from cjepa_fast.eval.options import encoders_of
from cjepa_fast.export.__main__ import export
from cjepa_fast.model import fused_mlp
from cjepa_fast.training import start

handlers = test_run.handlers


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tanh")
    config = tiny.write_config(
        folder, run={"precision": "fp32"}, model={"gelu": "tanh"}, checkpoint={"keep": 9}
    )
    assert train.main(["--config", str(config)]) == 0
    return config, folder / "run"


def test_its_encoder_says_so_and_it_resumes_to_the_same_bits(trained, tmp_path, capsys):
    config, run = trained
    assert json.loads((run / "encoder.json").read_text())["gelu"] == "tanh"
    encoder = load_encoder(run)
    assert encoder.gelu == "tanh" == encoder.blocks[1].mlp.gelu
    checkpointed = load_encoder(max((run / "checkpoints").glob("step_*")))
    images = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        assert torch.equal(checkpointed(images), encoder(images))
        assert not torch.equal(tiny.with_gelu(encoder, "exact")(images), encoder(images))
    halted = shutil.copytree(run, tmp_path / "run", symlinks=True)
    shutil.rmtree(halted / "checkpoints" / "step_00000004")
    again = ["--config", str(config), "--set", f"run.dir={halted}", "--resume", "auto"]
    assert train.main([*again, "--set", "model.gelu=exact"]) != 0
    assert "model.gelu" in capsys.readouterr().err  # another training
    assert train.main(again) == 0
    name = "encoder.safetensors"
    assert (halted / name).read_bytes() == (run / name).read_bytes()
    assert "GELU:" not in capsys.readouterr().out  # of fused blocks, on a GPU


@pytest.mark.long
def test_what_continues_from_it_keeps_it(trained, tmp_path):
    config, run = trained
    asked = argparse.Namespace(checkpoint=str(run), which="target", untrained=True, seed=0)
    assert {one.gelu for one in encoders_of(asked).values()} == {"tanh"}
    images = str(config.parent / "images")
    out = tmp_path / "finetuned"
    command = ["finetune", str(run), "--data", images, "--out", str(out)]
    assert evaluate([*command, "--set", "epochs=1", "warmup_epochs=0"]) == 0
    described = [json.loads(path.read_text()) for path in out.rglob("encoder.json")]
    assert described and all(one["gelu"] == "tanh" for one in described)
    assert export(run, "hf", tmp_path / "hf") < 1e-5
    assert load_encoder(tmp_path / "hf").gelu == "tanh"


def test_where_it_is_computed_is_told_only_of_fused_blocks_on_a_gpu(trained, monkeypatch):
    config = start.configuration.load(str(trained[0]))
    monkeypatch.setattr(start, "machine", lambda device: "a GPU")
    monkeypatch.setattr(start.hardware, "precision_message", lambda *_: "precision")
    monkeypatch.setattr(fused_mlp, "describe_gelu", lambda device, dtype: f"GELU in {dtype}")

    def told(precision="bf16", fused=True, device="cuda", gelu="tanh", width=32) -> list[str]:
        changes = {
            "run": config.run.model_copy(update={"precision": precision}),
            "model": config.model.model_copy(update={"gelu": gelu}),
        }
        trainer = argparse.Namespace(
            config=config.model_copy(update=changes), device=torch.device(device), restoring=False,
            attention={}, linear={}, context_encoder=argparse.Namespace(fused=fused, width=width),
        )  # fmt: skip
        return list(start._choices(trainer))[2:]

    assert told() == ["GELU in torch.bfloat16"]
    wide = ["the encoder's blocks are not fused: 2304 is wider than 2048"]
    assert told(fused=False, width=2304) == wide and told(width=2304, device="cpu") == []
    for other in ({"precision": "fp32"}, {"fused": False}, {"device": "cpu"}, {"gelu": "exact"}):
        assert told(**other) == [], other


def test_another_word_is_refused(trained):
    with pytest.raises(ConfigError, match=r"model\.gelu"):
        start.configuration.load(str(trained[0]), ["model.gelu=erf"])
