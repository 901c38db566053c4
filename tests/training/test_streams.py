"""The target on its own CUDA stream: who waits for whom, told by stand-ins for CUDA's streams."""

import contextlib

import pytest
import torch
from torch import nn

from cjepa_fast.training.engines.target_stream import TargetStream


class Stream:
    def __init__(self, name: str, log: list):
        self.name, self.log = name, log

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


class Part(nn.Module):
    """Notes on which stream it runs."""

    def __init__(self, name: str, cuda):
        super().__init__()
        self.name, self.cuda = name, cuda

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cuda.log.append(f"{self.name} on {self.cuda.stream.name}")
        return x + 1


class Cuda:
    """Stands in for torch.cuda."""

    def __init__(self):
        self.log: list[str] = []
        self.stream = self.main = Stream("main", self.log)

    @contextlib.contextmanager
    def on(self, stream: Stream):
        self.stream = stream
        yield
        self.stream = self.main


@pytest.fixture
def cuda(monkeypatch) -> Cuda:
    cuda = Cuda()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side", cuda.log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: cuda.stream)
    monkeypatch.setattr(torch.cuda, "stream", cuda.on)
    note = lambda tensor, stream: cuda.log.append(f"a tensor held for {stream.name}")  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "record_stream", note)
    return cuda


def test_the_main_stream_waits_between_predictor_and_loss(cuda):
    predictor = Part("predictor", cuda)
    target = TargetStream(Part("target", cuda), predictor, torch.device("cuda"))
    tokens = target(torch.zeros(2))
    Part("context", cuda)(torch.zeros(2))
    predictor(torch.zeros(2))
    Part("loss", cuda)(tokens)
    assert cuda.log == [
        "side waits for main",
        "target on side",
        "a tensor held for side",
        "a tensor held for main",
        "context on main",
        "predictor on main",
        "main waits for side",
        "loss on main",
    ]
    assert torch.equal(tokens, torch.ones(2))


@pytest.mark.gpu
def test_the_tokens_are_those_of_one_stream():
    """A target much slower than the rest: without the wait the loss would read what is not yet."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(40))).cuda()
    predictor, x = nn.Identity(), torch.randn(4096, 2048, device="cuda")
    target = TargetStream(layers, predictor, x.device)
    with torch.no_grad():
        wanted = layers(x)
        for _ in range(5):
            tokens = target(x)
            predictor(x)
            assert torch.equal(tokens + 0, wanted)
