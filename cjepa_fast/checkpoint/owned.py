"""What a training asks of an engine to be saved and restored: the fp32 state a rank owns.

The engines (training/engines) provide it; how they shard it is theirs.
"""

import sys
import threading
from typing import NamedTuple, Protocol

import torch
from torch import nn

from cjepa_fast.runtime.distributed import rank
from cjepa_fast.runtime.printable import say


class Fragment(NamedTuple):
    """A slice of a parameter's flattened values: [start, start + len(values)) of parameter
    `name`."""

    name: str
    start: int
    values: torch.Tensor  # 1-D, fp32


def fragment_of(tensor: torch.Tensor, like: Fragment) -> torch.Tensor:
    """The same slice of another tensor of the parameter's shape, as a view."""
    return tensor.view(-1)[like.start : like.start + len(like.values)]


class OwnedState(NamedTuple):
    """A slice of one parameter's fp32 state: the weights and Adam's two moments, as views."""

    master: Fragment
    moments: dict[str, torch.Tensor]


class Snapshot:
    """A copy on the host of tensors that are about to change, in memory kept for the next one."""

    def __init__(self):
        self._buffers: dict[str, torch.Tensor] = {}
        self._copied_on_host = threading.Event()
        self._copied_from_gpu: torch.cuda.Event | None = None
        self._waited = True
        self._pins = True  # as long as the host has pinned memory left

    def begin(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copies from a GPU have a CUDA stream of their own; those on the host wait for copy().

        Raises RuntimeError where the host has no memory for them: then nothing is to be waited for.
        """
        for key, values in tensors.items():
            if key not in self._buffers:
                self._buffers[key] = self._host_memory(values)
        on_gpu = [key for key, values in tensors.items() if values.is_cuda]
        if on_gpu:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for key in on_gpu:
                    self._buffers[key].copy_(tensors[key], non_blocking=True)
            self._copied_from_gpu = stream.record_event()
        self._copied_on_host.clear()
        self._tensors, self._waited = tensors, False

    def _host_memory(self, like: torch.Tensor) -> torch.Tensor:
        """Pinned for a GPU's tensor, while that can be had; the lack of it is said once."""
        if like.is_cuda and self._pins:
            try:
                return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
            except RuntimeError as error:
                self._pins = False
                why, _, _ = str(error).partition("\n")
                say(
                    f"WARNING: rank {rank()}: the host has not enough pinned memory for a "
                    f"checkpoint ({why}): each save waits for its copy. More may be had by "
                    "ulimit -l, or by a job or a container with more memory",
                    sys.stderr,
                )
        return torch.empty(like.shape, dtype=like.dtype)

    def copy(self) -> dict[str, torch.Tensor]:
        """In the thread: the copy, whole. The tensors may change from here on."""
        try:
            for key, values in self._tensors.items():
                if not values.is_cuda:
                    self._buffers[key].copy_(values)
        finally:
            self._copied_on_host.set()
        if self._copied_from_gpu is not None:
            self._copied_from_gpu.synchronize()
        return {key: self._buffers[key] for key in self._tensors}

    def wait(self) -> None:
        """Before the tensors change; a GPU's own queue waits, not the host."""
        if self._waited:
            return
        self._waited = True
        self._copied_on_host.wait()
        if self._copied_from_gpu is not None:
            torch.cuda.current_stream().wait_event(self._copied_from_gpu)


class EMA(Protocol):
    """The target encoder's EMA."""

    fragments: list[Fragment]  # of it, fp32

    def write_working_copy(self) -> None:
        """Cast the fp32 EMA into the module that computes the targets."""


class SavedEngine(Protocol):
    """What is saved and restored."""

    module: nn.Module
    ema: EMA
    sharded: bool  # whether each rank owns only a share of the fp32 state
    snapshot: Snapshot  # of the state, taken by who saves; the engine waits before it updates

    def state(self) -> list[OwnedState]:
        """This rank's share of the fp32 weights and moments, as views."""

    def optimizer_step(self) -> int:
        """Adam's count of updates."""

    def set_optimizer_step(self, step: int) -> None: ...

    def write_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Set the compute-dtype weights from whole fp32 tensors by name."""
