"""cuBLASLt's matmuls with GELU: the calls, by a stand-in that computes what they describe; the
numbers of attributes, by the real library where there is one; on a GPU, the calls themselves."""

import ctypes
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cublaslt_stand_in import StandIn
from kernel_checks import within_budget

from cjepa_fast.model import cublaslt, fused_mlp

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16]
FORWARD, BACKWARD = cublaslt.GELU_AUX_BIAS, cublaslt.DGELU_BGRAD


@pytest.fixture
def library(monkeypatch) -> StandIn:
    return stand_in(monkeypatch)


def stand_in(monkeypatch, **options) -> StandIn:
    library = StandIn(**options)
    made = cublaslt.Matmuls(cublaslt.bind(library))
    monkeypatch.setattr(cublaslt, "matmuls", lambda device: made)
    return library


def operands(dtype, shape=(3, 7, 16), hidden=24) -> list[torch.Tensor]:
    """x, W1, b, dout, W2 and u of an MLP, no two sizes alike."""
    width = shape[-1]
    made = torch.randn(shape), torch.randn(hidden, width) / 4, torch.randn(hidden)
    made += torch.randn(shape), torch.randn(width, hidden) / 4, torch.randn(*shape[:-1], hidden)
    return [x.to(dtype) for x in made]


def plain(x, weight, bias, dout, second, u) -> dict[str, torch.Tensor]:
    seen = u.detach().requires_grad_()
    (du,) = torch.autograd.grad(F.gelu(seen, approximate="tanh"), seen, dout @ second)
    before = F.linear(x, weight, bias)
    hidden = F.gelu(before, approximate="tanh")
    return {"u": before, "hidden": hidden, "du": du, "sums": du.flatten(0, -2).sum(0)}


def check(given: list[torch.Tensor]) -> None:
    x, weight, bias, dout, second, u = given
    found = *cublaslt.linear_gelu(x, weight, bias), *cublaslt.gelu_backward(dout, second, u)
    eager, exact = plain(*given), plain(*(t.double() for t in given))
    for got, (name, wanted) in zip(found, exact.items(), strict=True):
        within_budget(got, eager[name], wanted, x.dtype, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 7, 16), (5, 8), (1, 1, 40), (2, 3, 5, 8)])
def test_forward_and_backward_are_within_the_error_budget(seed, library, dtype, shape):
    check(operands(dtype, shape))
    assert library.calls == {FORWARD: 1, BACKWARD: 1}


def test_operands_that_lie_elsewhere_or_otherwise(seed, library):
    """A weight in the middle of a flat buffer, a gradient that is a transpose."""
    given = operands(torch.bfloat16)
    flat = torch.zeros(400, dtype=torch.bfloat16)
    given[1] = flat[3:387].copy_(given[1].flatten()).view(24, 16)
    given[3] = given[3].transpose(0, 1).contiguous().transpose(0, 1)
    assert not given[3].is_contiguous() and cublaslt.alignment(given[1]) < 16
    check(given)


def test_a_call_is_planned_once_for_its_shapes_and_alignment(seed, library, monkeypatch):
    aligned = lambda x: 64 if x.data_ptr() % 64 == 0 else 2  # noqa: E731, as on a GPU
    monkeypatch.setattr(cublaslt, "alignment", aligned)
    given = operands(torch.bfloat16)
    for _ in range(3):
        check(given)
    assert library.created == {"handle": 1, "preference": 1, "description": 2, "layout": 6}
    before = library.created["description"]
    cublaslt.linear_gelu(given[0][:2], *given[1:3])
    assert library.created["description"] == before + 1
    off = torch.zeros(25, dtype=torch.bfloat16)[1:]
    cublaslt.linear_gelu(given[0][:2], given[1], off)
    assert library.created["description"] == before + 2


def test_what_it_has_no_algorithm_for_is_left_to_others(seed, monkeypatch):
    library = stand_in(monkeypatch, algorithms=0)
    x, weight, bias, dout, second, u = operands(torch.bfloat16)
    assert cublaslt.linear_gelu(x, weight, bias) is cublaslt.gelu_backward(dout, second, u) is None
    assert not library.calls
    monkeypatch.setattr(cublaslt, "library_path", lambda: Path(os.devnull))
    found = cublaslt.problem.__wrapped__(CPU, torch.bfloat16)
    assert found == "cuBLASLt has no algorithm for (24, 32, 48)"


