"""The encoders that a run leaves, and the way any encoder is loaded, other projects' too."""

import itertools
import json
import os
from pathlib import Path

import torch
from torch import nn

from cjepa_fast.checkpoint import StoredCheckpoint, damage, latest, state_of
from cjepa_fast.checkpoint.pretrained import CROP, PretrainedEncoder
from cjepa_fast.data.sources import LIMITS, Limits
from cjepa_fast.interop import huggingface, ijepa
from cjepa_fast.interop.weights import mismatches
from cjepa_fast.model.vit import Encoder
from cjepa_fast.runtime.files import read_json, read_tensors, sha256, write_tensors, write_text

HUB = "hf:"
FINAL = {"target": "encoder", "context": "context_encoder"}  # file names at the end of a run


def write_encoder(path: Path, which: str, checkpoint: Path) -> None:
    """Write one encoder of a checkpoint, as save_encoder does."""
    encoder = _read(checkpoint, which)
    encoder.limits = limits_of(checkpoint) or LIMITS
    encoder.crop = crop_of(checkpoint) or CROP
    save_encoder(encoder, path)


def save_encoder(encoder: Encoder, path: Path) -> None:
    """Write an encoder as PATH (.safetensors), with a .json beside it that describes it."""
    limits, crop = getattr(encoder, "limits", LIMITS), getattr(encoder, "crop", CROP)
    save_described(encoder, description_of(encoder, crop, limits), path)


def save_described(module: nn.Module, described: dict, path: Path) -> None:
    """Write a module's weights as PATH (.safetensors), with a .json beside it: what describes them,
    and their checksum. Raises OSError where that fails, as on a full disk."""
    partial = path.with_suffix(".partial")
    write_tensors({k: v.contiguous() for k, v in module.state_dict().items()}, partial)
    described = {**described, "sha256": sha256(partial)}
    write_text(path.with_suffix(".json"), json.dumps(described, indent=2))
    partial.rename(path)


def description_of(encoder: Encoder, crop: float, limits: Limits) -> dict:
    """An encoder's architecture and how its images are read, as `described_encoder` takes it."""
    described = {**encoder.architecture, "mean": encoder.mean, "std": encoder.std}
    described |= {"limits": changed} if (changed := limits.changed()) else {}
    return described | ({"crop": crop} if crop != CROP else {})


def load_encoder(path: str | os.PathLike, which: str = "target") -> PretrainedEncoder:
    """A pretrained encoder, fp32, on the CPU, in evaluation mode; `embed` takes images as they are.

    path: a run's folder (or its name, where it lies in runs/), a checkpoint's folder, a
    .safetensors file with its .json beside it, a Hugging Face I-JEPA folder, "hf:USER/NAME" of
    their hub, or one of I-JEPA's own files (.pth.tar).
    which: "target" (the EMA, used for evaluation) or "context"; a .safetensors file holds
    one encoder, the target's unless its name says otherwise, a Hugging Face folder one, taken for
    the target's. Raises FileNotFoundError or ValueError.
    """
    if which not in FINAL:
        raise ValueError(f'which={which!r}: must be "target" or "context"')
    path = located(path)
    crop, limits = crop_of(path) or CROP, limits_of(path) or LIMITS
    return PretrainedEncoder(_read(path, which), crop, limits)


def located(path: str | os.PathLike) -> Path:
    """Where what load_encoder is given lies: of the hub's, a copy on this machine."""
    if str(path).startswith(HUB):
        return huggingface.from_hub(str(path).removeprefix(HUB))
    named = Path("runs", path)
    return named if not Path(path).exists() and named.is_dir() else Path(path)


def held_in(path: str | os.PathLike, which: str) -> str:
    """Which encoder load_encoder gives: the one that is asked for, or what a .safetensors file's
    name says (previous_context_encoder too)."""
    path = located(path)
    if path.suffix != ".safetensors":
        return which
    return "context" if path.stem.endswith(FINAL["context"]) else "target"


