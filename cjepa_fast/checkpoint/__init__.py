"""A training's state on disk: written, verified, restored; and the encoders taken from it."""

from cjepa_fast.checkpoint.format import (
    Stored,
    candidates,
    damage,
    latest,
    newest_first,
    set_aside_later_than,
    state_of,
    step_of,
)
from cjepa_fast.checkpoint.restore import differences, restore

__all__ = [
    "Stored", "candidates", "damage", "differences", "latest", "newest_first", "restore",
    "set_aside_later_than", "state_of", "step_of",
]  # fmt: skip
