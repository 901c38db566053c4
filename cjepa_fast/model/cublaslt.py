"""cuBLASLt's matmuls that compute tanh's GELU on their way, called through ctypes.

    linear_gelu     u = x W^T + b, and gelu(u)               CUBLASLT_EPILOGUE_GELU_AUX_BIAS
    gelu_backward   du = (dout W2) gelu'(u), and its sum     CUBLASLT_EPILOGUE_DGELU_BGRAD
                    over the rows, the gradient of b

GELU works on a tile of the output while that is in registers: no pass over memory is spent on it.
torch calls the library for the first without u (torch._addmm_activation), which serves an encoder
that takes no gradient, and has nothing for the second. The library is the one that torch has loaded
itself. The path is entered by a trial (`problem`), since neither its values nor its presence are
promised. Operands are bf16 or fp16, sums fp32. gelu(u) is of u before that is rounded.

cuBLAS is column-major. A row-major (r, c) tensor is, as it lies, a column-major c x r matrix of
leading dimension c: its transpose. So the transposed outputs are asked for. R rows, D width, F
hidden, in cuBLAS's words m x n = op(A) m x k * op(B) k x n:

    linear_gelu     gelu(u)^T (F x R) = W x^T
        A = W  (F, D), seen as D x F, op T;   B = x    (R, D), seen as D x R, op N
    gelu_backward   du^T (F x R) = W2^T dout^T
        A = W2 (D, F), seen as F x D, op N;   B = dout (R, D), seen as D x R, op N
    in both         D = the output (R, F), seen as F x R;   the auxiliary matrix is u, in the same
                    layout;   the bias or its gradient has a value for each of D's F rows

Descriptors and the library's choice of an algorithm are kept by shapes, dtype and alignment. A call
allocates its workspace from torch, launches on the current CUDA stream and waits for nothing, so it
can be recorded in a CUDA graph.

Source: NVIDIA, cuBLAS documentation, cublasLtMatmul and cublasLtEpilogue_t; cublasLt.h of CUDA 13.
"""

import ctypes
import functools
import importlib.util
import math
import threading
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from cjepa_fast.runtime.rates import synchronize

# --- the library's own numbers

COMPUTE_32F, TRANSPOSED = 68, 1
TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
GELU_AUX_BIAS = 32 | 128 | 4
DGELU_BGRAD = 64 | 128 | 16
REFUSED = 7, 15  # statuses: an invalid value, not supported; nothing has been launched


class Attribute(NamedTuple):
    number: int
    type: type


TRANSA, EPILOGUE = Attribute(3, c_int32), Attribute(7, c_uint32)
BIAS, AUX, AUX_LD = Attribute(8, c_void_p), Attribute(11, c_void_p), Attribute(12, c_int64)
# Of a preference: the most workspace, and the alignment in bytes of A, B, C and D.
MOST_BYTES, ALIGNED = Attribute(1, c_uint64), [Attribute(i, c_uint32) for i in (5, 6, 7, 8)]


class Algorithm(ctypes.Structure):
    _fields_ = [("data", c_uint64 * 8)]


