"""Weights to and from timm's own VisionTransformer: the same features, where it is installed.

`make install` lays timm beside torchvision, which it imports, in a folder of its own.
"""

from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
import vision_ops
from safetensors.torch import save_file

from cjepa_fast.export import __main__ as exporting
from cjepa_fast.interop.resample import resample_patches, resample_positions
from cjepa_fast.interop.vits import read_vit
from cjepa_fast.kernels.gelu import APPROXIMATE
from cjepa_fast.runtime.files import read_tensors

SIZES = {"img_size": 24, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
ALONE = {"class_token": False, "global_pool": "avg", "fc_norm": False}  # patch tokens and no others


@pytest.fixture(scope="module")
def timm():
    if not vision_ops.installed():
        pytest.skip("timm needs torchvision, which is not installed")
    vision_ops.load()
    return pytest.importorskip("timm")


def made(**options) -> torch.nn.Module:
    """timm's module, no two of its parameters alike."""
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(**{**SIZES, "num_classes": 5, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def saved(model: torch.nn.Module, folder: Path) -> Path:
    path = folder / "model.safetensors"
    save_file(model.state_dict(), path)
    return path


def tokens(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = getattr(model, "forward_features", model)(images)
    return found[:, getattr(model, "num_prefix_tokens", 0) :]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init_values": 0.1},
        {"qkv_bias": False, "proj_bias": False},
        {"mlp_ratio": 2.5, "init_values": 1e-5},
    ],
)
def test_features_of_a_vit_without_other_tokens_are_timm_s(timm, seed, tmp_path, options):
    model, images = made(**ALONE, **options), torch.randn(2, 3, 24, 24)
    ours, _ = read_vit(saved(model, tmp_path), 3)
    assert (tokens(ours, images) - tokens(model, images)).abs().max() < 1e-5
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    assert (tokens(ours, images).mean(1) - pooled).abs().max() < 1e-5


def test_fc_norm_is_taken_for_each_token(timm, seed, tmp_path):
    """timm's default of global_pool "avg" norms the mean: tokens are the same, the mean is not."""
    model, images = made(class_token=False, global_pool="avg"), torch.randn(2, 3, 24, 24)
    ours, told = read_vit(saved(model, tmp_path), 3)
    with torch.no_grad():
        each = model.fc_norm(model.forward_features(images))
    assert (tokens(ours, images) - each).abs().max() < 1e-5
    assert any(line.startswith("fc_norm, theirs of the patches' mean") for line in told)


@pytest.mark.parametrize(
    "options",
    [{}, {"reg_tokens": 4, "init_values": 0.1}, {"reg_tokens": 4, "no_embed_class": True}],
)
def test_of_a_vit_with_a_class_token_they_are_those_without_it(timm, seed, tmp_path, options):
    """What differs is what the patches saw of the class token and the registers, and no more."""
    model, images = made(**options), torch.randn(2, 3, 24, 24)
    ours, _ = read_vit(saved(model, tmp_path), 3)
    without = made(**ALONE, init_values=options.get("init_values"))
    kept = {name: value for name, value in model.state_dict().items() if "_token" not in name}
    kept["pos_embed"] = kept["pos_embed"][:, -36:]
    without.load_state_dict(kept)
    assert (tokens(ours, images) - tokens(without, images)).abs().max() < 1e-5
    assert (tokens(ours, images) - tokens(model, images)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options", [{"qk_norm": True}, {"pre_norm": True}, {"scale_attn_norm": True}]
)
def test_what_timm_has_beyond_ours_is_refused(timm, tmp_path, options):
    with pytest.raises(ValueError, match=r"it has (norms|a norm)"):
        read_vit(saved(made(**options), tmp_path), 3)


def test_swiglu_is_refused_under_timm_s_names(timm, tmp_path):
    from timm.layers import SwiGLUPacked

    model = made(mlp_layer=SwiGLUPacked, act_layer=torch.nn.SiLU)
    with pytest.raises(ValueError, match="SwiGLU in the MLP"):
        read_vit(saved(model, tmp_path), 3)


def test_resampling_is_timm_s(timm, seed):
    from timm.layers import resample_abs_pos_embed, resample_patch_embed

    table, kernel = torch.randn(1, 36, 24), torch.randn(5, 3, 14, 14)
    for side in (4, 9):
        theirs = resample_abs_pos_embed(table, [side, side], num_prefix_tokens=0)[0]
        assert (resample_positions(table[0], (6, 6), (side, side)) - theirs).abs().max() < 1e-6
    for side in (8, 16):
        theirs = resample_patch_embed(kernel, [side, side])
        assert (resample_patches(kernel, side) - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("gelu", ["exact", "tanh"])
def test_an_export_computes_in_timm_what_it_does_here(timm, seed, tmp_path, gelu):
    encoder = tiny.uneven_encoder(width=44, heads=4, mlp_ratio=48 / 11, gelu=gelu)
    run = tiny.write_run(tmp_path, encoder)
    assert exporting.export(run, "timm", tmp_path / "out") < 1e-5
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(2, 3, 24, 24)
    assert (tokens(model, images) - tokens(encoder, images)).abs().max() < 1e-5
    assert model.blocks[0].mlp.act(torch.tensor(-2.0)) == F.gelu(
        torch.tensor(-2.0), approximate=APPROXIMATE[gelu]
    )
    weights = read_tensors(tmp_path / "out" / "model.safetensors")
    assert weights.keys() == model.state_dict().keys()
