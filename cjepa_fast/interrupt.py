"""Asked to stop: the run ends after the step, on all processes after the same one."""

import signal

import torch
import torch.distributed as dist

from cjepa_fast.engine import world_size


class StopRequest:
    """SIGTERM and SIGINT ask the run to end after the step; all processes agree on which."""

    def __init__(self):
        self._asked = torch.zeros(1, dtype=torch.int32)
        self._group = dist.new_group(backend="gloo") if world_size() > 1 else None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number, frame) -> None:
        self._asked.fill_(1)

    def agreed(self) -> bool:
        """Whether any process was asked. Runs on the CPU, so no GPU waits for it."""
        if self._group is not None:
            dist.all_reduce(self._asked, dist.ReduceOp.MAX, group=self._group)
        return bool(self._asked)
