"""The gathers' kernels against their definitions in float64: outputs, gradients, every tile."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_checks import FLOOR, check_operator, compiles_whole, same_bits, within_budget
from parameters import crossed

from cjepa_fast.kernels import gather
from cjepa_fast.kernels.common import launch, tiles
from cjepa_fast.kernels.gather import predictor, targets, tokens
from cjepa_fast.model.jepa import JEPA
from cjepa_fast.model.loss import CJEPALoss
from cjepa_fast.model.predictor import Predictor
from cjepa_fast.model.vit import Encoder

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Shape(NamedTuple):
    B: int
    N: int
    K: int
    M: int
    P: int
    D: int


SHAPES = {
    "aligned": Shape(2, 64, 32, 2, 32, 64),  # full tiles only
    "ragged": Shape(3, 70, 37, 2, 29, 72),  # a rest in rows and in width
    "prime": Shape(2, 67, 41, 3, 23, 67),  # no alignment at all
    "one": Shape(1, 1, 1, 1, 1, 1),
    "power of two minus one": Shape(1, 63, 31, 3, 15, 127),
    "more indices than patches": Shape(2, 5, 131, 1, 131, 8),  # repeats, and two searches
    "wide": Shape(1, 3, 2, 1, 2, 520),  # a row cut into tiles
    "no index": Shape(2, 4, 0, 2, 0, 8),
    "no image": Shape(0, 4, 3, 2, 2, 8),
    "no block": Shape(2, 4, 3, 0, 2, 8),
}


def tensors_of(shape: Shape, dtype: torch.dtype, device: str, index=torch.int64) -> dict:
    """Random inputs of all ops. Context indices are unique in an image, as masks make them, where
    there are patches enough; target blocks overlap and repeat."""
    B, N, K, M, P, D = shape
    sizes = {"x": (B, N, D), "pos": (N, D), "context": (B, K, D), "token": (D,)}
    sizes["pred"] = (B, M, P, D)
    made = {n: torch.randn(*s).to(dtype) for n, s in sizes.items()}
    made["x"] = made["x"] + 0.5  # a mean for the layer-norm to take off
    rows = [torch.randperm(N)[:K] if K <= N else torch.randint(N, (K,)) for _ in range(B)]
    made["context_idx"] = torch.stack(rows).to(index) if B else torch.empty(0, K, dtype=index)
    made["target_idx"] = torch.randint(N, (B, M, P), dtype=index)
    return {n: t.to(device) for n, t in made.items()}


class Case(NamedTuple):
    op: Callable
    reference: Callable
    inputs: tuple[str, ...]
    trained: tuple[str, ...]  # those that take a gradient
    extra: tuple = ()


CASES = {
    "gather_tokens": Case(
        gather.gather_tokens, gather.gather_tokens_reference, ("x", "target_idx"), ("x",)
    ),
    "embed_gather": Case(
        gather.embed_gather, gather.embed_gather_reference, ("x", "pos", "context_idx"), ("x",)
    ),
    "add_positions": Case(
        gather.add_positions,
        gather.add_positions_reference,
        ("context", "pos", "context_idx"),
        ("context",),
    ),
    "target_gather": Case(
        gather.target_gather, gather.target_gather_reference, ("x", "target_idx"), ()
    ),
    "predictor_input": Case(
        gather.predictor_input,
        gather.predictor_input_reference,
        ("context", "pos", "token", "context_idx", "target_idx"),
        ("context", "token"),
    ),
    "smooth_l1": Case(
        gather.prediction_loss,
        gather.prediction_loss_reference,
        ("pred", "x", "target_idx"),
        ("pred",),
        ("smooth_l1",),
    ),
    "l2": Case(
        gather.prediction_loss,
        gather.prediction_loss_reference,
        ("pred", "x", "target_idx"),
        ("pred",),
        ("l2",),
    ),
}


def results(function, case: Case, tensors: dict, weight=None, dtype=None) -> tuple[dict, dict]:
    """The output and the gradients under `weight`, the output's gradient, by name."""
    used = {}
    for name in case.inputs:
        t = tensors[name].detach()
        used[name] = t.to(dtype) if dtype and t.is_floating_point() else t
        used[name].requires_grad_(name in case.trained)
    out = function(*used.values(), *case.extra)
    if weight is None:
        weight = torch.randn(out.shape).to(out)
    if case.trained:
        grads = torch.autograd.grad(out, [used[n] for n in case.trained], weight.to(out.dtype))
    else:
        assert not out.requires_grad
        grads = ()
    found = {"out": out.detach()}
    found |= {f"gradient of {n}": g for n, g in zip(case.trained, grads, strict=True)}
    return found, weight


