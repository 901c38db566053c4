"""What the kernels share: tables on their way to the device, in a CUDA graph and outside."""

import contextlib
import importlib
import pkgutil
import re
import warnings

import pytest
import torch

from cjepa_fast import kernels
from cjepa_fast.kernels.common import launch, sums
from cjepa_fast.kernels.ema.lists import tables

CPU = torch.device("cpu")


@pytest.fixture
def pretended(monkeypatch):
    """Recordings without a GPU, in memory that is this test's own."""
    monkeypatch.setattr(launch, "_space", [])
    monkeypatch.setattr(launch, "_asked", 0)

    def now(recording: bool) -> None:
        monkeypatch.setattr(launch, "recording", lambda device: recording)

    return now


def test_tables_of_a_recording_lie_beside_its_memory_and_are_written_at_its_end(pretended):
    """Memory of the graph's own is written by every replay, before the launch that reads it: so a
    table there, written once, would be garbage at the first replay (seen on a GPU)."""
    tables = [torch.arange(5), torch.arange(70, dtype=torch.int32).view(7, 10)]
    with launch.counted():
        for table in tables:
            assert torch.equal(launch.to_device(table, CPU), table)
    with launch.recorded(CPU) as space:
        inside = range(space.data_ptr(), space.data_ptr() + len(space))
        space.fill_(255)
        pretended(True)
        made = [launch.to_device(table, CPU) for table in tables]
        pretended(False)
        for there, table in zip(made, tables, strict=True):
            assert there.shape == table.shape and there.dtype == table.dtype
            assert there.data_ptr() in inside and there.data_ptr() % 16 == 0
            assert not torch.equal(there, table)
    for there, table in zip(made, tables, strict=True):
        assert torch.equal(there, table)
    assert made[0].data_ptr() + made[0].nbytes <= made[1].data_ptr()


def test_a_recording_has_room_for_its_tables_alone(pretended):
    with launch.counted():
        launch.to_device(torch.arange(5), CPU)
    launch.to_device(torch.arange(5000), CPU)  # of a step before or after, and in no recording
    pretended(True)
    with pytest.raises(RuntimeError, match="no room"):
        launch.to_device(torch.arange(5), CPU)
    with launch.recorded(CPU) as space:
        assert len(space) == 256
        launch.to_device(torch.arange(5), CPU)
        with pytest.raises(RuntimeError, match="no room"):
            launch.to_device(torch.arange(5), CPU)


def test_what_is_counted_includes_tables_that_are_there(pretended):
    """In a recording the lists' addresses are others, so each is asked for anew."""
    lists = [[torch.zeros(7) for _ in range(3)] for _ in range(2)]
    first = tables(*lists, chunk=8)
    with launch.counted():
        again = tables(*lists, chunk=8)
    assert again[0] is not first[0] and tables(*lists, chunk=8)[0] is first[0]
    with launch.recorded(CPU) as space:
        pretended(True)
        for made, wanted in zip(tables(*lists, chunk=8), first, strict=True):
            assert isinstance(made, bool) or made.shape == wanted.shape
        pretended(False)
    assert len(space) == 512 and not launch._space


def test_every_launcher_makes_its_tensors_gpu_the_current_one(monkeypatch):
    """Triton launches on the current GPU, whatever GPU its tensors are on."""
    launchers = [
        function
        for name in pkgutil.walk_packages(kernels.__path__, "cjepa_fast.kernels.")
        for key, function in vars(importlib.import_module(name.name)).items()
        if re.match("launch_|sum_parts$", key)
    ]
    assert len({id(launcher) for launcher in launchers}) > 20
    assert all(hasattr(launcher, "__wrapped__") for launcher in launchers)

    entered = []

    @contextlib.contextmanager
    def device_of(tensor):
        entered.append(tensor)
        yield
        entered.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    x = torch.ones(2)
    within = launch.on_its_device(lambda first, more: (entered[-1] is x, more))
    assert all(within(first, more=3) == (True, 3) for first in (x, [x, x], [[x], []], (x, x)))
    assert not entered


def test_parts_may_have_more_values_than_int32_counts(kernel_device):
    """Row 32 lies 2^31 values on; it is read by nobody, and yet has an address."""
    if kernel_device != "cpu":
        pytest.skip("the interpreter tells of an overflow")
    width = sums.TILE["WIDTH"]
    parts, out = torch.ones(1, width), torch.empty(width)
    sums._sum_parts_kernel[1,](parts, out, 1, 2**26, **sums.TILE)
    assert (out == 1).all()


class OnGPU:
    """What `use_kernel` asks of a tensor on a GPU."""

    is_cuda, dtype, device = True, torch.float32, torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of a capability, on which the trial ends with `outcome` (an error, or the sum)."""

    def pretend(capability: tuple[int, int], outcome: Exception | float) -> OnGPU:
        class Trial:
            def __getitem__(self, grid):
                return self

            def __call__(self, x, N):
                if isinstance(outcome, Exception):
                    raise outcome
                x[0] = outcome

        monkeypatch.setattr(launch, "_runs", {})
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(launch, "_count_kernel", Trial())
        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda n, device: zeros(n))
        return OnGPU()

    return pretend


def test_a_gpu_on_which_the_trial_is_right_gets_the_kernels(gpu):
    x = gpu((9, 0), 120.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launch.use_kernel(x)


@pytest.mark.parametrize(
    ("capability", "outcome", "said"),
    [
        ((7, 5), 120.0, "begin with sm_80, and a GPU is sm_75"),
        ((9, 0), RuntimeError("Failed to find C compiler"), "Failed to find C compiler"),
        ((9, 0), 119.0, "computes wrongly"),
    ],
)
def test_elsewhere_plain_pytorch_replaces_them_and_it_is_said_once(gpu, capability, outcome, said):
    x = gpu(capability, outcome)
    with pytest.warns(UserWarning, match=said):
        assert not launch.use_kernel(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not launch.use_kernel(x)


def test_the_trial_counts(kernel_device):
    x = torch.zeros(16, device=kernel_device)
    launch._count_kernel[(1,)](x, N=16)
    assert torch.equal(x.cpu(), torch.arange(16.0))
