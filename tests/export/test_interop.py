"""I-JEPA's files and Hugging Face's folders: what fits loads exactly, what does not is named."""

import copy
import json
import subprocess

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from cjepa_fast import load_encoder
from cjepa_fast.checkpoint.encoders import run_of, save_encoder
from cjepa_fast.interop import huggingface, load_ijepa
from cjepa_fast.model.predictor import Predictor
from cjepa_fast.model.vit import MODELS, Encoder

SIZES = {"model": "vit_tiny", "patch_size": 16, "image_size": 64}
PREDICTOR = {"predictor_depth": 2, "predictor_width": 96}


@pytest.fixture(scope="module")
def modules() -> dict[str, torch.nn.Module]:
    """Untrained networks of one small size; no two parts, and no bias or norm, are alike."""
    torch.manual_seed(0)
    made = {
        "encoder": Encoder(64, 16, **MODELS["vit_tiny"]),
        "predictor": Predictor(192, (4, 4), 96, 2, 3),
        "target_encoder": Encoder(64, 16, **MODELS["vit_tiny"]),
    }
    with torch.no_grad():
        for module in made.values():
            for parameter in module.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape))
    return made


@pytest.fixture
def layout(modules) -> dict:
    """The dict that I-JEPA's train.py saves, with what lies beside the weights."""
    weights = {
        part: {f"module.{name}": value.clone() for name, value in module.state_dict().items()}
        for part, module in modules.items()
    }
    optimiser = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3}]}
    counters = {"epoch": 3, "loss": 0.1, "batch_size": 8, "world_size": 1, "lr": 1e-3}
    return {**weights, "opt": optimiser, "scaler": None, **counters}


def load(source, **changes):
    return load_ijepa(source, **(SIZES | PREDICTOR | changes))


def refusal(source, **changes) -> str:
    with pytest.raises(ValueError) as refused:
        load(source, **changes)
    return str(refused.value)


@pytest.mark.parametrize("kind", ["zip file", "old file", "dict", "unwrapped"])
def test_what_was_saved_comes_back_exactly(tmp_path, layout, modules, kind):
    source = tmp_path / "jepa-ep3.pth.tar"
    if kind == "dict":
        source = layout
    else:
        if kind == "unwrapped":
            for part in modules:
                layout[part] = {k.removeprefix("module."): v for k, v in layout[part].items()}
        torch.save(layout, source, _use_new_zipfile_serialization=kind != "old file")
    loaded = dict(zip(modules, load(source), strict=True))
    for part, module in modules.items():
        ours = loaded[part].state_dict()
        assert ours.keys() == module.state_dict().keys()
        for name, value in module.state_dict().items():
            assert ours[name].dtype == torch.float32 and ours[name].device.type == "cpu"
            assert torch.equal(ours[name], value), f"{part} {name}"


def test_loaded_networks_compute_the_same_features(tmp_path, layout, modules):
    torch.save(layout, tmp_path / "x.pth.tar")
    encoder, predictor, target = load(str(tmp_path / "x.pth.tar"))
    images = torch.randn(2, 3, 64, 64)
    context, targets = torch.tensor([[0, 1, 5, 9]] * 2), torch.tensor([[[2, 3], [6, 7]]] * 2)
    with torch.no_grad():
        tokens = modules["encoder"](images, context)
        assert torch.equal(encoder(images, context), tokens)
        assert torch.equal(target(images), modules["target_encoder"](images))
        assert not torch.equal(target(images), encoder(images))
        predicted = modules["predictor"](tokens, context, targets)
        assert torch.equal(predictor(tokens, context, targets), predicted)


def test_loaded_networks_are_ready_to_use_and_to_train(tmp_path, layout):
    torch.save(layout, tmp_path / "x.pth.tar")
    before = (tmp_path / "x.pth.tar").read_bytes()
    encoder, predictor, target = load(tmp_path / "x.pth.tar")
    assert not any(module.training for module in (encoder, predictor, target))
    assert not any(p.requires_grad for p in target.parameters())
    frozen = {
        n for m in (encoder, predictor) for n, p in m.named_parameters() if not p.requires_grad
    }
    assert frozen == {"pos_embed", "predictor_pos_embed"}
    encoder(torch.randn(1, 3, 64, 64)).sum().backward()
    with torch.no_grad():
        encoder.norm.weight.add_(1.0)
    assert (tmp_path / "x.pth.tar").read_bytes() == before
    assert copy.deepcopy(encoder).architecture == encoder.architecture


def test_a_dict_is_copied_not_shared(layout):
    encoder, _, _ = load(layout)
    with torch.no_grad():
        encoder.norm.weight.zero_()
    assert layout["encoder"]["module.norm.weight"].abs().sum() > 0


def test_half_precision_weights_become_fp32(layout):
    layout["encoder"] = {name: value.bfloat16() for name, value in layout["encoder"].items()}
    encoder, _, _ = load(layout)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}


def test_an_unknown_model_lists_the_known_ones(layout):
    message = refusal(layout, model="vit_hug")
    assert "'vit_hug'" in message and all(name in message for name in MODELS)


