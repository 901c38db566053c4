"""Where the time of a step goes, by timing its parts from outside."""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator

from cjepa_fast.runtime.rates import synchronize
from cjepa_fast.training.trainer import Trainer


class Phases:
    """Times the parts of a Trainer's steps: target, context, predictor, loss, backward, optimiser
    (with the exchange between ranks), average (0 where it is the optimiser's own pass). Each
    part is waited for, on a GPU too."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.steps_ms: list[dict[str, float]] = []
        self._open: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Within it every step is timed by parts."""
        trainer, networks = self.trainer, self.trainer.engine.module
        parts: list[tuple[object, str, str]] = [
            (trainer.ema.module, "forward", "target"),
            (networks.encoder, "forward", "context"),
            (networks.predictor, "forward", "predictor"),
            (networks, "forward", "forward"),
            (trainer.engine, "backward", "backward"),
            (trainer.engine, "step", "optimiser"),
            (trainer.ema, "update", "average"),
            (trainer, "step", "step"),
        ]
        for owner, method, name in parts:
            setattr(owner, method, self._timing(getattr(owner, method), name))
        try:
            yield
        finally:
            for owner, method, _ in parts:
                delattr(owner, method)  # the class's own shows again

    def _timing(self, function: Callable, name: str) -> Callable:
        @functools.wraps(function)
        def timing(*args, **kwargs):
            synchronize(self.trainer.device)
            began = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize(self.trainer.device)
            self._open[name] = self._open.get(name, 0.0) + 1e3 * (time.perf_counter() - began)
            if name == "step":
                self.steps_ms.append(self._open)
                self._open = {}
            return result

        return timing

    def median_ms(self) -> dict[str, float]:
        """The median of each part over the steps, and of the rest; empty where none was timed."""
        rows = []
        for found in self.steps_ms:
            parts = {name: found[name] for name in ("target", "context", "predictor")}
            parts["loss"] = found["forward"] - found["context"] - found["predictor"]
            average = found.get("average", 0.0)
            parts["backward"] = found["backward"]
            parts |= {"optimiser": found["optimiser"] - average, "average": average}
            rows.append(parts | {"rest": found["step"] - sum(parts.values())})
        return {
            name: statistics.median(row[name] for row in rows) for name in (rows[0] if rows else ())
        }
