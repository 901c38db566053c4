"""Other projects' Vision Transformers in: those of timm, DINO, DINOv2, MAE and transformers.

What such a file holds is told by its names alone (names.py), wherever in the file they stand. What
our encoder lacks is folded into its weights where that is exact: the scale of a branch (LayerScale)
into the branch's last Linear, absent biases as zeros, q, k and v side by side. Tokens beside the
patches are left out, each with a line. What would change the features otherwise is refused by name.
Not in such a file, and taken for granted: norms before the branches, their epsilon of 1e-6; exact
GELU, unless a config.json beside it, transformers' or timm's, says tanh's; and I-JEPA's
initialisation, unless that file is of our export and names another.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from cjepa_fast.interop.names import (
    DROPPED,
    REFUSED,
    gelu_named,
    kinds,
    prefixes,
    translated,
)
from cjepa_fast.interop.weights import MEAN, STD, fill, listed, mismatches, read_torch
from cjepa_fast.model.vit import Encoder, sincos_positions
from cjepa_fast.runtime import json_text
from cjepa_fast.runtime.files import read_tensors
from cjepa_fast.runtime.printable import printable

Named = dict[str, torch.Tensor]
Normalisation = tuple[Sequence[float], Sequence[float]]  # mean and std, a number a channel

BETTER = re.compile(r"teacher|ema|momentum|target")  # of several ViTs in a file
DEEPEST = 50  # dots before a name
EPS = 1e-6  # of our norms, and of those of timm, DINO and MAE
SAME = 1e-5  # of positions, whose sines and cosines others compute in other precisions


def read_vit(path: Path, heads: int) -> tuple[Encoder, list[str]]:
    """The encoder of a file, at its own sizes, and what the user should know of it, a line each.

    path: .safetensors, or what torch.load reads with weights_only=True. heads: no file has their
    number, but a config.json of transformers or timm beside it may. fp32, on the CPU, eval mode;
    `mean` and `std` are ImageNet's. Raises ValueError for a file that cannot be read or holds no
    ViT that ours can be, naming why.
    """
    everything = dict(_flat(_read(path), path))
    prefix = _prefix(everything, path)
    names = {name: translated(name.removeprefix(prefix)) for name in everything
             if name.startswith(prefix)}  # fmt: skip
    state = {ours: everything[theirs].float() for theirs, ours in names.items()}
    if len(state) < len(names):
        raise ValueError(f"{path} has two names for one weight among {listed(sorted(names))}")
    description = path.with_name("config.json")
    known = _known(description)
    gelu, init = _gelu(known, description), known.get("weights_init", "ijepa")
    try:
        encoder, told = _encoder_of(state, heads, gelu, init)
    except (ValueError, RuntimeError, TypeError, IndexError, ArithmeticError) as error:  # by shapes
        raise ValueError(f"{path} cannot be an encoder of ours: {error}") from error
    width, depth, side = encoder.width, encoder.depth, encoder.patch_size
    first = f"weights of {path}: {depth} blocks of width {width}, patches of {side} pixels"
    beside = [_left_out_beside(everything, prefix)] if prefix else []
    told = [f"{first}; taken as {heads} heads", *beside, *told]
    return encoder, told + _described_beside(known, description, heads)


def normalisation_beside(path: Path) -> Normalisation | None:
    """Mean and std that a config.json of timm beside a file of weights says, or transformers'
    preprocessor_config.json; None where neither does."""
    of_timm = _known(path.with_name("config.json")).get("pretrained_cfg")
    processor = _known(path.with_name("preprocessor_config.json"))
    for there, names in ((of_timm, ("mean", "std")), (processor, ("image_mean", "image_std"))):
        pair = [there.get(name) for name in names] if isinstance(there, dict) else []
        if pair and all(map(_are_numbers, pair)) and len(pair[0]) == len(pair[1]):
            return pair[0], pair[1]
    return None


def _are_numbers(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, int | float) for value in values)


def _known(path: Path) -> dict:
    """What a JSON file says, {} where it is not there or is something else."""
    try:
        known = json_text.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _gelu(known: dict, path: Path) -> str:
    """The kind that transformers or timm computes. Raises ValueError for another activation."""
    arguments = known.get("model_args")
    if isinstance(arguments, dict) and "act_layer" in arguments:
        return gelu_named(arguments["act_layer"], f"{path}: act_layer")
    return gelu_named(known.get("hidden_act", "gelu"), f"{path}: hidden_act")


def _described_beside(known: dict, path: Path, heads: int) -> list[str]:
    """What else the config.json of transformers or timm tells and no weight does. Raises
    ValueError for other heads than those taken."""
    of_timm = known.get("model_args")
    arguments = of_timm if isinstance(of_timm, dict) else {}
    for name, there in (("num_attention_heads", known), ("num_heads", arguments)):
        if (theirs := there.get(name, heads)) != heads:
            raise ValueError(
                f"{path}: {name} is {theirs!r}, and model.heads is {heads}: set model.heads to it"
            )
    eps = known.get("layer_norm_eps", EPS)
    if eps == EPS:
        return []
    return [f"{path}: layer_norm_eps is {printable(eps)}, ours {EPS:g}: features differ a little"]


def _encoder_of(state: Named, heads: int, gelu: str, init: str) -> tuple[Encoder, list[str]]:
    """The encoder of weights whose names have been made ours where that is possible."""
    told = _norm_of_the_mean(state)
    _refuse(state)
    table_ND, line = _positions(state)
    told += [line, *_drop(state), *_fold(state)]
    return _built(state, table_ND, heads, gelu, init), told


def _read(path: Path) -> Mapping:
    if not path.is_file():
        raise ValueError(f"{path} is no file: give one of weights (.safetensors, .pth, .pt, .bin)")
    return read_tensors(path) if path.suffix == ".safetensors" else read_torch(path)


def _flat(tree: Mapping, path: Path, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of nested dicts, by their names with dots. Raises ValueError for dicts that are
    nested too deep, as those are that hold themselves."""
    if prefix.count(".") > DEEPEST:
        raise ValueError(f"{path} holds dicts nested deeper than {DEEPEST}: {prefix[:60]}...")
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, path, f"{name}.")
        elif isinstance(value, torch.Tensor):
            yield name, value


