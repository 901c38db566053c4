"""The index of an image set: where each image lies, how large it is, whether it can be used.

A Table covers one folder tree or one shard. It is made once, in parallel, and kept in the user's
cache; a folder's entries stay valid by each file's size and time, a shard's by the shard's.
41 bytes an image and its name: about 100 MB for ImageNet.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import stat
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np

from cjepa_fast.data import arrays, faults, formats
from cjepa_fast.runtime import caches, json_text
from cjepa_fast.runtime.oom import is_out_of_memory
from cjepa_fast.runtime.reads_in_progress import progressed, watched
from cjepa_fast.telemetry.progress import shown_clock

VERSION = 6  # of the cached file; raise it when the check or the layout changes
CHUNK = 256  # images a task
KEEP_S, KEEP_SHARE = 60.0, 20  # between two savings: at least this, and so many times one's time
KEPT = 1024  # indexes of one path, of the copies of so many nodes
MASK = 2**64 - 1  # for the time of a file, which may lie before 1970
SMALL_BYTES = 2**24
LOCK_S = 0.2  # between two tries to take a lock
UNLABELLED = -1
UNREAD = "cannot be read"  # so begins the reason of a file that may be sound
NEVER_NS = -1  # a time at which no file was changed
ENTRY = np.dtype(
    [("offset", "<i8"), ("length", "<i8"), ("mtime_ns", "<i8"), ("height", "<i4"),
     ("width", "<i4"), ("label", "<i4"), ("kind", "u1"), ("bits", "u1"), ("there_pct", "u1"),
     ("channels", "<u2")]
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """names: image i is blob[ends[i-1]:ends[i]]; entries_N of ENTRY; reasons: {i: why unusable}.

    stamp: (size, mtime_ns) of a shard, (0, 0) for a folder, whose entries carry their own. words:
    a label of -2 - k is words[k]; odd: {i: why what is given as its label is none}.
    """

    blob: bytes
    ends_N: np.ndarray
    entries_N: np.ndarray
    reasons: dict[int, str]
    stamp: tuple[int, int] = (0, 0)
    words: tuple[str, ...] = ()
    odd: dict[int, str] = field(default_factory=dict)

    @staticmethod
    def of(names: list[bytes], entries_N, reasons, **more) -> "Table":
        ends_N = np.cumsum([len(name) for name in names], dtype=np.int64)
        return Table(b"".join(names), ends_N, entries_N, reasons, **more)

    @property
    def unread(self) -> list[int]:
        """Rows of files that could not be read, which says nothing about what they hold."""
        return [i for i, why in self.reasons.items() if why.startswith(UNREAD)]

    def as_known(self) -> "Table":
        """What may be remembered: a file that could not be read is looked at again."""
        if not (unread := self.unread):
            return self
        entries_N = self.entries_N.copy()
        entries_N["mtime_ns"][unread] = NEVER_NS
        return replace(self, entries_N=entries_N, stamp=(0, 0))

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


def cache_name(path: Path, cache: Path | None) -> Path:
    """What is kept of a set begins so: the folder of its indexes, and what lies beside that."""
    key = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]
    return cache_folder(cache) / key


def cache_file(path: Path, cache: Path | None, stamp: tuple[int, int] = (0, 0)) -> Path:
    """stamp: of a file of the set. Copies at one path of several nodes, which may share a cache,
    differ in it, and where it is the same in all of them, one index serves them all."""
    size, mtime_ns = stamp
    return cache_name(path, cache) / f"{size:x}-{mtime_ns & MASK:x}.npz"


def load_newest(file: Path) -> Table | None:
    """`load`, or where it has none the newest of the same path, of which most may still hold."""
    if (table := load(file)) is not None:
        return table
    return next((load(other) for other in _newest_first(file.parent) if other != file), None)


def _newest_first(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        times = {path: path.stat().st_mtime_ns for path in folder.glob("*.npz")}
        return sorted(times, key=times.get, reverse=True)
    return []  # not there, or others are at work on it


def load(file: Path) -> Table | None:
    """The cached table, or None where there is none that can be read."""
    progressed()
    try:
        with open(file, "rb") as handle, _opened(handle) as kept:
            if int(kept["version"]) != VERSION or kept["entries"].dtype != ENTRY:
                return None
            said = json_text.parse(kept["said"].tobytes())
            reasons, odd = ({int(i): w for i, w in said[k].items()} for k in ("reasons", "odd"))
            size, mtime_ns = (int(x) for x in kept["stamp"])
            return Table(
                kept["blob"].tobytes(), kept["ends"], kept["entries"], reasons,
                stamp=(size, mtime_ns), words=tuple(said["words"]), odd=odd,
            )  # fmt: skip
    except (OSError, KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile):
        return None  # not there, from another version, or damaged: it is made anew


@contextlib.contextmanager
def _opened(handle: BinaryIO):
    """The arrays of a .npz. A small file is read before the lock, so that many are at once."""
    small = os.fstat(handle.fileno()).st_size <= SMALL_BYTES
    source = io.BytesIO(handle.read()) if small else handle
    with arrays.NPY_LOCK, np.load(source) as kept:
        yield kept


def save(file: Path, table: Table) -> None:
    """Write beside, then rename: a reader sees the old file or the new one. Raises OSError."""
    table = table.as_known()
    said = {"reasons": table.reasons, "words": table.words, "odd": table.odd}
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
                said=np.frombuffer(json.dumps(said).encode(), np.uint8),
                stamp=np.array(table.stamp, np.int64),
            )
        os.replace(temporary, file)
        _prune(file.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _prune(folder: Path) -> None:
    """Delete all but the newest KEPT indexes of a path, and all of earlier versions."""
    old = [*_newest_first(folder)[KEPT:], folder.with_suffix(".npz")]
    for path in old:  # not their locks, which others may hold
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(file: Path):
    """One process checks a set's images; the others that find them unchecked wait, then read its
    cache."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = open(file.with_suffix(".lock"), "w", encoding="utf-8")  # noqa: SIM115 (closed below)
    except OSError:
        yield  # a read-only cache: each rank indexes for itself
        return
    with handle:
        with contextlib.suppress(OSError):  # file systems without locks: likewise
            _hold(handle)
        yield


