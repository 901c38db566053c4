"""What a training asks of an engine to be saved and restored: the fp32 state a rank owns.

The engines (training/engines) provide it; how they shard it is theirs.
"""

from typing import NamedTuple, Protocol

import torch
from torch import nn


class Fragment(NamedTuple):
    """A run of a parameter's flattened values: [start, start + len(values)) of parameter `name`."""

    name: str
    start: int
    values: torch.Tensor  # 1-D, fp32


def fragment_of(tensor: torch.Tensor, like: Fragment) -> torch.Tensor:
    """The same run of another tensor of the parameter's shape, as a view."""
    return tensor.view(-1)[like.start : like.start + len(like.values)]


class OwnedState(NamedTuple):
    """A run of one parameter's fp32 state: the weights and Adam's two moments, as views."""

    master: Fragment
    moments: dict[str, torch.Tensor]


class Average(Protocol):
    """The target encoder's EMA."""

    fragments: list[Fragment]  # of it, fp32

    def write_working_copy(self) -> None:
        """Cast the fp32 EMA into the module that computes the targets."""


class Saved(Protocol):
    """What is saved and restored."""

    module: nn.Module
    ema: Average
    sharded: bool  # whether each rank owns only a share of the fp32 state

    def state(self) -> list[OwnedState]:
        """This rank's share of the fp32 weights and moments, as views."""

    def optimizer_step(self) -> int:
        """Adam's count of updates."""

    def set_optimizer_step(self, step: int) -> None: ...

    def write_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Set the compute-dtype weights from whole fp32 tensors by name."""