def check(case: Case, tensors: dict, op: Callable | None = None) -> None:
    """Kernel against definition in the inputs' dtypes and in float64, all under one gradient."""
    ours, weight = results(op or case.op, case, tensors)
    eager, _ = results(case.reference, case, tensors, weight)
    exact, _ = results(case.reference, case, tensors, weight, torch.float64)
    # What a gradient adds up: sums in another order differ by a share of that, much as may cancel.
    amounts, _ = results(case.reference, case, tensors, weight.abs(), torch.float64)
    for name, wanted in exact.items():
        if wanted.isnan().all() and wanted.dim() == 0:  # the mean of nothing
            assert ours[name].isnan()
            continue
        floor = FLOOR[eager[name].dtype]
        if name.startswith("gradient") and wanted.numel() and wanted.any():
            floor *= max(1.0, (amounts[name].abs().max() / wanted.abs().max()).item())
        within_budget(ours[name], eager[name], wanted, eager[name].dtype, name, floor)


@pytest.mark.parametrize(
    ("case_and_shape", "dtype"),
    crossed(
        {
            f"{op}-{name}": (case, shape)
            for op, case in CASES.items()
            for name, shape in SHAPES.items()
        },
        DTYPES,
    ),
)
def test_kernel_within_the_error_budget(seed, kernel_device, case_and_shape, dtype):
    case, shape = case_and_shape
    check(case, tensors_of(shape, dtype, kernel_device))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_int32_indices(seed, kernel_device, case):
    check(case, tensors_of(SHAPES["ragged"], torch.float32, kernel_device, torch.int32))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_strided_inputs(seed, kernel_device, case):
    """Tokens cut from longer and wider ones, or with another innermost dimension; indices too."""
    plain = tensors_of(SHAPES["ragged"], torch.float32, kernel_device)
    moved = {n: t.transpose(0, -1).contiguous().transpose(0, -1) for n, t in plain.items()}
    cut = {n: torch.cat([t, t], -1)[..., : t.shape[-1]] for n, t in plain.items()}
    cut["x"] = torch.cat([plain["x"][:, :1], plain["x"]], 1)[:, 1:]
    for tensors in (moved, cut):
        assert not any(tensors[n].is_contiguous() for n in case.inputs if tensors[n].dim() > 1)
        check(case, tensors)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_mixed_dtypes_as_under_autocast(seed, kernel_device, case):
    """bf16 activations beside fp32 positions and mask token: the sum is fp32."""
    tensors = tensors_of(SHAPES["ragged"], torch.float32, kernel_device)
    for name in ("x", "context", "pred"):
        tensors[name] = tensors[name].bfloat16()
    check(case, tensors)
    with torch.autocast(kernel_device, torch.bfloat16):
        check(case, tensors)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_same_bits_twice(seed, kernel_device, case):
    tensors = tensors_of(SHAPES["ragged"], torch.bfloat16, kernel_device)
    _, weight = results(case.op, case, tensors)
    same_bits(lambda: tuple(results(case.op, case, tensors, weight)[0].values()))


