"""Rows in FP8: the kernel against the definition bit for bit, and the definition's error."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_checks import check_operator, compiles_whole, same_bits

from cjepa_fast.kernels import fp8
from cjepa_fast.kernels.common.tiles import ROW_TILES, cuts
from cjepa_fast.kernels.gelu import APPROXIMATE
from cjepa_fast.model.vit import MODELS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One value, a power of two, one less, prime, several rows of a tile and a rest, rows in pieces,
# wider than a tile.
SHAPES = [(1, 1), (3, 64), (5, 63), (7, 101), (2, 19, 48), (17, 192), (2, 1100)]
EPS = 1e-6


def normal(device: str, *shape: int, dtype=torch.float32) -> torch.Tensor:
    """Rows of very different sizes, as weights and activations have."""
    sizes = 10.0 ** torch.empty(*shape[:-1], 1).uniform_(-3, 3)
    return (torch.randn(shape) * sizes).to(device, dtype)


def affine(device: str, C: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return (1 + 0.3 * torch.randn(C)).to(device, dtype), torch.randn(C).to(device, dtype)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Of 8-bit values. The interpreter loses the sign of zeros."""
    return torch.equal(one.float(), other.float())


def within_rounding(rows: fp8.Rows, exact: torch.Tensor, of: torch.Tensor | None = None) -> None:
    """Fails where a value is further from the float64 one than e4m3's rounding and fp32's own.

    Between powers of two e4m3 has 8 steps; below 2^-6 of what 448 stands for, steps of 2^-9. fp32's
    own error is 1e-6 of the largest value of the row, or of what it was computed `of`.
    """
    assert rows.values.dtype == torch.float8_e4m3fn and rows.scales.dtype == torch.float32
    assert rows.scales.shape == (*exact.shape[:-1], 1)
    scales, largest = rows.scales.double(), exact.abs().amax(-1, keepdim=True)
    slack = 1e-6 * (largest if of is None else of.double().abs().amax(-1, keepdim=True))
    half_step = (exact.abs() / 16).maximum(scales * 2.0**-10)
    error = (rows.values.double() * scales - exact).abs()
    assert (error <= half_step + 2 * slack).all()  # false for NaN too
    assert ((448 * scales - largest.clamp(min=1e-12)).abs() <= slack + 1e-12).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_the_definitions_bit_for_bit(seed, kernel_device, shape, dtype):
    x = normal(kernel_device, *shape, dtype=dtype)
    found, wanted = fp8.quantise_rows(x), fp8.quantise_rows_reference(x)
    assert same(found.values, wanted.values)
    assert torch.equal(found.scales, wanted.scales)
    within_rounding(found, x.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_then_rows(seed, kernel_device, shape, dtype):
    x, (weight, bias) = normal(kernel_device, *shape, dtype=dtype), affine("cpu", shape[-1], dtype)
    weight, bias = weight.to(kernel_device), bias.to(kernel_device)
    exact = F.layer_norm(x.double(), weight.shape, weight.double(), bias.double(), EPS)
    for quantise in (fp8.quantise_norm, fp8.quantise_norm_reference):
        within_rounding(quantise(x, weight, bias, EPS), exact)


@pytest.mark.parametrize(
    ("dtype", "branch"), [(d, d) for d in DTYPES] + [(torch.float32, torch.bfloat16)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_sum_and_norm_then_rows(seed, kernel_device, shape, dtype, branch):
    """The sum is rounded to the residual stream's type, as it is written, before it is normed."""
    x, y = normal(kernel_device, *shape, dtype=dtype), normal(kernel_device, *shape, dtype=branch)
    weight, bias = affine(kernel_device, shape[-1], branch)
    s, rows = fp8.quantise_add_norm(x, y, weight, bias, EPS)
    assert s.dtype == dtype and torch.equal(s, (x.float() + y.float()).to(dtype))
    assert same(rows.values, fp8.quantise_norm(s, weight, bias, EPS).values)
    plain = fp8.quantise_add_norm_reference(x, y, weight, bias, EPS)
    assert torch.equal(plain[0], s)


@pytest.mark.parametrize("kind", APPROXIMATE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gelu_then_rows(seed, kernel_device, shape, dtype, kind):
    x = 2 * torch.randn(shape).to(kernel_device, dtype)
    for quantise in (fp8.quantise_gelu, fp8.quantise_gelu_reference):
        exact = F.gelu(x.double(), approximate=APPROXIMATE[kind])
        within_rounding(quantise(x, kind), exact, of=x)


def test_each_kind_of_gelu_is_its_own(kernel_device):
    """Where they differ most, beyond what e4m3 rounds off."""
    x = torch.full((1, 16), -2.7, device=kernel_device)
    found = {kind: -448 * fp8.quantise_gelu(x, kind).scales.item() for kind in APPROXIMATE}
    for kind, name in APPROXIMATE.items():
        assert abs(found[kind] - F.gelu(x[0, 0].double(), approximate=name).item()) < 1e-6
    assert abs(found["exact"] - found["tanh"]) > 4e-4


@pytest.mark.parametrize("tile", [tiles[0] for tiles in ROW_TILES.values() if tiles[0].rows > 1])
@pytest.mark.parametrize("pieces", [1, 3])
def test_every_tile_of_several_rows(seed, kernel_device, tile, pieces):
    """The last tile is not full, nor is a row's last piece."""
    x = normal(kernel_device, tile.rows + 1, pieces * tile.width - 3)
    values, _ = fp8.launch_quantise(x, tile=tile)
    assert same(values, fp8.quantise_rows_reference(x).values)
    weight, bias = affine(kernel_device, x.shape[-1])
    exact = F.layer_norm(x.double(), weight.shape, weight.double(), bias.double(), EPS)
    rows = fp8.Rows(*fp8.launch_quantise(x, "norm", (weight, bias), EPS, tile))
    within_rounding(rows, exact)


def test_no_lane_is_idle_at_a_vit_s_widths():
    for sizes in MODELS.values():
        for width in (sizes["width"], round(sizes["width"] * sizes["mlp_ratio"])):
            assert cuts(fp8.tile_of(width), width)["FULL"], width
            assert width in fp8.WIDTHS + fp8.MLPS


@given(rows=st.integers(0, 9), C=st.integers(1, 300))
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_sizes(seed, kernel_device, rows, C):
    x, (weight, bias) = normal(kernel_device, rows, C), affine(kernel_device, C)
    assert same(fp8.quantise_rows(x).values, fp8.quantise_rows_reference(x).values)
    exact = F.layer_norm(x.double(), (C,), weight.double(), bias.double(), EPS)
    if rows:
        # What is left of x minus its mean has the rounding of x, scaled up with it.
        spread = (x.double().var(-1, correction=0, keepdim=True) + EPS).rsqrt()
        scaled = x.double() * spread * weight.abs().max() + bias.abs().max()
        within_rounding(fp8.quantise_norm(x, weight, bias, EPS), exact, of=scaled)


def test_every_8_bit_number_is_itself(kernel_device):
    """With 448 in its row the scale is one: all 254 numbers come back, so do those between."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()].sort().values.to(kernel_device)
    assert torch.equal(fp8.quantise_rows(numbers[None]).wide()[0], numbers)
    midway = (numbers[:-1] + numbers[1:]) / 2
    rows = fp8.quantise_rows(torch.cat([midway, numbers[-1:]])[None])
    below, above = numbers[:-1], numbers[1:]
    even = below.to(torch.float8_e4m3fn).view(torch.uint8) % 2 == 0  # ties go to the even one
    assert torch.equal(rows.wide()[0, :-1], torch.where(even, below, above))


def test_zeros_and_tiny_rows_are_safe(kernel_device):
    x = torch.zeros(3, 32, device=kernel_device)
    x[1] = 1e-38
    x[2, 3] = 1e-42  # subnormal
    rows = fp8.quantise_rows(x)
    assert (rows.scales > 0).all() and not rows.wide().any()
    zeros = torch.zeros(32, device=kernel_device)
    assert not fp8.quantise_norm(x, zeros, zeros, EPS).wide().any()


@pytest.mark.filterwarnings("ignore:.*(NaN|invalid value):RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(kernel_device, wrong):
    """In its own row: the others are as without it."""
    x = torch.ones(3, 40, device=kernel_device)
    x[1, 7] = wrong
    ones = torch.ones(40, device=kernel_device)
    for rows in (
        fp8.quantise_rows(x),
        fp8.quantise_norm(x, ones, ones, EPS),
        fp8.quantise_gelu(x),
    ):
        assert rows.wide().isfinite().all(-1).tolist() == [True, False, True]


def test_views_and_empty_tensors(seed, kernel_device):
    wide = normal(kernel_device, 6, 96)
    for x in (wide[:, 1:50], wide.t(), wide[::2]):
        wanted = fp8.quantise_rows_reference(x)
        assert same(fp8.quantise_rows(x).values, wanted.values)
    assert fp8.quantise_rows(wide[:0]).scales.shape == (0, 1)


def test_the_operators_pass_opcheck(seed, kernel_device):
    x, (weight, bias) = normal(kernel_device, 3, 48), affine(kernel_device, 48)
    ops = torch.ops.cjepa_fast
    check_operator(ops.quantise_rows.default, (x,))
    check_operator(ops.quantise_norm.default, (x, weight, bias, EPS))
    for tanh in (False, True):
        check_operator(ops.quantise_gelu.default, (x, tanh))


def test_compiles_without_a_graph_break(seed, kernel_device):
    weight, bias = affine(kernel_device, 48)

    def function(x: torch.Tensor) -> torch.Tensor:
        return fp8.quantise_norm(fp8.quantise_gelu(x).wide(), weight, bias, EPS).wide()

    compiles_whole(function, torch.randn(3, 48, device=kernel_device))


def test_other_shapes_are_refused(kernel_device):
    x, y = (torch.ones(3, n, device=kernel_device) for n in (8, 1))
    weight = torch.ones(8, device=kernel_device)
    with pytest.raises(ValueError, match=r"shapes \[8\] and \[7\] for rows of 8 values"):
        fp8.quantise_norm(x, weight, weight[:7], 1e-6)
    with pytest.raises(ValueError, match=r"y of shape \[3, 1\] to add to x of \[3, 8\]"):
        fp8.quantise_add_norm(x, y, weight, weight, 1e-6)


def test_same_bits_twice(seed, kernel_device):
    x, (weight, bias) = normal(kernel_device, 9, 48), affine(kernel_device, 48)
    same_bits(lambda: fp8.quantise_norm(x, weight, bias, EPS))
    same_bits(lambda: fp8.quantise_gelu(x))
