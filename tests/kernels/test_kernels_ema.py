"""The EMA and AdamW in one pass, against PyTorch's own: every value, and no other."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_checks import check_operator, same_bits, within_budget

from cjepa_fast.kernels import ema
from cjepa_fast.kernels.ema import adamw, plain_update
from cjepa_fast.kernels.ema import lists as ema_lists
from cjepa_fast.kernels.fp8 import quantise_rows_reference

CHUNK = ema_lists.CHUNKS[0]
# Less than a chunk, just one, one value more and less, several, prime, a matrix, a scalar, nothing.
SHAPES = [(5,), (CHUNK,), (CHUNK + 1,), (CHUNK - 1,), (2 * CHUNK + 7,), (1009,), (33, 70), (), (0,)]
FEW = [(5,), (CHUNK + 1,), (3, 7)]  # the interpreter takes tens of milliseconds a chunk
COPIES = [None, torch.bfloat16, torch.float16, torch.float32]
# Of the weights or gradients, and of the copies.
DTYPES = [
    (torch.float32, None), (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float16), (torch.bfloat16, torch.float32),
]  # fmt: skip


def randoms(device: str, shapes=SHAPES, dtype=torch.float32) -> list[torch.Tensor]:
    return [torch.randn(s).to(device, dtype) for s in shapes]


def clones(tensors: list[torch.Tensor], dtype=None) -> list[torch.Tensor]:
    return [t.detach().to(dtype or t.dtype, copy=True) for t in tensors]


def empties(tensors: list[torch.Tensor], dtype: torch.dtype | None) -> list[torch.Tensor]:
    """NaN where never written; no list without a dtype."""
    return [torch.full_like(t, math.nan, dtype=dtype) for t in tensors] if dtype else []


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors])


# --- ema_update


@pytest.mark.parametrize(("weights", "copy"), DTYPES)
@pytest.mark.parametrize("momentum", [0.996, 0.3])  # lerp's two formulas
def test_ema_within_the_error_budget(seed, kernel_device, momentum, weights, copy):
    start, online = randoms(kernel_device), randoms(kernel_device, dtype=weights)
    ours, eager, exact = clones(start), clones(start), clones(start, torch.float64)
    copies = empties(start, copy)
    ema.ema_update(ours, online, momentum, copies)
    ema.ema_update_reference(eager, online, momentum)
    ema.ema_update_reference(exact, clones(online, torch.float64), momentum)
    within_budget(flat(ours), flat(eager), flat(exact), torch.float32)
    for copied, wanted in zip(copies, ours, strict=bool(copies)):
        assert torch.equal(copied, wanted.to(copy))


def test_the_definition_is_the_ema():
    start, online = randoms("cpu", dtype=torch.float64), randoms("cpu", dtype=torch.float64)
    target = clones(start)
    ema.ema_update(target, online, 0.9)
    for t, s, w in zip(target, start, online, strict=True):
        torch.testing.assert_close(t, 0.9 * s + 0.1 * w, rtol=1e-13, atol=1e-13)


def test_momentum_one_keeps_and_zero_copies(seed, kernel_device):
    start, online = randoms(kernel_device), randoms(kernel_device)
    target = clones(start)
    ema.ema_update(target, online, 1.0)
    assert torch.equal(flat(target), flat(start))
    ema.ema_update(target, online, 0.0)
    assert torch.equal(flat(target), flat(online))


@pytest.mark.parametrize("shift", [0, 1, 8])
def test_fragments_of_a_flat_buffer(seed, kernel_device, shift):
    """As ZeRO cuts them, aligned or not: the EMA of each value is taken, and none between them."""
    sizes = [CHUNK, 17, CHUNK - 1, 2 * CHUNK + 3, 1]
    buffer, online = torch.randn(2, 6 * CHUNK, device=kernel_device)
    copy = torch.zeros(6 * CHUNK, dtype=torch.bfloat16, device=kernel_device)
    before, touched, offset = buffer.clone(), torch.zeros_like(buffer, dtype=torch.bool), shift
    slices = []
    for size in sizes:
        slices.append(slice(offset, offset + size))
        touched[slices[-1]] = True
        offset += size + 13
    ema.ema_update(
        [buffer[p] for p in slices], [online[p] for p in slices], 0.5, [copy[p] for p in slices]
    )
    torch.testing.assert_close(buffer[touched], (before + online)[touched] / 2)
    assert torch.equal(buffer[~touched], before[~touched])
    assert torch.equal(copy[touched], buffer[touched].bfloat16()) and not copy[~touched].any()


@given(
    sizes=st.lists(st.integers(0, 2 * CHUNK), min_size=1, max_size=3),
    momentum=st.floats(0, 1),
    copy=st.sampled_from(COPIES),
)
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_sizes(seed, kernel_device, sizes, momentum, copy):
    shapes = [(size,) for size in (*sizes, 100)]  # of few values all may be near zero
    start, online = randoms(kernel_device, shapes), randoms(kernel_device, shapes)
    ours, eager, exact = clones(start), clones(start), clones(start, torch.float64)
    copies = empties(start, copy)
    ema.ema_update(ours, online, momentum, copies)
    ema.ema_update_reference(eager, online, momentum)
    ema.ema_update_reference(exact, clones(online, torch.float64), momentum)
    within_budget(flat(ours), flat(eager), flat(exact), torch.float32)
    assert not copies or torch.equal(flat(copies), flat(ours).to(copy))


@pytest.mark.parametrize("chunk", ema_lists.CHUNKS)
def test_every_chunk(seed, kernel_device, chunk):
    """Forced, on sizes about its own: each value is that of the default, bit for bit."""
    shapes = [(chunk - 1,), (chunk,), (chunk + 1,), (3,)]
    start, online = randoms(kernel_device, shapes), randoms(kernel_device, shapes)
    forced, default, copies = clones(start), clones(start), empties(start, torch.bfloat16)
    weight = ema_lists.on_device([1 - 0.9], start[0].device)
    plain_update.launch_ema(forced, online, copies, weight, chunk=chunk)
    ema.ema_update(default, online, 0.9)
    assert torch.equal(flat(forced), flat(default))
    assert torch.equal(flat(copies), flat(default).bfloat16())
    lists = [[clones(start), online, *(clones(start) for _ in range(3))] for _ in range(2)]
    numbers = adamw.adamw_numbers(start[0].device, 1, 0.1, 0.9, (0.9, 0.99), 1e-8, 0.1)
    for arrays, size in zip(lists, (chunk, CHUNK), strict=True):
        arrays[3] = [x.square() for x in arrays[3]]
        adamw.launch_adamw_ema(arrays, (), (), numbers, chunk=size)
    for one, other in zip(*lists, strict=True):
        assert torch.equal(flat(one), flat(other))


def test_an_ema_of_nothing(kernel_device):
    ema.ema_update([], [], 0.9)
    ema.ema_update([torch.empty(0, device=kernel_device)] * 2, [torch.empty(0)] * 2, 0.9)


def test_lists_that_the_kernel_cannot_take_go_by_the_definition(seed, kernel_device):
    """Transposed, of two dtypes, and float64."""
    matrix = torch.randn(6, 5, device=kernel_device).t()
    vector = torch.randn(4, device=kernel_device)
    for target, online in (
        ([matrix], [torch.randn(5, 6, device=kernel_device)]),
        ([vector, vector.clone()], [vector.bfloat16() * 3, vector * 2]),
        ([vector.double()], [vector.double() * 2]),
    ):
        wanted = clones(target)
        ema.ema_update_reference(wanted, online, 0.9)
        copies = empties(target, torch.bfloat16)
        ema.ema_update(target, online, 0.9, copies)
        assert torch.equal(flat(target), flat(wanted))
        assert torch.equal(flat(copies), flat(wanted).bfloat16())


def test_the_tables_follow_the_tensors(seed, kernel_device):
    """Made once for the same tensors, anew for others of the same shapes."""
    target, online = randoms(kernel_device, [(7,), (9,)]), randoms(kernel_device, [(7,), (9,)])
    first = ema_lists.tables(target, online, chunk=8)
    assert ema_lists.tables(target, online, chunk=8)[0] is first[0]
    moved = clones(target)
    assert ema_lists.tables(moved, online, chunk=8)[0] is not first[0]
    ema.ema_update(target, online, 0.5)
    ema.ema_update(moved, online, 0.5)
    assert torch.equal(flat(moved), flat(target))


def test_lists_that_do_not_match():
    a, b = torch.randn(3), torch.randn(4)
    with pytest.raises(ValueError, match="other shapes"):
        ema.ema_update([a], [b], 0.9)
    with pytest.raises(ValueError, match="other shapes"):
        ema.ema_update([a], [a], 0.9, [b])
    with pytest.raises(ValueError, match="other shapes"):
        ema.ema_update([a, b], [a], 0.9)
    with pytest.raises(ValueError, match="no weights"):
        ema.ema_update([a], [], 0.9)


def test_lists_on_two_devices_are_not_for_a_kernel(kernel_device):
    """Their addresses would lie in one table: the definition refuses them in words."""
    here, elsewhere = torch.zeros(3, device=kernel_device), torch.zeros(3, device="meta")
    assert ema_lists.kernel_takes([[here], [here]], [[here], []])
    assert not ema_lists.kernel_takes([[here], [elsewhere]], [])
    assert not ema_lists.kernel_takes([[here], [here]], [[elsewhere]])


# --- ema_update_rows

# Rows of two widths, one value, a width of no power of two, and no rows.
MATRICES = [(5, 48), (3, 100), (1, 1), (7, 48), (0, 48)]


def fp8_rows(shapes, device: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Copies to be written, NaN before."""
    values = [torch.full(s, math.nan, device=device).to(torch.float8_e4m3fn) for s in shapes]
    return values, [torch.full((s[0], 1), math.nan, device=device) for s in shapes]


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.996, 0.3, 1.0])
def test_rows_are_the_ema_and_its_bf16_copy_in_fp8(seed, kernel_device, momentum, weights):
    """The EMA is ema_update's bit for bit, the rest what quantise_rows makes of its copy."""
    start = randoms(kernel_device, MATRICES)
    online = randoms(kernel_device, MATRICES, weights)
    ours, plain, copies = clones(start), clones(start), empties(start, torch.bfloat16)
    values, scales = fp8_rows(MATRICES, kernel_device)
    ema.ema_update_rows(ours, online, momentum, values, scales)
    ema.ema_update(plain, online, momentum, copies)
    assert torch.equal(flat(ours), flat(plain))
    for copied, value, scale in zip(copies, values, scales, strict=True):
        wanted = quantise_rows_reference(copied)
        assert torch.equal(value.float(), wanted.values.float())
        assert torch.equal(scale, wanted.scales)


