"""Hugging Face's I-JEPA folders, in and out; the transformers library is not needed for either.

Such a folder holds config.json (model_type "ijepa"), model.safetensors, whole or in shards named by
model.safetensors.index.json, and preprocessor_config.json. The names of the weights are those of
the published models, which transformers writes, and reads under every version that has I-JEPA.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from cjepa_fast.data.sources import LIMITS
from cjepa_fast.interop.names import gelu_named
from cjepa_fast.interop.weights import MEAN, STD, depth_of, fill, mismatches
from cjepa_fast.model.vit import Encoder
from cjepa_fast.runtime import json_text
from cjepa_fast.runtime.files import read_tensors, write_tensors, write_text
from cjepa_fast.runtime.image_size import height_width, shown, simplest

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"

# Our modules and Hugging Face's; of a block, and the rest.
OUTSIDE = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
QKV = [f"attention.attention.{part}" for part in ("query", "key", "value")]
# What our encoder is and their configuration might have otherwise.
FIXED = {"layer_norm_eps": 1e-6, "qkv_bias": True}
ACTIVATIONS = {"exact": "gelu", "tanh": "gelu_pytorch_tanh"}  # as is written


def is_folder(path: Path) -> bool:
    """Whether it holds a config.json of the kind that transformers writes, or a damaged one beside
    such weights."""
    try:
        return "model_type" in json_text.parse((path / CONFIG).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except ValueError:
        return any((path / name).is_file() for name in (WEIGHTS, INDEX))


@functools.cache
def from_hub(name: str) -> Path:
    """The folder of USER/NAME of Hugging Face's hub, fetched to this machine's cache of it. Raises
    ValueError where that fails."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"hf:{name} needs huggingface_hub: pip install '.[hub]'") from None
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:
        raise ValueError(f"hf:{name} cannot be fetched: {error}") from error


def read_encoder(folder: Path) -> Encoder:
    """The encoder of a folder: fp32, on the CPU, eval mode.

    `mean` and `std` are preprocessor_config.json's, or ImageNet's. Raises FileNotFoundError or
    ValueError for files that are missing or damaged, and for another model than I-JEPA.
    """
    encoder = _described(folder / CONFIG)
    state = _weights(folder)
    if problems := mismatches("model", to_huggingface(encoder.state_dict()), state):
        raise ValueError(f"{folder} does not fit its {CONFIG}:\n  " + "\n  ".join(problems))
    fill(encoder, from_huggingface(state, encoder.depth))
    encoder.mean, encoder.std = _normalisation(folder / PROCESSOR)
    if not len(encoder.mean) == len(encoder.std) == encoder.channels:
        raise ValueError(
            f"{folder / PROCESSOR}: image_mean and image_std must have a number for each of the "
            f"{encoder.channels} channels"
        )
    return encoder


def write_encoder(encoder: Encoder, folder: Path, crop: float) -> None:
    """Write a folder's files. crop: the share of the short side that the image processor keeps."""
    write_text(folder / CONFIG, json.dumps(_config(encoder, crop), indent=2) + "\n")
    write_text(folder / PROCESSOR, json.dumps(_processor(encoder, crop), indent=2) + "\n")
    # transformers asks for the metadata
    write_tensors(to_huggingface(encoder.state_dict()), folder / WEIGHTS, {"format": "pt"})


