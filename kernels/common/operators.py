"""A launcher as an operator of torch's dispatcher: autograd, torch.compile and opcheck know it.

torch.library.custom_op does the same and more, at each call: it looks for outputs that share memory
with inputs, and imports torch._dynamo, 1.3 s of the start of a run that compiles nothing.
"""

import sys
from collections.abc import Callable

import torch

NAMESPACE = "cjepa_fast"


def operator(
    name: str, mutates: tuple[str, ...] = ()
) -> Callable[[Callable], torch._ops.OpOverload]:
    """Of an annotated function of tensors, the operator cjepa_fast::`name` on every device.

    mutates: the arguments that it writes. What it computes on fake tensors and its gradient are
    added by torch.library.register_fake and register_autograd.
    """

    def register(function: Callable) -> torch._ops.OpOverload:
        qualified = f"{NAMESPACE}::{name}"
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
        overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        written = [i for i, a in enumerate(overload._schema.arguments) if a.name in mutates]
        torch.library.impl(qualified, "default", _untraced(function, written))
        return overload

    return register


def _untraced(function: Callable, written: list[int]) -> Callable:
    """The function as the dispatcher calls it: torch.compile, once it is loaded, looks into no
    launcher, and autograd hears of tensors that are written (the arguments at `written`)."""
    hidden = None

    def run(*args):
        nonlocal hidden
        if hidden is None and "torch._dynamo" in sys.modules:
            hidden = torch.compiler.disable(function)
        out = (hidden or function)(*args)
        for index in written:
            torch.autograd.graph.increment_version(args[index])
        return out

    return run
