"""What the tests of all kernels share: error budget, custom-op checks, repeatability."""

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType

import torch

from cjepa_fast import kernels

# What a result may be off, of the largest value, where the eager reference happens to be exact.
# fp32 sums in another order than eager; the narrow types' results are rounded once.
FLOOR = {torch.float32: 4e-7, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def within_budget(
    kernel_out: torch.Tensor,
    eager_out: torch.Tensor,
    exact: torch.Tensor,
    dtype: torch.dtype,
    what: str = "result",
    floor: float | None = None,
) -> None:
    """Fails unless |kernel - exact| <= 2 |eager - exact| + a floor, in the largest and rms error.

    eager_out: the reference in the kernel's dtype; exact: the reference in float64; dtype: the
    narrowest type the computation rounds to; floor: what its inputs are rounded to beside, FLOOR's
    by default. NaN and infinity fail, as do other shapes and dtypes.
    """
    assert kernel_out.shape == exact.shape, f"{what}: {kernel_out.shape}, not {exact.shape}"
    assert kernel_out.dtype == eager_out.dtype, f"{what}: {kernel_out.dtype}"
    if exact.numel() == 0:
        return
    scale = exact.abs().max().item()
    for name, measure in {"largest": torch.amax, "rms": _rms}.items():
        error, eager = (measure((x.double() - exact).abs()).item() for x in (kernel_out, eager_out))
        budget = 2 * eager + (FLOOR[dtype] if floor is None else floor) * scale
        assert error <= budget, (  # false for NaN too
            f"{what}: {name} error {error:.3g} over its budget {budget:.3g} "
            f"(eager {eager:.3g}, largest value {scale:.3g}, {dtype})"
        )


def _rms(error: torch.Tensor) -> torch.Tensor:
    return error.square().mean().sqrt()


def same_bits(call: Callable[[], tuple[torch.Tensor, ...]]) -> None:
    """Fails unless calling twice gives the same bits (NaN equals NaN)."""
    for a, b in zip(call(), call(), strict=True):
        assert torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def check_operator(op, args: tuple) -> None:
    """torch.library.opcheck: schema, fake tensors, autograd registration, AOT dispatch."""
    torch.library.opcheck(op, args)


def compiles_whole(function: Callable, *args: torch.Tensor) -> None:
    """Fails where torch.compile(fullgraph=True) breaks the graph, or changes results or gradients.

    On the CPU the graph is traced and differentiated ahead, and run op by op (no C++ compiler).
    """
    backend = "inductor" if args[0].is_cuda else "aot_eager"
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    results = []
    for call in (function, compiled):
        inputs = [a.detach().clone().requires_grad_(a.requires_grad) for a in args]
        out = call(*inputs)
        wanted = [x for x in inputs if x.requires_grad]
        grads = torch.autograd.grad(out.float().square().sum(), wanted) if wanted else ()
        results.append((out.detach(), *grads))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


class InTurn:
    """A stand-in for ranks, which run one after another, several rounds: each sum has the others'
    of the round before. Three rounds make two sums that follow one another exact, and the result.
    """

    ROUNDS = 3

    def __init__(self, world: int):
        self.heard: list[list[torch.Tensor]] = [[] for _ in range(world)]

    def run(self, call) -> list:
        for _ in range(self.ROUNDS):
            self.before, self.heard = self.heard, [[] for _ in self.heard]
            found = [self._as(index, call) for index in range(len(self.heard))]
        return found

    def _as(self, index: int, call):
        self.index = index
        return call(index)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        own = self.heard[self.index]
        own.append(x.detach().clone())
        parts = [before[len(own) - 1] if before else 0 * own[-1] for before in self.before]
        parts[self.index] = own[-1]
        return torch.stack(parts).sum(0)


def modules_to_compile() -> dict[str, ModuleType]:
    """The modules of kernels/ that say what is to be compiled ahead of time, by name: "gelu",
    "gather.tokens"."""
    prefix = f"{kernels.__name__}."
    names = [info.name for info in pkgutil.walk_packages(kernels.__path__, prefix)]
    modules = {name.removeprefix(prefix): importlib.import_module(name) for name in names}
    return {name: m for name, m in modules.items() if hasattr(m, "ahead_of_time")}