def test_rows_follow_their_definition(seed, kernel_device):
    start, online = randoms(kernel_device, MATRICES), randoms(kernel_device, MATRICES)
    found = []
    for update in (ema.ema_update_rows, ema.ema_update_rows_reference):
        target, (values, scales) = clones(start), fp8_rows(MATRICES, kernel_device)
        update(target, online, 0.75, values, scales)  # exact in fp32 at both formulas of lerp
        found.append((flat(scales), flat([v.float() for v in values])))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0.13, atol=1e-6)  # one step of e4m3


def test_rows_between_others_are_left_alone(seed, kernel_device):
    buffer, online = torch.randn(2, 4, 9, 48, device=kernel_device)
    values, scales = fp8_rows([(9, 48)], kernel_device)
    before = buffer.clone()
    ema.ema_update_rows([buffer[1]], [online[1]], 0.5, values, scales)
    assert torch.equal(buffer[[0, 2, 3]], before[[0, 2, 3]])
    torch.testing.assert_close(buffer[1], (before[1] + online[1]) / 2)


def test_rows_that_do_not_match():
    t, (values, scales) = torch.randn(3, 16), fp8_rows([(3, 16)], "cpu")
    ema.ema_update_rows([], [], 0.9, [], [])
    with pytest.raises(ValueError, match="other shapes"):
        ema.ema_update_rows([t], [t], 0.9, values, [torch.ones(3)])
    with pytest.raises(ValueError, match=r"\[1, 1, 0, 1\]"):
        ema.ema_update_rows([t], [t], 0.9, [], scales)
    with pytest.raises(ValueError, match="e4m3"):
        ema.ema_update_rows([t], [t], 0.9, [t.clone()], scales)


