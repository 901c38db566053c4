"""Attention over short sequences against the definition in float64: outputs, gradients, sums."""

import pytest
import torch
from kernel_checks import FLOOR, check_operator, compiles_whole, same_bits, within_budget
from parameters import crossed

from cjepa_fast.kernels.attention import short_attention, short_attention_reference
from cjepa_fast.kernels.attention.backward import backward_candidates, launch_attention_backward
from cjepa_fast.kernels.attention.descriptor_forward import BY_DESCRIPTORS, TMA
from cjepa_fast.kernels.attention.forward import (
    TILES,
    attention_op,
    forward_candidates,
    launch_attention,
)
from cjepa_fast.kernels.attention.heads import split
from cjepa_fast.kernels.attention.one_pass_backward import one_pass
from cjepa_fast.kernels.attention.two_pass_backward import TWO_PASSES, TwoPasses
from cjepa_fast.kernels.common import launch

DTYPES = [torch.bfloat16, torch.float16]
# Sequences, queries, keys, heads, values of a head.
SHAPES = {
    "aligned": (1, 64, 64, 2, 32),
    "the predictor of L, H": (1, 61, 61, 3, 24),
    "the contexts of H": (1, 70, 70, 2, 80),
    "heads of g": (1, 20, 20, 2, 88),
    "wide heads": (1, 30, 30, 1, 128),
    "several sequences": (3, 17, 17, 2, 16),
    "fewer queries than keys": (2, 5, 70, 2, 24),
    "more queries than keys": (1, 70, 5, 2, 24),
    "prime": (2, 41, 67, 3, 64),
    "one query": (1, 1, 2, 1, 16),
    "just above 128": (1, 131, 131, 1, 24),
    "no query": (2, 0, 3, 2, 16),
    "no sequence": (0, 4, 4, 2, 16),
}


def heads(x_BSX: torch.Tensor, H: int) -> torch.Tensor:
    return x_BSX.unflatten(-1, (H, -1)).transpose(1, 2)


def tensors(shape: tuple, device: str, dtype) -> tuple[torch.Tensor, ...]:
    """q as the last rows of a tensor of q, k and v side by side, and an upstream gradient."""
    B, S, T, H, d = shape
    qkv = torch.randn(B, max(S, T), 3 * H * d).to(device, dtype)
    q, k, v = qkv.chunk(3, -1)
    return q[:, q.shape[1] - S :], k[:, :T], v[:, :T], torch.randn(B, S, H * d).to(device, dtype)


def definition(q, k, v, dout, H: int, dtype=None) -> dict[str, torch.Tensor]:
    inputs = [x.to(dtype or x.dtype).detach().requires_grad_() for x in (q, k, v)]
    out = short_attention_reference(*(heads(x, H) for x in inputs)).transpose(1, 2).flatten(2)
    grads = torch.autograd.grad(out, inputs, dout.to(out.dtype))
    found = dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))
    return found | {"sums": torch.cat([g.sum((0, 1)) for g in grads])}


def kernel(q, k, v, dout, H: int, tile=None, backward=None) -> dict[str, torch.Tensor]:
    out, lse = launch_attention(q, k, v, H, tile)
    grads = [torch.full(x.shape, torch.nan, device=x.device, dtype=x.dtype) for x in (q, k, v)]
    sums = launch_attention_backward(dout, q, k, v, out, lse, H, tuple(grads), True, backward)
    return {"out": out, **dict(zip(("dq", "dk", "dv"), grads, strict=True)), "sums": sums}


def check(shape: tuple, device: str, dtype, tile=None, backward=None) -> None:
    made, H = tensors(shape, device, dtype), shape[3]
    got = kernel(*made, H, tile, backward)
    eager, exact = definition(*made, H), definition(*made, H, torch.float64)
    for name, wanted in exact.items():
        scale = wanted.abs().max().item() if wanted.numel() else 0.0
        floor = FLOOR[dtype] + rounding(name, made, exact, H) / max(scale, 1e-30)
        within_budget(got[name], eager[name], wanted, dtype, name, floor)


