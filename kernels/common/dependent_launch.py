"""Programmatic dependent launch: a kernel begins while the one before it ends (sm_90 and newer).

A kernel in a CUDA stream begins when the one before it has ended and its writes are visible. With
`launch_pdl` it may begin earlier: as soon as all programs of the kernel before have called
`gdc_launch_dependents`, or ended. Its programs then are on the multiprocessors already, and wait in
`gdc_wait` until the kernel before has ended, with its writes visible.

Why the result has the same bits:
- Our kernels call `gdc_wait` first. Before it they read their arguments, and no device memory.
- They call `gdc_launch_dependents` after it. So when a kernel begins early, the one before it is
  past its own wait, and all kernels before that one have ended. By induction everything that was
  launched earlier has ended when a wait returns: what it wrote can be read, what it read can be
  overwritten, and its memory can be used again.
- A kernel launched without the attribute (a matmul, one of torch's, our own of the loss and the
  update), a copy and an event wait until the kernel before has ended, early launches or not.
- A kernel of a library that is launched with the attribute has to wait itself, before it reads what
  came before it. `gdc_wait` returns when that kernel has ended, so the induction holds over it.
- The same instructions compute the same sums in the same order.

Programs that wait hold registers and shared memory, but take none from the kernel before: they
begin when all of its programs have begun. With the wait first, at most one kernel waits at a time.
On sm_100 attention reserves tensor memory before the wait. It may have to wait for that until
programs of the kernel before end, which need nothing of it.

A CUDA graph's recording takes such a launch as a programmatic edge between two kernels (CUDA 12.3
and newer). tests/kernels/aot_worker.py reads the order of wait and memory from the PTX and from
the machine code: a wait inside a pipelined loop comes after the loop's first loads (Triton 3.7.1,
triton-lang/triton#11905), so it must be a kernel's first statement.
"""

import dataclasses
from collections.abc import Iterable

import torch

from cjepa_fast.kernels.common.launch import INTERPRET, Compiled, at_least
from cjepa_fast.kernels.common.maybe_triton import tl, triton

OLDEST = 90  # sm_90, the first architecture with these instructions
INSTRUCTIONS = (r"griddepcontrol\.wait", r"griddepcontrol\.launch_dependents")

_on = False


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """The first statement of a kernel that may begin early; nothing without PDL."""
    if PDL and not INTERPRET:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def use_dependent_launch(on: bool) -> None:
    """Whether the launches from now on may begin early, of all kernels that have the argument PDL
    and on GPUs that can do it."""
    global _on
    _on = on


def dependent(device: torch.device) -> dict[str, bool]:
    """A launch's further arguments: empty where it does not begin early."""
    return {"PDL": True, "launch_pdl": True} if _on and at_least(OLDEST, device) else {}


def also_dependent(rows: Iterable[Compiled]) -> list[Compiled]:
    """The rows and, of each kernel and each number of its stages, the first as it begins early."""
    rows, first = list(rows), {}
    for row in rows:
        first.setdefault((row.kernel.__name__, row.constexprs.get("STAGES")), row)
    return rows + [_dependent(row) for row in first.values()]


def _dependent(row: Compiled) -> Compiled:
    return dataclasses.replace(
        row, name=f"{row.name}, dependent launch", constexprs=row.constexprs | {"PDL": True},
        must_have=(*row.must_have, *INSTRUCTIONS), since=max(row.since, OLDEST),
    )  # fmt: skip