def test_rows_pass_opcheck_and_compile(seed, kernel_device):
    shapes = [(5, 48), (3, 7)]
    target, online = randoms(kernel_device, shapes), randoms(kernel_device, shapes)
    values, scales = fp8_rows(shapes, kernel_device)
    lists = clones(target), online, [v.view(torch.uint8) for v in values], scales
    check_operator(
        torch.ops.cjepa_fast.ema_update_rows.default,
        (*lists, ema_lists.on_device([0.1], scales[0].device)),
    )
    found = []
    backend = "inductor" if kernel_device == "cuda" else "aot_eager"
    traced = torch.compile(ema.ema_update_rows, fullgraph=True, backend=backend)
    for update in (ema.ema_update_rows, traced):
        updated, (values, scales) = clones(target), fp8_rows(shapes, kernel_device)
        update(updated, online, 0.9, values, scales)
        found.append([flat(updated), flat([v.float() for v in values]), flat(scales)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --- adamw_ema_step

SETTINGS = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.04}


def torch_steps(params, grads, target, dtype, lr, momentum, **settings) -> dict:
    """torch.optim.AdamW, then lerp, for a gradient list a step: everything, by name."""
    params = [p.to(dtype, copy=True).requires_grad_() for p in params]
    target = clones(target, dtype)
    optimiser = torch.optim.AdamW(params, lr=lr, **settings)
    for now in grads:
        for p, g in zip(params, now, strict=True):
            p.grad = g.to(dtype)
        optimiser.step()
        for t, p in zip(target, params, strict=True):
            t.lerp_(p.detach(), 1 - momentum)
    states = [optimiser.state[p] for p in params]
    return {
        "params": flat(params).detach(),
        "exp_avgs": flat([s["exp_avg"] for s in states]),
        "exp_avg_sqs": flat([s["exp_avg_sq"] for s in states]),
        "target": flat(target),
    }


def our_steps(params, grads, target, dtype, lr, momentum, copy=None, **settings) -> tuple:
    """The same by adamw_ema_step: everything by name, and the two lists of copies."""
    params, target = clones(params, dtype), clones(target, dtype)
    state = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    copies, target_copies = empties(params, copy), empties(params, copy)
    for step, now in enumerate(grads, 1):
        ema.adamw_ema_step(
            params, now, *state, target, step=step, lr=lr, momentum=momentum,
            copies=copies, target_copies=target_copies, **settings,
        )  # fmt: skip
    names = ("params", "exp_avgs", "exp_avg_sqs", "target")
    found = {n: flat(list_) for n, list_ in zip(names, (params, *state, target), strict=True)}
    return found, copies, target_copies


@pytest.mark.parametrize("weight_decay", [0.0, 0.04])
def test_the_definition_is_torchs_adamw_and_lerp(seed, weight_decay):
    params, target = randoms("cpu"), randoms("cpu")
    grads = [randoms("cpu") for _ in range(4)]
    args = (params, grads, target, torch.float64, 1e-2, 0.9)
    kept = {**SETTINGS, "weight_decay": weight_decay}
    wanted = torch_steps(*args, **kept)
    doubled = [clones(g, torch.float64) for g in grads]
    found, _, _ = our_steps(params, doubled, *args[2:], **kept)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("narrow", "copy"), DTYPES)
