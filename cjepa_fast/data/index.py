"""The index of an image set: where each image lies, how large it is, whether it can be used.

A Table covers one folder tree or one shard. It is made once, in parallel, and kept in the user's
cache; a folder's entries stay valid by each file's size and time, a shard's by the shard's.
40 bytes an image and its name: about 100 MB for ImageNet.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cjepa_fast.data import formats
from cjepa_fast.runtime import caches, json_text

VERSION = 2  # of the cached file; raise it when the check or the layout changes
CHUNK = 256  # images a task
UNLABELLED = -1
ENTRY = np.dtype(
    [("offset", "<i8"), ("length", "<i8"), ("mtime_ns", "<i8"), ("height", "<i4"),
     ("width", "<i4"), ("label", "<i4"), ("kind", "u1")]
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """names: image i is blob[ends[i-1]:ends[i]]; entries_N of ENTRY; reasons: {i: why unusable}.

    stamp: (size, mtime_ns) of a shard, (0, 0) for a folder, whose entries carry their own.
    """

    blob: bytes
    ends_N: np.ndarray
    entries_N: np.ndarray
    reasons: dict[int, str]
    stamp: tuple[int, int] = (0, 0)

    @staticmethod
    def of(names: list[bytes], entries_N, reasons, stamp=(0, 0)) -> "Table":
        ends_N = np.cumsum([len(name) for name in names], dtype=np.int64)
        return Table(b"".join(names), ends_N, entries_N, reasons, stamp)

    def __len__(self) -> int:
        return len(self.ends_N)

    def name(self, i: int) -> bytes:
        return self.blob[(self.ends_N[i - 1] if i else 0) : self.ends_N[i]]

    def names(self) -> list[bytes]:
        starts = [0, *self.ends_N[:-1].tolist()]
        return [self.blob[a:b] for a, b in zip(starts, self.ends_N.tolist(), strict=False)]


def cache_folder(cache: Path | None = None) -> Path:
    """Where indexes are kept: `cache`, else the user's cache folder."""
    if cache is not None:
        return Path(cache)
    return caches.folder("index")


def cache_file(path: Path, cache: Path | None) -> Path:
    key = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]
    return cache_folder(cache) / f"{key}.npz"


def load(file: Path) -> Table | None:
    """The cached table, or None where there is none that can be read."""
    try:
        with open(file, "rb") as handle, np.load(handle) as kept:
            if int(kept["version"]) != VERSION or kept["entries"].dtype != ENTRY:
                return None
            reasons = {int(i): why for i, why in json_text.parse(kept["reasons"].tobytes()).items()}
            size, mtime_ns = (int(x) for x in kept["stamp"])
            blob = kept["blob"].tobytes()
            return Table(blob, kept["ends"], kept["entries"], reasons, (size, mtime_ns))
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None  # not there, from another version, or damaged: it is made anew


def save(file: Path, table: Table) -> None:
    """Write beside, then rename: a reader sees the old file or the new one. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as out:
            np.savez(
                out,
                version=VERSION,
                blob=np.frombuffer(table.blob, np.uint8),
                ends=table.ends_N,
                entries=table.entries_N,
                reasons=np.frombuffer(json.dumps(table.reasons).encode(), np.uint8),
                stamp=np.array(table.stamp, np.int64),
            )
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def lock(file: Path):
    """One rank indexes a set; the other ranks of the node wait, then read its cache."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = open(file.with_suffix(".lock"), "w")  # noqa: SIM115 (closed below)
    except OSError:
        yield  # a read-only cache: each rank indexes for itself
        return
    with handle:
        with contextlib.suppress(OSError):  # file systems without locks: likewise
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def pread_exactly(fd: int, count: int, offset: int) -> bytes:
    """Positioned and so thread-safe; raises OSError where the file ends early."""
    data = os.pread(fd, count, offset)
    while len(data) < count:  # Linux reads at most 2 GiB at once; signals cut reads short
        more = os.pread(fd, count - len(data), offset + len(data))
        if not more:
            raise OSError(f"ends after {len(data)} of {count} bytes: changed since it was indexed")
        data += more
    return data


def stamp(status: os.stat_result) -> tuple[int, int]:
    """What changes where a file is written to or replaced: size and time."""
    return status.st_size, status.st_mtime_ns


def read_unchanged(fd: int, indexed: tuple[int, int], count: int, offset: int) -> bytes:
    """pread_exactly of a file whose stamp is as it was when it was indexed, else OSError."""
    data = pread_exactly(fd, count, offset)
    if stamp(os.fstat(fd)) != indexed:  # after the read, so that no write slips in between
        raise OSError("changed since it was indexed")
    return data


def check(open_fd: Callable[[int], int], entries_N: np.ndarray, todo: Iterable[int]) -> dict:
    """Fill height, width and kind of entries_N[todo] in place; returns {i: why unusable}."""
    reasons = {}
    for i in todo:
        entry = entries_N[i]
        try:
            fd = open_fd(i)
            try:
                start = int(entry["offset"])
                read = lambda at, count, fd=fd, start=start: pread_exactly(fd, count, start + at)  # noqa: E731
                shape = formats.inspect(read, int(entry["length"]))
            finally:
                os.close(fd)
            entry["height"], entry["width"], entry["kind"] = shape
        except formats.Unusable as error:
            reasons[i] = str(error)
        except OSError as error:
            reasons[i] = f"cannot be read ({error.strerror or error})"
        if i in reasons:
            entry["kind"] = formats.UNUSABLE
    return reasons


def check_all(open_fd, entries_N: np.ndarray, todo: np.ndarray, pool: ThreadPoolExecutor, bar):
    """`check` in chunks on the pool. Threads do: header parsing is 16 us, the rest is reading."""
    chunks = [todo[a : a + CHUNK].tolist() for a in range(0, len(todo), CHUNK)]
    reasons = {}
    tasks = [pool.submit(check, open_fd, entries_N, chunk) for chunk in chunks]
    for task, chunk in zip(tasks, chunks, strict=True):
        reasons |= task.result()
        bar.update(len(chunk))
    return reasons
