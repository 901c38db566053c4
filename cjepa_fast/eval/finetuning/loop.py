"""The loop of every training with labels: classify, dense/segment_training, dense/rcnn_training.

A task says what is learnt from, a plan how long and at which learning rates; the rest is here:
steps, gradient accumulation, the average of the gradients over the ranks, the weights' EMA, the
progress, the look at the loss, and the state saved to resume from.
Several ranks train by torch's data parallelism: weights and moments are whole, and in fp32, on
every rank, so a rank alone can write them. One rank needs no process group.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cjepa_fast.eval.finetuning.saved import Learner, SavedTraining
from cjepa_fast.runtime.distributed import mean_over_ranks, rank, world_size
from cjepa_fast.telemetry.progress import shown_bar

LOSS_EVERY = 20  # steps between looks at the loss, each of which waits for the device


class Task(Protocol):
    """What a training learns from."""

    def begin(self, step: int) -> None:
        """Before a step: seed what is drawn in it, so that one that resumes draws the same."""

    def batches(self, start: int) -> Iterator:
        """This rank's micro-batches from step `start` on, a step's one after the other; with
        close()."""

    def loss(self, model: Callable, batch: Any) -> torch.Tensor:
        """The loss of a micro-batch: 0-d, the mean over its images."""


@dataclass(frozen=True)
class TrainingPlan:
    """period: steps from one save to the next; unit: "epoch" where a period is one, else "step".
    rate: the learning rate of a step, counted from 0. accumulation: micro-batches a step.
    weight_decay: that of a step; None: the learner's own. advice: what to do where the loss is not
    finite."""

    title: str
    steps: int
    period: int
    unit: str
    lr: Callable[[int], float]
    advice: str
    accumulation: int = 1
    weight_decay: Callable[[int], float] | None = None

    def moment(self, done: int) -> str:
        size = self.period if self.unit == "epoch" else 1
        return f"{self.unit} {-(-done // size)} of {self.steps // size}"

    def ends_period(self, done: int) -> bool:
        return done % self.period == 0 or done == self.steps


def train(learner: Learner, task: Task, plan: TrainingPlan, saved: SavedTraining) -> None:
    """Train in place, from where `saved` has come to. Every rank calls it.

    Raises ValueError, on every rank, for what `saved` does not take and for a loss that is not
    finite.
    """
    start = saved.restore(learner)
    if start and rank() == 0:
        print(f"{plan.moment(start)} is done, from {saved.folder}", flush=True)
    learner.module.train()
    if start == plan.steps:
        return
    model, mean = _spread(learner.module), _Mean(plan)
    with (
        contextlib.closing(task.batches(start)) as batches,
        shown_bar(plan.steps, plan.title, "step") as bar,
    ):
        bar.update(start)
        for step in range(start, plan.steps):
            task.begin(step)
            mean.add(_update(model, learner, task, batches, plan, step))
            bar.update()
            due = plan.ends_period(step + 1)
            if due or step % LOSS_EVERY == 0:
                bar.set_postfix(loss=mean.look(step + 1, tell=due))
            if due:
                saved.save(step + 1)


def _update(
    model: nn.Module, learner: Learner, task: Task, batches: Iterator, plan: TrainingPlan, step: int
) -> torch.Tensor:
    """One step. The mean loss of this rank's micro-batches, 0-d."""
    learner.set_lr(plan.lr(step))
    if plan.weight_decay is not None:
        learner.set_weight_decay(plan.weight_decay(step))
    losses = []
    for micro in range(plan.accumulation):
        with _this_rank_alone(model, micro + 1 < plan.accumulation):
            loss = task.loss(model, next(batches)) / plan.accumulation
            loss.backward()
        losses.append(loss.detach())
    learner.step()
    return sum(losses)


def _spread(model: nn.Module) -> nn.Module:
    """The model; its gradients are averaged over the ranks where there are several."""
    if world_size() == 1:
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def _this_rank_alone(model: nn.Module, alone: bool) -> contextlib.AbstractContextManager:
    """Gradients of all micro-batches but a step's last stay on their rank."""
    if alone and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


class _Mean:
    """The mean loss since the last one told."""

    def __init__(self, plan: TrainingPlan):
        self._plan, self._sum, self._count = plan, 0.0, 0

    def add(self, loss: torch.Tensor) -> None:
        self._sum, self._count = self._sum + loss, self._count + 1

    def look(self, done: int, tell: bool) -> float:
        """The mean loss of all ranks after so many steps. Raises ValueError where it is not
        finite."""
        mean = float(mean_over_ranks({"loss": self._sum / self._count})["loss"])
        moment = self._plan.moment(done)
        if not abs(mean) < float("inf"):
            raise ValueError(f"the loss of {moment} is {mean}: {self._plan.advice}")
        if tell:
            self._sum, self._count = 0.0, 0
            if rank() == 0:
                print(f"{moment}: loss {mean:.4f}", flush=True)
        return mean
