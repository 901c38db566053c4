"""LayerNorm with the sum before it: outputs, gradients and sums against the definition."""

import pytest
import torch
from kernel_checks import FLOOR, same_bits, within_budget

from cjepa_fast.kernels import norm
from cjepa_fast.kernels.common import sums
from cjepa_fast.kernels.common.tiles import cuts
from cjepa_fast.kernels.norm import launch_add_norm, launch_add_norm_backward

EPS = 1e-6
# Of the branches and weights, and of the residual stream.
DTYPES = [
    (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16), (torch.bfloat16, torch.float32),
]  # fmt: skip
SHAPES = {
    "aligned": (64, 128),
    "ragged": (37, 72),
    "prime": (41, 67),
    "pieces": (9, 192),
    "one": (1, 1),
    "power of two minus one": (15, 127),
    "wide": (5, 520),
    "no row": (0, 8),
}


def tensors(rows: int, D: int, device: str, dtype, stream) -> dict[str, torch.Tensor]:
    """Of x, y and the weights, and upstream gradients; the rows have means to be taken off."""
    made = {name: torch.randn(rows, D) for name in ("x", "y", "dh", "ds")}
    made |= {"weight": torch.randn(D), "bias": torch.randn(D)}
    made["x"] = made["x"] + 2 * torch.randn(rows, 1)
    kinds = {name: stream if name in ("x", "ds") else dtype for name in made}
    return {name: t.to(device, kinds[name]) for name, t in made.items()}


def kernel(made: dict, add: bool = True, later: bool = True, tile=None) -> dict:
    y, ds = made["y"] if add else None, made["ds"] if later else None
    s, h, stats = launch_add_norm(made["x"], y, made["weight"], made["bias"], EPS, tile)
    d, found = launch_add_norm_backward(made["dh"], ds, s, made["weight"], stats, tile)
    names = ("dweight", "dbias", "dy_bias")
    return {"s": s, "h": h, "d": d, **dict(zip(names, found, strict=True))}


def definition(made: dict, add: bool = True, later: bool = True, dtype=None) -> dict:
    """By automatic gradient, in the tensors' dtypes or in another."""
    made = {n: t.to(dtype or t.dtype).detach() for n, t in made.items()}
    x, weight, bias = (made[n].requires_grad_() for n in ("x", "weight", "bias"))
    y = made["y"] if add else None
    s, h = norm.add_norm_reference(x, y, weight, bias, EPS)
    outputs, upstream = [h, s * 1], [made["dh"], made["ds"] * later]
    d, dweight, dbias = torch.autograd.grad(outputs, (x, weight, bias), upstream)
    found = {"s": s, "h": h, "d": d, "dweight": dweight, "dbias": dbias}
    found["dy_bias"] = d.sum(0).to(weight.dtype)
    return {n: t.detach() for n, t in found.items()}


def check(
    made: dict, add: bool = True, later: bool = True, tile=None, mean_off: float = 0.0
) -> None:
    """mean_off: what the rows' means are rounded by, of which the budget then takes account."""
    got = kernel(made, add, later, tile)
    eager, exact = definition(made, add, later), definition(made, add, later, torch.float64)
    moved = mean_off / exact["s"].std(-1, correction=0).min().item() if mean_off else 0.0
    slopes = {"h": made["weight"].abs().max(), "dweight": made["dh"].norm(dim=0).max()}
    for name, wanted in exact.items():
        dtype = made["x"].dtype if name == "s" else made["weight"].dtype
        floor = FLOOR[dtype]
        if moved and name in slopes:
            floor += moved * slopes[name].item() / wanted.abs().max().item()
        within_budget(got[name], eager[name], wanted, dtype, name, floor)


@pytest.mark.parametrize(("dtype", "stream"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_gradients_and_sums_are_within_the_error_budget(
    seed, kernel_device, shape, dtype, stream
):
    check(tensors(*shape, kernel_device, dtype, stream))


@pytest.mark.parametrize(("add", "later"), [(True, False), (False, True), (False, False)])
def test_without_a_branch_and_without_a_gradient_from_elsewhere(seed, kernel_device, add, later):
    made = tensors(37, 72, kernel_device, torch.bfloat16, torch.bfloat16)
    check(made, add, later)
    if not add:
        assert kernel(made, add, later)["s"] is made["x"]


@pytest.mark.parametrize(
    "width", [192, 1280, *(pytest.param(width, marks=pytest.mark.long) for width in (384, 768))]
)
def test_every_tile(seed, kernel_device, width):
    """More rows than a program takes at a time, and (but where it takes one) not a multiple."""
    tiles = dict.fromkeys(norm.forward_tiles(width) + norm.tiles(width))
    assert {cuts(tile, width)["FULL"] for tile in tiles} == {True, False}
    for tile in tiles:
        rows = 5 * 3 * tile.rows + min(tile.rows // 2 + 1, 7)  # each of 5 programs takes several
        made = tensors(rows, width, kernel_device, torch.bfloat16, torch.bfloat16)
        check(made, tile=tile._replace(programs=5))


def test_pieces_with_a_rest(seed, kernel_device):
    made = tensors(9, 150, kernel_device, torch.bfloat16, torch.bfloat16)
    check(made, tile=norm.Rows(2, 64, 4, 3, 1))


def test_a_mean_far_from_zero(seed, kernel_device):
    """Where a mean of 300 is rounded to 2^-15, and the spread about it is 1."""
    made = tensors(9, 96, kernel_device, torch.float32, torch.float32)
    made["x"] += 300
    check(made, mean_off=2.0**-15)


def test_same_bits_twice(seed, kernel_device):
    made = tensors(300, 72, kernel_device, torch.bfloat16, torch.bfloat16)
    same_bits(lambda: tuple(kernel(made).values()))


def test_nan_stays_in_its_row(seed, kernel_device):
    made = tensors(9, 72, kernel_device, torch.bfloat16, torch.bfloat16)
    made["x"][3, 5] = torch.nan
    got = kernel(made)
    for name in ("h", "d"):
        rows = got[name].isnan().any(1)
        assert rows.nonzero().flatten().tolist() == [3], name
    assert got["dweight"].isnan().all() and not got["dbias"].isnan().any()


def test_what_the_kernels_do_not_take():
    assert not norm.takes(torch.zeros(2, 8))  # a CPU
    assert norm.tiles(norm.WIDEST) and not norm.tiles(norm.WIDEST + 1)


# --- sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (65, 63), (200, 130)])
def test_sums_of_parts(seed, kernel_device, shape, dtype):
    parts = torch.randn(*shape).to(kernel_device)
    reference = sums.sum_parts_reference
    eager, exact = reference(parts, dtype), reference(parts.double(), torch.float64)
    # Each addition rounds by half a step of a partial sum, in either direction: together, of the
    # largest sum, sqrt(n) 2^-24 of the sum of the magnitudes, which do not cancel.
    rounding = len(parts) ** 0.5 * 2.0**-24 * parts.abs().sum(0).max() / exact.abs().max()
    floor = FLOOR[dtype] + rounding.item()
    within_budget(sums.sum_parts(parts, dtype), eager, exact, dtype, floor=floor)
    same_bits(lambda: (sums.sum_parts(parts, dtype),))


def test_shares_cover_all_rows_once():
    for rows in (1, 5, 63, 64, 65, 1000):
        for programs in (1, 3, 64):
            each, count = sums.share_of(rows, programs, 4)
            assert each % 4 == 0 and count <= programs and (count - 1) * each < rows <= count * each