def test_a_gather_copies_bits(seed, kernel_device):
    tensors = tensors_of(SHAPES["prime"], torch.bfloat16, kernel_device)
    x, idx = tensors["x"], tensors["target_idx"]
    got = gather.gather_tokens(x, idx)
    assert torch.equal(got, gather.gather_tokens_reference(x, idx))


@pytest.mark.parametrize("width", [8, 4104])
def test_layer_norm_far_from_zero(seed, kernel_device, width):
    """Mean 1000, standard deviation 0.1: E[x^2] - E[x]^2 would lose all of it in fp32."""
    tensors = tensors_of(Shape(1, 3, 2, 1, 2, width), torch.float32, kernel_device)
    tensors["x"] = tensors["x"] * 0.1 + 1000
    for name in ("target_gather", "smooth_l1"):
        check(CASES[name], tensors)


@pytest.mark.gpu
def test_offsets_beyond_int32(seed):
    """3 images of 2^16 tokens of width 2^14: 6 GiB, of which only the last rows are read."""
    x = torch.zeros(3, 2**16, 2**14, dtype=torch.bfloat16, device="cuda")
    x[:, -2:] = torch.randn(3, 2, 2**14, device="cuda")
    idx = torch.tensor([[2**16 - 1, 2**16 - 2]] * 3, device="cuda")
    small, near = x[:, -2:].clone(), idx - (2**16 - 2)
    assert torch.equal(gather.gather_tokens(x, idx), small.flip(1))
    assert torch.equal(gather.target_gather(x, idx), gather.target_gather(small, near))
    grad = tokens.launch_gather_backward(small, idx, 2**16, torch.bfloat16)
    assert torch.equal(grad[:, -2:], small.flip(1)) and not grad[:, :-2].any()


def test_smooth_l1_on_both_sides_of_one(seed, kernel_device):
    tensors = tensors_of(SHAPES["ragged"], torch.float32, kernel_device)
    tensors["pred"] = tensors["pred"] * 3
    targets = gather.target_gather_reference(tensors["x"], tensors["target_idx"])
    error = tensors["pred"] - targets
    assert (error > 1).any() and (error < -1).any() and (error.abs() < 1).any()
    check(CASES["smooth_l1"], tensors)
    check(CASES["l2"], tensors)


# --- every tile, forced


@pytest.mark.parametrize("tile", tiles.COPY_TILES.values(), ids=str)
@pytest.mark.parametrize("width", [40, 136])  # within one tile's width for most; cut by others
@pytest.mark.parametrize("name", ["gather_tokens", "embed_gather", "predictor_input"])
def test_every_copy_tile(seed, kernel_device, monkeypatch, name, width, tile):
    for module in (tokens, predictor):
        monkeypatch.setattr(module, "copy_tiles", lambda width: (tile,))
    check(CASES[name], tensors_of(Shape(2, 70, 9, 2, 67, width), torch.float32, kernel_device))


@pytest.mark.parametrize("tile", [*itertools.chain(*tiles.ROW_TILES.values())], ids=str)
@pytest.mark.parametrize("name", ["target_gather", "smooth_l1"])
def test_every_row_tile(seed, kernel_device, name, tile, monkeypatch):
    monkeypatch.setattr(targets, "row_tiles", lambda width: (tile,))
    check(CASES[name], tensors_of(Shape(2, 5, 1, 1, 3, 40), torch.float32, kernel_device))