def to_huggingface(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our state dict under Hugging Face's names, q, k and v apart."""
    renamed = {}
    for ours, theirs in _names(depth_of(state)).items():
        parts = state[ours].chunk(len(theirs))
        renamed |= {name: part.contiguous() for name, part in zip(theirs, parts, strict=True)}
    return renamed


def from_huggingface(state: Mapping[str, torch.Tensor], depth: int) -> dict[str, torch.Tensor]:
    """The way back."""
    return {
        ours: torch.cat([state[name] for name in theirs]) for ours, theirs in _names(depth).items()
    }


def _names(depth: int) -> dict[str, list[str]]:
    """Each of our parameters, and those of Hugging Face's that make it up along the first axis."""
    modules = {ours: [theirs] for ours, theirs in OUTSIDE.items()}
    for i in range(depth):
        of_block = {ours: [theirs] for ours, theirs in BLOCK.items()} | {"attn.qkv": QKV}
        modules |= {
            f"blocks.{i}.{ours}": [f"encoder.layer.{i}.{name}" for name in theirs]
            for ours, theirs in of_block.items()
        }
    parameters = {
        f"{ours}.{kind}": [f"{name}.{kind}" for name in theirs]
        for ours, theirs in modules.items()
        for kind in ("weight", "bias")
    }
    return parameters | {"pos_embed": ["embeddings.position_embeddings"]}


def _config(encoder: Encoder, crop: float) -> dict:
    limits = getattr(encoder, "limits", LIMITS).changed()  # ours too: images of fewer bits
    return {
        "architectures": ["IJepaModel"],
        "model_type": "ijepa",
        "image_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "num_channels": encoder.channels,
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.heads,
        "intermediate_size": encoder.blocks[0].mlp.fc1.out_features,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "weights_init": encoder.init,  # ours: transformers keeps what it does not know
        **({"learned_positions": True} if encoder.learned_positions else {}),
        **({"limits": limits} if limits else {}),
        "crop": crop,  # ours: the processor has it rounded to pixels
        "hidden_act": ACTIVATIONS[encoder.gelu],
        **FIXED,
    }


def _processor(encoder: Encoder, crop: float) -> dict:
    """The evaluation's images: the centred square of `crop` times the short side, bilinear.

    BitImageProcessor is the one of transformers that resizes the short side and then crops. None
    of them finds the largest window of another aspect, so an oblong is not cut by it: the model
    then refuses images of another size than its own, and the card's code cuts them.
    """
    height, width = height_width(encoder.image_size)
    is_square = height == width
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": encoder.channels == 3,
        "do_resize": is_square,
        "size": {"shortest_edge": round(min(height, width) / crop)},
        "resample": 2,  # bilinear, as PIL numbers it
        "do_center_crop": is_square,
        "crop_size": {"height": height, "width": width},
        "do_rescale": not in_own_units(encoder),
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(encoder.mean),
        "image_std": list(encoder.std),
    }


def in_own_units(encoder: Encoder) -> bool:
    """Whether its images must have been arrays of floats: no share of a range has such a mean or
    standard deviation."""
    return not all(0 <= mean <= 1 for mean in encoder.mean) or max(encoder.std) > 1


def _described(path: Path) -> Encoder:
    """The encoder of a config.json, without weights. Raises ValueError for what ours cannot be."""
    config = _read_json(path)
    if config.get("model_type") != "ijepa":
        raise ValueError(
            f"{path} describes a model {config.get('model_type')!r}, not an 'ijepa'; to start from "
            "its weights give run.init_from the file that holds them"
        )
    for key, value in FIXED.items():
        if config.get(key) != value:
            raise ValueError(f"{path}: {key} is {config.get(key)!r}; only {value!r} can be loaded")
    gelu = gelu_named(config.get("hidden_act"), f"{path}: hidden_act")
    try:
        with torch.device("meta"):
            return Encoder(
                image_size=config["image_size"],
                patch_size=_square(config["patch_size"]),
                width=config["hidden_size"],
                depth=config["num_hidden_layers"],
                heads=config["num_attention_heads"],
                mlp_ratio=config["intermediate_size"] / config["hidden_size"],
                init=config.get("weights_init", "ijepa"),
                channels=config["num_channels"],
                learned_positions=config.get("learned_positions", False),
                gelu=gelu,
            )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path} does not describe an encoder: {error!r}") from error


def _square(size: int | list[int]) -> int:
    """The side of a square, given as one number or as two."""
    side = simplest(size)
    if not isinstance(side, int):
        raise ValueError(f"a patch of {shown(side)} is no square")
    return side


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of model.safetensors, or of the shards that its index names."""
    if (folder / WEIGHTS).is_file():
        return read_tensors(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS}, whole or in shards with {INDEX}")
    index = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict):
        raise ValueError(f"{folder / INDEX} has no weight_map")
    shards = [folder / name for name in sorted(set(index.values()))]
    for shard in shards:
        if not shard.is_file():
            raise FileNotFoundError(f"{shard} is missing, which {INDEX} names")
    return {name: tensor for shard in shards for name, tensor in read_tensors(shard).items()}


def _normalisation(path: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    processor = _read_json(path) if path.is_file() else {}
    return tuple(processor.get("image_mean", MEAN)), tuple(processor.get("image_std", STD))


def _read_json(path: Path) -> dict:
    try:
        values = json_text.parse(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object")
    return values
