"""The blocks as fused operators: the networks' outputs and every gradient, against the modules."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cublaslt_stand_in import StandIn
from torch.utils._python_dispatch import TorchDispatchMode

from cjepa_fast.config import validate
from cjepa_fast.kernels.common import launch
from cjepa_fast.model import cublaslt, fused_mlp, predictor, vit
from cjepa_fast.model.fp8 import linears_to_fp8
from cjepa_fast.model.predictor import Predictor
from cjepa_fast.model.recompute import RecomputePolicy
from cjepa_fast.model.vit import Encoder
from cjepa_fast.training import build

POLICIES = ["none", "norm_gelu", "selective", "full"]
LONG = [pytest.param(policy, marks=pytest.mark.long) for policy in POLICIES]
B, M, P, K = 2, 2, 7, 20


def networks(device: str, **options) -> torch.nn.ModuleDict:
    """A small encoder and predictor whose every parameter matters."""
    channels = options.pop("channels", 3)
    options = {"attention": "triton", **options}
    encoder = Encoder(24, 4, 48, 2, 2, **options, channels=channels)
    predictor = Predictor(48, encoder.grid, 32, 2, 2, **options)
    made = torch.nn.ModuleDict({"encoder": encoder, "predictor": predictor})
    for p in made.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, mean=0.3 * (p.dim() == 1), std=0.2)
    return made.to(device)


def inputs(device: str, channels: int = 3) -> tuple[torch.Tensor, ...]:
    context = torch.stack([torch.randperm(36)[:K].sort().values for _ in range(B)])
    images, upstream = torch.randn(B, channels, 24, 24), torch.randn(B, M, P, 48)
    return tuple(x.to(device) for x in (images, context, torch.randint(36, (B, M, P)), upstream))


def outcome(made, images, context, targets, upstream, dtype, fuse: bool) -> dict:
    """The prediction, and the gradients of the images and of all parameters, by name."""
    made = copy.deepcopy(made).to(dtype)
    for network in made.values():
        network.fused = fuse
        network.residual = network.residual if dtype == torch.bfloat16 else "bf16"
    if not fuse:
        for block in (*made["encoder"].blocks, *made["predictor"].predictor_blocks):
            block.attn.backend = "plain"
    images = images.to(dtype).requires_grad_()
    out = made["predictor"](made["encoder"](images, context), context, targets)
    trained = {name: p for name, p in made.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(out, [images, *trained.values()], upstream.to(out.dtype))
    return {"out": out.detach(), "images": grads[0], **dict(zip(trained, grads[1:], strict=True))}


def distance(x: torch.Tensor, exact: torch.Tensor) -> float:
    return ((x.double() - exact).norm() / exact.norm()).item()


def check_as_near(made, images, *batch, names: tuple[str, ...] = ()) -> None:
    """In bf16 the operators are twice as far from the truth as the modules at most, and a rounding.

    In norm, of the output and each gradient (`names`: of these), of the operators over two inputs,
    of the modules over eight. One alone is a poor measure: images 1.0002 times as bright round
    otherwise, and the distance of one and the same gradient then lies anywhere from 0.008 to 0.018,
    the modules' as much as the operators'.
    """
    squares = {True: [], False: []}
    for k in range(8):
        brighter = (images * (1 + k * 2.0**-12), *batch)
        exact = outcome(made, *brighter, torch.float64, False)
        for fuse in (True, False) if k < 2 else (False,):
            got = outcome(made, *brighter, torch.bfloat16, fuse)
            assert all(value.dtype == torch.bfloat16 for value in got.values())
            squares[fuse].append({name: distance(got[name], exact[name]) ** 2 for name in exact})
    for name in names or exact:
        operators, modules = (
            (sum(draw[name] for draw in draws) / len(draws)) ** 0.5 for draws in squares.values()
        )
        assert operators <= 2 * modules + 2.0**-9, name


@pytest.mark.parametrize("residual", ["bf16", pytest.param("fp32", marks=pytest.mark.long)])
@pytest.mark.parametrize("policy", ["none", *LONG[1:]])
def test_as_near_to_the_truth_as_the_modules(seed, kernel_device, residual, policy):
    made = networks(kernel_device, residual=residual, checkpointing=policy)
    check_as_near(made, *inputs(kernel_device))


@pytest.mark.parametrize("channels", [pytest.param(1, marks=pytest.mark.long), 5])
def test_any_number_of_channels(seed, kernel_device, channels):
    """A patch is then 16 or 80 values, which the gather of the context's patches copies."""
    made = networks(kernel_device, channels=channels)
    names = ("out", "images", "encoder.patch_embed.proj.weight")
    check_as_near(made, *inputs(kernel_device, channels), names=names)