def test_adamw_and_ema_within_the_error_budget(seed, kernel_device, narrow, copy):
    params, target = randoms(kernel_device, FEW), randoms(kernel_device, FEW)
    grads = [randoms(kernel_device, FEW, narrow) for _ in range(2)]
    found, copies, target_copies = our_steps(
        params, grads, target, torch.float32, 1e-2, 0.99, copy, **SETTINGS
    )
    eager = torch_steps(params, grads, target, torch.float32, 1e-2, 0.99, **SETTINGS)
    exact = torch_steps(params, grads, target, torch.float64, 1e-2, 0.99, **SETTINGS)
    for name, wanted in exact.items():
        within_budget(found[name], eager[name], wanted, torch.float32, name)
    if copy:
        assert torch.equal(flat(copies), found["params"].to(copy))
        assert torch.equal(flat(target_copies), found["target"].to(copy))


@pytest.mark.parametrize(("narrow", "copy"), DTYPES)
def test_the_way_on_a_cpu_within_the_error_budget(seed, monkeypatch, narrow, copy):
    """Without kernels, in runs of 8 values: shorter tensors, whole runs, a tail."""
    monkeypatch.setattr(adamw, "CACHED", 8)
    shapes = [(5,), (8,), (16, 3), (33,), (), (0,)]
    params, target = randoms("cpu", shapes), randoms("cpu", shapes)
    grads = [randoms("cpu", shapes, narrow) for _ in range(3)]
    scaled = [[g / 2 for g in now] for now in grads]
    found, copies, target_copies = our_steps(
        params, grads, target, torch.float32, 1e-2, 0.99, copy, scale=0.5, **SETTINGS
    )
    eager = torch_steps(params, scaled, target, torch.float32, 1e-2, 0.99, **SETTINGS)
    exact = torch_steps(params, scaled, target, torch.float64, 1e-2, 0.99, **SETTINGS)
    for name, wanted in exact.items():
        within_budget(found[name], eager[name], wanted, torch.float32, name)
    if copy:
        assert torch.equal(flat(copies), found["params"].to(copy))
        assert torch.equal(flat(target_copies), found["target"].to(copy))
    for now, halves in zip(grads, scaled, strict=True):  # gradients are read alone
        assert torch.equal(flat(now) / 2, flat(halves))