def rounding(name: str, made: tuple, exact: dict, H: int) -> float:
    """What the way of the kernel rounds that the definition does not, in the largest value.

    rowsum(do * o) is of the rounded o, as in FlashAttention, and is off in dq and dk by that. Each
    product is off by u of itself at most, half a step; together by no more than their sum, and 2.3
    u of their norm are four standard deviations. The sums add up many values that nearly cancel:
    the keys' sum to nothing but rounding. Into them each query's rowsum goes, off by itself. The
    weights are rounded before they multiply v, and do: of few keys each counts.
    """
    q, k, v, dout = made
    if not dout.numel():
        return 0.0
    step = FLOOR[q.dtype]
    rows = (exact["out"] * dout.double()).abs().unflatten(-1, (H, -1))
    off = torch.minimum(rows.sum(-1), 2.3 * rows.norm(dim=-1))  # (B, S, H)
    slope = 2 * step * rows.shape[-1] ** -0.5
    if name in ("dq", "dk"):
        return slope * off.max().item() * (k if name == "dq" else q).abs().max().item()
    if name == "sums":
        added = sum(exact[n].abs().sum((0, 1)).amax().item() for n in ("dq", "dk", "dv"))
        together = off.square().sum((0, 1)).sqrt().max().item()
        return step / 2 * added + slope * together * max(q.abs().max(), k.abs().max()).item()
    scores = heads(q.double(), H) @ heads(k.double(), H).transpose(-1, -2)
    weights = (scores * rows.shape[-1] ** -0.5).softmax(-1)
    if name == "dv":
        return step * (weights.transpose(-1, -2) @ heads(dout.double(), H).abs()).max().item()
    return step * (weights @ heads(v.double(), H).abs()).max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_gradients_and_sums_are_within_the_error_budget(seed, kernel_device, shape, dtype):
    check(shape, kernel_device, dtype)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile(seed, kernel_device, tile):
    check((1, 70, 77, 2, 24), kernel_device, torch.bfloat16, tile)


@pytest.fixture
def with_tma(kernel_device) -> str:
    """A device whose loads can go by descriptors; the interpreter knows them too."""
    if kernel_device != "cpu" and not launch.at_least(TMA, torch.device(kernel_device)):
        pytest.skip("from sm_90 on")
    return kernel_device


LOADED = {
    name: SHAPES[name]
    for name in (
        "aligned", "the predictor of L, H", "the contexts of H", "heads of g", "prime",
        "fewer queries than keys", "one query", "just above 128",
    )
}  # fmt: skip


@pytest.mark.parametrize("shape", LOADED.values(), ids=LOADED)
def test_loads_by_descriptors(seed, with_tma, shape):
    check(shape, with_tma, torch.bfloat16, BY_DESCRIPTORS[0])


@pytest.mark.parametrize("tile", BY_DESCRIPTORS, ids=str)
def test_every_tile_by_descriptors(seed, with_tma, tile):
    check((2, 70, 77, 2, 24), with_tma, torch.float16, tile)


