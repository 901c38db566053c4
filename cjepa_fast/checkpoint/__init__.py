"""A training's state on disk: written, verified, restored; and the encoders taken from it."""

from cjepa_fast.checkpoint.format import (
    StoredCheckpoint,
    damage,
    latest,
    lies_in,
    newest_first,
    resume_candidates,
    set_aside_later_than,
    state_of,
    step_of,
)
from cjepa_fast.checkpoint.restore import differences, restore

__all__ = [
    "StoredCheckpoint",
    "damage",
    "differences",
    "latest",
    "lies_in",
    "newest_first",
    "restore",
    "resume_candidates",
    "set_aside_later_than",
    "state_of",
    "step_of",
]  # fmt: skip
