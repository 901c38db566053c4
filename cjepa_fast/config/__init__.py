"""The configuration of a training: its schema, how it is read, and what is checked."""

from cjepa_fast.config.load import (
    check_path_set,
    check_paths_set,
    configs_folder,
    expand_path,
    find,
    from_values,
    image_paths,
    keep_saved_values,
    load,
    load_run,
    validate,
    with_saved_defaults,
)
from cjepa_fast.config.resolve import (
    epochs_message,
    lr_message,
    micro_batch_message,
    warmup_message,
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
    "MODEL_NAMES",
    "Config",
    "ConfigError",
    "DataSection",
    "Section",
    "check_path_set",
    "check_paths_set",
    "configs_folder",
    "epochs_message",
    "expand_path",
    "find",
    "from_values",
    "image_paths",
    "keep_saved_values",
    "load",
    "load_run",
    "lr_message",
    "micro_batch_message",
    "micro_batches",
    "validate",
    "warmup_message",
    "with_epochs",
    "with_saved_defaults",
]