@pytest.mark.parametrize("policy", ["norm_gelu", *LONG[2:]])
def test_what_is_computed_again_has_the_same_bits(seed, kernel_device, policy):
    """And so has a second call: nothing in it is left to the order in which programs end."""
    made, batch = networks(kernel_device), inputs(kernel_device)
    kept = outcome(made, *batch, torch.bfloat16, True)
    for network in made.values():
        for block in getattr(network, "blocks", None) or network.predictor_blocks:
            block.policy = RecomputePolicy(policy)
    again = outcome(made, *batch, torch.bfloat16, True)
    for name, value in kept.items():
        assert torch.equal(again[name], value), name


# --------------------------------------------------------------------------------- GELU by tanh


def by_stand_in(monkeypatch, **options) -> StandIn | None:
    """cuBLASLt's calls by a stand-in, on a CPU; on a GPU by cuBLASLt, where it is right."""
    if torch.cuda.is_available():
        if why := cublaslt.problem(torch.device("cuda", 0), torch.bfloat16):
            pytest.skip(why)
        return None
    library = StandIn(**options)
    made = cublaslt.Matmuls(cublaslt.bind(library))
    monkeypatch.setattr(cublaslt, "matmuls", lambda device: made)
    monkeypatch.setattr(cublaslt, "takes", lambda x, weight: True)
    return library


@pytest.mark.parametrize(
    ("policy", "by_matmul", "calls"),
    [
        pytest.param("none", False, {}, marks=pytest.mark.long),
        ("none", True, {cublaslt.GELU_AUX_BIAS: 4, cublaslt.DGELU_BGRAD: 4}),
        pytest.param("norm_gelu", True, {cublaslt.DGELU_BGRAD: 4}, marks=pytest.mark.long),
        pytest.param("selective", True, {}, marks=pytest.mark.long),
        pytest.param("full", True, {}, marks=pytest.mark.long),
    ],
)
def test_tanh_s_is_as_near_to_the_truth_as_the_modules(
    seed, kernel_device, monkeypatch, policy, by_matmul, calls
):
    """The output and every gradient; and what cuBLASLt is asked for, of four blocks."""
    library = by_stand_in(monkeypatch) if by_matmul else None
    if kernel_device == "cuda" and not by_matmul:
        monkeypatch.setattr(cublaslt, "takes", lambda x, weight: False)
    made = networks(kernel_device, gelu="tanh", checkpointing=policy)
    check_as_near(made, *inputs(kernel_device))
    twice = {epilogue: 2 * count for epilogue, count in calls.items()}  # of two inputs
    assert library is None or library.calls == twice


