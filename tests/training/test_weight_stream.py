"""The gradients of weights on a second CUDA stream: the order of waits, what memory is kept, and
the same bits. A stand-in for CUDA does the second stream's work as late as CUDA may."""

import contextlib
import dataclasses
from typing import NamedTuple

import pytest
import tiny
import torch
from test_graph import STEPS, trainer_of
from torch.autograd import Function
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from cjepa_fast.config import ConfigError, validate
from cjepa_fast.data.loader import Batch
from cjepa_fast.data.masks import Masks
from cjepa_fast.model import weight_stream
from cjepa_fast.model.fused_ops import BF16, AddNormLast, Matmul
from cjepa_fast.model.weight_stream import WeightStream
from cjepa_fast.runtime import distributed
from cjepa_fast.training import build, start

CPU = torch.device("cpu")


class Memory(NamedTuple):
    """A tensor that keeps no memory alive."""

    storage: StorageWeakRef
    dtype: torch.dtype
    layout: tuple

    @classmethod
    def of(cls, x: torch.Tensor) -> "Memory":
        layout = x.storage_offset(), x.size(), x.stride()
        return cls(StorageWeakRef(x.untyped_storage()), x.dtype, layout)

    def tensor(self) -> torch.Tensor:
        assert not self.storage.expired(), "the second stream used memory that had been freed"
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.layout)


class Stream:
    def __init__(self, name: str, cuda: "Cuda"):
        self.name, self.cuda = name, cuda

    def wait_stream(self, other: "Stream") -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")
        if other.name == "second":
            self.cuda.run()


class Cuda(TorchDispatchMode):
    """Stands in for torch.cuda. Work of the second stream is done when the main one waits for it;
    until then what it writes is NaN."""

    def __init__(self):
        super().__init__()
        self.log: list[str] = []
        self.stream = self.main = Stream("main", self)
        self.waiting: list[tuple] = []
        self.used: list[Memory] = []  # by work that is done
        self.kept = 0  # of that, when the next was begun

    @contextlib.contextmanager
    def on(self, stream: Stream):
        self.stream = stream
        yield
        self.stream = self.main

    def run(self) -> None:
        for function, tensors, out in self.waiting:
            with _disable_current_modes():
                function(*(x.tensor() for x in tensors), out=out.tensor())
            self.used += tensors
        self.waiting.clear()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.overloadpacket is torch.ops.aten.mm:
            self.log.append(f"matmul on {self.stream.name}")
        if self.stream is self.main or "out" not in kwargs:
            return function(*args, **kwargs)
        self.kept += sum(not used.storage.expired() for used in self.used)
        kwargs["out"].fill_(torch.nan)
        self.waiting.append((function, [Memory.of(x) for x in args], Memory.of(kwargs["out"])))
        return kwargs["out"]


@pytest.fixture
def cuda(monkeypatch) -> Cuda:
    cuda = Cuda()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("second", cuda))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: cuda.stream)
    monkeypatch.setattr(torch.cuda, "stream", cuda.on)
    return cuda


class Norm(Function):
    """Stands for what follows in the backward; raises if asked."""

    @staticmethod
    def forward(ctx, x, cuda, fails):
        ctx.cuda, ctx.fails = cuda, fails
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        ctx.cuda.log.append(f"norm on {ctx.cuda.stream.name}")
        if ctx.fails:
            raise RuntimeError("in the middle of a backward")
        return dx.clone(), None, None


def weights(count: int = 4) -> list[torch.nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(8, 8, generator=g)) for _ in range(count)]


def loss_of(weights: list[torch.Tensor], cuda: Cuda, fails: bool = False) -> torch.Tensor:
    """Of Linears one after the other, a norm before each."""
    x = torch.ones(5, 8)
    for weight in weights:
        x = Matmul.apply(Norm.apply(x.requires_grad_(), cuda, fails), weight, torch.zeros(8), BF16)
    return x.square().sum()