def run_of(path: str | os.PathLike) -> Path | None:
    """The folder of the run that a run's folder, a checkpoint or an encoder's file belongs to."""
    path = located(path)
    return next((folder for folder in (path, *path.resolve().parents[:2]) if is_run(folder)), None)


def crop_of(path: str | os.PathLike) -> float | None:
    """The share that evaluation's centred square has of an image: by the run that the path belongs
    to, the checkpoint, or the description of its weights; None where that says none."""
    path = located(path)
    if trained := _config_of(path):
        return trained.get("eval", {}).get("crop")
    described = _description_of(path)
    return described and _crop_in(read_json(described), described)


def limits_of(path: str | os.PathLike) -> Limits | None:
    """Those that the encoder's images were read by, from where `crop_of` has the crop."""
    path = located(path)
    if trained := _config_of(path):
        return _limits_of_run(trained)
    described = _description_of(path)
    return described and _limits_in(read_json(described), described)


def _config_of(path: Path) -> dict | None:
    """The configuration of the run that it belongs to, or of a checkpoint by itself."""
    if run := run_of(path):
        return read_json(run / "config.json")
    return state_of(path)["config"] if (path / "state.json").is_file() else None


def _description_of(path: Path) -> Path | None:
    return next(filter(Path.is_file, _descriptions(path)), None)


def _descriptions(path: Path) -> list[Path]:
    """The files that may describe an encoder that is not a run's."""
    if path.suffix == ".safetensors":
        return [path.with_suffix(".json")]
    if huggingface.is_folder(path):
        return [path / huggingface.CONFIG]
    return [path / f"{name}.json" for name in FINAL.values()]


def _limits_of_run(saved: dict) -> Limits:
    """What a run older than a limit lacks is as usual."""
    data = saved["data"]
    return LIMITS._replace(**{name: data[name] for name in Limits._fields if name in data})


def _crop_in(described: dict, file: Path) -> float | None:
    """That of an encoder's description, which loses it. Raises ValueError, naming the file."""
    crop = described.pop("crop", None)
    if crop is not None and not (isinstance(crop, (int, float)) and 0 < crop <= 1):
        raise ValueError(f"{file}: its crop {crop!r} must be a number above 0, at most 1")
    return crop


def _limits_in(described: dict, file: Path) -> Limits | None:
    """Those of an encoder's description, which loses them. Raises ValueError, naming the file."""
    changed = described.pop("limits", None)
    if changed is None:
        return None
    try:
        limits = Limits(**changed)
        sound = limits.bit_depth in (None, *range(9, 17)) and all(
            isinstance(x, (int, float)) and x >= 0 for x in limits._replace(bit_depth=0)
        )
    except TypeError:
        sound = False
    if not sound:
        raise ValueError(
            f"{file}: its limits {changed} are none of the data section's: "
            f"{', '.join(Limits._fields)}, bit_depth from 9 to 16, the others from 0"
        )
    return limits


def _read(path: Path, which: str) -> Encoder:
    if path.suffix == ".safetensors":
        if which == "context" and held_in(path, which) != "context":
            raise ValueError(f"{path} holds a target encoder: give the run's folder instead")
        return _build_encoder(_description(path), read_tensors(path), path)
    if path.is_file():
        return ijepa.read_encoder(path, which)
    if huggingface.is_folder(path):
        if which == "context":
            raise ValueError(f"{path} holds one encoder, taken for a target: give a run's folder")
        return huggingface.read_encoder(path)
    final = path / f"{FINAL[which]}.safetensors"
    if final.is_file():
        return _read(final, which)
    checkpoint = path if (path / "state.json").is_file() else latest(path)
    if checkpoint is None:
        raise FileNotFoundError(f"{path}: neither a checkpoint nor {final.name} is there")
    if damaged := damage(checkpoint):
        raise ValueError("\n".join([*damaged, "give another checkpoint of the run instead"]))
    return _build_encoder(
        checkpoint / "encoder.json", StoredCheckpoint(checkpoint).encoder_weights(which)
    )