def test_a_call_that_fails_is_named(library, monkeypatch):
    monkeypatch.setattr(library, "_cublasLtMatmul", lambda *_: 14)
    with pytest.raises(RuntimeError, match="cublasLtMatmul: cuBLAS status 14"):
        cublaslt.linear_gelu(*operands(torch.bfloat16)[:3])
    monkeypatch.setattr(library, "_cublasLtMatmul", lambda *_: 15)  # not supported
    assert cublaslt.linear_gelu(*operands(torch.bfloat16)[:3]) is None
    monkeypatch.setattr(library, "_cublasLtMatmulPreferenceSetAttribute", lambda *_: 7)
    with pytest.raises(RuntimeError, match="PreferenceSetAttribute: cuBLAS status 7"):
        cublaslt.linear_gelu(*operands(torch.bfloat16, (9, 16))[:3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_trial_finds_what_is_right_and_what_is_not(library, monkeypatch, dtype):
    assert not any(cublaslt.fault(CPU, dtype, size) for size in cublaslt.TRIED)
    right = library._epilogue
    wrongs = {
        "no GELU": lambda said: said | {7: FORWARD & ~32},
        "no bias": lambda said: said | {7: said[7] & ~4},
        "no slope": lambda said: said | {7: said[7] & ~64},
        "no bias gradient": lambda said: said | {7: said[7] & ~16},
    }
    for name, change in wrongs.items():
        wrong = lambda said, *rest, change=change: right(change(said), *rest)  # noqa: E731
        monkeypatch.setattr(library, "_epilogue", wrong)
        for size in cublaslt.TRIED:
            assert cublaslt.fault(CPU, dtype, size).endswith("wrongly"), name


def test_torch_s_own_on_a_cpu_is_not_tanh_s_and_is_not_asked(monkeypatch):
    """The trial allows 1 %, which the two kinds are not apart: so the device decides."""
    assert not fused_mlp.gelu_by_torch(torch.zeros(1), torch.zeros(1))
    assert cublaslt.torch_is_right.__wrapped__(CPU, torch.float32)
    monkeypatch.setattr(torch, "_addmm_activation", lambda b, x, w, use_gelu: x @ w + b)
    assert not cublaslt.torch_is_right.__wrapped__(CPU, torch.float32)


def test_why_it_is_not_taken_is_told(monkeypatch):
    problem = cublaslt.problem.__wrapped__
    monkeypatch.setattr(cublaslt, "library_path", lambda: None)
    assert problem(CPU, torch.bfloat16) == "torch has loaded no libcublasLt"
    monkeypatch.setattr(cublaslt, "library_path", lambda: Path(os.devnull))
    assert problem(CPU, torch.float32) == "not of torch.float32"
    monkeypatch.setattr(cublaslt, "matmuls", lambda device: ctypes.CDLL(os.devnull))
    assert problem(CPU, torch.bfloat16).startswith("OSError: ")
    monkeypatch.setattr(cublaslt, "problem", problem)
    assert "not inside cuBLASLt's matmuls (OSError: " in fused_mlp.describe_gelu(
        CPU, torch.bfloat16
    )
    monkeypatch.setattr(cublaslt, "fault", lambda *given: "of 512 rows" * (given[2][0] == 512))
    assert problem(CPU, torch.bfloat16) == "of 512 rows"
    monkeypatch.setattr(cublaslt, "fault", lambda *_: "")
    assert fused_mlp.describe_gelu(CPU, torch.bfloat16) == "GELU: inside the matmuls, by cuBLASLt"
    x, weight = torch.zeros(2, 8), torch.zeros(8, 8)
    assert not cublaslt.takes(x, weight)  # on a CPU


def test_the_library_is_found_in_the_process_or_beside_torch(tmp_path, monkeypatch):
    """Here neither, unless torch is built for CUDA."""
    if torch.version.cuda:
        assert cublaslt.library_path().name.startswith("libcublasLt.so")
    (tmp_path / "nvidia" / "cu13" / "lib").mkdir(parents=True)
    there = tmp_path / "nvidia" / "cu13" / "lib" / "libcublasLt.so.13"
    there.touch()
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path / "nvidia")]})
    monkeypatch.setattr(cublaslt.importlib.util, "find_spec", lambda name: spec)
    if not torch.version.cuda:
        assert cublaslt.library_path() == there
        there.unlink()
        assert cublaslt.library_path() is None


# ------------------------------------------------------------------------------ the real library


