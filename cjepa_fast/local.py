"""Training on one process, which owns everything: nothing to shard, so no DeepSpeed.

Gradients stay where autograd leaves them, in the compute dtype. One pass over the weights
(kernels/ema.py) reads them and writes the fp32 weights, Adam's moments, the fp32 average, and the
compute-dtype copies of weights and average. Whether a gradient is finite is decided on the device,
and nobody waits for it.
"""

from typing import NamedTuple

import torch
from torch import nn

from cjepa_fast.ema import Fragment, TargetEMA
from cjepa_fast.engine import DTYPES, MOMENTS, OwnedState, masters_below
from cjepa_fast.kernels.ema import Number, adamw_ema_step

Tensors = list[torch.Tensor]


class Group(NamedTuple):
    """A parameter group's tensors, flat, list for list; those of the average are empty but for the
    encoder's, copies where the weights are their own masters."""

    decay: bool
    place: slice  # among all parameters, as the groups have them in turn
    masters: Tensors
    moments: tuple[Tensors, ...]
    average: Tensors
    copies: Tensors
    average_copies: Tensors


class LocalEngine:
    """engine.Engine's seam for one process. groups: from optim.parameter_groups.

    target: a copy of the model's encoder, in fp32 and on its device, as the model is; both are
    moved to the compute dtype here.
    """

    sharded = False

    def __init__(
        self,
        model: nn.Module,
        target: nn.Module,
        groups: list[dict],
        *,
        accumulation: int,
        precision: str = "bf16",
        clip: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        keep_gradients: bool = False,
    ):
        """keep_gradients: in place, set to zero, as a CUDA graph wants them; else freed."""
        self.keep_gradients = keep_gradients
        self.module, self.accumulation, self.clip = model, accumulation, clip
        self.betas, self.eps = betas, eps
        self.device = next(model.parameters()).device
        names = {id(p): name for name, p in model.named_parameters()}
        self._weights = {names[id(p)]: p for group in groups for p in group["params"]}
        self._state = [
            OwnedState(
                Fragment(name, 0, p.detach().view(-1)),
                {moment: torch.zeros_like(p.detach()).view(-1) for moment in MOMENTS},
            )
            for name, p in self._weights.items()
        ]
        model.to(DTYPES[precision])  # in fp32 the weights remain the masters
        self.ema = TargetEMA(target, self.masters("encoder."), DTYPES[precision])
        self._groups = list(self._grouped(groups))
        self._steps = torch.zeros((), dtype=torch.float64, device=self.device)
        self._micro_steps = 0
        self._sums: Tensors = []
        self.grad_norm: torch.Tensor | float = 0.0

    def _grouped(self, groups: list[dict]):
        averaged = {
            f"encoder.{f.name}": (f.values, copy)
            for f, copy in zip(self.ema.fragments, self.ema.working, strict=True)
        }
        end = 0
        for group in groups:
            place = slice(end, end + len(group["params"]))
            end = place.stop
            state = self._state[place]
            masters = [s.master.values for s in state]
            copies = [p.data.view(-1) for p in group["params"]]
            average = [averaged[s.master.name] for s in state if s.master.name in averaged]
            yield Group(
                group["decay"],
                place,
                masters,
                tuple([s.moments[moment] for s in state] for moment in MOMENTS),
                [values for values, _ in average],
                copies if copies[0].dtype != torch.float32 else [],
                [copy for _, copy in average],
            )

    def __call__(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of one micro-batch."""
        loss.backward()

    def step(self, lr: Number, weight_decay: Number, momentum: Number) -> bool | torch.Tensor:
        """Call after each micro-batch; at the last of a step, update weights and average.

        Returns whether the gradient was finite, else nothing is updated: a 0-d tensor, so that
        nobody need wait for it; True between.
        """
        self._micro_steps += 1
        gradients, self._sums = self._gradients(), []
        if self._micro_steps % self.accumulation:
            self._sums = gradients
            self._clear()
            return True
        scale = 1 / self.accumulation
        self.grad_norm = total_norm(gradients) * scale
        applied = torch.isfinite(self.grad_norm)
        if self.clip:
            scale = scale * (self.clip / (self.grad_norm + 1e-6)).clamp(max=1)
        for group in self._groups:
            adamw_ema_step(
                group.masters,
                gradients[group.place],
                *group.moments,
                group.average,
                step=self._steps + 1,
                lr=lr,
                momentum=momentum,
                betas=self.betas,
                eps=self.eps,
                weight_decay=weight_decay if group.decay else 0.0,
                scale=scale,
                apply=applied,
                copies=group.copies,
                target_copies=group.average_copies,
            )
        self._steps += applied
        self._clear()
        return applied

    def _gradients(self) -> Tensors:
        """Of each parameter, flat; sums over micro-batches are in fp32."""
        new = [gradient_of(p) for p in self._weights.values()]
        if self.accumulation == 1:
            return new
        new = [g.float() for g in new]
        if self._sums:
            torch._foreach_add_(new, self._sums)
        return new

    def _clear(self) -> None:
        self.module.zero_grad(set_to_none=not self.keep_gradients)

    def set_optimizer_step(self, step: int) -> None:
        """Adam's count of updates, which decides its bias correction."""
        self._steps.fill_(step)

    def optimizer_step(self) -> int:
        return int(self._steps)

    def state(self) -> list[OwnedState]:
        """The fp32 weights and moments, whole, as views."""
        return self._state

    def masters(self, prefix: str) -> list[Fragment]:
        return masters_below(prefix, self._state)

    @torch.no_grad()
    def write_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Set the compute-dtype weights from whole fp32 tensors by name, after a restore."""
        for name, p in self._weights.items():
            p.copy_(weights[name].view(p.shape))


def gradient_of(p: nn.Parameter) -> torch.Tensor:
    """Flat; zeros for a parameter that the loss does not reach."""
    return torch.zeros_like(p).view(-1) if p.grad is None else p.grad.reshape(-1)


def total_norm(gradients: Tensors) -> torch.Tensor:
    """The 2-norm of them all, 0-d fp32, summed in fp32 whatever their dtype."""
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms))
