"""Training on one rank, which owns everything: nothing to shard, so no DeepSpeed.

Gradients stay where autograd leaves them, in the compute dtype. One pass over the weights
(kernels/ema/) reads them and writes the fp32 weights, Adam's moments, the fp32 EMA, and the
compute-dtype copies of weights and EMA. Whether a gradient is finite is decided on the device,
and nobody waits for it.
"""

import contextlib
from collections.abc import Container
from typing import NamedTuple

import torch
from torch import nn

from cjepa_fast.checkpoint.owned import Fragment, OwnedState, Snapshot
from cjepa_fast.kernels.ema import Number, adamw_ema_step
from cjepa_fast.model.weight_stream import WeightStream
from cjepa_fast.training.ema import TargetEMA
from cjepa_fast.training.engines.base import DTYPES, MOMENTS, masters_below, total_norm

Tensors = list[torch.Tensor]


class Group(NamedTuple):
    """A parameter group's tensors, flat, list for list; those of the EMA are empty but for the
    encoder's, copies where the weights are their own masters."""

    decay: bool
    names: list[str]
    masters: Tensors
    moments: tuple[Tensors, ...]
    ema: Tensors
    copies: Tensors
    ema_copies: Tensors


def split(names: list[str], chosen: Container[str]) -> list[list[str]]:
    """Those chosen and the others, what there is of both."""
    parts = [n for n in names if n in chosen], [n for n in names if n not in chosen]
    return [part for part in parts if part]


class SingleEngine:
    """base.Engine for one rank. groups: from optim.parameter_groups.

    target: a copy of the model's encoder, in fp32 and on its device, as the model is; both are
    moved to the compute dtype here.
    """

    sharded, stage = False, 0

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
        fp8: bool = False,
        weight_stream: bool = False,
    ):
        """fp8: of the target; weight_stream: where there is CUDA."""
        self.module, self.accumulation, self.clip = model, accumulation, clip
        self.betas, self.eps = betas, eps
        self.device = next(model.parameters()).device
        cuda = self.device.type == "cuda"
        self.weight_stream = WeightStream(self.device) if weight_stream and cuda else None
        names = {id(p): name for name, p in model.named_parameters()}
        self._weights = {names[id(p)]: p for group in groups for p in group["params"]}
        self._state = {
            name: OwnedState(
                Fragment(name, 0, p.detach().view(-1)),
                {moment: torch.zeros_like(p.detach()).view(-1) for moment in MOMENTS},
            )
            for name, p in self._weights.items()
        }
        model.to(DTYPES[precision])  # in fp32 the weights remain the masters
        self.ema = TargetEMA(target, self.masters("encoder."), DTYPES[precision], fp8=fp8)
        with_ema = {f"encoder.{a.name}": (a.values, copy) for a, _, copy in self.ema.cast}
        self._groups = [
            self._group(group["decay"], part, with_ema)
            for group in groups
            for part in split([names[id(p)] for p in group["params"]], with_ema)
        ]
        self._steps = torch.zeros((), dtype=torch.float64, device=self.device)
        self._micro_steps = 0
        self._sums: dict[str, torch.Tensor] = {}
        self.grad_norm: torch.Tensor | float = 0.0
        self.snapshot = Snapshot()
        self._loss: torch.Tensor | float = 0.0  # summed over micro-batches
        self._limits = torch.full((2,), torch.inf, dtype=torch.float64, device=self.device)

    def _group(
        self, decay: bool, names: list[str], with_ema: dict[str, tuple[torch.Tensor, torch.Tensor]]
    ) -> Group:
        """with_ema: by name, the EMA and its copy of the weights that have one."""
        state = [self._state[name] for name in names]
        pairs = [with_ema[name] for name in names if name in with_ema]
        masters = [s.master.values for s in state]
        copies = [self._weights[name].data.view(-1) for name in names]
        return Group(
            decay,
            names,
            masters,
            tuple([s.moments[moment] for s in state] for moment in MOMENTS),
            [values for values, _ in pairs],
            copies if copies[0].data_ptr() != masters[0].data_ptr() else [],
            [copy for _, copy in pairs],
        )

    def __call__(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of one micro-batch."""
        self._loss = self._loss + loss.detach()
        second = self.weight_stream
        with second.backward(self._weights.values()) if second else contextlib.nullcontext():
            loss.backward()

    def limit(self, loss: float, grad_norm: float) -> None:
        """From now on, a step above either is not applied."""
        self._limits.copy_(torch.tensor([loss, grad_norm], dtype=torch.float64), non_blocking=True)

    def step(self, lr: Number, weight_decay: Number, momentum: Number) -> bool | torch.Tensor:
        """Call after each micro-batch; at the last of a step, update weights and EMA.

        Returns whether the gradient was finite and within limits, else nothing is updated: a 0-d
        tensor, so that nobody need wait for it; True between. A snapshot is waited for before
        anything of the state changes.
        """
        self._micro_steps += 1
        gradients, self._sums = self._gradients(), {}
        if self._micro_steps % self.accumulation:
            self._sums = gradients
            self._clear()
            return True
        self.snapshot.wait()
        scale = 1 / self.accumulation
        self.grad_norm = total_norm(list(gradients.values())) * scale
        seen = torch.stack([(self._loss * scale).double(), self.grad_norm.double()])
        applied = torch.isfinite(self.grad_norm) & ~(seen > self._limits).any()
        self._loss = 0.0
        if self.clip:
            scale = scale * (self.clip / (self.grad_norm + 1e-6)).clamp(max=1)
        for group in self._groups:
            adamw_ema_step(
                group.masters,
                [gradients[name] for name in group.names],
                *group.moments,
                group.ema,
                step=self._steps + 1,
                lr=lr,
                momentum=momentum,
                betas=self.betas,
                eps=self.eps,
                weight_decay=weight_decay if group.decay else 0.0,
                scale=scale,
                apply=applied,
                copies=group.copies,
                target_copies=group.ema_copies,
            )
        # In FP8 the matrices' EMA is taken apart; a momentum of 1 leaves them as they are.
        self.ema.update_rows(1 - applied.double() * (1 - momentum))
        self._steps += applied
        self._clear()
        return applied

    def _gradients(self) -> dict[str, torch.Tensor]:
        """Each parameter's gradient, flat; sums over micro-batches are in fp32."""
        new = {name: gradient_of(p) for name, p in self._weights.items()}
        if self.accumulation == 1:
            return new
        if not self._sums:
            return {name: g.to(torch.float32, copy=True) for name, g in new.items()}
        return {name: self._sums[name].add_(g) for name, g in new.items()}

    def _clear(self) -> None:
        self.module.zero_grad()

    def set_optimizer_step(self, step: int) -> None:
        """Adam's count of updates, which decides its bias correction."""
        self._steps.fill_(step)

    def optimizer_step(self) -> int:
        return int(self._steps)

    def state(self) -> list[OwnedState]:
        """The fp32 weights and moments, whole, as views."""
        return list(self._state.values())

    def masters(self, prefix: str) -> list[Fragment]:
        return masters_below(prefix, self.state())

    @torch.no_grad()
    def write_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Set the compute-dtype weights from whole fp32 tensors by name, after a restore."""
        for name, p in self._weights.items():
            p.copy_(weights[name].view(p.shape))


def gradient_of(p: nn.Parameter) -> torch.Tensor:
    """Flat; zeros for a parameter that the loss does not reach."""
    return torch.zeros_like(p).view(-1) if p.grad is None else p.grad.reshape(-1)