def load_encoders(path: str | os.PathLike) -> dict[str, Encoder]:
    """All that load_encoder finds at `path`, by "target" and "context": both, or the one there."""
    path = located(path)
    if path.suffix == ".safetensors":
        which = held_in(path, "target")
        return {which: load_encoder(path, which)}
    if huggingface.is_folder(path):
        return {"target": load_encoder(path)}
    there = [which for which, name in FINAL.items() if (path / f"{name}.safetensors").is_file()]
    export = there and latest(path) is None
    return {which: load_encoder(path, which) for which in (there if export else FINAL)}


def _description(weights: Path) -> Path:
    """The .json beside a .safetensors file."""
    path = weights.with_suffix(".json")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing, which says what {weights.name} holds; of a Hugging Face model "
            "give the folder"
        )
    return path


def _build_encoder(
    description: Path, weights: dict[str, torch.Tensor], file: Path | None = None
) -> Encoder:
    """file: where the weights are from, in their shapes, if the description may have its checksum;
    else they are a checkpoint's, flat. Raises ValueError for what does not fit the description."""
    described = read_json(description)
    checksum = described.pop("sha256", None)
    encoder = described_encoder(described, description)
    if file and checksum is not None:
        require_checksum(file, checksum, description)
    own = {name: p for name, p in encoder.named_parameters() if p.requires_grad or name in weights}
    if own.keys() != weights.keys():
        raise ValueError(f"{description.parent}: weights differ: {sorted(own.keys() ^ weights)}")
    wanted = {name: p if file else p.flatten() for name, p in own.items()}
    if problems := mismatches("encoder", wanted, weights):
        source = file or description.parent
        raise ValueError("\n  ".join([f"{source} does not fit {description.name}:", *problems]))
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(weights[name].view(p.shape))
    return encoder


def described_encoder(described: dict, file: Path) -> Encoder:
    """An encoder of fresh weights as `described` says, with its mean, std, crop and limits.

    file: where that was read, which a ValueError for what does not describe an encoder names.
    """
    crop, limits = _crop_in(described, file), _limits_in(described, file)
    try:
        normalisation = {name: tuple(described.pop(name)) for name in ("mean", "std")}
        encoder = Encoder(**described).eval()
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{file} does not describe an encoder: {error!r}") from error
    encoder.mean, encoder.std = normalisation["mean"], normalisation["std"]
    encoder.crop, encoder.limits = crop or CROP, limits or LIMITS
    return encoder


def require_checksum(file: Path, checksum: object, description: Path) -> None:
    """Raises ValueError for a file that has not the SHA-256 that its description has."""
    if checksum != sha256(file):
        raise ValueError(f"{file} is damaged: it has not the checksum that {description.name} has")


def is_run(folder: Path) -> bool:
    """Whether it is a run's: its config.json has a run's sections, which a model's has not."""
    try:
        return read_json(folder / "config.json").keys() >= {"run", "data", "model"}
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False


def are_of(checkpoint: Path, run: Path) -> bool:
    """Whether the final encoders that a run has, if any, are those of this checkpoint."""
    stored = StoredCheckpoint(checkpoint)
    return all(
        _holds(path, stored.encoder_weights(which))
        for which, name in FINAL.items()
        if (path := run / f"{name}.safetensors").is_file()
    )


def _holds(path: Path, weights: dict[str, torch.Tensor]) -> bool:
    """Whether a file has these flat values; one that is damaged has not."""
    try:
        there = read_tensors(path)
    except ValueError:
        return False
    none = torch.empty(0)
    return all(torch.equal(there.get(n, none).flatten(), w) for n, w in weights.items())


def set_aside(run: Path) -> None:
    """A run that is resumed has no final encoders yet: those there become previous_*, and those of
    later ends previous_2_*, previous_3_* ..."""
    names = [f"{which}{suffix}" for which in FINAL.values() for suffix in (".safetensors", ".json")]
    prefixes = itertools.chain(["previous_"], (f"previous_{n}_" for n in itertools.count(2)))
    free = next(p for p in prefixes if not any((run / f"{p}{name}").exists() for name in names))
    for path in (run / name for name in names):
        if path.exists():
            path.replace(path.with_name(f"{free}{path.name}"))
