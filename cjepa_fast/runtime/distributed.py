"""The ranks of one training: joining them, what passes between them, leaving.

One rank alone needs no group: each function then returns its own. DeepSpeed is imported here, as
it joins the group.
"""

import contextlib
import ctypes
import functools
import os
import re
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from cjepa_fast.runtime import caches, children, files, hardware
from cjepa_fast.runtime.printable import say

T = TypeVar("T")
PIECE_ROWS = 4096  # of a large tensor, passed on at a time

GROWN_BYTES = 64 * 2**20  # more than what has_gpu() may have left to be used again
LONG_WAIT = timedelta(days=7)
# Tested; and its bf16.check_grad_overflow is on by default (pull request 8035, not in 0.19.0).
OLDEST_DEEPSPEED = (0, 19, 8)
_group_options: dict[str, timedelta] = {}  # of every process group, by start()
_callers_group = False  # whether there was one before start()


def start(seed: int, timeout_s: float = 0) -> torch.device:
    """Join the process group of several ranks, and seed torch. Returns the device.

    Without a GPU: the CPU and gloo. timeout_s: of the collectives; 0: none that is ever reached.
    Raises ValueError for one of several ranks that alone cannot use its GPU.
    """
    global _callers_group
    _callers_group = dist.is_initialized()
    caches.root()
    files.allow_many_open()
    children.end_with_parent()
    cuda = hardware.has_gpu()
    local_rank = hardware.local_rank()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if not cuda and torch.cuda.is_available():
        why = hardware.gpu_problem(local_rank)
        _check_no_gpu_works(why)
        say(f"WARNING: rank {local_rank} here is on the CPU, since {why}", sys.stderr)
    elif unseen := hardware.unseen_gpus():
        say(f"WARNING: rank {local_rank} here is on the CPU, since {unseen}", sys.stderr)
    if cuda:
        torch.cuda.set_device(device)
        grow_memory_in_place(device)
    else:
        keep_freed_memory()
    few_threads()
    _group_options["timeout"] = timedelta(seconds=timeout_s) if timeout_s else LONG_WAIT
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        deepspeed()
    torch.manual_seed(seed)
    return device


def _check_no_gpu_works(why: str) -> None:
    """Of several ranks, one on the CPU among others on GPUs: they would wait for each other for
    good. Where this process can use none of the GPUs that it sees, the others are taken to be on
    the CPU as well. why: what is wrong with its own GPU. Raises ValueError."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    works = [i for i in range(torch.cuda.device_count()) if not hardware.gpu_problem(i)]
    if works:
        raise ValueError(
            f"one of {os.environ['WORLD_SIZE']} ranks cannot use its GPU, and others can use "
            f"theirs: {why}. Leave that GPU out (CUDA_VISIBLE_DEVICES={','.join(map(str, works))}, "
            f"and {len(works)} ranks on this node), or train on the CPUs of all ranks "
            "(CUDA_VISIBLE_DEVICES= with nothing behind it)"
        )


def grow_memory_in_place(device: torch.device) -> None:
    """Have torch's allocator grow its segments, unless the user has told it how to work.

    Lengths that change from step to step would else leave it with pieces that fit none of the next
    ones: it then frees and asks for memory anew, which holds a step up. Some virtual machines
    refuse the calls that it takes: there it is tried in vain, and segments stay as they were.
    """
    told = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys()
    tell = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # torch 2.10 and newer
    if not tell or told:
        return
    tell("expandable_segments:True")
    try:
        torch.zeros(GROWN_BYTES, dtype=torch.uint8, device=device)
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        tell("expandable_segments:False")
        say(f"memory is not grown in place: {str(error).splitlines()[0]}", sys.stderr)


def keep_freed_memory() -> None:
    """Have the C library keep what a step frees for the next one, where it is glibc.

    By default each large tensor is mapped anew, and its pages are zeroed as they are first written.
    """
    trim_threshold, mmap_threshold, most = -1, -3, 32 * 2**20  # malloc.h; glibc takes no more
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, most)
        mallopt(trim_threshold, 2**31 - 1)


def few_threads() -> None:
    """No more of torch's than cores, where the user has not said how many: torch counts cores that
    a container's quota leaves no time on, and its threads then wait for each other."""
    if "OMP_NUM_THREADS" not in os.environ and hardware.cores() < torch.get_num_threads():
        torch.set_num_threads(hardware.cores())


