"""JSON files of figures, whole at any time, and the archives in which they travel."""

import json
import tarfile
from pathlib import Path, PurePosixPath


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


def unpack(archive: Path, folder: Path) -> None:
    """The plain files of a tar, each with one folder above it at most. Raises ValueError for a name
    that leads out of `folder`."""
    with tarfile.open(archive) as tar:
        for member in filter(tarfile.TarInfo.isfile, tar):
            name = PurePosixPath(member.name)
            if name.is_absolute() or ".." in name.parts or len(name.parts) > 2:
                raise ValueError(f"{archive}: {member.name} does not belong into it")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(tar.extractfile(member).read())
