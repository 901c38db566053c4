"""What an encoder is worth: probes, fine-tuning, dense tasks, figures; `cjepa-eval`."""

from cjepa_fast.runtime.lazy import exports

__all__, __getattr__, __dir__ = exports(
    __name__,
    {
        "features": "extract image_vectors",
        "online": "OnlineEvaluation build_online",
    },
)
