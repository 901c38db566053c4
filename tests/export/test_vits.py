"""Other projects' ViTs as a start: what fits is carried over exactly, the rest said or refused."""

import json

import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from cjepa_fast.interop import huggingface
from cjepa_fast.interop.resample import resample_patches, resample_positions
from cjepa_fast.interop.vits import read_vit
from cjepa_fast.model.vit import Encoder, sincos_positions

Weights = dict[str, torch.Tensor]


@pytest.fixture
def encoder(seed) -> Encoder:
    return tiny.uneven_encoder()


@pytest.fixture
def weights(encoder) -> Weights:
    """The encoder's, under timm's names, which are its own."""
    return {name: value.clone() for name, value in encoder.state_dict().items()}


def read(folder, weights, name="x.pth", heads=3) -> tuple[Encoder, list[str]]:
    path = folder / name
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in weights.items()}, path)
    else:
        torch.save(weights, path)
    return read_vit(path, heads)


def refusal(folder, weights) -> str:
    with pytest.raises(ValueError) as refused:
        read(folder, weights)
    assert str(folder / "x.pth") in str(refused.value)
    return str(refused.value)


# ------------------------------------------------------------ the same encoder, written by others


def as_it_is(weights: Weights) -> Weights:
    return weights


def with_layer_scale(weights: Weights, names=("ls1.gamma", "ls2.gamma")) -> Weights:
    """Branches that are scaled by what their last Linear was divided by."""
    for name, linear in zip(names, ("attn.proj", "mlp.fc2"), strict=True):
        for i in range(2):
            gamma = 0.5 + torch.rand(24)
            weights[f"blocks.{i}.{name}"] = gamma
            weights[f"blocks.{i}.{linear}.weight"] /= gamma[:, None]
            weights[f"blocks.{i}.{linear}.bias"] /= gamma
    return weights


def of_dinov2(weights: Weights) -> Weights:
    """A teacher's, trained in chunks of blocks, the class token's position before the others."""
    weights = with_layer_scale(weights)
    weights["pos_embed"] = torch.cat([torch.randn(1, 1, 24), weights["pos_embed"]], 1)
    others = {"cls_token": (1, 1, 24), "register_tokens": (1, 4, 24), "mask_token": (1, 24)}
    weights |= {name: torch.randn(shape) for name, shape in others.items()}
    chunked = {name.replace("blocks.1.", "blocks.1.1.").replace("blocks.0.", "blocks.0.0."): value
               for name, value in weights.items()}  # fmt: skip
    head = {"dino_head.mlp.0.weight": torch.randn(3, 24)}
    backbone = {f"backbone.{name}": value for name, value in chunked.items()}
    student = {name: torch.zeros_like(value) for name, value in backbone.items()}
    return {"teacher": backbone | head, "student": student, "epoch": 3}


def of_mae(weights: Weights) -> Weights:
    weights["cls_token"] = torch.randn(1, 1, 24)
    weights["pos_embed"] = torch.cat([torch.zeros(1, 1, 24), weights["pos_embed"]], 1)
    decoder = {"decoder_embed.weight": (8, 24), "decoder_blocks.0.attn.qkv.weight": (24, 8)}
    decoder |= {"mask_token": (1, 1, 8), "decoder_pos_embed": (1, 37, 8)}
    return {"model": weights | {name: torch.randn(shape) for name, shape in decoder.items()}}


def of_transformers(weights: Weights) -> Weights:
    found = {f"vit.{n}": v for n, v in huggingface.to_huggingface(weights).items()}
    return found | {
        "classifier.weight": torch.randn(5, 24),
        "vit.pooler.dense.weight": torch.eye(3),
    }


def of_transformers_dinov2(weights: Weights) -> Weights:
    found = huggingface.to_huggingface(with_layer_scale(weights, ("ls1.gamma", "ls2.gamma")))
    for theirs, dinov2 in (
        ("layernorm_before", "norm1"), ("layernorm_after", "norm2"),
        ("intermediate.dense", "mlp.fc1"), ("attention.output.dense", "kept"),
        ("output.dense", "mlp.fc2"), ("kept", "attention.output.dense"),
    ):  # fmt: skip
        found = {name.replace(theirs, dinov2): value for name, value in found.items()}
    scales = {f"encoder.layer.{i}.layer_scale{n}.lambda1": weights[f"blocks.{i}.ls{n}.gamma"]
              for i in range(2) for n in (1, 2)}  # fmt: skip
    return found | scales