def _prefix(everything: Named, path: Path) -> str:
    """What stands before the names of the one ViT, or of the best of several."""
    found = prefixes(everything)
    best = [prefix for prefix in found if BETTER.search(prefix)] if len(found) > 1 else found
    if len(best) == 1:
        return best[0]
    if not found:
        raise ValueError(
            f"{path} holds no ViT: no patch_embed.proj.weight (timm, DINO, MAE), no "
            "embeddings.patch_embeddings.projection.weight (transformers), but "
            f"{listed(sorted(everything))}"
        )
    raise ValueError(f"{path} holds several ViTs: save one of them alone. Their names begin with "
                     f"{listed(found)}")  # fmt: skip


def _left_out_beside(everything: Named, prefix: str) -> str:
    """What a file holds beside its ViT, in words; "" if nothing."""
    others = {".".join(name.split(".")[: prefix.count(".")])
              for name in everything if not name.startswith(prefix)}  # fmt: skip
    beside = f"; left out beside it: {listed(sorted(others))}" if others else ""
    return f"it is the file's {prefix.rstrip('.')}{beside}"


def _norm_of_the_mean(state: Named) -> list[str]:
    """timm's fc_norm takes the place of the last norm where there is none."""
    if "norm.weight" in state or "fc_norm.weight" not in state:
        return []
    for kind in ("weight", "bias"):
        if f"fc_norm.{kind}" in state:
            state[f"norm.{kind}"] = state.pop(f"fc_norm.{kind}")
    return ["fc_norm, theirs of the patches' mean, becomes the norm of each: other features"]


def _refuse(state: Named) -> None:
    """Raises ValueError for what changes the patch tokens and has no place in our encoder."""
    reasons = [f"{kind} ({listed(sorted(names))})" for kind, names in kinds(state, REFUSED).items()]
    first, second = (state.get(f"blocks.0.mlp.fc{i}.weight") for i in (1, 2))
    if first is not None and second is not None and len(first) == 2 * second.shape[1]:
        reasons.append("SwiGLU in the MLP (blocks.0.mlp.fc1.weight has both of its halves)")
    if "pos_embed" not in state and not reasons:
        reasons.append("no table of positions: they are rotary (RoPE), relative or none")
    kernel = tuple(state["patch_embed.proj.weight"].shape)
    if len(kernel) != 4 or kernel[1] != 3 or kernel[2] != kernel[3]:
        reasons.append(f"a patch embedding of shape {kernel}, not of square RGB patches")
    if reasons:
        raise ValueError("it has " + "; ".join(reasons))


