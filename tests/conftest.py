"""What every test gets: a fresh seed, few threads, and no GPU test without a GPU."""

import contextlib
import os
import random
import signal
from pathlib import Path

import fast_interpreter
import numpy as np
import pytest
import torch
from crashes import (  # noqa: F401 (pytest finds its hooks here)
    pytest_collection_finish,
    pytest_collectstart,
    pytest_configure,
    pytest_configure_node,
    pytest_testnodedown,
)

from cjepa_fast.runtime import caches

caches.root()  # without a home folder: elsewhere, also for the processes that tests start
HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    # DeepSpeed picks its accelerator at import, here and in the processes that tests start.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Triton reads this at its import: its kernels can then run here (fixture `kernel_device`).
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Processes that tests start share the cores, as do the workers of `-n`; one alone may use two.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))


def pytest_xdist_auto_num_workers() -> int:
    """Of `-n auto`: a core each, four at most; one where there is a GPU, which they would share."""
    return 1 if torch.cuda.is_available() else min(os.cpu_count() or 1, 4)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_CUDA:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def repeatable() -> None:
    """torch's own draws do not hang on the test before; `seed` makes them new in every run."""
    torch.manual_seed(0)


@pytest.fixture
def seed(repeatable) -> int:
    """A seed that is new in every run, set in torch, numpy and random; CJEPA_TEST_SEED fixes it."""
    value = int(os.environ.get("CJEPA_TEST_SEED") or random.SystemRandom().randrange(2**31))
    print(f"to repeat: CJEPA_TEST_SEED={value}")  # pytest shows this where the test fails
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)
    return value


@pytest.fixture
def heard_hangup():
    """SIGHUP is not ignored, here and in processes that the test starts, also under nohup."""
    before = signal.signal(signal.SIGHUP, signal.default_int_handler)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def real_images() -> Path:
    """A folder or shards of real images that the user names in CJEPA_REAL_IMAGES."""
    path = os.environ.get("CJEPA_REAL_IMAGES")
    if not path:
        pytest.skip("CJEPA_REAL_IMAGES names no folder or shards of real images")
    return Path(path)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel_device(request) -> str:
    """Where the Triton kernels run: the interpreter where there is no GPU, else CUDA.

    What torch.empty returns is filled with NaN meanwhile, so that a value never written shows.
    """
    from cjepa_fast.kernels.common import launch

    if request.param == "cpu" and not launch.INTERPRETING:
        pytest.skip("Triton compiles here: the same test runs on the GPU")
    torch.use_deterministic_algorithms(True, warn_only=True)  # poisons fresh memory
    on_cpu = request.param == "cpu"
    with fast_interpreter.interpreted() if on_cpu else contextlib.nullcontext():
        yield request.param
    torch.use_deterministic_algorithms(False)


def _threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread():
    """torch computes on one thread."""
    yield from _threads(1)


@pytest.fixture
def four_threads():
    """torch computes on four, however many cores there are."""
    yield from _threads(4)
