"""The target encoder: an exponential moving average of the context encoder, kept in fp32.

    target <- momentum * target + (1 - momentum) * encoder

A process keeps the fp32 average of the fragments of the encoder whose fp32 masters it owns: all
under ZeRO-0, its share under the higher stages. The module that computes the targets holds a
working copy in the compute dtype, whole on every process, written from the average: a bf16 average
would drift, since at momentum 0.999 most updates are below its rounding.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from cjepa_fast.kernels.ema import ema_update


class Fragment(NamedTuple):
    """A run of a parameter's flattened values: [start, start + len(values)) of parameter `name`."""

    name: str
    start: int
    values: torch.Tensor  # 1-D, fp32


def fragment_of(tensor: torch.Tensor, like: Fragment) -> torch.Tensor:
    """The same run of another tensor of the parameter's shape, as a view."""
    return tensor.view(-1)[like.start : like.start + len(like.values)]


class TargetEMA:
    """Averages `masters` (fragments of the encoder's fp32 weights) into the target module.

    target: a copy of the encoder in fp32, moved to `dtype` here; its values start the average.
    group: the processes that together own all fragments, None where each owns them all.
    working: the fragments' places in the module's weights.
    """

    def __init__(
        self,
        target: nn.Module,
        masters: list[Fragment],
        dtype: torch.dtype,
        group: dist.ProcessGroup | None = None,
    ):
        self.masters = masters
        self.group = group
        parameters = dict(target.named_parameters())
        self.fragments = [
            Fragment(m.name, m.start, fragment_of(parameters[m.name].data, m).float().clone())
            for m in masters
        ]
        trained = [name for name, p in parameters.items() if p.requires_grad]
        self.module = target.to(dtype).requires_grad_(False).eval()
        self._flatten(trained)

    def _flatten(self, names: list[str]) -> None:
        """Lay the averaged weights in one buffer, so that one collective completes them all."""
        parameters = dict(self.module.named_parameters())
        self._flat = torch.cat([parameters[name].data.flatten() for name in names])
        offset = 0
        for p in (parameters[name] for name in names):
            p.data = self._flat[offset : offset + p.numel()].view(p.shape)
            offset += p.numel()
        self.working = [fragment_of(parameters[f.name].data, f) for f in self.fragments]

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """One step of the average, after the optimiser's, and its working copy."""
        masters = [m.values for m in self.masters]
        with self._completed_by_others():
            ema_update([f.values for f in self.fragments], masters, momentum, self.working)

    @torch.no_grad()
    def write_working_copy(self) -> None:
        """Cast the average into the module's weights, completed from the other processes."""
        with self._completed_by_others():
            if self.fragments:
                torch._foreach_copy_(self.working, [f.values for f in self.fragments])

    @contextlib.contextmanager
    def _completed_by_others(self) -> Iterator[None]:
        """Within it this process writes its share of the working copy, the others theirs."""
        if self.group is not None:
            self._flat.zero_()  # each value has one owner: a sum of it and zeros is exact
        yield
        if self.group is not None:
            dist.all_reduce(self._flat, group=self.group)
