"""Frozen features evaluated: kNN, linear probes, few labels, counting, collapse."""

from cjepa_fast.runtime.lazy import exports

__all__, __getattr__, __dir__ = exports(
    __name__,
    {
        "knn": "pixel_baselines",
        "linear": "sweep",
        "probe_sweep": "ProbePlan fit",
        "spread": "alignment lidar uniformity",
    },
)
