"""Datasets of a known form: the synthetic shapes, COCO, DAVIS, image and label-map pairs."""

from cjepa_fast.runtime.lazy import exports

__all__, __getattr__, __dir__ = exports(
    __name__,
    {
        "coco": "Coco",
        "davis": "Clip open_davis",
        "pairs": "Pairs open_pairs",
    },
)
