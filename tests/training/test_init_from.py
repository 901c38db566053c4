"""run.init_from: other ViTs and runs of ours as a start, at the sizes configured, or refused."""

import copy
import json

import pytest
import tiny
import torch

from cjepa_fast import config as configuration
from cjepa_fast import load_encoder
from cjepa_fast.checkpoint.encoders import save_encoder
from cjepa_fast.config import ConfigError
from cjepa_fast.interop import huggingface
from cjepa_fast.interop.resample import resample_patches, resample_positions
from cjepa_fast.model.vit import Encoder, sincos_positions
from cjepa_fast.training import build
from cjepa_fast.training.init_from import initialise


@pytest.fixture
def encoder(seed) -> Encoder:
    return tiny.uneven_encoder()


@pytest.fixture
def weights(encoder) -> dict[str, torch.Tensor]:
    """The encoder's, under timm's names, which are its own."""
    return {name: value.clone() for name, value in encoder.state_dict().items()}


def networks_of(path, data=None, **model):
    """JEPA and target of a tiny configuration, started from a file; what was said."""
    model = {**tiny.CONFIG["model"], "positions": "learned", **model}
    data = {**tiny.CONFIG["data"], **(data or {})}
    config = configuration.validate(
        {**tiny.CONFIG, "data": data, "model": model, "run": {"init_from": str(path)}}
    )
    networks = build.build_networks(config)
    target = copy.deepcopy(networks.encoder)
    fresh = copy.deepcopy(networks.predictor)
    told = initialise(networks, target, config)
    for name, value in fresh.state_dict().items():
        assert torch.equal(networks.predictor.state_dict()[name], value)
    assert told[-1].startswith("the predictor starts fresh")
    return networks.encoder, target, told


def test_both_encoders_start_from_the_file(tmp_path, encoder, weights):
    torch.save(weights, tmp_path / "x.pth")
    images = torch.randn(2, 3, 24, 24)
    *found, _ = networks_of(tmp_path / "x.pth")
    with torch.no_grad():
        for one in found:
            assert torch.equal(one(images), encoder(images))


def test_another_grid_and_other_patches_are_resampled_aloud(tmp_path, encoder, weights):
    torch.save(weights, tmp_path / "x.pth")
    context, _, told = networks_of(tmp_path / "x.pth", patch_size=6)
    table = resample_positions(encoder.pos_embed[0].data, (6, 6), (4, 4))
    assert torch.equal(context.pos_embed[0], table)
    kernel = encoder.patch_embed.proj.weight.data
    assert torch.equal(context.patch_embed.proj.weight, resample_patches(kernel, 6))
    assert torch.equal(context.blocks[1].mlp.fc2.weight, encoder.blocks[1].mlp.fc2.weight)
    assert "resampled: the patch embedding, from 4 to 6 pixels (FlexiViT's way)" in told
    assert "interpolated: positions, from 6 x 6 to 4 x 4 (bicubic, antialiased)" in told


def test_gray_and_oblong_images_start_from_three_channels_and_a_square(tmp_path, encoder, weights):
    torch.save(weights, tmp_path / "x.pth")
    gray = {"channels": 1, "mean": [0.5], "std": [0.5]}
    context, _, told = networks_of(tmp_path / "x.pth", gray)
    image = torch.randn(1, 1, 24, 24)
    with torch.no_grad():
        torch.testing.assert_close(context(image), encoder(image.expand(-1, 3, -1, -1)))
    assert "each of 1 channels has the sum of the filters of 3, over 1" in told
    oblong, _, told = networks_of(tmp_path / "x.pth", {"image_size": [16, 32]})
    wanted = resample_positions(encoder.pos_embed[0].data, (6, 6), (4, 8))
    assert torch.equal(oblong.pos_embed[0], wanted)
    assert "interpolated: positions, from 6 x 6 to 4 x 8 (bicubic, antialiased)" in told
    oblong.mean, oblong.std = (0.5,) * 3, (0.25,) * 3
    save_encoder(oblong, tmp_path / "encoder.safetensors")
    square, _, told = networks_of(tmp_path / "encoder.safetensors")
    assert torch.equal(square.pos_embed[0], resample_positions(wanted, (4, 8), (6, 6)))
    assert "interpolated: positions, from 4 x 8 to 6 x 6 (bicubic, antialiased)" in told


def test_learned_positions_do_not_become_sin_cos_in_silence(tmp_path, weights):
    torch.save(weights, tmp_path / "x.pth")
    with pytest.raises(ConfigError, match=r"features would change; set model\.positions=learned"):
        networks_of(tmp_path / "x.pth", positions="sincos")
    weights["pos_embed"] = sincos_positions(6, 6, 24)[None]
    torch.save(weights, tmp_path / "x.pth")
    context, _, _ = networks_of(tmp_path / "x.pth", positions="sincos")
    assert not context.pos_embed.requires_grad
    weights["pos_embed"] = sincos_positions(6, 6, 24)[None] + 5e-6  # of another precision
    torch.save(weights, tmp_path / "x.pth")
    for one in networks_of(tmp_path / "x.pth", positions="sincos")[:2]:  # as a resume builds them
        assert torch.equal(one.pos_embed, sincos_positions(6, 6, 24)[None])


