"""What the kernels share: when they run, how they round, and what is compiled ahead of time."""

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from cjepa_fast.kernels.common.maybe_triton import tl, triton
from cjepa_fast.kernels.tuned import TUNED

T = TypeVar("T")

# TRITON_INTERPRET=1, set before triton is first imported: kernels then run in numpy, on the CPU.
INTERPRETING = bool(triton.knobs.runtime.interpret)
INTERPRET = tl.constexpr(INTERPRETING)
# CJEPA_DEBUG_INDICES=1: kernels assert on the device that every index lies in its table.
DEBUG_INDICES = os.environ.get("CJEPA_DEBUG_INDICES", "0") == "1"

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_NAMES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int32: "i32", torch.int64: "i64", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip

OLDEST = (8, 0)  # compute capability that the kernels are written and compiled for

_on_cpu = False
_runs: dict[int | None, bool] = {}  # whether kernels run, by the GPU's index


def use_kernel(*tensors: torch.Tensor) -> bool:
    """Whether kernels take these tensors: on a GPU that runs them (runs_on), of a dtype they
    compute in (never float64)."""
    here = runs_on(tensors[0].device) if tensors[0].is_cuda else _on_cpu
    return here and all(t.dtype in KERNEL_DTYPES for t in tensors)


def runs_on(device: torch.device) -> bool:
    """Whether a kernel compiles and runs on this GPU: one is tried, once. Where not, a warning
    says why, and plain PyTorch runs instead of the kernels."""
    if device.index not in _runs:
        if torch.compiler.is_compiling():
            return True
        problem = problem_on(device)
        _runs[device.index] = not problem
        if problem:
            warnings.warn(f"plain PyTorch in place of our kernels: {problem}", stacklevel=2)
    return _runs[device.index]


def problem_on(device: torch.device) -> str:
    """Why kernels do not run on this GPU, in words, "" where one did."""
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < OLDEST:
        name = torch.cuda.get_device_name(device)
        return f"they begin with sm_80, and {name} is sm_{major}{minor}"
    x = torch.zeros(16, device=device)
    try:
        with torch.cuda.device(device):
            _count_kernel[(1,)](x, N=16)
        return "" if x.sum().item() == 120 else "Triton computes wrongly here"
    except Exception as error:  # of a compiler, a driver, a missing C compiler: all are told
        return f"Triton does not work here ({type(error).__name__}: {str(error)[:200]})"


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Within it kernels run on CPU tensors too, in Triton's interpreter: for tests.

    Raises RuntimeError in a process that was not started with TRITON_INTERPRET=1.
    """
    global _on_cpu
    if not INTERPRETING:
        raise RuntimeError("set TRITON_INTERPRET=1 before triton is imported")
    before, _on_cpu = _on_cpu, True
    try:
        yield
    finally:
        _on_cpu = before


def on_its_device(launcher: Callable) -> Callable:
    """Within a call the current GPU is that of the first tensor (or of the first in a list).

    Triton launches on the current GPU and its stream, wherever the tensors are: on another that is
    an access to memory that it does not have.
    """

    @functools.wraps(launcher)
    def on_device(first, *args, **kwargs):
        head = first
        while not isinstance(head, torch.Tensor):
            head = head[0]
        with torch.cuda.device_of(head):
            return launcher(first, *args, **kwargs)

    return on_device


def last_dim_dense(x: torch.Tensor) -> torch.Tensor:
    """x with its last dimension dense: the other strides are the kernels' arguments."""
    return x if x.stride(-1) == 1 else x.contiguous()


_asked = 0  # bytes that `to_device` was asked for in the last `counted`
_counting = False
_space: list[torch.Tensor] = []  # what is left of the current recording's
_to_fill: list[tuple[torch.Tensor, torch.Tensor]] = []
_ALIGNED = 256


def recording(device: torch.device) -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def counted() -> Iterator[None]:
    """To be held while a function runs that is recorded next: how much its tables take."""
    global _asked, _counting
    _asked, _counting = 0, True
    try:
        yield
    finally:
        _counting = False


def makes_tables_anew(device: torch.device) -> bool:
    """Whether tables that were made before may not be taken: a recorded launch reads its own at
    every replay, and no other call's may replace them."""
    return _counting or recording(device)


