"""`triton` and `tl`, its language, or what stands for them where Triton cannot be imported.

Triton has no build for macOS. There the kernels are defined all the same and never run, since every
function of this package takes its plain-PyTorch path on a CPU. Launching one raises
ModuleNotFoundError.
"""

from types import SimpleNamespace

try:
    import triton
    import triton.language as tl
    from triton.errors import TritonError
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError as error:
    WHY_NOT = str(error)

    class TritonError(Exception):
        """A kernel that cannot be compiled, or that the GPU has no room for."""

    class TensorDescriptor:
        """Of a tensor, for the GPU's tensor memory accelerator: never made without a GPU."""

    class _Constexpr:
        def __init__(self, value):
            self.value = value

    class _Kernel:
        """What @triton.jit makes of a function: it can be passed on, but not run."""

        def __init__(self, function):
            self.__name__ = function.__name__

        def __call__(self, *_, **__):
            raise ModuleNotFoundError(
                f"{self.__name__} is a Triton kernel, and Triton cannot be imported ({WHY_NOT}): "
                "pip install triton, or keep the tensors on the CPU"
            )

        __getitem__ = __call__  # kernel[grid](...)

    def _jit(function=None, **_):
        return _jit if function is None else _Kernel(function)

    class _Language:
        """Types and operations by name; nothing reads them before a kernel runs."""

        constexpr = _Constexpr

        def __getattr__(self, name: str) -> str:
            return f"tl.{name}"

    tl = _Language()
    triton = SimpleNamespace(
        jit=_jit,
        cdiv=lambda a, b: -(-a // b),
        next_power_of_2=lambda n: 1 << (n - 1).bit_length(),
        knobs=SimpleNamespace(runtime=SimpleNamespace(interpret=False)),
    )

__all__ = ["TensorDescriptor", "TritonError", "tl", "triton"]
