"""Weights to start from, run.init_from: I-JEPA's three networks, or an encoder of others.

An encoder alone is both the context encoder and the target's start; the predictor stays fresh.
"""

import itertools
import json
import math
from pathlib import Path

import torch

from cjepa_fast import config as configuration
from cjepa_fast.checkpoint.encoders import load_encoders
from cjepa_fast.config import Config, ConfigError
from cjepa_fast.interop import huggingface, ijepa, load_ijepa, vits
from cjepa_fast.interop.resample import resample_patches, resample_positions
from cjepa_fast.interop.weights import with_channels
from cjepa_fast.model.jepa import JEPA
from cjepa_fast.model.vit import Encoder

SIZES = ("width", "depth", "heads")


def initialise(networks: JEPA, target: Encoder, config: Config) -> list[str]:
    """Fill encoder, target encoder and, from I-JEPA's files, the predictor. Returns what the user
    should know of it, a line each.

    Raises ConfigError where the configuration's sizes are not those of the weights, ValueError for
    what cannot be read or cannot be an encoder of ours.
    """
    configuration.check_path_set("run.init_from", config.run.init_from)
    path = Path(configuration.expand_path(config.run.init_from))
    tensors = path.suffix == ".safetensors"
    ours = path.is_dir() or (tensors and path.with_suffix(".json").is_file())
    if not ours and not tensors and path.is_file() and ijepa.is_checkpoint(path):
        return _from_ijepa(path, networks, target, config)
    if ours:
        found = load_encoders(path)
        one = next(iter(found.values()))
        context, ema = found.get("context", one), found.get("target", one)
        told = [f"weights of {path}: {' and '.join(found)} encoder"]
        trained_with = _normalisation_of(path, context)
    else:
        context, told = vits.read_vit(path, networks.encoder.heads)
        ema = context
        trained_with = vits.normalisation_beside(path)
    told += _fill(networks.encoder, context, config)
    _fill(target, ema, config)
    told += _another_gelu(config, context.gelu) + _another_normalisation(config, trained_with)
    return [*told, "the predictor starts fresh: only files of I-JEPA's are taken with theirs"]


def _fill(encoder: Encoder, start: Encoder, config: Config) -> list[str]:
    """Put the weights in place, at the configuration's grid and patch size."""
    _check_sizes(encoder, start, config)
    state, told = start.state_dict(), []
    if start.channels != encoder.channels:
        state = with_channels(state, encoder.channels)
        told.append(
            f"each of {encoder.channels} channels has the sum of the filters of {start.channels}, "
            f"over {encoder.channels}"
        )
    if start.patch_size != encoder.patch_size:
        kernel = resample_patches(state["patch_embed.proj.weight"], encoder.patch_size)
        state["patch_embed.proj.weight"] = kernel
        sizes = f"{start.patch_size} to {encoder.patch_size} pixels"
        told.append(f"resampled: the patch embedding, from {sizes} (FlexiViT's way)")
    if start.grid != encoder.grid:
        table = resample_positions(state["pos_embed"][0], start.grid, encoder.grid)
        state["pos_embed"] = table[None]
        grids = " to ".join(f"{rows} x {cols}" for rows, cols in (start.grid, encoder.grid))
        told.append(f"interpolated: positions, from {grids} (bicubic, antialiased)")
    _put_in_place(encoder, state, config)
    return told


def _put_in_place(encoder: Encoder, state: dict[str, torch.Tensor], config: Config) -> None:
    """Load the weights. Fixed positions stay as they were built: no checkpoint has them, so every
    resume and export builds them anew."""
    _check_positions(encoder, state["pos_embed"], config)
    own = {} if encoder.learned_positions else {"pos_embed": encoder.pos_embed}
    encoder.load_state_dict({**state, **own})


def _another_gelu(config: Config, theirs: str) -> list[str]:
    """A warning where model.gelu is another than that of the weights. It is no error: the two are
    at most 5e-4 apart, and training goes on from there."""
    own, start = config.model.gelu, config.run.init_from
    if own == theirs:
        return []
    return [
        f'WARNING: model.gelu = "{own}": run.init_from = {start} was trained with "{theirs}", so '
        f"its features change a little; model.gelu={theirs} leaves them as they were"
    ]


def _normalisation_of(path: Path, start: Encoder) -> vits.Normalisation | None:
    """Mean and std that come with an encoder of ours; a Hugging Face folder may have none."""
    if huggingface.is_folder(path):
        return vits.normalisation_beside(path / huggingface.WEIGHTS)
    return start.mean, start.std