def without(made: list[torch.nn.Parameter], backwards: int = 1) -> list[torch.Tensor]:
    """The gradients on one stream."""
    made = [torch.nn.Parameter(w.detach().clone()) for w in made]
    for _ in range(backwards):
        loss_of(made, Cuda()).backward()
    return [w.grad for w in made]


def check_same(made: list[torch.nn.Parameter], wanted: list[torch.Tensor]) -> None:
    for weight, gradient in zip(made, wanted, strict=True):
        assert torch.equal(weight.grad, gradient)


def test_each_waits_for_what_it_needs_and_no_longer(cuda):
    made = weights(2)
    loss = loss_of(made, cuda)
    with cuda, WeightStream(CPU).backward(made):
        loss.backward()
        assert cuda.waiting, "the last one is not waited for before the backward ends"
    begun = ["second waits for main", "matmul on second", "norm on main"]
    dx = ["matmul on main"]
    assert cuda.log == [*dx, *begun, *dx, "main waits for second", *begun, "main waits for second"]
    check_same(made, without(made))


def test_what_one_matmul_uses_is_kept_until_the_main_stream_waits(cuda):
    """And no longer; autograd takes dW without a copy."""
    made, stream = weights(), WeightStream(CPU)
    loss = loss_of(made, cuda)
    written = []
    with cuda, stream.backward(made):
        loss.backward()
        written += [memory for *_, memory in cuda.waiting]
    assert len(cuda.used) == 2 * len(made) and not cuda.kept
    assert all(memory.storage.expired() for memory in cuda.used)
    (first,) = written
    assert made[0].grad.data_ptr() == first.tensor().data_ptr()
    check_same(made, without(made))


def test_the_gradient_of_a_frozen_weight_is_kept_while_it_is_written(cuda):
    """Nobody takes it."""
    made = weights(3)
    made[1].requires_grad_(False)
    loss = loss_of(made, cuda)
    with cuda, WeightStream(CPU).backward(made):
        loss.backward()
    wanted = without(made)
    assert made[1].grad is None
    check_same([made[0], made[2]], [wanted[0], wanted[2]])


def test_a_gradient_that_is_there_is_added_to_on_the_main_stream(cuda):
    """Autograd's sum would else read what is not yet there."""
    made, stream = weights(2), WeightStream(CPU)
    for _ in range(2):
        loss = loss_of(made, cuda)
        with cuda, stream.backward(made):
            loss.backward()
    assert cuda.log.count("matmul on second") == 2
    check_same(made, without(made, backwards=2))


def test_so_is_the_second_gradient_of_a_weight_that_is_used_twice(cuda):
    (weight,) = weights(1)
    loss = loss_of([weight, weight, weight], cuda)
    with cuda, WeightStream(CPU).backward([weight]):
        loss.backward()
    assert cuda.log.count("matmul on second") == 1
    other = torch.nn.Parameter(weight.detach().clone())
    loss_of([other, other, other], Cuda()).backward()
    check_same([weight], [other.grad])


def test_after_an_error_all_is_waited_for_and_let_go(cuda):
    made, stream = weights(2), WeightStream(CPU)
    loss = loss_of(made, cuda, fails=True)
    with (
        cuda,
        pytest.raises(RuntimeError, match="in the middle of a backward"),
        stream.backward(made),
    ):
        loss.backward()
    del loss
    assert cuda.log[-1] == "main waits for second" and not cuda.waiting
    assert not stream._used and weight_stream._in_use is None
    for weight in made:
        weight.grad = None
    loss_of(made, cuda).backward()  # of somebody else
    assert cuda.log.count("matmul on second") == 1
    check_same(made, without(made))


def test_nothing_is_waited_for_where_nothing_was_begun(cuda):
    """In a recording, an event of before it is an error."""
    with cuda, WeightStream(CPU).backward([]):
        torch.ones(2, requires_grad=True).sum().backward()
    assert not cuda.log