def test_where_cublaslt_has_no_algorithm_the_kernels_serve(seed, kernel_device, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("by the stand-in alone")
    made, batch = networks(kernel_device, gelu="tanh"), inputs(kernel_device)
    apart = outcome(made, *batch, torch.bfloat16, True)
    library = by_stand_in(monkeypatch, algorithms=0)
    for name, value in outcome(made, *batch, torch.bfloat16, True).items():
        assert torch.equal(value, apart[name]), name
    assert library.created["description"] and not library.calls


@pytest.mark.long
def test_exact_gelu_asks_no_matmul_for_it(seed, kernel_device, monkeypatch):
    def never(*_):
        raise AssertionError("asked")

    for module, name in ((cublaslt, "takes"), (fused_mlp, "gelu_by_torch")):
        monkeypatch.setattr(module, name, never)
    made, (images, *batch) = networks(kernel_device), inputs(kernel_device)
    outcome(made, images, *batch, torch.bfloat16, True)
    encoder = made["encoder"].bfloat16()
    encoder.fused = True
    with torch.no_grad():
        encoder(images.bfloat16())


def test_without_gradients_tanh_s_is_in_torch_s_own_matmul(seed, kernel_device, monkeypatch):
    """By a stand-in that computes tanh's, as that call does on CUDA alone."""
    asked, real = [], torch._addmm_activation

    def addmm(bias, x, weight_t, *, use_gelu):
        asked.append((bias, x, weight_t))
        assert use_gelu
        if x.is_cuda:
            return real(bias, x, weight_t, use_gelu=True)
        return F.gelu(torch.addmm(bias, x, weight_t).float(), approximate="tanh").to(x.dtype)

    monkeypatch.setattr(torch, "_addmm_activation", addmm)
    monkeypatch.setattr(fused_mlp, "gelu_by_torch", lambda x, weight: True)
    monkeypatch.setattr(fused_mlp, "launch_gelu", None)  # no pass of its own
    encoder = networks(kernel_device, gelu="tanh")["encoder"].requires_grad_(False)
    images = torch.randn(B, 3, 24, 24, device=kernel_device)
    with torch.no_grad():
        exact = copy.deepcopy(encoder).double()(images.double())
        encoder.bfloat16()
        plain = encoder(images.bfloat16())
        encoder.fused = True
        got = encoder(images.bfloat16())
    assert distance(got, exact) <= 2 * distance(plain, exact) + 2.0**-9
    assert len(asked) == len(encoder.blocks)
    for (bias, x, weight_t), block in zip(asked, encoder.blocks, strict=True):
        fc1 = block.mlp.fc1
        assert bias is fc1.bias and x.shape == (B * 36, 48)
        assert weight_t.data_ptr() == fc1.weight.data_ptr() and weight_t.shape == (48, 192)


class Counting(TorchDispatchMode):
    """Matmuls with a bias, which only a forward makes."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket is torch.ops.aten.addmm
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("policy", "recomputed"), [("none", 0), ("norm_gelu", 0), ("selective", 1), ("full", 3)]
)
def test_how_many_matmuls_are_recomputed_in_the_backward(seed, kernel_device, policy, recomputed):
    """Of a block's four: fc1, or all but fc2, as recompute.py says."""
    encoder = networks(kernel_device, checkpointing=policy)["encoder"].bfloat16()
    encoder.fused = True
    images, context, *_ = inputs(kernel_device)
    out = encoder(images.bfloat16(), context)
    with Counting() as matmuls:
        out.sum().backward()
    assert matmuls.count == recomputed * len(encoder.blocks)


@pytest.mark.parametrize("backend", [pytest.param("plain", marks=pytest.mark.long), "sdpa"])
def test_with_another_kernel_for_attention(seed, kernel_device, backend):
    check_as_near(networks(kernel_device, attention=backend), *inputs(kernel_device))


def test_without_gradients_nothing_is_kept_and_all_is_equal(seed, kernel_device):
    """As the target encoder runs: GELU in place, and the same values."""
    made, (images, *_) = networks(kernel_device).bfloat16(), inputs(kernel_device)
    encoder = made["encoder"]
    encoder.fused = True
    with_graph = encoder(images.bfloat16())
    with torch.no_grad():
        without = encoder(images.bfloat16())
    assert with_graph.requires_grad and torch.equal(with_graph, without)


def test_in_8_bits_as_near_to_the_truth_as_the_modules(seed, kernel_device):
    encoder = networks(kernel_device)["encoder"].requires_grad_(False)
    images = torch.randn(B, 3, 24, 24, device=kernel_device)
    exact = copy.deepcopy(encoder).double()(images.double())
    encoder.bfloat16()
    linears_to_fp8(encoder)
    plain = encoder(images.bfloat16())
    encoder.fused = True
    got = encoder(images.bfloat16())
    assert distance(got, exact) <= 1.5 * distance(plain, exact) < 0.1


def test_the_fused_path_is_taken_where_it_can_be(seed, kernel_device, monkeypatch):
    """And nowhere else: not for packed or one-pass sequences, fp32, or where it is off."""
    ran = []
    for module in (vit, predictor):
        run = lambda blocks, norm, x, last=None: ran.append(1) or x  # noqa: E731
        monkeypatch.setattr(module, "run_fused", run)
    images = torch.randn(1, 3, 24, 24, device=kernel_device)
    encoder = networks(kernel_device)["encoder"]
    encoder(images)
    encoder.fused = True
    encoder(images)  # fp32
    assert not ran
    encoder.bfloat16()(images.bfloat16())
    assert ran


@pytest.mark.parametrize(
    ("sections", "stage", "wanted"),
    [
        ({}, 0, True),
        ({"model": {"fused": False}}, 0, False),
        ({"run": {"compile": "blocks"}}, 0, False),
        ({}, 2, True),
        ({}, 3, False),
    ],
)
def test_where_the_trainer_asks_for_it(sections, stage, wanted):
    tiny = {"name": "vit_tiny", "patch_size": 16, "width": 48, "depth": 1, "heads": 2}
    sections = {**sections, "model": tiny | sections.get("model", {})}
    config = validate({**sections, "predictor": {"width": 24, "depth": 1, "heads": 1}})
    made = build.build_networks(config)
    target = copy.deepcopy(made.encoder)
    build.fuse_networks(made, target, config, stage)
    assert made.encoder.fused == made.predictor.fused == target.fused == wanted


def test_on_a_cpu_the_modules_run(seed):
    assert not launch.use_kernel(torch.zeros(1))
    made, batch = networks("cpu"), inputs("cpu")
    one, other = (outcome(made, *batch, torch.bfloat16, fuse) for fuse in (False, True))
    for name, value in one.items():
        assert torch.equal(other[name], value), name