def _another_normalisation(config: Config, theirs: vits.Normalisation | None) -> list[str]:
    """A warning where data.mean and data.std are others than those of the weights; None: these are
    not known. Those of another number of channels cannot be compared."""
    own = config.data.mean, config.data.std
    if theirs is None or len(theirs[0]) != len(own[0]) or _close(own, theirs):
        return []
    now, then = ([json.dumps(list(values)) for values in pair] for pair in (own, theirs))
    mean, std = (values.replace(" ", "") for values in then)
    return [
        f"WARNING: data.mean = {now[0]}, data.std = {now[1]}: run.init_from = "
        f"{config.run.init_from} was trained with {then[0]} and {then[1]}; set data.mean={mean} "
        f"data.std={std}"
    ]


def _close(own: vits.Normalisation, theirs: vits.Normalisation) -> bool:
    """Up to the digits that a description may leave out."""
    pairs = zip(itertools.chain(*own), itertools.chain(*theirs), strict=True)
    return all(math.isclose(a, b, rel_tol=1e-4) for a, b in pairs)


def _check_sizes(encoder: Encoder, start: Encoder, config: Config) -> None:
    """Raises ConfigError, naming the keys and the file's values, where the blocks differ."""
    differ = [key for key in SIZES if getattr(encoder, key) != getattr(start, key)]
    differ = {key: (getattr(encoder, key), getattr(start, key)) for key in differ}
    hidden, theirs = (one.blocks[0].mlp.fc1.out_features for one in (encoder, start))
    if hidden != theirs and "width" not in differ:
        differ["mlp_ratio"] = encoder.mlp_ratio, theirs / start.width
    if differ:
        have = "; ".join(f"model.{key} = {own}" for key, (own, _) in differ.items())
        take = " ".join(f"model.{key}={theirs}" for key, (_, theirs) in differ.items())
        raise ConfigError(
            f"{have}: not as in run.init_from = {config.run.init_from}; set {take}, or leave "
            "run.init_from out"
        )


def _check_positions(encoder: Encoder, table: torch.Tensor, config: Config) -> None:
    """Raises ConfigError where fixed sin-cos positions would take the place of others."""
    if encoder.learned_positions or _same(table, encoder.pos_embed):
        return
    rows, cols = encoder.grid
    raise ConfigError(
        f'model.positions = "sincos": the positions of run.init_from = {config.run.init_from}, at '
        f"{rows} x {cols} patches, are others, and the features would change; set "
        "model.positions=learned, which starts from them and trains them"
    )


def _check_predictor_positions(own: torch.Tensor, table: torch.Tensor, config: Config) -> None:
    """Raises ConfigError where the predictor's, which are never learned, would be others."""
    if not _same(table, own):
        start = config.run.init_from
        raise ConfigError(
            f"run.init_from = {start}: its predictor_pos_embed is not sin-cos, and ours always is; "
            f"start from its encoder alone: cjepa-export {start} --to safetensors --out FOLDER, "
            "then run.init_from=FOLDER"
        )


def _same(table: torch.Tensor, own: torch.Tensor) -> bool:
    return bool((table - own).abs().max() <= vits.SAME)


def _from_ijepa(path: Path, networks: JEPA, target: Encoder, config: Config) -> list[str]:
    _check_named_sizes(config)
    encoder, predictor, ema = load_ijepa(
        path,
        config.model.name,
        config.model.patch_size,
        config.data.image_size,
        config.predictor.depth,
        config.predictor.width,
        config.data.channels,
    )
    own = networks.predictor.predictor_pos_embed
    _check_predictor_positions(own, predictor.predictor_pos_embed, config)
    _put_in_place(networks.encoder, encoder.state_dict(), config)
    _put_in_place(target, ema.state_dict(), config)
    networks.predictor.load_state_dict({**predictor.state_dict(), "predictor_pos_embed": own})
    told = f"weights of {path}, an I-JEPA checkpoint: encoder, predictor and target encoder"
    return [told, *_another_gelu(config, encoder.gelu)]


def _check_named_sizes(config: Config) -> None:
    """Raises ConfigError for sizes set by hand beside a checkpoint of I-JEPA's."""
    given = {"model": (*SIZES, "mlp_ratio"), "predictor": ("heads", "mlp_ratio")}
    for section, keys in given.items():
        part = getattr(config, section)
        for key in keys:
            if getattr(part, key) != type(part).model_fields[key].default:
                raise ConfigError(
                    f"{section}.{key} = {getattr(part, key)}: leave it out, since run.init_from "
                    "names an I-JEPA checkpoint, which has its own"
                )
