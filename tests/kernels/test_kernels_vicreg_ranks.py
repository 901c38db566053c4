"""VICReg's terms over 1, 2 and 4 ranks with uneven rows, against one with the whole batch."""

import contextlib
import functools
import itertools
from typing import NamedTuple

import fast_interpreter
import forks
import pytest
import tiny
import torch
import torch.distributed as dist
from kernel_checks import within_budget

from cjepa_fast.kernels.common import launch
from cjepa_fast.kernels.vicreg import vicreg_terms, vicreg_terms_reference
from cjepa_fast.runtime.distributed import AllRanks

# The rows of each rank; one of four has none, one a single row.
WORLDS = {1: (9,), 2: (7, 2), 4: (5, 1, 0, 3)}


class Case(NamedTuple):
    blocks: int  # M, or 0 for z without that dimension
    width: int  # with 4 mostly the moments are fewer bytes than the rows, with 40 the reverse
    dtype: torch.dtype
    kernels: bool  # Triton's, in the interpreter; else plain PyTorch

    @property
    def name(self) -> str:
        path = "kernels" if self.kernels else "plain"
        return f"{self.blocks} blocks, width {self.width}, {self.dtype}, {path}"

    def batch(self) -> torch.Tensor:
        """All ranks' rows, of which the first lie elsewhere, as in sorted data."""
        g = torch.Generator().manual_seed(self.blocks + self.width)
        shape = (self.blocks,) * (self.blocks > 0) + (9, self.width)
        z = torch.randn(shape, generator=g, dtype=torch.float64)
        z = z * torch.linspace(0.3, 1.5, self.width, dtype=torch.float64) + 5
        z[..., :5, :] += 2
        return z.to(self.dtype)


PLAIN = [torch.float64, torch.float32]
KERNELS = [torch.float32, torch.bfloat16]
CASES = [
    Case(blocks, width, dtype, kernels)
    for blocks, width in itertools.product((0, 3), (4, 40))
    for kernels, dtypes in ((False, PLAIN), (True, KERNELS))
    for dtype in dtypes
]


def slopes_of(rank: int) -> tuple[float, float]:
    """The upstream gradients of std and cov, another pair in each rank."""
    return 1.0 + rank, 0.5 - 0.2 * rank


class Counted:
    """Counts the bytes that collectives move: of what is reduced, or of all that is gathered."""

    def __init__(self, monkeypatch):
        self.bytes = 0
        for name in ("all_reduce", "all_gather"):
            inner = getattr(dist, name)
            monkeypatch.setattr(dist, name, functools.partial(self.call, inner))

    def call(self, inner, tensors, *args, **kwargs):
        several = tensors if isinstance(tensors, list) else [tensors]
        self.bytes += sum(t.numel() * t.element_size() for t in several)
        return inner(tensors, *args, **kwargs)


def found_by(rank: int, rows: tuple[int, ...], case: Case, counted: Counted) -> dict:
    """The terms that a rank finds, the gradient at its rows, and the bytes it moved."""
    z = case.batch().split(rows, dim=-2)[rank].requires_grad_()
    counted.bytes = 0
    with fast_interpreter.interpreted() if case.kernels else contextlib.nullcontext():
        std, cov, per_dim = vicreg_terms(z, ranks=AllRanks())
        a, b = slopes_of(rank)
        (a * std + b * cov).backward()
    found = {"std": std.detach(), "cov": cov.detach(), "per_dim": per_dim, "dz": z.grad}
    return found | {"moved": counted.bytes}


def refuses(rows: int) -> bool:
    """Whether two rows are asked for, on every rank; one rank that waited would hang."""
    try:
        vicreg_terms(torch.zeros(rows, 3), ranks=AllRanks())
    except ValueError as error:
        return "all ranks together have 1" in str(error)
    return False


def worker(rank: int, port: int, rows: tuple[int, ...], out: str) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=len(rows))
    with pytest.MonkeyPatch.context() as monkeypatch:
        counted = Counted(monkeypatch)
        found = {case.name: found_by(rank, rows, case, counted) for case in CASES}
    found["refused"] = refuses(int(rank == 0))
    torch.save(found, f"{out}/rank{rank}.pt")
    dist.destroy_process_group()


@functools.cache
def together(world: int, out: str) -> list[dict]:
    """What each of `world` ranks finds."""
    port = tiny.free_port()
    forks.spawn(worker, (port, WORLDS[world], out), world)
    return [torch.load(f"{out}/rank{rank}.pt") for rank in range(world)]


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=() if n == 2 else pytest.mark.long) for n in WORLDS],
)
def ranks(request, tmp_path_factory) -> list[dict]:
    if not launch.INTERPRETING:
        pytest.skip("the ranks' kernels run in Triton's interpreter")
    return together(request.param, str(tmp_path_factory.mktemp("ranks")))


def alone(case: Case, world: int, dtype: torch.dtype) -> dict:
    """One rank with all rows, by the definition: the sum over the ranks of their losses."""
    z = case.batch().to(dtype).requires_grad_()
    std, cov, per_dim = vicreg_terms_reference(z)
    for a, b in map(slopes_of, range(world)):
        (a * std + b * cov).backward(retain_graph=True)
    return {"std": std.detach(), "cov": cov.detach(), "per_dim": per_dim, "dz": z.grad}


@pytest.mark.multiprocess
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ranks_together_equal_one_with_the_whole_batch(ranks, case):
    found = [rank[case.name] for rank in ranks]
    eager, exact = (alone(case, len(ranks), dtype) for dtype in (case.dtype, torch.float64))
    whole = {"dz": torch.cat([f["dz"] for f in found], dim=-2)}
    for name, wanted in exact.items():
        for got in [whole] if name == "dz" else found:
            if case.dtype == torch.float64:
                torch.testing.assert_close(got[name], wanted, rtol=1e-11, atol=1e-13)
            else:
                within_budget(got[name], eager[name], wanted, case.dtype, name)
    for name in ("std", "cov", "per_dim"):
        assert all(torch.equal(f[name], found[0][name]) for f in found)


def bytes_of(case: Case, rows: tuple[int, ...]) -> tuple[int, int]:
    """What gathering z moves, and what reducing column sums (in float64) and moments does."""
    size, wide = (torch.empty(0, dtype=t).element_size() for t in (case.dtype, torch.float32))
    D = case.width
    each = len(rows) * max(rows) * D * size, D * 8 + D * D * max(size, wide)
    return each[0] * max(case.blocks, 1), each[1] * max(case.blocks, 1)


@pytest.mark.multiprocess
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_fewer_bytes_are_moved(ranks, case):
    counts_and_slopes = 8 * len(ranks) + 2 * ranks[0][case.name]["std"].element_size()
    expected = min(bytes_of(case, WORLDS[len(ranks)])) + counts_and_slopes
    assert {rank[case.name]["moved"] for rank in ranks} == {expected}


def test_the_cases_take_both_ways():
    for kernels, rows in itertools.product((False, True), WORLDS.values()):
        ways = [bytes_of(case, rows) for case in CASES if case.kernels == kernels]
        assert {gathered < reduced for gathered, reduced in ways} == {False, True}


@pytest.mark.multiprocess
def test_a_single_row_in_all_ranks_is_refused_by_each(ranks):
    assert all(rank["refused"] for rank in ranks)