class Heuristic(ctypes.Structure):
    _fields_ = [
        ("algorithm", Algorithm),
        ("workspace_bytes", c_size_t),
        ("status", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    ]


_set = c_void_p, c_int, c_void_p, c_size_t  # of whom, which, the value, its bytes
SIGNATURES = {
    "cublasLtCreate": (c_void_p,),
    "cublasLtMatmulDescCreate": (c_void_p, c_int, c_int),
    "cublasLtMatmulDescSetAttribute": _set,
    "cublasLtMatrixLayoutCreate": (c_void_p, c_int, c_uint64, c_uint64, c_int64),
    "cublasLtMatmulPreferenceCreate": (c_void_p,),
    "cublasLtMatmulPreferenceSetAttribute": _set,
    # handle, description, layouts of A, B, C, D, preference, how many, where to, how many there are
    "cublasLtMatmulAlgoGetHeuristic": (*[c_void_p] * 7, c_int, POINTER(Heuristic), POINTER(c_int)),
    # handle, description, alpha, A, its layout, B, its layout, beta, C, its layout, D, its layout,
    # algorithm, workspace, its bytes, stream
    "cublasLtMatmul": (*[c_void_p] * 14, c_size_t, c_void_p),
}  # fmt: skip


def bind(library):
    """A library whose functions know their arguments."""
    for name, arguments in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c_int
    return library


def library_path() -> Path | None:
    """The libcublasLt in this process, or else the one that lies beside torch; None without one."""
    name = "libcublasLt.so"
    maps = Path("/proc/self/maps")
    lines = (
        maps.read_text(encoding="utf-8", errors="replace").splitlines() if maps.is_file() else []
    )
    loaded = [line.split(maxsplit=5)[-1] for line in lines if name in line]
    spec = importlib.util.find_spec("nvidia")
    folders = map(Path, (spec and spec.submodule_search_locations) or ())
    beside = (path for folder in folders for path in sorted(folder.glob(f"*/lib/{name}*")))
    return next((path for path in (*map(Path, loaded), *beside) if path.is_file()), None)


# --- the calls

MOST_WORKSPACE = 32 * 2**20  # bytes, as torch takes on Hopper


class Plan(NamedTuple):
    description: c_void_p
    layouts: tuple[c_void_p, c_void_p, c_void_p]  # of A, B and D
    algorithm: Algorithm
    workspace_bytes: int


class Matmuls:
    """The calls of one device, and what is kept for them. library: as `bind` gives it."""

    def __init__(self, library):
        self.library, self.plans, self.lock = library, {}, threading.Lock()
        self.handle = self._new("cublasLtCreate")
        self.preference = self._new("cublasLtMatmulPreferenceCreate")

    def run(
        self,
        epilogue: int,
        a: torch.Tensor,
        b_RK: torch.Tensor,
        out_RF: torch.Tensor,
        bias_F: torch.Tensor,
        aux_RF: torch.Tensor,
        op_a: int = 0,
    ) -> bool:
        """Fills out and what the epilogue writes of bias and aux; False where the library has no
        algorithm for that. Dense row-major tensors of one dtype; a: (F, K) where op_a is
        TRANSPOSED, else (K, F). Raises RuntimeError for a call that fails."""
        tensors = a, b_RK, out_RF, bias_F, aux_RF
        aligned = tuple(map(alignment, tensors))
        key = epilogue, op_a, a.shape, b_RK.shape, a.dtype, aligned
        with self.lock, torch.cuda.device_of(a):  # forward and backward have threads of their own
            if key not in self.plans:
                self.plans[key] = self._planned(epilogue, op_a, tensors, aligned)
            if (plan := self.plans[key]) is None:
                return False
            self._point(plan.description, bias_F, aux_RF)
            status = self._launch(plan, a, b_RK, out_RF)
            if status in REFUSED:
                self.plans[key] = None
                return False
        if status:
            raise RuntimeError(f"cublasLtMatmul: cuBLAS status {status}")
        return True

    def _launch(self, plan: Plan, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> int:
        """The status."""
        workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=a.device)
        one, zero = c_float(1), c_float(0)
        of_a, of_b, of_d = plan.layouts
        return self.library.cublasLtMatmul(
            self.handle, plan.description,
            ctypes.byref(one), a.data_ptr(), of_a, b.data_ptr(), of_b,
            ctypes.byref(zero), out.data_ptr(), of_d, out.data_ptr(), of_d,
            ctypes.byref(plan.algorithm), workspace.data_ptr(), plan.workspace_bytes,
            torch.cuda.current_stream(a.device).cuda_stream if a.is_cuda else None,
        )  # fmt: skip

    def _planned(
        self, epilogue: int, op_a: int, tensors: tuple[torch.Tensor, ...], aligned: tuple[int, ...]
    ) -> Plan | None:
        a, b, out, bias, aux = tensors
        description = self._new("cublasLtMatmulDescCreate", COMPUTE_32F, TYPES[torch.float32])
        for attribute, value in ((TRANSA, op_a), (EPILOGUE, epilogue), (AUX_LD, aux.shape[1])):
            self._set("cublasLtMatmulDesc", description, attribute, value)
        self._point(description, bias, aux)  # the choice heeds their alignment
        limits = zip(
            (MOST_BYTES, *ALIGNED), (MOST_WORKSPACE, *aligned[:3], aligned[2]), strict=True
        )
        for attribute, value in limits:
            self._set("cublasLtMatmulPreference", self.preference, attribute, value)
        layouts = tuple(map(self._layout, (a, b, out)))
        found, count = Heuristic(), c_int()
        status = self.library.cublasLtMatmulAlgoGetHeuristic(
            self.handle, description, *layouts, layouts[-1], self.preference, 1,
            ctypes.byref(found), ctypes.byref(count),
        )  # fmt: skip
        if status or not count.value or found.status:
            return None
        return Plan(description, layouts, found.algorithm, found.workspace_bytes)

    def _layout(self, rows: torch.Tensor) -> c_void_p:
        """The layout of a row-major matrix, as the column-major matrix that it is."""
        r, c = rows.shape
        return self._new("cublasLtMatrixLayoutCreate", TYPES[rows.dtype], c, r, c)

    def _point(self, description: c_void_p, bias: torch.Tensor, aux: torch.Tensor) -> None:
        self._set("cublasLtMatmulDesc", description, BIAS, bias.data_ptr())
        self._set("cublasLtMatmulDesc", description, AUX, aux.data_ptr())

    def _set(self, kind: str, of: c_void_p, attribute: Attribute, value: int) -> None:
        value = attribute.type(value)
        self._call(
            f"{kind}SetAttribute", of, attribute.number, ctypes.byref(value), ctypes.sizeof(value)
        )

    def _new(self, name: str, *args) -> c_void_p:
        made = c_void_p()
        self._call(name, ctypes.byref(made), *args)
        return made

    def _call(self, name: str, *args) -> None:
        if status := getattr(self.library, name)(*args):
            raise RuntimeError(f"{name}: cuBLAS status {status}")


def alignment(x: torch.Tensor) -> int:
    """The largest power of two, up to 256, of which x's address is a multiple."""
    return min(x.data_ptr() & -x.data_ptr(), 256)


@functools.cache
def matmuls(device: torch.device) -> Matmuls:
    """Raises OSError or AttributeError for a library that cannot be loaded or is another."""
    with torch.cuda.device(device):
        return Matmuls(bind(ctypes.CDLL(str(library_path()))))


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def linear_gelu(
    x: torch.Tensor, weight_FD: torch.Tensor, bias_F: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """u = x W^T + b and gelu(u), each (..., F), of x (..., D). None where cuBLASLt has no algorithm
    for it."""
    rows_RD = _dense(x)
    u_RF, hidden_RF = (x.new_empty(len(rows_RD), len(weight_FD)) for _ in range(2))
    done = matmuls(x.device).run(
        GELU_AUX_BIAS, weight_FD.contiguous(), rows_RD, hidden_RF, bias_F, u_RF, TRANSPOSED
    )
    shape = *x.shape[:-1], len(weight_FD)
    return (u_RF.view(shape), hidden_RF.view(shape)) if done else None


def gelu_backward(
    dout: torch.Tensor, weight_DF: torch.Tensor, u: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """du (..., F), and its sum over the rows (F,), of the gradient (..., D) of gelu(u) W^T. None
    where cuBLASLt has no algorithm for it."""
    u_RF, dout_RD = _dense(u), _dense(dout)
    du_RF, sums_F = torch.empty_like(u_RF), u.new_empty(u.shape[-1])
    done = matmuls(u.device).run(DGELU_BGRAD, weight_DF.contiguous(), dout_RD, du_RF, sums_F, u_RF)
    return (du_RF.view(u.shape), sums_F) if done else None


# --- the trials

MULTIPLE = 8  # of which u's width must be one, and the others, for the tensor cores


def takes(x: torch.Tensor, weight_FD: torch.Tensor) -> bool:
    """Whether linear_gelu and gelu_backward serve an MLP of x, whose first weight this is."""
    sizes = all(size % MULTIPLE == 0 for size in weight_FD.shape) and x.numel() > 0
    return x.is_cuda and sizes and not problem(x.device, weight_FD.dtype)


# Rows, width and hidden width of the MLPs that are tried: as small as may be, and of a size for
# which the library takes the kernels of a training.
TRIED = (24, 32, 48), (512, 264, 1032)


@functools.cache
def problem(device: torch.device, dtype: torch.dtype) -> str:
    """Why GELU in training is not computed in the matmuls here, in words, "" where it is: tried."""
    if library_path() is None:
        return "torch has loaded no libcublasLt"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"not of {dtype}"
    try:
        return next((why for size in TRIED if (why := fault(device, dtype, size))), "")
    except (OSError, AttributeError, RuntimeError) as error:
        synchronize(device)  # raises where the device itself has failed: then no run goes on
        return f"{type(error).__name__}: {str(error)[:200]}"


@functools.cache
def torch_is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's own matmul with a GELU, torch._addmm_activation, computes tanh's here."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        x, weight, bias, *_ = _sample(device, dtype, TRIED[0])
        found = torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
        u = F.linear(x.float(), weight.float(), bias.float())
        return _near(found, F.gelu(u, approximate="tanh"))


@torch.no_grad()
def fault(device: torch.device, dtype: torch.dtype, size: tuple[int, int, int]) -> str:
    """What is wrong with the two calls, of an MLP from D to H and back, for R rows: in words, ""
    where they come out as torch computes them apart. size: (R, D, H)."""
    with torch.autocast(device.type, enabled=False):
        x, weight, bias, dout, second = _sample(device, dtype, size)
        u = F.linear(x.float(), weight.float(), bias.float())
        du = torch.ops.aten.gelu_backward(
            dout.float() @ second.float(), u.to(dtype).float(), approximate="tanh"
        )
        found = linear_gelu(x, weight, bias), gelu_backward(dout, second, u.to(dtype))
        if None in found:
            return f"cuBLASLt has no algorithm for {size}"
        wanted = (u, F.gelu(u, approximate="tanh")), (du, du.sum(0))
        right = all(
            _near(*pair)
            for ours, theirs in zip(found, wanted, strict=True)
            for pair in zip(ours, theirs, strict=True)
        )
        return "" if right else "cuBLASLt computes another GELU, or wrongly"


def _sample(
    device: torch.device, dtype: torch.dtype, size: tuple[int, int, int]
) -> list[torch.Tensor]:
    """x (R, D), W1 (H, D), b (H,), dout (R, D) and W2 (D, H), of few bits, so that u, from -3 to 3
    or so, is the same however it is summed."""
    R, D, H = size
    shapes = (R, D), (H, D), (H,), (R, D), (D, H)
    made = []
    for shape, period, scale in zip(shapes, (7, 5, 3, 11, 13), (1, 8, 2, 4, 8), strict=True):
        numbers = torch.arange(math.prod(shape)) * 5 % period - period // 2
        made.append((numbers.view(shape) / scale).to(device, dtype))
    return made


def _near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Within 1 % of the largest value: false for NaN."""
    return bool((found.float() - wanted).abs().max() <= 0.01 * wanted.abs().max())
