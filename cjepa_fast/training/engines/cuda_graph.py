"""A step recorded once as a CUDA graph and replayed: one launch instead of a thousand."""

import contextlib
import copy
import dataclasses
import gc
from collections.abc import Callable, Iterator

import torch

from cjepa_fast.kernels.common.launch import counted, recorded

WARM = 3  # calls before the recording: they compile kernels and allocate what stays


class Graphed:
    """A function of tensors, dataclasses of them and floats, recorded at its call WARM + 1.

    Every call must bring tensors of the same shapes, and the function must not wait for the device
    nor keep anything of one call for the next but tensors that it writes in place. Floats become
    0-d float64 tensors on the device. What it returns is overwritten by the next call.
    """

    def __init__(self, function: Callable, device: torch.device):
        self.function, self.device = function, device
        self.calls, self.beside = 0, None

    def __call__(self, *inputs):
        inputs = [
            torch.tensor(x, dtype=torch.float64) if isinstance(x, float) else x for x in inputs
        ]
        if self.calls == 0:
            self.inputs = [x.to(self.device) for x in copy.deepcopy(inputs)]
        for static, x in zip(tensors_in(self.inputs), tensors_in(inputs), strict=True):
            if static.shape != x.shape:
                shapes = f"{tuple(static.shape)}, not {tuple(x.shape)}"
                raise ValueError(f"this step is recorded for tensors of {shapes}")
            static.copy_(x, non_blocking=True)
        self.calls += 1
        if self.calls <= WARM:
            return self._beside()
        if self.calls == WARM + 1:
            self._record()
        self.graph.replay()
        return self.outputs

    def _beside(self):
        """On another CUDA stream, as torch asks of the calls before a recording; on the same one
        for all of them, since torch keeps the memory of each stream for it alone."""
        here, self.beside = torch.cuda.current_stream(), self.beside or torch.cuda.Stream()
        self.beside.wait_stream(here)
        last = self.calls == WARM
        with torch.cuda.stream(self.beside), counted() if last else contextlib.nullcontext():
            outputs = self.function(*self.inputs)
        here.wait_stream(self.beside)
        return outputs

    def _record(self) -> None:
        """The loader's threads continue: what they ask of the device spoils no recording."""
        gc.collect()  # an earlier trainer's memory is not given back in the middle of it
        self.graph = torch.cuda.CUDAGraph()
        with (
            recorded(self.device) as self.tables,
            torch.cuda.graph(self.graph, capture_error_mode="thread_local"),
        ):
            self.outputs = self.function(*self.inputs)


def tensors_in(x) -> Iterator[torch.Tensor]:
    """Those of a list or dataclass, however deep."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, list):
        for part in x:
            yield from tensors_in(part)
    elif dataclasses.is_dataclass(x):
        for field in dataclasses.fields(x):
            yield from tensors_in(getattr(x, field.name))
