"""The interpreter of the tests computes what Triton's does, and tells of an overflow."""

import fast_interpreter
import pytest
import torch
import triton
import triton.language as tl

from cjepa_fast.kernels.common import launch

pytestmark = pytest.mark.skipif(not launch.INTERPRETING, reason="Triton compiles here")


@triton.jit
def _mixed_kernel(x_ptr, out_ptr, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (row > 0) & (column < COLUMNS - 1)
    x = tl.load(x_ptr + row * COLUMNS + column, mask=inside, other=0).to(tl.float32)
    x = (x * scale + tl.sum(x, 1)[:, None]).to(tl.bfloat16) * column
    out = tl.where(x.to(tl.float32) > 1, x.to(tl.float32), tl.dot(x, tl.trans(x)))
    tl.store(out_ptr + row * COLUMNS + column, out)


@triton.jit
def _integer_kernel(out_ptr, a, b, TIMES: tl.constexpr):
    at = tl.arange(0, 4)
    tl.store(out_ptr + at, (at + a) * b if TIMES else at + a - b)


def test_it_computes_the_bits_of_triton_s(seed):
    x = torch.randn(16, 16, dtype=torch.bfloat16)
    outcomes = []
    for interpreted in (fast_interpreter.interpreted, launch.interpreted):
        with interpreted():
            _mixed_kernel[1,](x, out := torch.empty(16, 16), 1.7, 16, 16)
        outcomes.append(out)
    assert torch.equal(*outcomes) and outcomes[0].isfinite().all()


@pytest.mark.parametrize(
    ("a", "b", "times", "said"),
    [(2**31 - 3, 1, False, "add"), (-(2**31) + 5, 6, False, "sub"), (2**20, 2**11, True, "mul")],
)
def test_an_overflow_of_int32_is_an_error_that_says_where(a, b, times, said):
    out = torch.empty(4, dtype=torch.int64)
    with fast_interpreter.interpreted():
        with pytest.raises(Exception, match=f"int32 overflows in {said}"):
            _integer_kernel[1,](out, a, b, times)
        _integer_kernel[1,](out, 3, 2, times)
        assert out.tolist() == [(i + 3) * 2 if times else i + 1 for i in range(4)]
