"""JSON files of figures, whole at any time."""

import json
from pathlib import Path


def write(found: list | dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def save(rows: list[dict], path: Path) -> None:
    """Append to a list."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    write(kept + rows, path)


def loaded(results: Path, name: str):
    """What a file of a folder holds, None where there is none."""
    path = results / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
