"""What a training tells: its log, a progress line, TensorBoard and W&B scalars, GPU counters."""

from cjepa_fast.telemetry.jsonl import read_log
from cjepa_fast.telemetry.log import Telemetry
from cjepa_fast.telemetry.representation import effective_rank, position_share, representation_stats

__all__ = ["Telemetry", "effective_rank", "position_share", "read_log", "representation_stats"]
