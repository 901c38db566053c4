"""Figures: attention, PCA, masks, neighbours, curves."""

from cjepa_fast.runtime.lazy import exports

__all__, __getattr__, __dir__ = exports(
    __name__,
    {
        "sheets": "as_array as_arrays load_images sheet",
        "style": "save",
    },
)