@pytest.mark.filterwarnings("ignore:.*(NaN|invalid value):RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("d", [24, 80])
def test_a_descriptor_reads_neither_the_next_head_nor_the_next_sequence(seed, with_tma, d):
    """Beyond a head's values, or a sequence's tokens, it gives zeros: NaN would stay NaN."""
    q, k, v, _ = tensors((2, 5, 7, 2, d), with_tma, torch.bfloat16)
    before, _ = launch_attention(q, k, v, 2, BY_DESCRIPTORS[0])
    for x in (q, k, v):
        x[1] = torch.nan
        x[0, :, d:] = torch.nan
    after, _ = launch_attention(q, k, v, 2, BY_DESCRIPTORS[0])
    assert torch.equal(after[0, :, :d], before[0, :, :d]) and after[1].isnan().all()


def test_what_no_descriptor_holds_is_read_without(seed, with_tma):
    """Addresses and strides that are no multiples of 16 bytes."""
    for d, first in ((24, 1), (20, 0)):
        qkv = torch.randn(1, 9, 6 * d + 8).to(with_tma, torch.bfloat16)[..., first : first + 6 * d]
        q, k, v = qkv.chunk(3, -1)
        wanted = launch_attention(q, k, v, 2, TILES[0])
        for one, other in zip(launch_attention(q, k, v, 2, BY_DESCRIPTORS[0]), wanted, strict=True):
            assert torch.equal(one, other)


def test_descriptors_are_candidates_where_the_gpu_has_tma_and_never_the_first():
    for d, tma, more in ((24, True, BY_DESCRIPTORS), (24, False, ()), (20, True, ())):
        key, found = forward_candidates(100, d, tma)
        assert (key, found) == (f"attention 128x{d}", TILES + more)
        assert len({tuple(tile) for tile in found}) == len(found)


@pytest.mark.parametrize(("S", "d"), [(40, 64), (40, 80), (100, 32), (140, 24), (170, 24)])
def test_every_tile_of_the_backward(seed, kernel_device, S, d):
    for tile in one_pass(S, d):
        check((1, S, S, 1, d), kernel_device, torch.bfloat16, None, tile)


# Queries and keys of several blocks, the last one ragged; more blocks of either.
PASSES = {
    "the predictor of L, H": (1, 61, 61, 2, 24),
    "two parts of a head": (2, 70, 70, 2, 80),
    "fewer queries than keys": (2, 5, 70, 2, 24),
    "more queries than keys": (1, 70, 5, 2, 88),
    "longer than one pass holds": (1, 133, 150, 1, 64),
}


@pytest.mark.parametrize(("shape", "tile"), crossed(PASSES, [*TWO_PASSES, TwoPasses(32, 16, 4)]))
def test_two_passes(seed, kernel_device, shape, tile):
    check(shape, kernel_device, torch.bfloat16, None, tile)


def test_two_passes_in_fp16(seed, kernel_device):
    check((2, 40, 50, 2, 32), kernel_device, torch.float16, None, TWO_PASSES[0])


def test_large_scores_do_not_overflow(seed, kernel_device):
    """The softmax takes its maximum off; a key far ahead takes all."""
    q, k, v, dout = tensors((1, 33, 70, 2, 16), kernel_device, torch.bfloat16)
    q, k, v = (factor * x.contiguous() for factor, x in ((60, q), (60, k), (1, v)))
    got, exact = kernel(q, k, v, dout, 2), definition(q, k, v, dout, 2, torch.float64)
    within_budget(got["out"], definition(q, k, v, dout, 2)["out"], exact["out"], torch.bfloat16)
    assert all(x.isfinite().all() for x in got.values())


# of keys that are not there, whose weights are then set to 0
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
@pytest.mark.parametrize(("shift", "dtype"), [(-95, torch.bfloat16), (-20, torch.float16)])
@pytest.mark.parametrize("T", [64, 70])
@pytest.mark.parametrize("backward", [None, TWO_PASSES[0]], ids=str)
def test_scores_far_below_zero(seed, kernel_device, shift, dtype, T, backward):
    """The softmax does not see a shift of all scores; 0, the score of a key that is not there, is
    then far above those that are."""
    q, k, v, dout = tensors((1, 8, T, 1, 16), kernel_device, dtype)
    q, k = 0.3 * q.contiguous(), 0.3 * k.contiguous()
    q[..., 0], k[..., 0], v = 10.0, shift * 16**0.5 / 10, v.contiguous()
    got = kernel(q, k, v, dout, 1, backward=backward)
    assert all(x.isfinite().all() for x in got.values())
    exact, eager = definition(q, k, v, dout, 1, torch.float64), definition(q, k, v, dout, 1)
    for name in ("out", "dv"):
        within_budget(got[name], eager[name], exact[name], dtype, name)


@pytest.mark.filterwarnings("ignore:.*(NaN|invalid value):RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("backward", [None, TWO_PASSES[0]], ids=str)
def test_sequences_and_heads_do_not_see_each_other(seed, kernel_device, backward):
    q, k, v, dout = tensors((3, 9, 9, 2, 16), kernel_device, torch.bfloat16)
    before = kernel(q, k, v, dout, 2, backward=backward)
    q[1, :, 16:] = torch.nan
    after = kernel(q, k, v, dout, 2, backward=backward)
    for name in ("out", "dq", "dk", "dv"):
        changed = after[name].isnan()
        assert changed[1, :, 16:].all() and changed.sum() == 9 * 16
        assert torch.equal(after[name][[0, 2]], before[name][[0, 2]])


def test_same_bits_twice(seed, kernel_device):
    made = tensors((2, 70, 70, 2, 24), kernel_device, torch.bfloat16)
    for backward in (None, TWO_PASSES[0]):
        same_bits(lambda tile=backward: tuple(kernel(*made, 2, backward=tile).values()))


@pytest.mark.parametrize(
    ("d", "parts"),
    [(16, (16, 0)), (24, (32, 0)), (32, (32, 0)), (48, (32, 16)), (64, (64, 0)), (80, (64, 16)),
     (88, (64, 32)), (96, (64, 32)), (112, (128, 0)), (128, (128, 0))],
)  # fmt: skip
def test_parts_of_a_head(d, parts):
    assert split(d) == parts and sum(parts) >= d


def test_one_pass_holds_all_queries_and_the_others_take_two():
    for d in (24, 32, 64, 80, 128):
        for S in (1, 64, 65, 128, 129, 144, 145, 256, 257, 1024):
            assert all(t.rows0 + t.rows1 >= S for t in one_pass(S, d))
            assert bool(one_pass(S, d)) == ((256 if d <= 32 else 128) >= S)
            _, found = backward_candidates(S, d, torch.device("cpu"))
            assert found == one_pass(S, d) + TWO_PASSES
    assert one_pass(64, 64, room=False) and not one_pass(64, 80, room=False)


def test_a_length_has_one_key_and_one_list():
    """tuned.py names one of the list by the key, by numbers that no other of it has."""
    for d in (24, 80):
        lists = {}
        for S in range(1, 600):
            key, found = backward_candidates(S, d, torch.device("cpu"))
            assert lists.setdefault(key, found) == found
            assert len(set(map(tuple, found))) == len(found)


# --- the operator


def parts_of(qkv: torch.Tensor, H: int) -> list[torch.Tensor]:
    return [heads(x, H) for x in qkv.chunk(3, -1)]


def test_the_operator_follows_any_layout(seed, kernel_device):
    """Heads side by side, as the projections write them, or apart, as others hold them."""
    qkv = torch.randn(2, 19, 3 * 48).to(kernel_device, torch.bfloat16).requires_grad_()
    upstream = torch.randn(2, 2, 19, 24).to(kernel_device, torch.bfloat16)
    results = []
    for apart in (False, True):
        q, k, v = parts_of(qkv, 2)
        if apart:
            q, k, v = q.contiguous(), k.contiguous(), v
        out = short_attention(q, k, v)
        results.append((out.detach(), *torch.autograd.grad(out, qkv, upstream)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_opcheck_and_compilation(seed, kernel_device):
    q, k, v, _ = tensors((1, 9, 12, 2, 16), kernel_device, torch.bfloat16)
    inputs = [x.contiguous().requires_grad_() for x in (q, k, v)]
    check_operator(attention_op, (*inputs, 2))
    views = [heads(x.detach(), 2).requires_grad_() for x in inputs]
    compiles_whole(short_attention, *views)


def test_what_the_kernels_do_not_take_is_refused_or_goes_by_the_definition(seed, kernel_device):
    def call(S: int, d: int, dtype=torch.bfloat16):
        return short_attention(*torch.randn(3, 1, 2, S, d).to(kernel_device, dtype))

    with pytest.raises(RuntimeError, match=r"no kernel.*4, 136"):
        call(4, 136)
    assert call(4, 8, torch.float32).dtype == torch.float32
    q, k = torch.randn(2, 2, 2, 4, 8).to(kernel_device, torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"of shapes \(2, 2, 4, 8\), \(2, 2, 4, 8\), \(2, 2, 3,"):
        short_attention(q, k, k[:, :, :3])
    with pytest.raises(RuntimeError, match=r"of shapes .*\(1, 2, 4, 8\), \(1,"):
        short_attention(q, k[:1], k[:1])


def test_values_that_do_not_lie_side_by_side(seed, kernel_device):
    """Every second value of a wider tensor: read as it lies, it would be another's."""
    wide = torch.randn(3, 2, 19, 2, 48).to(kernel_device, torch.bfloat16)
    q, k, v = wide[..., ::2].transpose(2, 3)
    assert torch.equal(short_attention(q, k, v), short_attention(*(x.clone() for x in (q, k, v))))


def test_without_keys_there_is_nothing_to_attend_to(kernel_device):
    q, k = (torch.ones(1, 2, n, 8).to(kernel_device, torch.bfloat16) for n in (3, 0))
    q.requires_grad_(), k.requires_grad_()
    out = short_attention(q, k, k)
    out.sum().backward()
    assert not out.any() and not q.grad.any() and k.grad.shape == k.shape


def test_on_a_cpu_it_is_the_definition(seed):
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    assert torch.equal(short_attention(q, k, v), short_attention_reference(q, k, v))
