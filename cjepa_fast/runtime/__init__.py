"""The machine and its ranks: what the hardware can do, ranks, locks, signals, reports."""

from cjepa_fast.runtime.lazy import exports

__all__, __getattr__, __dir__ = exports(
    __name__,
    {
        "distributed": "rank world_size",
        "hardware": "best_precision has_gpu",
        "launchers": "resume_command",
        "oom": "is_out_of_memory",
        "watchdog": "Watchdog",
    },
)
