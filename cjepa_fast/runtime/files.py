"""Files written so that a reader sees the old or the new, and a crash loses neither."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from cjepa_fast.runtime import json_text

if TYPE_CHECKING:
    import torch

MOST_JSON_BYTES = 2**26  # of a description; what is larger is none of ours
MANY = 65_536  # files open at once


def write_text(path: Path, text: str) -> None:
    """Atomic: a reader sees the old text or the new."""
    partial = path.with_name(f".{path.name}.partial")
    with _named(path):
        partial.write_text(text, encoding="utf-8")
    sync_file(partial)
    partial.rename(path)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """An OSError says of which file it is: one of a write or a sync does not."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_text(path: Path) -> str:
    """The text of a user's file: UTF-8, with a byte order mark or without. Raises ValueError for
    another encoding, FileNotFoundError if it is missing."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start}): write it anew, as by "
            f"iconv -f latin1 -t utf-8 {path} -o NEW"
        ) from error


def read_json(path: Path) -> dict:
    """The object that a JSON file holds. Raises ValueError, naming the file, for anything else,
    FileNotFoundError if it is missing."""
    if (size := path.stat().st_size) > MOST_JSON_BYTES:
        raise ValueError(f"{path} is damaged: a description of {size} bytes is none of ours")
    try:
        found = json_text.parse(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged or no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it must hold an object, not a {type(found).__name__}")
    return found


def sync_file(path: Path) -> None:
    """Make a file, or a folder's names, survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with _named(path):
            os.fsync(descriptor)
    except OSError as error:  # some file systems have none of folders
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def point(name: Path, target: Path) -> None:
    """Make `name` a link to a folder beside or below it, in place of what it was."""
    partial = name.with_name(f".{name.name}.partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(os.path.relpath(target, name.parent))
    partial.replace(name)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def write_tensors(
    tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file, for whoever may read the files beside it, on the disk when this returns.

    Not atomic: under a temporary name. Raises OSError where that fails, as on a full disk.
    """
    from safetensors.torch import save_file  # with torch, seconds to import

    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    path.chmod(mode)  # safetensors lets its owner alone read it
    sync_file(path)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All of a safetensors file. Raises as `opened`."""
    with opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)


@contextlib.contextmanager
def opened(path: Path):
    """A safetensors file. Raises ValueError where it is damaged, FileNotFoundError if missing."""
    with reading(path), safe_open(path, "pt") as file:
        yield file


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """What is wrong with a safetensors file, where one that is open is read."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


def allow_many_open() -> None:
    """As many open files as this process may ask for, up to MANY: a rank holds the shards of its
    images and of checkpoints, and connections to all other ranks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MANY if hard == resource.RLIM_INFINITY else min(hard, MANY)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # macOS has a lower limit than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
