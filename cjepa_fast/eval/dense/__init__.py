"""Labels for every pixel or box: segmentation, detection, video propagation."""

from cjepa_fast.runtime.lazy import exports

__all__, __getattr__, __dir__ = exports(
    __name__,
    {
        "pyramid": "Pyramid",
        "segmenter": "Segmenter",
        "upernet": "UPerHead",
    },
)
