"""A training put together and run: build, step, loop, engines."""

from cjepa_fast.runtime.lazy import exports

__all__, __getattr__, __dir__ = exports(
    __name__,
    {
        "build": "build_engine build_loader build_masks build_networks",
        "ema": "TargetEMA",
        "loop": "Loop",
        "run": "Run",
        "trainer": "Trainer",
    },
)
