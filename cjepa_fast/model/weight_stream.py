"""The gradients of weights on a second CUDA stream (run.weight_stream).

In the backward of a fused block one matmul gives a weight's gradient, dW = dout^T x, which nobody
reads before the optimiser. What comes next is LayerNorm, GELU or attention, bound by memory. So the
matmul runs beside that, on the second stream, and beside the next dx. The main stream waits for it
before the next dW begins, and at the end of the backward:

    main     dx = dout W | wait | fork |  LayerNorm, GELU or attention | dx = dout W | wait | ...
    second                             |  dW = dout^T x                              |

What keeps that right:
  - Memory. What is freed is used again by the stream that it was allocated for. All of this is
    allocated for the main stream, dW before the fork, so that nothing uses its memory by then. What
    the matmul reads and writes is kept here until the main stream has been told to wait. Only
    cuBLAS's workspace belongs to the second stream.
  - Nothing reads dW before the backward ends. Autograd takes it as .grad without a copy where
    nobody else refers to that tensor, so its storage is kept here, and not the tensor. Where there
    is a gradient already, autograd adds to it on the main stream, so such a matmul runs there.
    Hooks that read gradients earlier, as DeepSpeed's do, are not allowed.
  - Bits. torch gives cuBLAS a workspace of the same size on each stream, as NVIDIA asks for (cuBLAS
    documentation, "Results reproducibility").
  - CUDA graphs. Fork and wait become edges. A recording may not wait for an event from before it,
    so the main stream waits only where a matmul has begun.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch

Use = tuple[torch.Tensor, torch.Tensor]  # dout (R, rows of the weight), x (R, its columns)
# A global, since autograd calls a backward from a thread of its own.
_in_use: "WeightStream | None" = None


def weight_gradient(weight: torch.Tensor, *uses: Use) -> torch.Tensor:
    """dout^T x of a Linear. Several uses have some of the weight's rows each, one below the other.

    Within WeightStream.backward it is not to be read until that ends.
    """
    if _in_use is not None:
        return _in_use.gradient(weight, uses)
    parts = [dout.t() @ x for dout, x in uses]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class WeightStream:
    """The second CUDA stream, and what its matmul uses."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self._used: list = []
        self._with_gradient: set[int] = set()  # weights, by address

    @contextlib.contextmanager
    def backward(self, parameters: Iterable[torch.Tensor]) -> Iterator[None]:
        """Around a backward: within it weight_gradient uses the second stream."""
        global _in_use
        self._with_gradient = {p.data_ptr() for p in parameters if p.grad is not None}
        _in_use = self
        try:
            yield
        finally:
            _in_use = None
            self._join()

    def gradient(self, weight: torch.Tensor, uses: tuple[Use, ...]) -> torch.Tensor:
        """weight_gradient, beside the current stream, which is the main one."""
        self._join()
        dweight = torch.empty_like(weight)
        if weight.data_ptr() in self._with_gradient:
            return write(dweight, uses)
        self._with_gradient.add(weight.data_ptr())
        self._used = [dweight.untyped_storage(), *uses]
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            return write(dweight, uses)

    def _join(self) -> None:
        """The main stream waits; what was used may then be freed."""
        if self._used:
            torch.cuda.current_stream().wait_stream(self.stream)
            self._used = []


def write(dweight: torch.Tensor, uses: tuple[Use, ...]) -> torch.Tensor:
    parts = dweight.split([dout.shape[1] for dout, _ in uses])
    for part, (dout, x) in zip(parts, uses, strict=True):
        torch.mm(dout.t(), x, out=part)
    return dweight
