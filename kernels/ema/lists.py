"""Lists of tensors in one launch: the checks, the tables on the device, and their use in a kernel.

One launch serves the whole list: a table on the device holds the tensors' addresses, and a second
one says to which tensor each program belongs. The tables are made again only when an address
changes.
"""

import functools
import itertools
from collections.abc import Sequence

import torch

from cjepa_fast.kernels.common.launch import TRITON_NAMES, makes_tables_anew, to_device, use_kernel
from cjepa_fast.kernels.common.maybe_triton import tl, triton

Tensors = Sequence[torch.Tensor]
Number = float | torch.Tensor  # or 0-d, on the tensors' device
# Values a program handles: 16 of each array in each of 128 threads, or 8; see launch.chosen.
CHUNKS = (2048, 1024)
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# --- the checks


def of_one_kind(array: Tensors) -> bool:
    """Whether one kernel can take these: dense, on one device, of one dtype."""
    head = array[0] if array else None
    return all(
        t.is_contiguous() and t.dtype == head.dtype and t.device == head.device for t in array
    )


def kernel_takes(masters: Sequence[Tensors], others: Sequence[Tensors]) -> bool:
    """Whether the kernel takes these lists: the masters in fp32, the others in what it reads."""
    arrays = [*masters, *(array for array in others if array)]
    return (
        all(of_one_kind(array) for array in arrays)
        and all(array[0].dtype == torch.float32 for array in masters)
        and len({array[0].device for array in arrays}) == 1
        and use_kernel(*(array[0] for array in arrays))
    )


def check_same_shapes(*arrays: Tensors) -> None:
    """Raise ValueError unless the lists that are there have the same shapes in turn."""
    wanted = [t.shape for t in arrays[0]]
    for array in arrays[1:]:
        shapes = [t.shape for t in array]
        if array and shapes != wanted:
            raise ValueError(f"lists of tensors of other shapes: {shapes}, not {wanted}")


# --- the tables


@functools.lru_cache(maxsize=8)
def _tables(
    device: torch.device,
    addresses: tuple[tuple[int, ...], ...],
    sizes: tuple[int, ...],
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """For one list of tensors an array: where each lies, which program owns what, and alignment.

    pointers (arrays + 2, tensors) int64: the addresses, then the number of values and the first
    program of each tensor. owners (programs,) int32: the tensor of each program. Aligned: every
    address is a multiple of 16 bytes, so that whole chunks load 16 bytes at a time.
    """
    programs = [triton.cdiv(size, chunk) for size in sizes]
    first = [0, *itertools.accumulate(programs)][:-1]
    pointers = torch.tensor([*addresses, sizes, first], dtype=torch.int64)
    tensors = torch.arange(len(sizes), dtype=torch.int32)
    owners = tensors.repeat_interleave(torch.tensor(programs))
    aligned = all(a % 16 == 0 for array in addresses for a in array)
    return to_device(pointers, device), to_device(owners, device), aligned


def tables(*arrays: Tensors, chunk: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """_tables of the lists; empty lists stand for arrays that are not there.

    Some hundred microseconds of the host a call for a thousand tensors: to read their addresses.
    """
    present = [array for array in arrays if array]
    addresses = tuple(tuple(t.data_ptr() for t in array) for array in present)
    device, sizes = arrays[0][0].device, tuple(t.numel() for t in arrays[0])
    made = _tables.__wrapped__ if makes_tables_anew(device) else _tables
    return made(device, addresses, sizes, chunk)


def type_of(array: Tensors):
    """The Triton type of a list's tensors, None for a list that is not there."""
    return TYPES[array[0].dtype] if array else None


def on_device(values: Sequence[Number], device: torch.device) -> torch.Tensor:
    """Numbers and 0-d tensors as one fp32 tensor, without waiting for the device."""
    if not any(isinstance(value, torch.Tensor) for value in values):
        return torch.tensor(values, dtype=torch.float32).to(device, non_blocking=True)
    return torch.stack([
        value.to(torch.float32) if isinstance(value, torch.Tensor)
        else torch.full((), value, dtype=torch.float32, device=device)
        for value in values
    ])  # fmt: skip


# --- in a kernel


@triton.jit
def address(pointers, array, tensor, tensors, start, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to the value `start` of a tensor of an array."""
    address = tl.load(pointers + array * tensors + tensor).to(tl.pointer_type(dtype))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address + start


@triton.jit
def lerp(old, new, weight):
    """As torch.lerp: exact at both ends."""
    return tl.where(weight < 0.5, old + weight * (new - old), new - (new - old) * (1.0 - weight))


@triton.jit
def chunk_of_program(pointers, owners, sizes_row, tensors, CHUNK: tl.constexpr):
    """This program's tensor, its first value there, and how many values are left from it on."""
    tensor = tl.load(owners + tl.program_id(0)).to(tl.int64)
    size = tl.load(pointers + sizes_row * tensors + tensor)
    first = tl.load(pointers + (sizes_row + 1) * tensors + tensor)
    start = (tl.program_id(0) - first) * CHUNK
    return tensor, start, size - start


# --- ahead of time

WIDE_LOADS = (r"ld\.global[\w.:]*\.v[48]\.b32", r"st\.global[\w.:]*\.v[24]\.b32")
TABLES = {"pointers": "*i64", "owners": "*i32", "tensors": "i32"}  # a kernel's first arguments


def chunked(dtype: torch.dtype, chunk: int, aligned: bool, copy: torch.dtype | None) -> str:
    """How a kernel over chunks is named."""
    kind = "aligned" if aligned else "unaligned"
    return f"{TRITON_NAMES[dtype]} {chunk}, {kind}, copy {TRITON_NAMES.get(copy)}"