def leave_group() -> None:
    """Leave the process group, where one was joined; one that was there before `start` stays."""
    _gloo_group.cache_clear()
    _long_timeout_group.cache_clear()
    if dist.is_initialized() and not _callers_group:
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """End this process with an exit status, its work done and its files closed.

    One of several ends at once: a gloo thread may still hold the last collective's tensor, and
    freeing that while the interpreter is being taken down aborts a run that had succeeded. So does
    a stream that cannot be flushed: at the end Python makes another status of that.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(status)
    sys.exit(status)


def deepspeed():
    """DeepSpeed, imported late (seconds), without what does not concern the user, and joined.

    Raises ValueError where it cannot be imported.
    """
    backend = "nccl" if hardware.has_gpu() else "gloo"
    if backend == "gloo":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed 0.19 still calls collectives and amp helpers by names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(deepspeed|torch)\.")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(
            f"DeepSpeed cannot be imported ({error}): several ranks, and what the deepspeed "
            "section asks for beyond a ZeRO stage, need it. Install it (pip install deepspeed; it "
            "has no build for macOS), or train on one process: python cjepa_fast/train.py"
        ) from error
    numbers = tuple(map(int, re.findall(r"\d+", deepspeed.__version__)[:3]))
    if numbers < OLDEST_DEEPSPEED:
        raise ValueError(
            f"DeepSpeed {deepspeed.__version__} may apply steps in bf16 whose gradients are not "
            "finite, and not say so: pip install --upgrade deepspeed, to 0.19.8 or newer"
        )
    if "RANK" not in os.environ and not dist.is_initialized():
        # In memory: no port is taken, nor RANK set, which processes started from here would see.
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed wants it
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    from deepspeed.runtime import compiler

    if hasattr(compiler, "dummy_decorator"):
        # Muon, which nothing here uses, is imported all the same and compiled as it is: 1.5 s.
        compiler.compile = lambda: compiler.dummy_decorator
    if backend == "gloo":
        # Otherwise DeepSpeed compiles a shared-memory collective for over a minute; gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(backend, verbose=False, **_group_options)
    return deepspeed


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class AllRanks:
    """The ranks of this training, for a statistic over all of them (kernels/common/ranks.py)."""

    @property
    def index(self) -> int:
        return rank()

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of x over the ranks, as a new tensor."""
        x = x.contiguous().clone()
        dist.all_reduce(x)
        return x

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's x, all of one shape, in the ranks' order."""
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return parts


def mean_over_ranks(terms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """0-d tensors by name, averaged over all ranks in one collective; no host sync."""
    if world_size() == 1:
        return terms
    values = torch.stack(list(terms.values()))
    dist.all_reduce(values)
    return dict(zip(terms, values / world_size(), strict=True))


def all_gather_objects(mine: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's object, in their order."""
    if world_size() == 1:
        return [mine]
    gathered: list = [None] * world_size()
    dist.all_gather_object(gathered, mine, group=group or _gloo_group())
    return gathered


def gather_rows(mine_nD: torch.Tensor, row_n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of one tensor that each rank has some of, put together by their ascending numbers.

    mine_nD (n, ...) on the CPU, of one dtype everywhere, and its rows' numbers (n,), ascending.
    Returns (N, ...), empty but on rank 0, and the numbers of all (N,) on every rank. They
    pass a piece at a time, so rank 0 needs room for them and its own, and no more.
    """
    if world_size() == 1:
        return mine_nD, row_n
    shares = all_gather_objects((row_n, mine_nD.shape[1:]))
    row_N = torch.cat([row for row, _ in shares]).sort().values
    if rank() != 0:
        for piece in mine_nD.split(PIECE_ROWS) if len(row_n) else ():
            dist.send(piece.contiguous(), 0, group=_gloo_group())
        return mine_nD.new_empty(0), row_N
    shape = next((shape for row, shape in shares if len(row)), ())
    whole_ND = mine_nD.new_empty(len(row_N), *shape)
    if len(row_n):
        whole_ND[torch.searchsorted(row_N, row_n)] = mine_nD
    for source, (row, _) in enumerate(shares[1:], 1):
        for part in row.split(PIECE_ROWS) if len(row) else ():
            piece = mine_nD.new_empty(len(part), *shape)
            dist.recv(piece, source, group=_gloo_group())
            whole_ND[torch.searchsorted(row_N, part)] = piece
    return whole_ND, row_N


def broadcast_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Rank 0's tensor, on the CPU, on every rank."""
    if world_size() == 1:
        return tensor
    shape, dtype = broadcast_from_rank_0(lambda: (tensor.shape, tensor.dtype))
    tensor = tensor if rank() == 0 else torch.empty(shape, dtype=dtype)
    for piece in tensor.split(PIECE_ROWS):
        dist.broadcast(piece, src=0, group=_gloo_group())
    return tensor


def any_rank(*flags: bool) -> tuple[bool, ...]:
    """Whether each flag is set on any rank; no GPU waits for it."""
    if world_size() == 1:
        return flags
    set_anywhere = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(set_anywhere, dist.ReduceOp.MAX, group=_gloo_group())
    return tuple(map(bool, set_anywhere))


@functools.cache
def _gloo_group() -> dist.ProcessGroup:
    """All ranks, for small matters on the CPU."""
    return dist.new_group(backend="gloo", **_group_options)


@functools.cache
def _long_timeout_group() -> dist.ProcessGroup | None:
    """All ranks, where one may take hours, as to index a large set: that it gets on is for the
    watchdog to see, where there is one (start()'s timeout_s); None where there is none."""
    if world_size() == 1 or not _group_options:
        return None
    return dist.new_group(backend="gloo", timeout=LONG_WAIT)


def broadcast_from_rank_0(make: Callable[[], T]) -> T:
    """What make() returns on rank 0, on all; a ValueError or OSError of it is raised on all."""
    made: list = [None, None]
    if rank() == 0:
        try:
            made[0] = make()
        except (ValueError, OSError) as error:
            made[1] = error
    if world_size() > 1:
        dist.broadcast_object_list(made, src=0, group=_gloo_group())
    if made[1] is not None:
        raise made[1]
    return made[0]


def all_gather_results(make: Callable[[], T]) -> list[T]:
    """What make() returns on every rank, in their order; a ValueError or OSError of one is raised
    on all."""
    try:
        mine = make()
    except (ValueError, OSError) as error:
        mine = error
    found = all_gather_objects(mine)
    for one in found:
        if isinstance(one, Exception):
            raise one
    return found


def local_rank_0_first(make: Callable[[], T]) -> T:
    """make() on rank 0 of each node, then on the others, which find its caches.

    An error on any rank is raised on all, so that none waits for one that has gone.
    """
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    made, error, group = None, None, _long_timeout_group()
    for turn in (True, False):
        if first is turn:
            try:
                made = make()
            except (ValueError, OSError) as caught:
                error = caught
        for found in all_gather_objects(error, group):
            if found is not None:
                raise found
    return made