def test_the_launchers_take_a_tile(seed, kernel_device):
    """As the tuner passes it: the results are those of the chosen one, bit for bit or nearly."""
    t = tensors_of(Shape(2, 7, 3, 2, 4, 40), torch.float32, kernel_device)
    idx, x, pred = t["target_idx"].flatten(1), t["x"], t["pred"].flatten(1, 2)
    grad = torch.randn(4, 7, 40, device=kernel_device)
    ones = torch.ones((), device=kernel_device)
    dtypes = (torch.float32, torch.float32)
    inputs = t["context"], t["pos"], t["token"], t["context_idx"], t["target_idx"]
    calls = [
        (tokens.launch_gather, (x, None, idx), tiles.COPY_TILES[64]),
        (
            tokens.launch_gather_backward,
            (pred, idx, 7, torch.float32),
            tiles.COPY_TILES[512],
        ),
        (predictor.launch_predictor_input, inputs, tiles.COPY_TILES[256]),
        (
            predictor.launch_predictor_input_backward,
            (grad, 2, 3, dtypes),
            tiles.COPY_TILES[256],
        ),
        (targets.launch_target_gather, (x, idx, 1e-5), tiles.ROW_TILES[128][0]),
        (
            targets.launch_prediction_loss,
            (pred, x, idx, "l2", 1e-5),
            tiles.ROW_TILES[256][0],
        ),
        (
            targets.launch_prediction_slope,
            (ones, pred, x, idx, "l2", 1e-5),
            tiles.ROW_TILES[64][0],
        ),
    ]
    for launcher, args, tile in calls:
        torch.testing.assert_close(launcher(*args, tile=tile), launcher(*args))


def test_the_chosen_tile_fits_the_width():
    for width in (192, 384, 768, 1024, 1280, 1408):
        assert all(width % tile.width == 0 for tile in tiles.copy_tiles(width))
    assert [tile.width for tile in tiles.copy_tiles(768)] == [256, 128, 64]
    for width in range(1, 2000):
        assert all(tile.width >= width for tile in tiles.row_tiles(width))
        assert set(tiles.copy_tiles(width)) <= set(tiles.COPY_TILES.values())


# --- shapes that nobody thought of


@given(
    shape=st.builds(
        Shape,
        B=st.integers(0, 3),
        N=st.integers(1, 20),
        K=st.integers(0, 20),
        M=st.integers(0, 3),
        P=st.integers(0, 9),
        D=st.integers(1, 70),
    ),
    name=st.sampled_from(sorted(CASES)),
    dtype=st.sampled_from(DTYPES),
    index=st.sampled_from([torch.int32, torch.int64]),
)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_shape(seed, kernel_device, shape, name, dtype, index):
    check(CASES[name], tensors_of(shape, dtype, kernel_device, index))


# --- gradients that the kernels leave to the definitions, and that nobody asks for


@pytest.mark.parametrize("name", ["embed_gather", "add_positions", "predictor_input"])
def test_trained_positions_get_their_gradient(seed, kernel_device, name):
    case = CASES[name]
    case = case._replace(trained=(*case.trained, "pos"))
    check(case, tensors_of(SHAPES["ragged"], torch.float32, kernel_device))


def test_targets_take_no_gradient(seed, kernel_device):
    t = tensors_of(SHAPES["aligned"], torch.float32, kernel_device)
    loss = gather.prediction_loss(
        t["pred"].requires_grad_(), t["x"].requires_grad_(), t["target_idx"]
    )
    loss.backward()
    assert t["x"].grad is None and t["pred"].grad.any()
    assert not gather.target_gather(t["x"], t["target_idx"]).requires_grad


def test_float64_goes_by_the_definition(seed, kernel_device):
    t = tensors_of(SHAPES["ragged"], torch.float64, kernel_device)
    for case in CASES.values():
        args = [t[n] for n in case.inputs] + list(case.extra)
        assert torch.equal(case.op(*args), case.reference(*args))


# --- indices outside the table


def with_wrong(idx: torch.Tensor, wrong: int) -> torch.Tensor:
    idx = idx.clone()
    idx[(0,) * idx.dim()] = wrong
    return idx


