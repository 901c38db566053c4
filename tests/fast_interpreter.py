"""Triton's interpreter in half the time, and an overflow of its integers is an error.

What Triton makes anew for every operation is made once: the language is patched once a launch, an
array's dtype is looked up, the constants of a shape are kept.
"""

import contextlib
import math
from collections.abc import Iterator
from unittest import mock

import numpy as np


class _Scope:
    """Of a launch: what was patched within it is taken out with it."""

    def __init__(self):
        self.modules: set[int] = set()
        self.patched: list = []

    def restore(self) -> None:
        for scope in reversed(self.patched):
            scope.restore()
        self.modules.clear()
        self.patched.clear()


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Within it kernels run on CPU tensors too; RuntimeError without TRITON_INTERPRET=1."""
    from triton.language import core, semantic
    from triton.runtime import interpreter

    from cjepa_fast.kernels.common import launch  # which imports triton

    with (
        launch.interpreted(),
        mock.patch.object(interpreter, "_patch_lang", _patched_once()),
        mock.patch.object(interpreter, "_get_np_dtype", _looked_up()),
        mock.patch.object(core.block_type, "__init__", _block_type()),
        mock.patch.object(core.tensor, "__init__", _tensor()),
        mock.patch.object(
            semantic.TritonSemantic, "binary_op_sanitize_overflow_impl", _no_overflow
        ),
    ):
        yield


def _patched_once():
    """Triton puts its functions into the language for every call of one @triton.jit by another."""
    from triton import language
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, _Scope()

    def once(fn) -> _Scope:
        own = {id(x) for x in fn.__globals__.values() if x is language or x is language.core}
        if not own <= launch.modules:
            launch.patched.append(patch(fn))
            launch.modules |= own
        return launch

    return once


def _looked_up():
    """numpy's dtype of a Triton type: the original makes a table of all for each."""
    from triton.runtime import interpreter

    make, made = interpreter._get_np_dtype, {}

    def np_dtype(ty) -> np.dtype:
        name = ty.scalar.name
        if name not in made:
            made[name] = make(ty)
        return made[name]

    return np_dtype


def _block_type():
    """block_type.__init__, which checks a shape once and shares its tuple."""
    from triton.language import core

    made: dict[tuple, tuple] = {}

    def init(self, element_ty, shape) -> None:
        shape = tuple(s.value if isinstance(s, core.constexpr) else s for s in shape)
        if shape not in made:
            if not shape:
                raise TypeError("0d block_type is forbidden")
            values = core.tuple(shape)
            made[shape] = values, core.validate_block_shape(values), str(values)
        self.shape, self.numel, text = made[shape]
        self.element_ty = element_ty
        self.name = f"<{text}, {element_ty}>"

    return init


def _tensor():
    """tensor.__init__, which makes the constants of a shape once."""
    from triton.language import core

    made: dict[tuple, tuple] = {}

    def init(self, handle, type) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        shape = tuple(type.shape) if type.is_block() else ()
        if shape not in made:
            constants = core.tuple([core.constexpr(s) for s in shape])
            made[shape] = constants, core.constexpr(math.prod(shape))
        self.shape, self.numel = made[shape]

    return init


def _no_overflow(self, lhs, rhs, operation) -> None:
    """Integers of up to 32 bits stay within them; the original computes this and tells nobody."""
    ty = lhs.type.scalar
    if ty.int_bitwidth >= 64:
        return
    compute = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__]
    exact = compute(lhs.handle.data, rhs.handle.data, dtype=np.int64)
    within = ty.get_int_min_value() <= exact.min() and exact.max() <= ty.get_int_max_value()
    assert within, f"{ty} overflows in {operation.__name__}: {exact.min()} to {exact.max()}"