@pytest.mark.parametrize("which", ["params", "grads", "copies", "target_copies"])
def test_on_a_cpu_lists_that_are_not_dense_go_by_the_definition(seed, which):
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "target", "copies", "target_copies")
    lists = {name: torch.rand(6, 5) for name in names}
    lists[which] = torch.rand(5, 6).t()
    wanted = {name: lists[name].clone() for name in names}
    ema.adamw_ema_step(**{name: [lists[name]] for name in names}, step=1, lr=0.1, momentum=0.5)
    ema.adamw_ema_step_reference(
        **{name: [wanted[name]] for name in names}, step=1, lr=0.1, momentum=0.5
    )
    for name in names:
        torch.testing.assert_close(lists[name], wanted[name])


def test_adamw_leaves_what_lies_between_fragments(seed, kernel_device):
    """As ZeRO cuts them from flat buffers: nothing beyond a fragment's last value is written."""
    size = CHUNK + 40
    arrays = torch.rand(5, size, device=kernel_device).unbind()
    slices, between = [slice(0, 5), slice(9, 9 + CHUNK + 1)], torch.ones(size, dtype=torch.bool)
    for piece in slices:
        between[piece] = False
    before = [array.clone() for array in arrays]
    lists = [[array[piece] for piece in slices] for array in arrays]
    ema.adamw_ema_step(*lists, step=1, lr=0.1, momentum=0.5)
    for written, (array, old) in enumerate(zip(arrays, before, strict=True)):
        assert torch.equal(array[between], old[between])
        assert written == 1 or not torch.equal(array[~between], old[~between])  # 1: gradients


def test_one_kind_of_copy_alone(seed, kernel_device):
    """Of the weights, or of the EMA: the tables then have one row less."""
    shapes = [(5,), (CHUNK + 3,)]
    params, grads, target = (randoms(kernel_device, shapes) for _ in range(3))
    state = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    for name, source in (("copies", params), ("target_copies", target)):
        copies = empties(params, torch.bfloat16)
        ema.adamw_ema_step(
            params, grads, *state, target, step=1, lr=1e-2, momentum=0.9, **{name: copies}
        )
        assert torch.equal(flat(copies), flat(source).bfloat16())


