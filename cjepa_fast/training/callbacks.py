"""What a training calls back: `cjepa_fast.pretrain(..., callbacks=[Mine()])`."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch


class Callback:
    """To be derived from; each method does nothing here. What one raises ends the training as an
    error of a step does. On one rank a method may take as long as it likes, in a debugger too. On
    several the others wait for it: after run.timeout_s the run is ended as stuck."""

    def on_step(self, step: int, terms: Mapping[str, torch.Tensor]) -> bool | None:
        """After optimiser step `step` (from 1), on every rank; terms: the loss and its parts, 0-d
        tensors, of which to read one waits for the device. True asks to stop as Ctrl-C does: the
        training is saved and can be resumed."""

    def on_evaluate(self, step: int, scores: Mapping[str, float]) -> None:
        """On rank 0, after an evaluation by eval.online: percent right, by name."""

    def on_save(self, step: int, checkpoint: Path) -> None:
        """On rank 0, once the checkpoint of step `step` is whole: its folder. A later step may be
        under way by then."""


class Callbacks:
    """All of a training's, as the loop calls them, in the order they were given.

    paused: what each call is made within (Watchdog.paused).
    """

    def __init__(self, callbacks: Sequence[Callback] = ()):
        self._all = tuple(callbacks)
        self.paused: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    def on_step(self, step: int, terms: Mapping[str, torch.Tensor]) -> bool:
        """Whether any asks to stop."""
        with self.paused():
            answers = [callback.on_step(step, terms) for callback in self._all]
        return any(answers)

    def on_evaluate(self, step: int, scores: Mapping[str, float]) -> None:
        with self.paused():
            for callback in self._all:
                callback.on_evaluate(step, scores)

    def on_save(self, step: int, checkpoint: Path) -> None:
        with self.paused():
            for callback in self._all:
                callback.on_save(step, checkpoint)
