"""What a trial found to be the fastest on this machine, remembered for the next runs.

A trial's outcome may differ from one time to the next, and with it the last bits of a training. So
the first outcome on a machine stays, until the processor, the versions or the sizes are others.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from cjepa_fast.runtime import caches, json_text


def remembered(facts: dict, decide: Callable[[], dict], otherwise: dict) -> dict:
    """The outcome for these facts: the one on record, else decide()'s, put there.

    Processes that decide at the same moment all take the first one's. Where nothing can be written
    down nothing is tried: `otherwise`.
    """
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    file = caches.folder("trials") / f"{name}.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if (found := _outcome(file)) is None:
            _write_first(file, {"facts": facts, "outcome": decide()})
            found = _outcome(file)
        return otherwise if found is None else found
    except OSError:
        return otherwise


def _outcome(file: Path) -> dict | None:
    """That on record; a record that a crash left empty or torn is removed."""
    try:
        return json_text.parse(file.read_text(encoding="utf-8"))["outcome"]
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError):
        file.unlink(missing_ok=True)
        return None


def _write_first(file: Path, record: dict) -> None:
    """Whole, or not at all where another process was first."""
    handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as out:
            json.dump(record, out, indent=1)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, file)
    finally:
        os.unlink(temporary)