def test_missing_unexpected_and_misshapen_parameters_are_named(layout):
    del layout["encoder"]["module.blocks.3.attn.qkv.weight"]
    layout["encoder"]["module.cls_token"] = torch.zeros(1)
    layout["predictor"]["module.mask_token"] = torch.zeros(1, 1, 95)
    message = refusal(layout)
    assert "encoder, missing: blocks.3.attn.qkv.weight" in message
    assert "encoder, unexpected: cls_token" in message
    assert "predictor, of another shape: mask_token (1, 1, 95) where (1, 1, 96)" in message
    assert "target_encoder" not in message
    assert "vit_tiny with patch_size 16, image_size 64" in message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"image_size": 128}, "pos_embed (1, 16, 192) where (1, 64, 192)"),
        ({"patch_size": 32}, "patch_embed.proj.weight (192, 3, 16, 16) where (192, 3, 32, 32)"),
        ({"predictor_depth": 3}, "missing: predictor_blocks.2.norm1.weight"),
        ({"predictor_depth": 1}, "unexpected: predictor_blocks.1.norm1.weight"),
        ({"model": "vit_small"}, "pos_embed (1, 16, 192) where (1, 16, 384)"),
    ],
)
def test_other_sizes_than_the_files_are_named(layout, changes, named):
    assert named in refusal(layout, **changes)


@pytest.mark.parametrize("channels", [1, 4])
def test_filters_of_three_channels_are_shared_by_any_number(layout, modules, channels):
    """An image that is the same in all its channels gives the tokens that it gave as RGB."""
    encoder, _, target = load(layout, channels=channels)
    gray = torch.randn(2, 1, 64, 64)
    for ours, theirs in ((encoder, "encoder"), (target, "target_encoder")):
        assert ours.channels == ours.patch_embed.proj.weight.shape[1] == channels
        with torch.no_grad():
            wanted = modules[theirs](gray.expand(-1, 3, -1, -1))
            got = ours(gray.expand(-1, channels, -1, -1))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    named = refusal(layout, channels=channels, patch_size=32)
    assert f"(192, {channels}, 16, 16) where (192, {channels}, 32, 32)" in named


def test_an_oblong_is_refused(layout):
    assert "image_size [32, 128]: I-JEPA's checkpoints" in refusal(layout, image_size=(32, 128))


def test_a_long_list_is_cut_short(layout):
    for name in list(layout["encoder"])[:30]:
        del layout["encoder"][name]
    message = refusal(layout)
    assert "and 20 more" in message and message.count("blocks.") <= 10


def test_a_missing_part_is_named_with_what_is_there(layout):
    del layout["target_encoder"]
    message = refusal(layout)
    assert "no 'target_encoder'" in message and "encoder, epoch" in message
    layout["target_encoder"] = 3
    assert "'target_encoder' of the checkpoint is a int" in refusal(layout)


def test_files_that_are_no_checkpoint_are_refused(tmp_path, layout):
    assert "is no file" in refusal(tmp_path / "none.pth.tar")
    assert "is no file" in refusal(tmp_path)
    (tmp_path / "text.pth.tar").write_text("hello")
    (tmp_path / "empty.pth.tar").write_bytes(b"")
    torch.save(layout, tmp_path / "whole.pth.tar")
    whole = (tmp_path / "whole.pth.tar").read_bytes()
    (tmp_path / "torn.pth.tar").write_bytes(whole[: len(whole) // 2])
    for name in ("text", "empty", "torn"):
        message = refusal(tmp_path / f"{name}.pth.tar")
        assert f"{name}.pth.tar cannot be read as a checkpoint" in message
    torch.save([1, 2], tmp_path / "list.pth.tar")
    assert "holds a list" in refusal(tmp_path / "list.pth.tar")


class RunsCode:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return subprocess.call, (["touch", self.target],)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_file_that_carries_code_is_refused_and_not_run(tmp_path, layout, new_format):
    layout["loss"] = RunsCode(tmp_path / "ran")
    torch.save(layout, tmp_path / "x.pth.tar", _use_new_zipfile_serialization=new_format)
    assert "weights_only=True" in refusal(tmp_path / "x.pth.tar")
    assert not (tmp_path / "ran").exists()


# --------------------------------------------------------------- load_encoder of I-JEPA's files


def same(one: Encoder, other: Encoder) -> bool:
    theirs = other.state_dict()
    return one.architecture == other.architecture and all(
        torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items()
    )


def test_load_encoder_reads_the_sizes_off_i_jepa_s_files(tmp_path, layout, modules):
    path = tmp_path / "jepa-latest.pth.tar"
    torch.save(layout, path)
    target = load_encoder(path)
    assert same(target, modules["target_encoder"]) and not target.training
    assert (target.image_size, target.heads) == (64, 3)
    assert (target.mean, target.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert same(load_encoder(str(path), "context"), modules["encoder"])


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("pos_embed", torch.zeros(1, 15, 192), "15 positions, which are no square grid"),
        ("patch_embed.proj.weight", torch.zeros(190, 3, 8, 8), "width 190 and depth 12"),
        ("patch_embed.proj.weight", torch.zeros(3), "no encoder of I-JEPA's"),
        ("pos_embed", None, "no encoder of I-JEPA's"),
        ("norm.bias", None, "missing: norm.bias"),
        ("blocks.12.norm1.bias", torch.zeros(192), "width 192 and depth 13"),
        ("cls_token", torch.zeros(1), "unexpected: cls_token"),
    ],
)
def test_foreign_encoders_in_i_jepa_s_files_are_refused(tmp_path, layout, name, tensor, said):
    state = layout["target_encoder"] | {f"module.{name}": tensor}
    layout["target_encoder"] = {key: value for key, value in state.items() if value is not None}
    path = tmp_path / "other.pth.tar"
    torch.save({"target_encoder": layout["target_encoder"]}, path)
    with pytest.raises(ValueError, match=said) as refused:
        load_encoder(path)
    assert str(path) in str(refused.value)


def test_a_file_that_is_no_checkpoint_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"notes\.txt cannot be read as a checkpoint"):
        load_encoder(tmp_path / "notes.txt")