def test_a_weight_of_two_matmuls_is_written_in_place(cuda, seed, kernel_device):
    """The queries' and the keys' and values' rows of the predictor's last block."""
    if kernel_device == "cuda":
        pytest.skip("with the stand-in alone")
    parts = [torch.randn(n, dtype=torch.bfloat16) for n in (8, 8, 24)]
    x = torch.randn(2, 6, 8, dtype=torch.bfloat16)
    found = []
    for second in (False, True):
        torch.manual_seed(seed)
        weight = torch.nn.Parameter(torch.randn(24, 8).bfloat16())
        inputs = x.clone().requires_grad_()
        gain, shift, bias = parts
        out = AddNormLast.apply(inputs, None, None, gain, shift, 1e-6, weight, bias, 2)
        loss = sum((part.float() * (1 + n)).square().sum() for n, part in enumerate(out))
        with contextlib.ExitStack() as entered:
            if second:
                entered.enter_context(cuda)
                entered.enter_context(WeightStream(CPU).backward([weight]))
            loss.backward()
        found.append((weight.grad, inputs.grad))
    assert cuda.log.count("matmul on second") == 2 and cuda.log.count("second waits for main") == 1
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("policy", "micro_batch", "gelu", "a_block"),
    [
        ("none", 8, "exact", 4),
        pytest.param("norm_gelu", 4, "exact", 4, marks=pytest.mark.long),
        pytest.param("selective", 8, "exact", 3, marks=pytest.mark.long),  # fc2 is torch's own
        pytest.param("full", 8, "tanh", 3, marks=pytest.mark.long),
    ],
)
def test_a_step_has_the_same_bits(cuda, kernel_device, policy, micro_batch, gelu, a_block):
    """Of the whole model, also recomputed and with several micro-batches. a_block: matmuls."""
    if kernel_device == "cuda":
        pytest.skip("with the stand-in alone")
    found = []
    for second in (False, True):
        torch.manual_seed(0)
        model = {"checkpointing": policy, "gelu": gelu}
        trainer, ((batch,), *_) = trainer_of(
            attention="triton", model=model, micro_batch=micro_batch, precision="bf16",
            weight_stream=True,
        )  # fmt: skip
        assert trainer.engine.weight_stream is None  # on a CPU
        if second:
            trainer.engine.weight_stream = WeightStream(CPU)
        with cuda if second else contextlib.nullcontext():
            trainer.step(halves(batch) if micro_batch == 4 else [batch], 0)
        found.append([owned.master.values for owned in trainer.engine.state()])
    backwards, blocks = 8 // micro_batch, 2 + 1
    assert cuda.log.count("second waits for main") == a_block * blocks * backwards
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def halves(batch: Batch) -> list[Batch]:
    """Two micro-batches of a batch of eight."""
    parts = batch.images_BCHW, batch.masks.context, batch.masks.target_idx_BMP
    return [
        dataclasses.replace(batch, images_BCHW=images, masks=Masks(context, targets))
        for images, context, targets in zip(*(part.split(4) for part in parts), strict=True)
    ]


ON = {"run": {"weight_stream": True}}


def test_deepspeed_which_reads_gradients_in_the_backward_is_refused():
    config = validate(tiny.CONFIG | ON | {"optim": {"implementation": "fused"}})
    config = build.with_precision(config, CPU)
    with pytest.raises(ConfigError, match=r'DeepSpeed reads .*\.implementation = "adamw_ema"'):
        build.check_weight_stream(config, build.optimizer_implementation(config), CPU)
    made = build.build_networks(config)
    with pytest.raises(ConfigError, match="DeepSpeed reads"):
        build.build_engine(made, made.encoder, config, 8, 2)