def _hold(handle: TextIO) -> None:
    """Take its lock, waited for: who waits reads nothing meanwhile, and is not stuck."""
    with shown_clock("waiting for another process, which checks the images"):
        while True:
            progressed()
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(LOCK_S)


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
    """What changes where a file is written to or replaced: size and time, this as int64 has it,
    which ends in 2262."""
    return status.st_size, max(-(2**63), min(status.st_mtime_ns, 2**63 - 1))


def read_unchanged(fd: int, indexed: tuple[int, int], count: int, offset: int) -> bytes:
    """pread_exactly of a file whose stamp is as it was when it was indexed, else OSError."""
    data = pread_exactly(fd, count, offset)
    if stamp(os.fstat(fd)) != indexed:  # after the read, so that no write slips in between
        raise OSError("changed since it was indexed")
    return data


def open_regular(path: str | bytes | os.PathLike) -> int:
    """A descriptor for reading. Raises OSError for a pipe or a device, which might never answer."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError("a pipe or a device, not a file")
    return fd


def check(open_fd: Callable[[int], int], entries_N: np.ndarray, todo: Iterable[int], name) -> dict:
    """Fill what formats.ImageHeader has of entries_N[todo] in place; returns {i: why unusable}.

    name(i): of the file. Raises faults.MachineFailed.
    """
    reasons = {}
    for i in todo:
        entry = entries_N[i]
        try:
            with watched(name(i)):
                header = faults.patiently(lambda i=i: _header(open_fd, entries_N[i], i), name(i))
            for part, value in zip(header._fields, header, strict=True):
                entry[part] = value
        except formats.Unusable as error:
            reasons[i] = str(error)
            foreign = isinstance(error, formats.Foreign)
            entry["kind"] = formats.FOREIGN if foreign else formats.UNUSABLE
        except faults.MachineFailed:
            raise
        except OSError as error:
            reasons[i] = f"{UNREAD} ({error.strerror or error})"
            entry["kind"] = formats.UNUSABLE
        except Exception as error:  # of a parser that has met bytes nobody thought of
            if is_out_of_memory(error):
                raise
            reasons[i] = f"damaged ({error!r})"
            entry["kind"] = formats.UNUSABLE
    return reasons


def _header(open_fd: Callable[[int], int], entry: np.void, i: int) -> formats.ImageHeader:
    fd = open_fd(i)
    try:
        start = int(entry["offset"])
        read = lambda at, count: pread_exactly(fd, count, start + at)  # noqa: E731
        return formats.inspect(read, int(entry["length"]))
    finally:
        os.close(fd)


def check_all(
    open_fd,
    entries_N: np.ndarray,
    todo: np.ndarray,
    pool: ThreadPoolExecutor,
    bar,
    name,
    keep: Callable[[np.ndarray, dict[int, str]], None] = lambda rest, reasons: None,
) -> dict[int, str]:
    """`check` in chunks on the pool. Threads do: header parsing is 16 us, the rest is reading.

    keep(the part of todo that is not checked yet, reasons so far): called now and then, and before
    an error is raised, so that the next start goes on from there.
    """
    chunks = [todo[a : a + CHUNK].tolist() for a in range(0, len(todo), CHUNK)]
    reasons, done, wait_s, kept_s = {}, 0, KEEP_S, time.monotonic()
    tasks = [pool.submit(check, open_fd, entries_N, chunk, name) for chunk in chunks]
    try:
        for task, chunk in zip(tasks, chunks, strict=True):
            reasons |= task.result()
            bar.update(len(chunk))
            done += len(chunk)
            if (now_s := time.monotonic()) - kept_s >= wait_s:
                keep(todo[done:], reasons)
                kept_s = time.monotonic()
                wait_s = max(KEEP_S, KEEP_SHARE * (kept_s - now_s))
    except BaseException:
        if done:
            keep(todo[done:], reasons)
        raise
    return reasons