# ------------------------------------------------------------------------ Hugging Face's folders


@pytest.fixture
def encoder(seed) -> Encoder:
    made = tiny.uneven_encoder(width=44, heads=4, mlp_ratio=48 / 11)
    made.mean, made.std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    return made


@pytest.fixture
def folder(tmp_path, encoder):
    path = tmp_path / "hf"
    path.mkdir()
    huggingface.write_encoder(encoder, path, crop=0.875)
    return path


def change(path, **values) -> None:
    """Keys of a JSON file; None takes one out."""
    both = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in both.items() if value is not None}))


def shard(folder) -> None:
    """Cut model.safetensors in two, with an index, as large models come."""
    weights = load_file(folder / "model.safetensors")
    names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    for file in set(names.values()):
        save_file({n: t for n, t in weights.items() if names[n] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def test_a_hugging_face_folder_comes_back_whole_or_in_shards(folder, encoder):
    for cut in (lambda _: None, shard):
        cut(folder)
        loaded = load_encoder(folder)
        assert same(loaded, encoder) and not loaded.training
        assert (loaded.mean, loaded.std) == (encoder.mean, encoder.std)
    assert json.loads((folder / "preprocessor_config.json").read_text())["size"] == {
        "shortest_edge": 27  # 24 / 0.875
    }
    (folder / "preprocessor_config.json").unlink()
    assert load_encoder(folder).mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "vit"}, "describes a model 'vit', not an 'ijepa'"),
        ({"layer_norm_eps": 1e-12}, "layer_norm_eps is 1e-12; only 1e-06 can be loaded"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"num_attention_heads": None}, "does not describe an encoder: KeyError"),
        ({"image_size": [24, 32]}, "position_embeddings (1, 36, 44) where (1, 48, 44) belongs"),
        ({"patch_size": [4, 8]}, "a patch of 4 x 8 is no square"),
        ({"image_size": [24, 24, 24]}, "must be a square's side, or [height, width]"),
        ({"image_size": 26}, "not a multiple of patch_size"),
        ({"hidden_size": "44"}, "does not describe an encoder"),
        ({"image_size": 32}, "position_embeddings (1, 36, 44) where (1, 64, 44) belongs"),
        ({"num_hidden_layers": 1}, "unexpected: encoder.layer.1."),
    ],
)
def test_another_model_s_folder_is_refused(folder, changes, said):
    change(folder / "config.json", **changes)
    with pytest.raises(ValueError) as refused:
        load_encoder(folder)
    assert said in str(refused.value) and str(folder) in str(refused.value)


def test_damaged_folders_name_the_file(folder, encoder):
    shard(folder)
    second = folder / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    for damage, said in (
        (lambda: second.write_bytes(whole[:100]), "00002.safetensors is damaged"),
        (second.unlink, "00002.safetensors is missing, which"),
        ((folder / "model.safetensors.index.json").unlink, "holds no model.safetensors"),
    ):
        damage()
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            load_encoder(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match=r"index\.json holds no JSON object"):
        load_encoder(folder)


def test_a_hugging_face_folder_holds_one_encoder(folder):
    with pytest.raises(ValueError, match="holds one encoder"):
        load_encoder(folder, "context")
    with pytest.raises(FileNotFoundError, match="give the folder"):
        load_encoder(folder / "model.safetensors")


def test_a_hugging_face_folder_is_no_run(folder, encoder, tmp_path):
    """Its config.json is not a run's, though it lies where one would."""
    assert run_of(folder) is None and run_of(folder / "config.json") is None
    run = tiny.write_run(tmp_path, encoder)
    assert run_of(run) == run and run_of(run / "encoder.safetensors") == run
    save_encoder(encoder, folder / "encoder.safetensors")
    assert run_of(folder / "encoder.safetensors") is None