@pytest.mark.parametrize("wrong", [-1, 7, 8, 10**9, -(2**40)])
def test_a_wrong_index_comes_out_as_nan(seed, kernel_device, wrong):
    """Never a neighbouring image's row; and all other rows are as they should be."""
    t = tensors_of(Shape(2, 7, 3, 2, 4, 40), torch.float32, kernel_device)
    right = t["target_idx"].flatten(1)
    idx = with_wrong(right, wrong)
    for call in (
        lambda i: tokens.launch_gather(t["x"], None, i),
        lambda i: tokens.launch_gather(t["x"], t["pos"], i),
        lambda i: tokens.launch_gather(t["pred"].flatten(1, 2), t["pos"], i, gather=False),
        lambda i: targets.launch_target_gather(t["x"], i, 1e-5),
    ):
        got, wanted = call(idx), call(right)
        assert got[0, 0].isnan().all()
        assert torch.equal(got.flatten(0, 1)[1:], wanted.flatten(0, 1)[1:])
    pred = t["pred"].flatten(1, 2)
    assert targets.launch_prediction_loss(pred, t["x"], idx, "smooth_l1", 1e-5).isnan()
    one = torch.ones((), device=kernel_device)
    slope = targets.launch_prediction_slope(one, pred, t["x"], idx, "smooth_l1", 1e-5)
    assert slope[0, 0].isnan().all() and not slope[0, 1:].isnan().any()
    inputs = [t["context"], t["pos"], t["token"]]
    sequences = predictor.launch_predictor_input(
        *inputs, with_wrong(t["context_idx"], wrong), with_wrong(t["target_idx"], wrong)
    )
    assert sequences[:2, 0].isnan().all() and sequences[0, 3].isnan().all()
    assert sequences.isnan().any(-1).sum() == 3


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_wrong_index_is_named_on_the_cpu(seed, kernel_device, case):
    t = tensors_of(Shape(2, 7, 3, 2, 4, 40), torch.float32, "cpu")
    which = case.inputs[-1]
    t[which] = with_wrong(t[which], 7)
    with pytest.raises(IndexError, match=r"index 7 is outside 0\.\.6"):
        case.op(*[t[n] for n in case.inputs], *case.extra)


def test_the_debug_switch_asserts_on_the_device(seed, monkeypatch):
    if not launch.INTERPRETING:
        pytest.skip("a device assert ends the process's CUDA context")
    from triton.runtime import interpreter
    from triton.runtime.errors import InterpreterError

    options = interpreter.InterpreterOptions(debug=True)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
    monkeypatch.setattr(launch, "DEBUG_INDICES", True)
    t = tensors_of(Shape(2, 7, 3, 2, 4, 40), torch.float32, "cpu")
    calls = {
        "rows": lambda i: tokens.launch_gather(t["x"], None, i.flatten(1)),
        "targets": lambda i: targets.launch_target_gather(t["x"], i, 1e-5),
        "loss": lambda i: targets.launch_prediction_loss(
            t["pred"].flatten(1, 2), t["x"], i, "l2", 1e-5
        ),
        "sequences": lambda i: predictor.launch_predictor_input(
            t["context"], t["pos"], t["token"], t["context_idx"], i
        ),
    }
    for call in calls.values():
        call(t["target_idx"])
        for wrong in (7, -1):
            with pytest.raises(InterpreterError, match=r"outside 0\.\.N-1"):
                call(with_wrong(t["target_idx"], wrong))


def test_arguments_that_do_not_fit(seed, kernel_device):
    t = tensors_of(Shape(2, 7, 3, 2, 4, 40), torch.float32, kernel_device)
    with pytest.raises(ValueError, match="6 positions for 7 patches"):
        gather.embed_gather(t["x"], t["pos"][:6], t["context_idx"])
    context_idx = t["context_idx"][:, :2]
    with pytest.raises(ValueError, match=r"indices \[2, 2\] for tokens \[2, 3, 40\]"):
        gather.add_positions(t["context"], t["pos"], context_idx)
    with pytest.raises(ValueError, match=r"indices \[2, 2\] for tokens \[2, 3, 40\]"):
        gather.predictor_input(t["context"], t["pos"], t["token"], context_idx, t["target_idx"])
    with pytest.raises(ValueError, match=r"indices \[1, 2, 4\] cpu for \[2, 7, 40\]"):
        tokens.launch_gather(t["x"].cpu(), None, t["target_idx"][:1].cpu())
    with pytest.raises(ValueError, match="'huber'"):
        gather.prediction_loss(t["pred"], t["x"], t["target_idx"], "huber")
    with pytest.raises(ValueError, match=r"pred is \(2, 2, 4, 39\)"):
        gather.prediction_loss(t["pred"][..., 1:], t["x"], t["target_idx"])


