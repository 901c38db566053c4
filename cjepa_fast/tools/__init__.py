"""Commands that look over several layers: doctor, plan, report, ablate."""

from cjepa_fast.runtime.lazy import exports

__all__, __getattr__, __dir__ = exports(
    __name__,
    {
        "ablate": "Ablation",
        "plan": "GPU Plan",
    },
)
