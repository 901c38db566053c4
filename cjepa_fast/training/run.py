"""A training's folder, for whoever started it from Python."""

from pathlib import Path
from typing import NamedTuple

from cjepa_fast.checkpoint.encoders import load_encoder
from cjepa_fast.model.vit import Encoder
from cjepa_fast.telemetry import read_log


class Run(NamedTuple):
    """A training that has ended: its folder, and a status of 0 where it ended well."""

    folder: Path
    status: int

    def log(self) -> list[dict]:
        """The rows of log.jsonl."""
        return read_log(self.folder)

    def encoder(self, which: str = "target") -> Encoder:
        """The "target" or the "context" encoder, of the end or of the newest checkpoint."""
        return load_encoder(self.folder, which)
