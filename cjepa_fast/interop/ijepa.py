"""I-JEPA's checkpoints in: the files of facebookresearch/ijepa as the modules of this package.

Such a file is a dict whose `encoder`, `predictor` and `target_encoder` are state dicts with keys
prefixed `module.`; optimiser, scaler and counters lie beside them and are not read.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from cjepa_fast.interop.weights import (
    MEAN,
    STD,
    depth_of,
    fill,
    listed,
    mismatches,
    read_torch,
    with_channels,
)
from cjepa_fast.model.predictor import Predictor
from cjepa_fast.model.vit import MODELS, Encoder
from cjepa_fast.runtime.image_size import ImageSize, simplest

PARTS = ("encoder", "predictor", "target_encoder")


def load_ijepa(
    path_or_dict: str | Path | Mapping,
    model: str = "vit_huge",
    patch_size: int = 14,
    image_size: ImageSize = 224,
    predictor_depth: int = 12,
    predictor_width: int = 384,
    channels: int = 3,
) -> tuple[Encoder, Predictor, Encoder]:
    """(encoder, predictor, target_encoder) of an I-JEPA checkpoint: fp32, on the CPU, eval mode.

    path_or_dict: a file of I-JEPA's, or what torch.load gave of one. model: a name in MODELS;
    patch_size and image_size, of a square, in pixels; the predictor's heads follow the encoder's.
    The target encoder's parameters need no gradient. channels: of the encoders; where these are not
    the checkpoint's three, each has the sum of the three channels' filters over `channels`, so that
    an image which is the same in all its channels gives the same tokens.
    Raises ValueError for an unknown model, a file that cannot be read or is no such checkpoint,
    and for parameters that are missing, unexpected or of another shape, all named.
    """
    if model not in MODELS:
        raise ValueError(f"model {model!r} is unknown: use one of {', '.join(MODELS)}")
    if not isinstance(simplest(image_size), int):
        raise ValueError(
            f"image_size {list(image_size)}: I-JEPA's checkpoints have the positions of a square, "
            "and predict on it; take a square, or start without one"
        )
    is_loaded = isinstance(path_or_dict, Mapping)
    checkpoint = path_or_dict if is_loaded else _read(Path(path_or_dict))
    source = "the checkpoint" if is_loaded else str(path_or_dict)
    states = {part: _state(checkpoint, part, source) for part in PARTS}
    if channels != 3:
        for part in ("encoder", "target_encoder"):
            states[part] = with_channels(states[part], channels)

    with torch.device("meta"):  # shapes alone: the weights come from the file
        encoder = Encoder(image_size, patch_size, **MODELS[model], channels=channels)
        target = Encoder(image_size, patch_size, **MODELS[model], channels=channels)
        predictor = Predictor(
            encoder.width, encoder.grid, predictor_width, predictor_depth, encoder.heads
        )
    modules = {"encoder": encoder, "predictor": predictor, "target_encoder": target}
    wanted = {part: module.state_dict() for part, module in modules.items()}
    problems = [p for part in PARTS for p in mismatches(part, wanted[part], states[part])]
    if problems:
        raise ValueError(
            f"{source} does not fit {model} with patch_size {patch_size}, image_size {image_size}, "
            f"predictor_depth {predictor_depth} and predictor_width {predictor_width}:\n  "
            + "\n  ".join(problems)
        )
    for part in PARTS:
        fill(modules[part], states[part])
    target.requires_grad_(False)
    return encoder, predictor, target


def read_encoder(path: Path, which: str) -> Encoder:
    """One encoder of an I-JEPA file, "target" or "context", its sizes read off its weights.

    fp32, on the CPU, eval mode; `mean` and `std` are ImageNet's. Raises ValueError for a file that
    cannot be read, is no such checkpoint, or holds a model of none of I-JEPA's sizes.
    """
    part = {"target": "target_encoder", "context": "encoder"}[which]
    state = _state(_read(path), part, str(path))
    with torch.device("meta"):
        encoder = Encoder(**_sizes(state, f"{part!r} of {path}"))
    if problems := mismatches(part, encoder.state_dict(), state):
        raise ValueError("\n  ".join([f"{path} does not hold an encoder of I-JEPA's:", *problems]))
    fill(encoder, state)
    encoder.mean, encoder.std = MEAN, STD
    return encoder


def is_checkpoint(path: Path) -> bool:
    """Whether a file of torch's has the parts of I-JEPA's."""
    return read_torch(path).keys() >= set(PARTS)


def _sizes(state: Mapping[str, torch.Tensor], source: str) -> dict:
    """An encoder's arguments. Width, depth, patch and grid are seen in the weights; the heads are
    not: they are those of I-JEPA's model of that width and depth."""
    try:
        width, _, patch_size, _ = state["patch_embed.proj.weight"].shape
        patches = state["pos_embed"].shape[1]
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"{source} is no encoder of I-JEPA's: it needs patch_embed.proj.weight (D, 3, p, p) "
            f"and pos_embed (1, N, D), and holds {listed(sorted(state))}"
        ) from error
    depth = depth_of(state)
    known = [m for m in MODELS.values() if (m["width"], m["depth"]) == (width, depth)]
    if not known:
        models = ", ".join(f"{name} {m['width']} x {m['depth']}" for name, m in MODELS.items())
        raise ValueError(
            f"{source} has width {width} and depth {depth}, and the number of its heads is not in "
            f"the file: known are {models} (width x depth)"
        )
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"{source} has {patches} positions, which are no square grid")
    return {"image_size": side * patch_size, "patch_size": patch_size, **known[0]}


def _read(path: Path) -> Mapping:
    """The checkpoint's dict."""
    if not path.is_file():
        raise ValueError(f"{path} is no file: give the path of an I-JEPA checkpoint (.pth.tar)")
    return read_torch(path)


def _state(checkpoint: Mapping, part: str, source: str) -> dict[str, torch.Tensor]:
    """A part's tensors by name, without the prefix that data-parallel wrappers leave."""
    if part not in checkpoint:
        raise ValueError(
            f"{source} has no {part!r}: an I-JEPA checkpoint holds {', '.join(PARTS)}, "
            f"this one {listed(sorted(map(str, checkpoint)))}"
        )
    state = checkpoint[part]
    if not isinstance(state, Mapping):
        raise ValueError(f"{part!r} of {source} is a {type(state).__name__}, not a state dict")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}