@contextlib.contextmanager
def recorded(device: torch.device) -> Iterator[torch.Tensor]:
    """To be held while a CUDA graph is recorded, by a function that has run under `counted`.

    Nothing can be copied from the host meanwhile. So what `to_device` is asked for is written at
    the end, and into memory of its own: in the graph's, an earlier part of every replay would write
    over it. Every replay reads that memory, so it is to be kept as long as the graph.
    """
    space = torch.empty(_asked, dtype=torch.uint8, device=device)
    _space.append(space)
    try:
        yield space
        for there, values in _to_fill:
            there.copy_(values)
    finally:
        _to_fill.clear()
        _space.clear()


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor's values on the device, without waiting for it. See `recorded`."""
    global _asked
    size = triton.cdiv(values.nbytes, _ALIGNED) * _ALIGNED
    if not recording(device):
        _asked += size if _counting else 0
        if device.type == "cuda":
            values = values.pin_memory()
        return values.to(device, non_blocking=True)
    if not _space or len(_space[-1]) < size:
        raise RuntimeError("no room for tables: record within launch.recorded(), after a call")
    there, _space[-1] = _space[-1].split([size, len(_space[-1]) - size])
    _to_fill.append((there[: values.nbytes].view(values.dtype).view(values.shape), values))
    return _to_fill[-1][0]


@functools.cache
def architecture(device: torch.device) -> str:
    """ "sm_90" and the like; "cpu" without one."""
    if device.type != "cuda":
        return "cpu"
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def at_least(number: int, device: torch.device) -> bool:
    """Whether it is a GPU of sm_`number` or newer."""
    name = architecture(device)
    return name != "cpu" and int(name.removeprefix("sm_")) >= number


@functools.cache
def roomy(device: torch.device) -> bool:
    """Whether a program may have 160 KiB of shared memory, as on an A100, H100 or B200."""
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= 160 * 2**10


def chosen(key: str, candidates: Sequence[T], device: torch.device) -> T:
    """The configuration that tuned.py names for this kernel and architecture, else the first.

    Another one sums in another order: the last bits are those of one architecture.
    """
    return named_in(TUNED.get(architecture(device), {}), key, candidates)


def named_in(table: Mapping[str, Any], key: str, candidates: Sequence[T]) -> T:
    """By its own numbers, not by its position: a list may grow and change its order."""
    named = table.get(key)
    return next((c for c in candidates if c == named), candidates[0])


@dataclass(frozen=True)
class Compiled:
    """A kernel in one configuration, to be compiled without a GPU.

    signature: the run-time arguments, as {"x": "*bf16", "rows": "i32", "eps": "fp32"}; pointers
    count as aligned to 16 bytes, and so do the integers named in `divisible` (multiples of 16).
    must_have: regular expressions, each of which must be found in the PTX. debug: with device
    assertions. since: the first architecture that has its instructions, as 89. may_spill: bytes
    that it may; any, where it is timed against others' kernels before it is chosen. maxnreg: most
    registers of a thread.
    """

    name: str
    kernel: Any  # a triton JITFunction
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    must_have: tuple[str, ...] = ()
    divisible: tuple[str, ...] = ()
    debug: bool = False
    since: int = 80
    may_spill: float = 0
    maxnreg: int | None = None


@triton.jit
def _count_kernel(x_ptr, N: tl.constexpr):
    """x (N,) fp32 <- 0, 1, 2, ...: what `runs_on` tries."""
    at = tl.arange(0, N)
    tl.store(x_ptr + at, at.to(tl.float32))


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 x in `dtype`, rounded to nearest even.

    The interpreter's own cast to bf16 truncates; its cast to e4m3 truncates too, knows no NaN, and
    gives NaN's bits to 480, the number that they would be.
    """
    if INTERPRET and dtype == tl.bfloat16:
        x = _rounded(x, 16)
    if INTERPRET and dtype == tl.float8e4nv:
        # below 2^-6 values are multiples of 2^-9, as fp32 is between 2^14 and 2^15
        x = tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, _rounded(x, 20))
        x = tl.where(x == x, x, 480.0)
    return x.to(dtype)


@triton.jit
def dot(x, y, acc):
    """acc + x y, accumulated in fp32."""
    if INTERPRET:  # its own bf16 matmul is wrong
        return tl.dot(x.to(tl.float32), y.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(x, y, acc)


@triton.jit
def _rounded(x, DROPPED: tl.constexpr):
    """fp32 x without its last DROPPED bits, rounded to nearest even; NaN stays as it is."""
    bits = x.to(tl.uint32, bitcast=True)
    half = (1 << (DROPPED - 1)) - 1
    rounded = ((bits + half + ((bits >> DROPPED) & 1)) >> DROPPED) << DROPPED
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