# --- in the network


def small_network() -> JEPA:
    torch.manual_seed(0)
    encoder = Encoder(12, 3, 16, 1, 2)
    return JEPA(encoder, Predictor(16, encoder.grid, 8, 1, 2), CJEPALoss(beta=0.0))


def step_of(network: JEPA, device: str, autocast: bool) -> dict[str, torch.Tensor]:
    """The loss of a fixed batch and every gradient, by name."""
    g = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 12, 12, generator=g).to(device, network.encoder.norm.weight.dtype)
    order = torch.stack([torch.randperm(16, generator=g) for _ in range(2)]).to(device)
    targets = torch.stack([order[:, 5:9], order[:, 7:11]], 1)  # two blocks that overlap
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        with torch.no_grad():
            tokens = network.encoder(images)
        loss = network(images, order[:, :5], targets, tokens)["loss"]
    network.zero_grad()
    loss.backward()
    grads = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


@pytest.mark.parametrize("autocast", [False, True])
def test_the_network_learns_the_same(kernel_device, monkeypatch, autocast):
    network = small_network().to(kernel_device)
    ours = step_of(network, kernel_device, autocast)
    for module in (tokens, targets, predictor):
        monkeypatch.setattr(module, "use_kernel", lambda *tensors: False)
    plain = step_of(network, kernel_device, autocast)
    exact = step_of(network.double(), kernel_device, False)
    assert ours.keys() == plain.keys() == exact.keys() and len(ours) > 30
    dtype = torch.bfloat16 if autocast else torch.float32
    for name, wanted in exact.items():
        assert name == "loss" or wanted.any()
        within_budget(ours[name], plain[name], wanted, dtype, name)


# --- as PyTorch's own


def test_the_operators_pass_opcheck(seed, kernel_device):
    t = tensors_of(Shape(2, 7, 3, 2, 4, 40), torch.float32, kernel_device)
    x, pred = t["x"].requires_grad_(), t["pred"].flatten(1, 2).requires_grad_()
    context, token = t["context"].requires_grad_(), t["token"].requires_grad_()
    idx, ops = t["target_idx"].flatten(1), torch.ops.cjepa_fast
    check_operator(ops.gather.default, (x, None, idx))
    check_operator(ops.gather.default, (x, t["pos"], t["context_idx"]))
    check_operator(ops.add_positions.default, (context, t["pos"], t["context_idx"]))
    check_operator(ops.gather_backward.default, (pred.detach(), idx, 7, torch.bfloat16))
    check_operator(ops.target_gather.default, (x.detach(), idx, 1e-5))
    check_operator(ops.prediction_loss.default, (pred, x.detach(), idx, "l2", 1e-5))
    one = torch.ones((), device=kernel_device)
    args = (one, pred.detach(), x.detach(), idx, "smooth_l1", 1e-5)
    check_operator(ops.prediction_slope.default, args)
    inputs = (context, t["pos"], token, t["context_idx"], t["target_idx"])
    check_operator(ops.predictor_input.default, inputs)
    grad = torch.randn(4, 7, 40, device=kernel_device)
    dtypes = (torch.bfloat16, torch.float32)
    check_operator(ops.predictor_input_backward.default, (grad, 2, 3, *dtypes))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_compiles_without_a_graph_break(seed, kernel_device, case):
    t = tensors_of(Shape(2, 7, 3, 2, 4, 40), torch.float32, kernel_device)
    for name in case.trained:
        t[name].requires_grad_()
    args = [t[n] for n in case.inputs]
    compiles_whole(lambda *args: case.op(*args, *case.extra) * 2, *args)