def test_a_gradient_of_zero_moves_nothing_but_decay(seed, kernel_device):
    """sqrt(0) + eps divides: eps 1e-8 must not be lost."""
    params, target = randoms(kernel_device, FEW), randoms(kernel_device, FEW)
    grads = [[torch.zeros_like(p) for p in params]]
    found, _, _ = our_steps(params, grads, target, torch.float32, 0.1, 1.0, **SETTINGS)
    torch.testing.assert_close(found["params"], flat(params) * (1 - 0.1 * 0.04))
    assert torch.equal(found["target"], flat(target))


def test_parameters_with_gradients_on_are_stepped_in_place(seed, kernel_device):
    weight = torch.nn.Parameter(torch.randn(9, device=kernel_device))
    before, zeros = weight.detach().clone(), [torch.zeros(9, device=kernel_device)]
    target = weight.detach().clone()
    args = [torch.ones(9, device=kernel_device)], zeros, clones(zeros), [target]
    ema.adamw_ema_step([weight], *args, step=1, lr=0.1, momentum=0.5, weight_decay=0.0)
    torch.testing.assert_close(weight.detach(), before - 0.1)  # the first step is lr's sign
    torch.testing.assert_close(target, before - 0.05)


def test_without_an_ema(seed, kernel_device):
    """The weights and their copies are stepped as with one."""
    params, grads = randoms(kernel_device, FEW), randoms(kernel_device, FEW, torch.bfloat16)
    found = {}
    for with_ema in (True, False):
        fresh, state = clones(params), [[torch.zeros_like(p) for p in params] for _ in range(2)]
        copies = empties(params, torch.bfloat16)
        target = clones(params) if with_ema else ()
        ema.adamw_ema_step(fresh, grads, *state, target, step=3, lr=0.1, copies=copies)
        found[with_ema] = [flat(array) for array in (fresh, *state, copies)]
    for one, other in zip(found[True], found[False], strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(found[False][0], flat(params))


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16])
def test_the_gradients_scale(seed, kernel_device, narrow):
    """A quarter is exact in every type: as scaling them beforehand, bit for bit."""
    params, grads = randoms(kernel_device, FEW), randoms(kernel_device, FEW, narrow)
    found = []
    for gradient, scale in ((grads, 0.25), ([g / 4 for g in grads], 1.0)):
        arrays = [clones(params), gradient, *(clones(params) for _ in range(3))]
        arrays[3] = [v.square() for v in arrays[3]]
        before = clones(gradient)
        ema.adamw_ema_step(*arrays, step=2, lr=0.1, momentum=0.9, scale=scale)
        assert torch.equal(flat(gradient), flat(before))
        found.append(flat([x for i, array in enumerate(arrays) if i != 1 for x in array]))
    assert torch.equal(*found)


def test_numbers_on_the_device(seed, kernel_device):
    """Rate, decay, momentum, scale and the count of steps as 0-d tensors: the same values."""
    params, grads = randoms(kernel_device, FEW), randoms(kernel_device, FEW)
    numbers = {"step": 3, "lr": 0.1, "weight_decay": 0.2, "momentum": 0.7, "scale": 0.5}
    there = {
        k: torch.tensor(v, dtype=torch.float64, device=kernel_device) for k, v in numbers.items()
    }
    found = []
    for named in (numbers, there):
        arrays = [clones(params), grads, *(clones(params) for _ in range(3))]
        arrays[3] = [v.square() for v in arrays[3]]
        ema.adamw_ema_step(*arrays, **named, apply=torch.tensor(True, device=kernel_device))
        found.append(flat([x for array in arrays for x in array]))
    assert torch.equal(*found)


@pytest.mark.parametrize("tensor", [False, True])
def test_a_step_that_is_not_applied_writes_nothing(seed, kernel_device, tensor):
    params = randoms(kernel_device, FEW)
    lists = [clones(params) for _ in range(5)]
    lists[1] = [g * math.nan for g in lists[1]]
    copies = [empties(params, torch.bfloat16) for _ in range(2)]
    apply = torch.tensor(False, device=kernel_device) if tensor else False
    ema.adamw_ema_step(
        *lists, step=1, lr=0.1, momentum=0.5, apply=apply, copies=copies[0], target_copies=copies[1]
    )
    for which in (0, 2, 3, 4):
        assert torch.equal(flat(lists[which]), flat(params))
    assert flat([*copies[0], *copies[1]]).isnan().all()


