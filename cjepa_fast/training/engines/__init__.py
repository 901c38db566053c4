"""Who owns weights and optimiser: one rank alone, or DeepSpeed's ZeRO over many."""

from cjepa_fast.runtime.lazy import exports

__all__, __getattr__, __dir__ = exports(
    __name__,
    {
        "base": "Engine",
        "single": "SingleEngine",
        "zero": "ZeroEngine",
    },
)