@pytest.mark.parametrize(
    ("sections", "refused"),
    [
        ({"run": {"precision": "bf16"}}, False),
        ({"run": {"precision": "fp32"}}, True),  # what "auto" became
        ({"run": {"precision": "bf16"}, "model": {"width": 4096}}, False),  # the predictor's blocks
        (
            {"run": {"precision": "bf16"}, "model": {"width": 4096}, "predictor": {"width": 2052}},
            True,
        ),
    ],
)
def test_where_no_block_is_fused_on_a_gpu_it_is_refused(sections, refused):
    config = validate(sections)
    for device, told in ((CPU, False), (torch.device("cuda"), refused)):
        with pytest.raises(ConfigError, match="leave it out") if told else contextlib.nullcontext():
            build.check_weight_stream(config, "adamw_ema", device)


@pytest.mark.parametrize(
    ("device", "runs", "newest", "idle"),
    [
        ("cpu", True, 90, ["weight_stream", "dependent_launch"]),
        ("cuda", False, 90, ["weight_stream", "dependent_launch"]),
        ("cuda", True, 80, ["dependent_launch"]),
        ("cuda", True, 90, []),
    ],
)
def test_a_key_that_changes_nothing_here_is_told(monkeypatch, device, runs, newest, idle):
    monkeypatch.setattr(start.launch, "runs_on", lambda _: runs)
    monkeypatch.setattr(start.launch, "at_least", lambda number, _: newest >= number)
    config = validate({"run": {"weight_stream": True, "dependent_launch": True}})
    told = list(start._idle(config, torch.device(device)))
    assert [line.split()[0] for line in told] == [f"run.{key}" for key in idle]
    assert not list(start._idle(validate({}), torch.device(device)))


def test_without_fused_blocks_it_is_refused():
    """The other keys that leave none are in test_config.py."""
    with pytest.raises(ConfigError, match=r"weight_stream = true: not with model.fused = false"):
        validate(ON | {"model": {"fused": False}})


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("cuda_graph", "target_stream", "slow"),
    [(False, False, False), (False, True, True), (True, False, True), (True, True, False)],
)
def test_on_a_gpu_steps_have_the_same_bits(monkeypatch, cuda_graph, target_stream, slow):
    """Also where the second stream is far behind, so that a wait that lacks shows."""
    begun, write = [], weight_stream.write

    def late(dweight, uses):
        begun.append(1)
        if slow:
            torch.cuda._sleep(2_000_000)  # about a millisecond
        return write(dweight, uses)

    monkeypatch.setattr(weight_stream, "write", late)
    found = []
    for second in (False, True):
        torch.manual_seed(0)
        trainer, steps = trainer_of(
            attention="triton", precision="bf16", cuda_graph=cuda_graph,
            target_stream=target_stream, weight_stream=second,
        )  # fmt: skip
        losses = [trainer.step(batches, i)[0]["loss"].item() for i, batches in enumerate(steps)]
        found.append((losses, torch.cat([s.master.values for s in trainer.engine.state()])))
        assert bool(begun) == second
    (losses, masters), (second_losses, second_masters) = found
    assert len(losses) == STEPS and losses == second_losses
    assert torch.equal(masters, second_masters)


@pytest.mark.gpu
def test_on_a_gpu_it_takes_the_memory_of_one_matmul_more():
    """And cuBLAS's workspace of a stream."""
    peaks = []
    device = distributed.start(0)
    weight = torch.nn.Parameter(torch.randn(1024, 1024, device=device).bfloat16())
    many = [torch.nn.Parameter(weight.detach().clone()) for _ in range(8)]
    for second in (None, None, WeightStream(device), WeightStream(device)):
        x = torch.randn(8192, 1024, device=device).bfloat16().requires_grad_()
        for w in many:
            x = Matmul.apply(x, w, torch.zeros(1024, device=device, dtype=x.dtype), BF16)
        torch.cuda.reset_peak_memory_stats()
        with second.backward(many) if second else contextlib.nullcontext():
            x.float().square().mean().backward()
        peaks.append(torch.cuda.max_memory_allocated())
        for w in many:
            w.grad = None
    workspace, used = 40 * 2**20, 2 * 8192 * 1024 * 2
    assert peaks[3] <= peaks[1] + used + workspace
