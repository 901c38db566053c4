"""What the readers of foreign weights share: reading torch's files, the check of names and shapes,
and the filling."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from cjepa_fast.runtime.printable import printable

# What images are normalised with where a file does not say: ImageNet's mean and deviation.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHOWN = 10  # names in a message before "and n more"


def read_torch(path: Path) -> Mapping:
    """The dict in a file of torch's; tensors stay there until they are used, where torch can.

    Raises ValueError for other than tensors and plain values in it, which are never unpickled.
    """
    try:
        # memory mapping needs torch's zip format; files from before torch 1.6 have another
        mapped = zipfile.is_zipfile(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # on foreign bytes the unpickler raises nearly anything
        reason = str(error).strip().splitlines() or ["no reason given"]
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors and plain values "
            f"(torch.load with weights_only=True): {type(error).__name__}: {reason[0]}"
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint's dict")
    return checkpoint


def mismatches(
    part: str, wanted: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]
) -> list[str]:
    """Lines that name what is missing, unexpected or of another shape; none if all fits."""
    shapes = [
        f"{name} {tuple(state[name].shape)} where {tuple(wanted[name].shape)} belongs"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    groups = {
        "missing": [name for name in wanted if name not in state],
        "unexpected": [name for name in state if name not in wanted],
        "of another shape": shapes,
    }
    return [f"{part}, {kind}: {listed(names)}" for kind, names in groups.items() if names]


def depth_of(state: Mapping[str, torch.Tensor]) -> int:
    """How many blocks an encoder's state dict has."""
    return len({name.split(".")[1] for name in state if name.startswith("blocks.")})


def listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(map(printable, names[:SHOWN])) or "nothing") + more


def with_channels(state: Mapping[str, torch.Tensor], channels: int) -> dict[str, torch.Tensor]:
    """An encoder's weights for images of another number of channels.

    Each channel's filter is the sum of the filters there over `channels`: the sum alone for gray.
    """
    name = "patch_embed.proj.weight"
    filters_DCpp = state.get(name)
    if filters_DCpp is None or filters_DCpp.ndim != 4:
        return dict(state)  # what is missing or of another shape is told by `mismatches`
    shared_D1pp = filters_DCpp.float().sum(1, keepdim=True) / channels
    return {**state, name: shared_D1pp.repeat(1, channels, 1, 1)}


def fill(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Replace a module's meta tensors by copies, in fp32, that do not depend on the file."""
    copies = {name: tensor.to(torch.float32, copy=True) for name, tensor in state.items()}
    module.load_state_dict(copies, strict=True, assign=True)
    module.eval()
