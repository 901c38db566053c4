"""A GPU that computes nothing: kernels/ launches as on sm_90, and its launches go elsewhere.

So what a step launches, how many bytes it asks for and what that costs the host can be told without
a GPU, and the kernels can be compiled for one. The tensors lie on the CPU; what a kernel would have
written there is left as it is. Matmuls give memory that nobody has written, in no time.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

from cjepa_fast.kernels.common import launch
from cjepa_fast.kernels.common.maybe_triton import triton
from cjepa_fast.model import fp8

ARCHITECTURE = 90
KERNEL = type(launch._count_kernel)  # of a function under triton.jit here: interpreted, or compiled


class Launch(NamedTuple):
    """A kernel by its function, its arguments by name (constants too), and its options (warps)."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__.strip("_").removesuffix("_kernel")

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {n: a for n, a in self.arguments.items() if isinstance(a, torch.Tensor)}


def _launch(kernel, args: tuple, kwargs: dict) -> Launch:
    names = kernel.arg_names
    options = {name: value for name, value in kwargs.items() if name not in names}
    named = dict(zip(names, args, strict=False)) | {n: v for n, v in kwargs.items() if n in names}
    return Launch(kernel, named, options)


@contextlib.contextmanager
def launches(take: Callable[[Launch], object] | None) -> Iterator[None]:
    """Within it every launch of a Triton kernel is handed to `take` (None: to nobody)."""

    def run(self, *args, grid, warmup, **kwargs):
        if take is not None:
            take(_launch(self, args, kwargs))

    with _as_on_a_gpu(), mock.patch.object(KERNEL, "run", run):
        yield


@contextlib.contextmanager
def compiling(wanted: Callable[[Launch], bool] = lambda launch: True) -> Iterator[None]:
    """Within it every launch that is wanted goes through Triton, up to the driver's call: a kernel
    is compiled, or found in Triton's cache.

    Raises RuntimeError in a process whose kernels are interpreted.
    """
    if launch.INTERPRETING:
        raise RuntimeError("set TRITON_INTERPRET=0 before triton is imported")
    through = KERNEL.run

    def run(self, *args, grid, warmup, **kwargs):
        if wanted(_launch(self, args, kwargs)):
            through(self, *args, grid=grid, warmup=True, **kwargs)

    with (
        _as_on_a_gpu(),
        mock.patch.object(KERNEL, "run", run),
        mock.patch.object(triton.runtime.driver, "_active", Driver()),
    ):
        yield


class Driver:
    """What Triton asks of a driver before a launch."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", ARCHITECTURE, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    with (
        mock.patch.object(launch, "_on_cpu", True),
        mock.patch.object(launch, "architecture", lambda device: f"sm_{ARCHITECTURE}"),
    ):
        yield


@contextlib.contextmanager
def no_matmuls() -> Iterator[None]:
    """Within it a fused step's matmuls on the CPU are not computed, and those in FP8 make no copies
    in fp32; for a process of its own."""
    library = torch.library.Library("aten", "IMPL")

    def mm(a, b):
        return a.new_empty(a.shape[0], b.shape[1])

    def addmm(bias, a, b, *, beta=1, alpha=1):
        return a.new_empty(a.shape[0], b.shape[1])

    def matmul(x, weight, bias):
        return bias.new_empty(*x.values.shape[:-1], len(weight.values))

    library.impl("mm", mm, "CPU")
    library.impl("addmm", addmm, "CPU")
    try:
        with mock.patch.object(fp8, "matmul_reference", matmul):
            yield
    finally:
        library._destroy()
