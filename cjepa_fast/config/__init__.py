"""The configuration of a training: its schema, how it is read, and what is checked."""

from cjepa_fast.config.load import (
    as_begun,
    completed,
    configs_folder,
    expanded,
    find,
    image_paths,
    load,
    of,
    read,
    refuse_unset,
    refuse_unset_in,
    validate,
)
from cjepa_fast.config.resolve import (
    told_epochs,
    told_micro_batch,
    told_rate,
    told_start,
    with_epochs,
)
from cjepa_fast.config.schema import (
    MODEL_NAMES,
    Config,
    ConfigError,
    DataSection,
    Section,
    micro_batches,
)

__all__ = [
    "MODEL_NAMES", "Config", "ConfigError", "DataSection", "Section", "as_begun", "completed",
    "configs_folder", "expanded", "find", "image_paths", "load", "micro_batches", "of", "read",
    "refuse_unset", "refuse_unset_in", "told_epochs", "told_micro_batch", "told_rate", "told_start",
    "validate", "with_epochs",
]  # fmt: skip
