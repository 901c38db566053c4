"""An encoder trained on with labels, and what that recipe is made of."""

from cjepa_fast.runtime.lazy import exports

__all__, __getattr__, __dir__ = exports(
    __name__,
    {
        "classify": "tune",
        "recipe": "Classifier Recipe recipe_of",
    },
)
