"""What the trainer asks of an engine, whoever owns the weights, and what the engines share."""

from typing import Protocol

import torch

from cjepa_fast.checkpoint.owned import Fragment, OwnedState, SavedEngine
from cjepa_fast.kernels.ema import Number
from cjepa_fast.training.ema import TargetEMA

MOMENTS = ("exp_avg", "exp_avg_sq")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # by run.precision


class Engine(SavedEngine, Protocol):
    """A model with its optimiser and its target's EMA: single.SingleEngine, zero.ZeroEngine."""

    ema: TargetEMA
    stage: int  # of ZeRO; 0 where nothing is sharded
    device: torch.device
    grad_norm: torch.Tensor | float  # of the last step

    def __call__(self, *args, **kwargs):
        """The model's forward."""

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of one micro-batch."""

    def limit(self, loss: float, grad_norm: float) -> None:
        """From now on, a step above either is not applied."""

    def step(self, lr: Number, weight_decay: Number, momentum: Number) -> bool | torch.Tensor:
        """Call after each micro-batch; at the last of a step, update weights and EMA. Returns
        whether it was applied: a 0-d tensor where the device decides."""


def masters_below(prefix: str, state: list[OwnedState]) -> list[Fragment]:
    """The fp32 fragments of the parameters below `prefix`, their names without it."""
    return [
        s.master._replace(name=s.master.name[len(prefix) :])
        for s in state
        if s.master.name.startswith(prefix)
    ]


def total_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of them all, 0-d fp32, summed in fp32 whatever their dtype."""
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms))
