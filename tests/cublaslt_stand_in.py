"""A libcublasLt of Python: it computes, on a CPU, what the descriptors that it is given ask for.

Column-major, with transposes and leading dimensions, as NVIDIA's documentation says, from the bytes
of the attributes and the addresses of the operands. Its functions are C callbacks of the signatures
that cublaslt.py declares, so arguments are converted as for the real library.
"""

import ctypes
import itertools
import traceback
from collections import Counter

import torch
import torch.nn.functional as F

from cjepa_fast.model import cublaslt

OK, INVALID, INTERNAL, NOT_SUPPORTED = 0, 7, 14, 15  # statuses
DTYPES = {0: torch.float32, 2: torch.float16, 14: torch.bfloat16}
SIZES = {3: 4, 7: 4, 8: 8, 11: 8, 12: 8}  # bytes, by a description's attribute
PREFERENCE_SIZES = {1: 8, 5: 4, 6: 4, 7: 4, 8: 4}
WORKSPACE = 4096
GELU, DGELU, AUX, BIAS, BIAS_GRADIENT = 32, 64, 128, 4, 16


def bytes_at(address: int, count: int) -> bytes:
    return ctypes.string_at(address, count)


def number(raw: bytes) -> int:
    return int.from_bytes(raw, "little", signed=True)


def matrix(address: int, dtype: torch.dtype, rows: int, cols: int, ld: int) -> torch.Tensor:
    """The column-major matrix that lies there, to read and to write."""
    assert ld >= rows
    values = (cols - 1) * ld + rows
    raw = (ctypes.c_uint8 * (values * dtype.itemsize)).from_address(address)
    return torch.frombuffer(raw, dtype=dtype).as_strided((rows, cols), (1, ld))


class StandIn:
    """algorithms: how many it finds for a call."""

    def __init__(self, algorithms: int = 1):
        self.algorithms, self.made, self.numbers = algorithms, {}, itertools.count(1000)
        self.calls, self.created = Counter(), Counter()
        for name, arguments in cublaslt.SIGNATURES.items():
            setattr(self, name, ctypes.CFUNCTYPE(ctypes.c_int, *arguments)(self._told(name)))

    def _told(self, name: str):
        """The function; what goes wrong in it is a status, since C knows no exceptions."""

        def call(*args) -> int:
            try:
                return getattr(self, f"_{name}")(*args)
            except Exception:
                traceback.print_exc()
                return INTERNAL

        return call

    def _new(self, into: int, kind: str, what) -> int:
        handle = next(self.numbers)
        self.made[handle], self.created[kind] = what, self.created[kind] + 1
        ctypes.c_void_p.from_address(into).value = handle
        return OK

    def _cublasLtCreate(self, into):
        return self._new(into, "handle", "handle")

    def _cublasLtMatmulDescCreate(self, into, compute, scale):
        assert (compute, scale) == (68, 0)  # fp32
        return self._new(into, "description", {})

    def _cublasLtMatrixLayoutCreate(self, into, kind, rows, cols, ld):
        return self._new(into, "layout", (DTYPES[kind], rows, cols, ld))

    def _cublasLtMatmulPreferenceCreate(self, into):
        return self._new(into, "preference", {})

    def _set(self, sizes, of, attribute, value, size):
        if sizes.get(attribute) != size:
            return INVALID
        self.made[of][attribute] = number(bytes_at(value, size))
        return OK

    def _cublasLtMatmulDescSetAttribute(self, *args):
        return self._set(SIZES, *args)

    def _cublasLtMatmulPreferenceSetAttribute(self, *args):
        return self._set(PREFERENCE_SIZES, *args)

    def _cublasLtMatmulAlgoGetHeuristic(self, handle, desc, a, b, c, d, limits, most, to, count):
        assert self.made[handle] == "handle" and most >= 1 and self.made[c] == self.made[d]
        wanted = self.made[limits]
        assert wanted[1] >= WORKSPACE and all(0 < wanted[i] <= 256 for i in (5, 6, 7, 8))
        count[0] = self.algorithms
        if not self.algorithms:
            return NOT_SUPPORTED
        to[0].workspace_bytes, to[0].status = WORKSPACE, OK
        return OK

    def _cublasLtMatmul(
        self, handle, desc, alpha, a, of_a, b, of_b, beta, c, of_c, d, of_d, algo, work, size, _
    ):  # fmt: skip
        said = self.made[desc]
        assert size == WORKSPACE and work and c == d and algo
        one, zero = (ctypes.c_float.from_address(x).value for x in (alpha, beta))
        assert (one, zero) == (1.0, 0.0)
        a, b, out = (
            matrix(x, *self.made[of]) for x, of in ((a, of_a), (b, of_b), (d, of_d))
        )  # fmt: skip
        a = a.t() if said[3] else a
        assert a.shape[1] == b.shape[0] and out.shape == (a.shape[0], b.shape[1])
        self._epilogue(said, a.float() @ b.float(), out)
        return OK

    def _epilogue(self, said: dict, sums: torch.Tensor, out: torch.Tensor) -> None:
        epilogue, (rows, cols) = said[7], out.shape
        self.calls[epilogue] += 1
        bias = matrix(said[8], out.dtype, rows, 1, rows)
        assert epilogue & AUX and said[12] % 8 == 0
        aux = matrix(said[11], out.dtype, rows, cols, said[12])
        if epilogue & BIAS:
            sums = sums + bias.float()
        if epilogue & GELU:
            aux.copy_(sums)
            sums = F.gelu(sums, approximate="tanh")
        if epilogue & DGELU:
            sums = torch.ops.aten.gelu_backward(sums, aux.float(), approximate="tanh")
        if epilogue & BIAS_GRADIENT:
            bias.copy_(sums.sum(1, keepdim=True))
        out.copy_(sums)