def of_transformers_5(weights: Weights) -> Weights:
    """As its modules are named from version 5 on."""
    parts = {f"blocks.{i}.attn.{part}_proj.{kind}": value
             for i in range(2) for kind in ("weight", "bias")
             for part, value in zip(
                 "qkv", weights[f"blocks.{i}.attn.qkv.{kind}"].chunk(3), strict=True)}  # fmt: skip
    rest = {name: value for name, value in weights.items() if "attn.qkv" not in name}
    return {
        name.replace("blocks.", "layers.").replace("attn.proj", "attention.o_proj")
        .replace("attn.", "attention.").replace("patch_embed.proj", "embeddings.patch_embeddings."
        "projection").replace("pos_embed", "embeddings.position_embeddings")
        : value for name, value in (parts | rest).items()
    }  # fmt: skip


def of_beit(weights: Weights) -> Weights:
    """Its keys have no bias, and its LayerScale another name."""
    weights = with_layer_scale(weights, ("gamma_1", "gamma_2"))
    for i in range(2):
        bias = weights.pop(f"blocks.{i}.attn.qkv.bias")
        q, _, v = bias.chunk(3)
        weights |= {f"blocks.{i}.attn.q_bias": q, f"blocks.{i}.attn.v_bias": v}
    return weights


FORMS = {
    "timm.safetensors": (as_it_is, []),
    "timm with LayerScale.pth": (with_layer_scale, ["folded: LayerScale"]),
    "dinov2.pth": (of_dinov2, [
        "it is the file's teacher.backbone; left out beside it: student.backbone, teacher.dino",
        "positions of 6 x 6 patches; left out: 1 of other tokens",
        "left out: class token (cls_token): the patches attended to it",
        "left out: registers (register_tokens): the patches attended to it",
        "left out: mask token (mask_token)",
        "folded: LayerScale",
    ]),
    "mae.pth": (of_mae, [
        "it is the file's model",
        "left out: decoder (decoder_blocks.0.attn.qkv.weight, decoder_embed.weight, "
        "decoder_pos_embed)",
    ]),
    "transformers.bin": (of_transformers, [
        "it is the file's vit; left out beside it: classifier",
        "left out: head (pooler.dense.weight)",
        "folded: q, k and v into one weight",
    ]),
    "dinov2.safetensors": (of_transformers_dinov2, ["folded: LayerScale"]),
    "transformers 5.pt": (of_transformers_5, ["folded: q, k and v into one weight"]),
    "beit.pth": (of_beit, ["folded: k without a bias: zeros", "folded: LayerScale"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_features_are_the_same_under_everybody_s_names(tmp_path, encoder, weights, name):
    """Up to the tokens that a file has beside the patches', which are not asked here."""
    form, said = FORMS[name]
    if form is of_beit:
        with torch.no_grad():
            for i in range(2):
                encoder.blocks[i].attn.qkv.bias[24:48] = 0
                weights[f"blocks.{i}.attn.qkv.bias"][24:48] = 0
    read_back, told = read(tmp_path, form(weights), name)
    images = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        assert (read_back(images) - encoder(images)).abs().max() < 1e-5
    assert not read_back.training and read_back.learned_positions
    for line in said:
        assert any(one.startswith(line) for one in told), told
    assert told[0].endswith("2 blocks of width 24, patches of 4 pixels; taken as 3 heads")


def test_what_transformers_writes_is_read(tmp_path, seed):
    """Its DINOv2 with registers; the same features where its blocks see the patches alone."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=24, patch_size=4,
        layerscale_value=0.5, num_register_tokens=2,
    )  # fmt: skip
    model = transformers.Dinov2WithRegistersModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path)
    ours, _ = read_vit(tmp_path / "model.safetensors", 3)
    images = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        patches = model.embeddings(images)[:, 3:]
        theirs = model.layernorm(model.encoder(patches).last_hidden_state)
        assert (ours(images) - theirs).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_attention_heads": 6}, "num_attention_heads is 6, and model.heads is 3"),
        ({"model_args": {"num_heads": 6}}, "num_heads is 6, and model.heads is 3"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"model_args": {"act_layer": "silu"}}, "act_layer is 'silu'"),
    ],
)
def test_what_transformers_says_beside_a_file_is_heard(tmp_path, weights, config, said):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=said):
        read(tmp_path, weights)
    known = {"num_attention_heads": 3, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
    (tmp_path / "config.json").write_text(json.dumps(known))
    _, told = read(tmp_path, weights)
    assert told[-1].endswith("layer_norm_eps is 1e-12, ours 1e-06: features differ a little")
    for other in ("[]", "{", '{"run": {}}'):  # of something else
        (tmp_path / "config.json").write_text(other)
        assert len(read(tmp_path, weights)[1]) == len(told) - 1


@pytest.mark.parametrize(
    ("config", "gelu"),
    [
        ({"hidden_act": "gelu"}, "exact"),
        ({"hidden_act": "gelu_new"}, "tanh"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "tanh"),
        ({"model_args": {"act_layer": "gelu_tanh"}}, "tanh"),
        ({"model_args": {"img_size": 24}}, "exact"),
    ],
)
def test_the_gelu_is_the_one_that_is_said_beside_a_file(tmp_path, encoder, weights, config, gelu):
    (tmp_path / "config.json").write_text(json.dumps(config))
    read_back, _ = read(tmp_path, weights)
    images = torch.randn(2, 3, 24, 24)
    wanted = tiny.with_gelu(encoder, gelu)
    with torch.no_grad():
        assert read_back.gelu == gelu and torch.equal(read_back(images), wanted(images))


def test_absent_biases_are_zeros(tmp_path, encoder, weights):
    for name in ("attn.qkv.bias", "norm1.bias"):
        for i in range(2):
            encoder.get_parameter(f"blocks.{i}.{name}").data.zero_()
            del weights[f"blocks.{i}.{name}"]
    images = torch.randn(2, 3, 24, 24)
    read_back, told = read(tmp_path, weights)
    with torch.no_grad():
        assert torch.equal(read_back(images), encoder(images))
    assert {"folded: attn.qkv without biases: zeros", "folded: norm1 without biases: zeros"} < set(
        told
    )
    del weights["blocks.1.mlp.fc1.bias"]  # of one block alone: a damaged file
    assert "missing: blocks.1.mlp.fc1.bias" in refusal(tmp_path, weights)


@pytest.mark.parametrize(
    ("classes", "registers", "positions"),
    [(1, 0, 37), (0, 0, 36), (1, 4, 36), (1, 4, 37), (1, 4, 41), (2, 0, 38)],
)
def test_positions_of_other_tokens_are_left_out(tmp_path, weights, classes, registers, positions):
    """As timm, DINOv2 and DeiT have them: of all tokens, of class token and patches, or these."""
    names = ["cls_token", "dist_token"][:classes] + ["reg_token"] * bool(registers)
    weights |= {name: torch.zeros(1, registers if name == "reg_token" else 1, 24) for name in names}
    table = weights["pos_embed"]
    more = torch.randn(1, positions - 36, 24)
    weights["pos_embed"] = torch.cat([more, table], 1)
    read_back, _ = read(tmp_path, weights)
    assert torch.equal(read_back.pos_embed, table)


def test_positions_that_are_our_sin_cos_stay_fixed(tmp_path, weights):
    """Also as another library computes them, in another precision."""
    weights["pos_embed"] = sincos_positions(6, 6, 24)[None] + 1e-6
    read_back, _ = read(tmp_path, weights)
    assert not read_back.learned_positions and not read_back.pos_embed.requires_grad


# ---------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("blocks.0.mlp.w12.weight", "SwiGLU in the MLP (blocks.0.mlp.w12.weight)"),
        ("blocks.0.mlp.weights_in.weight", "SwiGLU"),
        ("blocks.0.mlp.gate_proj.weight", "SwiGLU"),
        ("rope_embed.periods", "rotary positions (RoPE)"),
        ("blocks.0.attn.relative_position_bias_table", "a relative position bias"),
        ("blocks.0.attn.rel_pos_h", "a relative position bias"),
        ("blocks.0.attn.q_norm.weight", "norms of queries and keys"),
        ("norm_pre.weight", "a norm of the patch embedding"),
        ("blocks.0.attn.norm.weight", "a norm inside of attention or MLP"),
        ("blocks.0.conv.weight", "unexpected: blocks.0.conv.weight"),
        ("adapter.weight", "unexpected: adapter.weight"),
        ("blocks.7.norm1.weight", "blocks are not numbered from 0 on: 0, 1, 7"),
    ],
)  # fmt: skip
def test_what_has_no_place_in_ours_is_refused_by_name(tmp_path, weights, name, said):
    weights[name] = torch.ones(24)
    assert said in refusal(tmp_path, weights)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("pos_embed", None, "no table of positions"),
        ("pos_embed", (1, 35, 24), "(1, 35, 24) is no square grid"),
        ("pos_embed", (1, 6, 6, 24), "is no square grid"),
        ("patch_embed.proj.weight", (24, 4, 4, 4), "(24, 4, 4, 4), not of square RGB patches"),
        ("patch_embed.proj.weight", (24, 3, 4, 2), "not of square RGB patches"),
        ("patch_embed.proj.weight", None, "holds no ViT: no patch_embed.proj.weight"),
        ("blocks.0.mlp.fc1.weight", (192, 24), "(blocks.0.mlp.fc1.weight has both of its halves)"),
        ("blocks.1.norm2.weight", None, "missing: blocks.1.norm2.weight"),
        ("norm.weight", None, "missing: norm.weight"),
        ("patch_embed.proj.weight", (0, 3, 4, 4), "cannot be an encoder of ours"),
        ("cls_token", (), "cannot be an encoder of ours"),
        ("blocks.0.ls1.gamma", (7,), "cannot be an encoder of ours"),
        ("blocks.0.mlp.fc1.weight", (), "cannot be an encoder of ours"),
    ],
)  # fmt: skip
def test_weights_that_are_not_all_there_or_of_other_shapes(tmp_path, weights, name, value, said):
    weights[name] = None if value is None else torch.ones(value)
    present = {name: tensor for name, tensor in weights.items() if tensor is not None}
    assert said in refusal(tmp_path, present)


def test_dinov3_is_refused_for_its_positions(tmp_path, weights):
    """Under all three of its names: no file of it has a table of positions."""
    del weights["pos_embed"]
    assert "they are rotary (RoPE), relative or none" in refusal(tmp_path, weights)
    weights["blocks.0.attn.qkv.bias_mask"] = torch.ones(72)
    assert "rotary positions (RoPE), as in DINOv3" in refusal(tmp_path, weights)


def test_of_several_vits_none_is_guessed(tmp_path, weights):
    both = {"online": weights, "offline": weights}
    assert "several ViTs: save one of them alone. Their names begin with offline., online." in (
        refusal(tmp_path, both)
    )


def test_dicts_that_hold_themselves_are_refused(tmp_path, weights):
    weights["again"] = weights
    assert "holds dicts nested deeper than 50: again.again." in refusal(tmp_path, weights)


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_nothing_in_a_file_is_unpickled(tmp_path, weights):
    made = tmp_path / "made"
    assert "weights_only=True" in refusal(tmp_path, {"model": weights, "args": Bomb(made)})
    assert not made.exists()


def test_names_in_a_file_are_data(tmp_path, weights):
    weights["head.\nerror: all is lost\x1b[31m"] = torch.ones(2)
    _, told = read(tmp_path, weights)
    assert r"left out: head (head.\nerror: all is lost\x1b[31m)" in told


# -------------------------------------------------------------------------------------- resampling


def test_larger_patches_give_what_the_old_ones_did(seed):
    """Of a resized image the new kernel makes what the old one makes of the image itself."""
    kernel, image = torch.randn(5, 3, 4, 4), torch.randn(2, 3, 4, 4)
    larger = F.interpolate(image, size=(7, 7), mode="bicubic", antialias=True)
    found, wanted = F.conv2d(larger, resample_patches(kernel, 7)), F.conv2d(image, kernel)
    terms = F.conv2d(image.abs(), kernel.abs())  # what fp32's rounding is relative to
    assert ((found - wanted).abs() <= 2.0**-20 * terms).all()
    assert torch.equal(resample_patches(kernel, 4), kernel)


def test_positions_are_interpolated_by_place():
    rows, cols = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    table = torch.stack([rows, cols], -1).view(64, 2)  # a ramp: in the middle, halfway between
    found = resample_positions(table, (8, 8), (4, 4)).view(4, 4, 2)
    assert torch.allclose(found[1:3, 1:3, 0], torch.tensor([[2.5, 2.5], [4.5, 4.5]]), atol=0.05)
    assert torch.allclose(found[1:3, 1:3, 1], torch.tensor([[2.5, 4.5], [2.5, 4.5]]), atol=0.05)
    assert torch.equal(resample_positions(table, (8, 8), (8, 8)), table)