def test_another_gelu_than_the_weights_were_trained_with_is_a_warning(tmp_path, encoder, weights):
    torch.save(weights, tmp_path / "x.pth")
    context, target, told = networks_of(tmp_path / "x.pth", gelu="tanh")
    (line,) = [line for line in told if "model.gelu" in line]
    assert line.startswith('WARNING: model.gelu = "tanh"') and 'with "exact"' in line
    assert context.gelu == target.gelu == "tanh"
    (tmp_path / "config.json").write_text(json.dumps({"hidden_act": "gelu_new"}))
    assert not any(
        "model.gelu" in line for line in networks_of(tmp_path / "x.pth", gelu="tanh")[-1]
    )
    line = next(line for line in networks_of(tmp_path / "x.pth")[-1] if "model.gelu" in line)
    assert "model.gelu=tanh leaves them as they were" in line
    run = tiny.write_run(tmp_path, tiny.with_gelu(encoder, "tanh"))
    assert any("model.gelu=tanh leaves" in line for line in networks_of(run)[-1])


HALF = {"mean": [0.5] * 3, "std": [0.25] * 3}


def told_of_mean(path, data=None) -> list[str]:
    return [line for line in networks_of(path, data)[-1] if "data.mean" in line]


def test_another_normalisation_than_the_weights_were_trained_with_is_a_warning(tmp_path, encoder):
    run = tiny.write_run(tmp_path, encoder)
    folder = tmp_path / "hf"
    folder.mkdir()
    huggingface.write_encoder(encoder, folder, crop=1.0)
    for start in (run, run / "encoder.safetensors", folder):
        assert told_of_mean(start) == []
        (line,) = told_of_mean(start, HALF)
        assert line == (
            "WARNING: data.mean = [0.5, 0.5, 0.5], data.std = [0.25, 0.25, 0.25]: run.init_from = "
            f"{start} was trained with [0.485, 0.456, 0.406] and [0.229, 0.224, 0.225]; set "
            "data.mean=[0.485,0.456,0.406] data.std=[0.229,0.224,0.225]"
        )
        assert told_of_mean(start, {"channels": 1, "mean": [0.5], "std": [0.5]}) == []
        ones = configuration.load("demo.json", line.split("; set ")[1].split()).data
        assert (ones.mean, ones.std) == (encoder.mean, encoder.std)
    (folder / huggingface.PROCESSOR).unlink()  # then nothing says what it was
    assert told_of_mean(folder, HALF) == []


@pytest.mark.parametrize(
    ("name", "described"),
    [
        ("config.json", {"pretrained_cfg": HALF}),
        ("preprocessor_config.json", {"image_mean": HALF["mean"], "image_std": HALF["std"]}),
    ],
    ids=["timm", "transformers"],
)
def test_the_normalisation_beside_another_vit_is_compared(tmp_path, weights, name, described):
    torch.save(weights, tmp_path / "x.pth")
    assert told_of_mean(tmp_path / "x.pth", HALF) == []
    (tmp_path / name).write_text(json.dumps(described))
    (line,) = told_of_mean(tmp_path / "x.pth")
    assert line.endswith("set data.mean=[0.5,0.5,0.5] data.std=[0.25,0.25,0.25]")
    assert told_of_mean(tmp_path / "x.pth", HALF) == []
    for odd in ("0.5", [0.5, None], {"mean": 0.5}):
        (tmp_path / name).write_text(json.dumps(dict.fromkeys(described, odd)))
        assert told_of_mean(tmp_path / "x.pth") == []


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"depth": 3}, "model.depth = 3: not as in .*; set model.depth=2"),
        ({"width": 48}, "model.width = 48: not as in .*; set model.width=24"),
        ({"mlp_ratio": 2}, "model.mlp_ratio = 2.0: not as in .*; set model.mlp_ratio=4.0"),
    ],
)
def test_other_sizes_than_the_file_s_are_named(tmp_path, weights, sizes, said):
    torch.save(weights, tmp_path / "x.pth")
    with pytest.raises(ConfigError, match=said):
        networks_of(tmp_path / "x.pth", **sizes)


def test_a_run_of_ours_is_a_start_too(tmp_path, encoder):
    run = tiny.write_run(tmp_path, encoder)
    other = tiny.uneven_encoder()
    other.mean, other.std = encoder.mean, encoder.std
    save_encoder(other, run / "context_encoder.safetensors")
    for path in (run, run / "encoder.safetensors"):
        # a run's checkpoint is newer than its final files: here it holds no weights
        (run / "checkpoints").rename(tmp_path / "aside") if path == run else None
        context, target, _ = networks_of(path)
        assert torch.equal(target.pos_embed, encoder.pos_embed)
        expected = other if path == run else encoder
        assert torch.equal(context.norm.bias, expected.norm.bias)


def test_what_is_no_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.pth is no file"):
        networks_of(tmp_path / "none.pth")


def test_a_training_from_there_resumes_with_its_positions(tmp_path, weights):
    """The trained positions are in checkpoints and exports as all other weights are."""
    torch.save(weights, tmp_path / "x.pth")
    config = tiny.write_config(tmp_path, run={"epochs": 1, "init_from": str(tmp_path / "x.pth")},
                               model={"positions": "learned"})  # fmt: skip
    done = tiny.train("--config", config)
    assert done.returncode == 0, done.stderr
    assert "weights of" in done.stdout and "positions of 6 x 6 patches" in done.stdout
    (tmp_path / "x.pth").unlink()  # a resume needs it no more
    again = tiny.train("--config", config, "--resume", "auto", "--set", "run.epochs=2",
                       "--accept-changes")  # fmt: skip
    assert again.returncode == 0, again.stderr
    trained = load_encoder(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "encoder.json").read_text())["learned_positions"]
    moved = (trained.pos_embed - weights["pos_embed"]).abs().max()
    assert 0 < moved < 0.1
    from_checkpoint = load_encoder(max((tmp_path / "run" / "checkpoints").glob("step_*")))
    assert torch.equal(from_checkpoint.pos_embed, trained.pos_embed)
    huggingface.write_encoder(trained, tmp_path, crop=1.0)
    assert load_encoder(tmp_path).architecture == trained.architecture