def _positions(state: Named) -> tuple[torch.Tensor, str]:
    """The patches' positions (N, D), out of `state`, without those of the other tokens."""
    table = state.pop("pos_embed")
    dropped = kinds(state, DROPPED)
    classes, registers = (
        sum(state[name].numel() // state[name].shape[-1] for name in dropped.get(kind, []))
        for kind in ("class token", "registers")
    )
    for extra in dict.fromkeys((classes, 0, classes + registers)):
        if table.dim() == 3 and _is_square(patches := table.shape[1] - extra):
            side = round(patches**0.5)
            left_out = f"; left out: {extra} of other tokens" if extra else ""
            return table[0, extra:], f"positions of {side} x {side} patches{left_out}"
    raise ValueError(
        f"its pos_embed {tuple(table.shape)} is no square grid, with or without {classes} class "
        f"tokens and {registers} registers"
    )


def _is_square(count: int) -> bool:
    return count > 0 and round(count**0.5) ** 2 == count


def _drop(state: Named) -> list[str]:
    """Take out what our encoder computes its patch tokens without."""
    outside = [name for name in state if not name.startswith("blocks.")]
    told = []
    for kind, names in kinds(outside, DROPPED).items():
        for name in names:
            del state[name]
        seen = kind in ("class token", "registers")
        effect = ": the patches attended to it, so their features change" if seen else ""
        told.append(f"left out: {kind} ({listed(sorted(names))}){effect}")
    return told


def _fold(state: Named) -> list[str]:
    """Bring into the weights of our blocks what theirs have beside them, exactly."""
    told, blocks = set(), _blocks(state)
    for block in blocks:
        told |= _join(state, f"{block}attn.") | _scale(state, block)
    return sorted(told | _zero_biases(state, blocks))


def _blocks(state: Named) -> list[str]:
    """What the names of each block begin with. Raises ValueError for numbers left out."""
    numbers = {int(found[1]) for name in state if (found := re.match(r"blocks\.(\d+)\.", name))}
    if numbers != set(range(len(numbers))):
        raise ValueError(
            f"its blocks are not numbered from 0 on: {listed(list(map(str, sorted(numbers))))}"
        )
    return [f"blocks.{i}." for i in sorted(numbers)]


def _join(state: Named, attn: str) -> set[str]:
    """q, k and v side by side, in that order; a bias that some have is zero for the others."""
    told = set()
    if all(f"{attn}{part}.weight" in state for part in "qkv"):
        parts = [state.pop(f"{attn}{part}.weight") for part in "qkv"]
        state[f"{attn}qkv.weight"] = torch.cat(parts)
        told.add("folded: q, k and v into one weight")
    biases = {part: state.pop(f"{attn}{part}.bias", None) for part in "qkv"}
    width = next((len(bias) for bias in biases.values() if bias is not None), 0)
    if width:
        zero = torch.zeros(width)
        parts = [zero if bias is None else bias for bias in biases.values()]
        state[f"{attn}qkv.bias"] = torch.cat(parts)
        if missing := [part for part, bias in biases.items() if bias is None]:
            told.add(f"folded: {' and '.join(missing)} without a bias: zeros")
    return told


def _scale(state: Named, block: str) -> set[str]:
    """LayerScale: gamma * (W x + b) is (gamma W) x + gamma b."""
    told = set()
    for gamma, linear in (("ls1.gamma", "attn.proj"), ("ls2.gamma", "mlp.fc2")):
        if (scale_D := state.pop(f"{block}{gamma}", None)) is None:
            continue
        for kind in ("weight", "bias"):
            if (values := state.get(f"{block}{linear}.{kind}")) is not None:
                scale = scale_D.view(-1, *[1] * (values.dim() - 1))
                state[f"{block}{linear}.{kind}"] = scale * values
        told.add("folded: LayerScale into attn.proj and mlp.fc2")
    return told


def _zero_biases(state: Named, blocks: list[str]) -> set[str]:
    """What has no bias in any block has one of zeros."""
    told = set()
    for module in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "norm1", "norm2"):
        weights = [state.get(f"{block}{module}.weight") for block in blocks]
        if any(w is None for w in weights) or any(f"{b}{module}.bias" in state for b in blocks):
            continue
        for block, weight in zip(blocks, weights, strict=True):
            state[f"{block}{module}.bias"] = torch.zeros(len(weight))
        told.add(f"folded: {module} without biases: zeros")
    return told


def _built(state: Named, table_ND: torch.Tensor, heads: int, gelu: str, init: str) -> Encoder:
    """The encoder of weights under our names. Raises ValueError where they are not all there."""
    width, _, patch_size, _ = state["patch_embed.proj.weight"].shape
    hidden = len(state.get("blocks.0.mlp.fc1.weight", table_ND))
    side = round(len(table_ND) ** 0.5)
    learned = not (table_ND - sincos_positions(side, side, width)).abs().max() <= SAME
    with torch.device("meta"):
        encoder = Encoder(
            side * patch_size, patch_size, width, len(_blocks(state)), heads, hidden / width,
            init=init, learned_positions=learned, gelu=gelu,
        )  # fmt: skip
    state["pos_embed"] = table_ND[None]
    if problems := mismatches("encoder", encoder.state_dict(), state):
        raise ValueError("\n  ".join(["its weights are not all those of ours:", *problems]))
    fill(encoder, state)
    encoder.mean, encoder.std = MEAN, STD
    return encoder