@pytest.fixture(scope="module")
def real():
    """CUBLASLT_LIBRARY names it where torch has none: nothing here needs a GPU."""
    path = os.environ.get("CUBLASLT_LIBRARY") or cublaslt.library_path()
    if not path:
        pytest.skip("no libcublasLt is here")
    library = cublaslt.bind(ctypes.CDLL(str(path)))
    for kind in ("MatmulDesc", "MatrixLayout", "MatmulPreference"):
        get = getattr(library, f"cublasLt{kind}GetAttribute")
        get.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
        get.argtypes += [ctypes.c_void_p]
    return library


def read(library, kind: str, of, attribute: int, type_) -> tuple[int, int | None, int]:
    """Status, value and how many bytes it has."""
    value, written = type_(), ctypes.c_size_t()
    get = getattr(library, f"cublasLt{kind}GetAttribute")
    args = of, attribute, ctypes.byref(value), ctypes.sizeof(value), ctypes.byref(written)
    return get(*args), value.value, written.value


def test_the_real_library_has_our_attributes_in_our_sizes(real):
    made = {"MatmulDesc": ctypes.c_void_p(), "MatmulPreference": ctypes.c_void_p()}
    fp32 = cublaslt.COMPUTE_32F, cublaslt.TYPES[torch.float32]
    assert not real.cublasLtMatmulDescCreate(ctypes.byref(made["MatmulDesc"]), *fp32)
    assert not real.cublasLtMatmulPreferenceCreate(ctypes.byref(made["MatmulPreference"]))
    values = {
        ("MatmulDesc", cublaslt.TRANSA): [cublaslt.TRANSPOSED],
        ("MatmulDesc", cublaslt.EPILOGUE): [FORWARD, BACKWARD],
        ("MatmulDesc", cublaslt.BIAS): [2**40 + 256],
        ("MatmulDesc", cublaslt.AUX): [2**41 + 512],
        ("MatmulDesc", cublaslt.AUX_LD): [5120],
        ("MatmulPreference", cublaslt.MOST_BYTES): [cublaslt.MOST_WORKSPACE],
        **{("MatmulPreference", one): [16, 256] for one in cublaslt.ALIGNED},
    }
    for (kind, attribute), wanted in values.items():
        put, of = getattr(real, f"cublasLt{kind}SetAttribute"), made[kind]
        size = ctypes.sizeof(attribute.type)
        for value in wanted:
            assert not put(of, attribute.number, ctypes.byref(attribute.type(value)), size)
            assert read(real, kind, of, *attribute) == (0, value, size)
        for other in {4, 8} - {size}:
            raw = ctypes.c_uint64(wanted[0])
            assert put(of, attribute.number, ctypes.byref(raw), other), attribute


def test_the_structures_are_as_large_as_the_header_s():
    assert ctypes.sizeof(cublaslt.Algorithm) == 64 and ctypes.sizeof(cublaslt.Heuristic) == 96


def test_the_real_library_has_our_layout_of_a_matrix(real):
    made = ctypes.c_void_p()
    kind = cublaslt.TYPES[torch.bfloat16]
    assert not real.cublasLtMatrixLayoutCreate(ctypes.byref(made), kind, 24, 16, 32)
    wanted = {
        0: (ctypes.c_uint32, kind),  # type
        1: (ctypes.c_int32, 0),  # order: column-major
        2: (ctypes.c_uint64, 24),  # rows
        3: (ctypes.c_uint64, 16),  # columns
        4: (ctypes.c_int64, 32),  # leading dimension
    }
    for attribute, (type_, value) in wanted.items():
        found = read(real, "MatrixLayout", made, attribute, type_)
        assert found == (0, value, ctypes.sizeof(type_))


# --------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu_it_is_right_and_can_be_recorded(seed, dtype):
    device = torch.device("cuda", torch.cuda.current_device())
    if why := cublaslt.problem(device, dtype):
        pytest.skip(why)
    given = [x.to(device) for x in operands(dtype, (5, 91, 128), 512)]
    check(given)
    x, weight, bias, dout, second, u = given
    both = lambda: (*cublaslt.linear_gelu(x, weight, bias),  # noqa: E731
                    *cublaslt.gelu_backward(dout, second, u))  # fmt: skip
    wanted, graph = both(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both()
    for tensor in found:
        tensor.zero_()
    graph.replay()
    for got, expected in zip(found, wanted, strict=True):
        assert torch.equal(got, expected)