def test_steps_that_cannot_be():
    a, b = torch.zeros(3), torch.zeros(4)
    numbers = {"lr": 1e-3, "momentum": 0.9}
    with pytest.raises(ValueError, match="step 0"):
        ema.adamw_ema_step([a], [a], [a], [a], [a], step=0, **numbers)
    with pytest.raises(ValueError, match="other shapes"):
        ema.adamw_ema_step([a], [b], [a], [a], [a], step=1, **numbers)
    with pytest.raises(ValueError, match=r"\[1, 0, 1, 1, 1\]"):
        ema.adamw_ema_step([a], [], [a], [a], [a], step=1, **numbers)
    with pytest.raises(ValueError, match="copies of an EMA"):
        ema.adamw_ema_step([a], [a], [a], [a], step=1, target_copies=[a], **numbers)


# --- as PyTorch's own


def some_lists(device: str, count: int) -> list[list[torch.Tensor]]:
    return [randoms(device, [(5,), (3, 7)]) for _ in range(count)]


def test_the_operators_pass_opcheck(seed, kernel_device):
    target, online = some_lists(kernel_device, 2)
    ops = torch.ops.cjepa_fast
    weight = ema_lists.on_device([0.1], target[0].device)
    check_operator(ops.ema_update.default, (target, online, [], weight))
    copies = empties(target, torch.bfloat16)
    check_operator(ops.ema_update.default, (target, online, copies, weight))
    lists = some_lists(kernel_device, 5)
    lists[3] = [v.abs() for v in lists[3]]
    numbers = adamw.adamw_numbers(target[0].device, 3, 1e-3, 0.9, [0.9, 0.95], 1e-8, 0.04)
    check_operator(ops.adamw_ema_step.default, (*lists, [], [], numbers))
    check_operator(ops.adamw_ema_step.default, (*lists[:4], [], copies, [], numbers))
    check_operator(ops.adamw_ema_step.default, (*lists, copies, clones(copies), numbers))


def test_autograd_hears_of_what_is_written(seed, kernel_device):
    """As of PyTorch's own operators in place: a graph that saved it before refuses to go on."""
    target, online = some_lists(kernel_device, 2)
    before = [x._version for x in (*target, *online)]
    weight = ema_lists.on_device([0.1], target[0].device)
    torch.ops.cjepa_fast.ema_update(target, online, [], weight)
    after = [x._version for x in (*target, *online)]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, 0, 0]


def step_of(target, online, exp_avgs, exp_avg_sqs, grads, copies) -> None:
    ema.ema_update(target, online, 0.9, copies)
    ema.adamw_ema_step(
        online, grads, exp_avgs, exp_avg_sqs, target, step=2, lr=0.1, momentum=0.7, copies=copies
    )


def test_compiles_without_a_graph_break(seed, kernel_device):
    lists = some_lists(kernel_device, 5)
    lists[3] = [v.abs() for v in lists[3]]
    lists.append(empties(lists[0], torch.bfloat16))
    eager, traced = [clones(a) for a in lists], [clones(a) for a in lists]
    step_of(*eager)
    backend = "inductor" if kernel_device == "cuda" else "aot_eager"
    torch.compile(step_of, fullgraph=True, backend=backend)(*traced)
    for a, b in zip(eager, traced, strict=True):
        assert torch.equal(flat(a), flat(b))


def test_same_bits_twice(seed, kernel_device):
    lists = some_lists(kernel_device, 5)
    lists[3] = [v.abs() for v in lists[3]]
    copies = empties(lists[0], torch.bfloat16)

    def call() -> tuple[torch.Tensor, ...]:
        fresh = [clones(a) for a in [*lists, copies]]
        step_of(*fresh)
        return tuple(flat(a) for a in fresh)

    same_bits(call)
