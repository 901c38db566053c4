"""Where images come from: a folder tree, WebDataset shards (plain tars), a list, or several.

    images = open_images("/data/imagenet/train")          # classes: first-level sub-folders
    images = open_images("/data/shards/x-{000000..000127}.tar")
    images.read(7), images.name(7), images.sizes_N2[7]    # bytes, name, (height, width) upright

The set is indexed once (index.py) and read by position, so any image can be had at any time. What
is read and how the rest is reported: docs/image_formats.md.
"""

import functools
import hashlib
import os
import resource
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch

from cjepa_fast.config import DataSection
from cjepa_fast.data import (
    arrays,
    faults,
    formats,
    index,
    kinds,
    labels,
    listing,
    lists,
    locations,
)
from cjepa_fast.data.headers import JPEG_END
from cjepa_fast.data.left_out import tell
from cjepa_fast.runtime.hardware import cores
from cjepa_fast.runtime.printable import printable
from cjepa_fast.runtime.reads_in_progress import watched

TRIED_DEEP = 8  # images of more than 8 bits, whose brightness is looked at
OPEN_SHARDS = 4096  # shards kept open at most


class Limits(NamedTuple):
    """What counts as usable, of the configuration's data section."""

    max_pixels: int = formats.MAX_PIXELS
    min_jpeg: float = 0.9  # share of the rows of a JPEG that was cut short
    min_shown: float = 0.9  # share of what is shown of a JPEG that ends early
    bit_depth: int | None = None  # in use, of images with more than 8 bits
    max_skipped: float = 0.05  # share of the files that could not be read

    @staticmethod
    def of(data: DataSection) -> "Limits":
        return Limits(*(getattr(data, name) for name in Limits._fields))

    def changed(self) -> dict[str, float | None]:
        """What differs from the defaults, by name."""
        return {k: v for k, v in self._asdict().items() if v != Limits._field_defaults[k]}


LIMITS = Limits()


class NothingUsable(ValueError):
    """The message names the path, what is there and the way out."""


@dataclass(frozen=True)
class Part:
    """A folder tree, a list or a shard: its table, and where it lies.

    classes: the names of its labels or None; prefix: of its names, where several paths were given.
    """

    table: index.Table
    root: Path
    shard: Path | None
    classes: labels.Classes
    prefix: str = ""

    def name(self, row: int) -> str:
        name = os.fsdecode(self.table.name(row))
        return f"{self.prefix}{self.shard.name}/{name}" if self.shard else f"{self.prefix}{name}"


@runtime_checkable
class ReadableImages(Protocol):
    """Images by their position from 0 on. fingerprint: the same for the same images in the same
    order; limits: how they are read; has_arrays: all are arrays (arrays.py), else none is."""

    limits: Limits
    has_arrays: bool
    fingerprint: str

    def __len__(self) -> int: ...

    def name(self, i: int) -> str: ...

    def read_original(self, i: int) -> bytes:
        """The file's bytes as they are. Raises OSError if they cannot be had, MachineFailed for
        what is not the file's fault."""


@runtime_checkable
class DecodableImages(ReadableImages, Protocol):
    """What decode_pipeline.py reads. root: where they lie; sizes_N2: int32 (n, 2) height and width,
    upright."""

    root: Path
    sizes_N2: np.ndarray

    def shard(self, i: int) -> Path | None:
        """The shard that image i lies in, None in a folder."""

    def read(self, i: int, channels: int = 3) -> bytes:
        """Bytes that a decoder makes an upright picture of so many channels of, or an array's own.
        Raises OSError if they cannot be had."""

    def require_channels(self, channels: int) -> None:
        """Raises ValueError, naming the first image that has another number."""


class ImageSet:
    """The usable images of a set, in a fixed order: DecodableImages. Reading is thread-safe.

    labelled: images without a label are left out. labels: int64 (n,), None where one is missing;
    classes: their names or None; label_N, class_names: the same where some are missing; sizes_N2:
    int32 (n, 2) height and width, upright; skipped: (name, reason) of what is left out; unlabelled:
    usable but for a label; found: how many files look like images; has_arrays: all are arrays
    (arrays.py), else none is; fingerprint: hash of names and
    sizes in bytes, the same wherever the set lies, and whether or not a file is corrupt.
    """

    def __init__(self, parts: list[Part], limits: Limits = LIMITS, labelled: bool = False):
        self.root, self.limits, self._parts = parts[0].root, limits, parts
        label_by_part, classes = _merged([part.table.entries_N["label"] for part in parts], parts)
        out = [_left_out(part.table, limits) for part in parts]
        _without_arrays(parts, out)
        self.unlabelled = 0
        for part, label_N, why in zip(parts, label_by_part, out, strict=True):
            without = np.setdiff1d(np.flatnonzero(label_N == index.UNLABELLED), list(why)).tolist()
            self.unlabelled += len(without)
            if labelled:
                why |= {i: part.table.odd.get(i, labels.NONE_GIVEN) for i in without}
        usable = [_others(part.table, why) for part, why in zip(parts, out, strict=True)]
        self._part_N = np.repeat(np.arange(len(parts), dtype=np.int32), [len(u) for u in usable])
        self._row_N = np.concatenate(usable).astype(np.int32)
        pairs = list(zip(parts, usable, strict=True))
        self._entries_N = np.concatenate([part.table.entries_N[rows] for part, rows in pairs])
        self.has_arrays = bool((self._entries_N["kind"] == formats.ARRAY).any())
        self.sizes_N2 = np.stack([self._entries_N["height"], self._entries_N["width"]], axis=1)
        label_N = np.concatenate(
            [own[rows] for own, rows in zip(label_by_part, usable, strict=True)]
        )
        self.label_N, self.class_names = label_N.astype(np.int64), classes
        whole = not (label_N == index.UNLABELLED).any()
        self.labels = torch.from_numpy(self.label_N) if whole else None
        self.classes: labels.Classes = classes if whole else None
        self.skipped = [
            (part.name(i), why[i])
            for part, why in zip(parts, out, strict=True)
            for i in sorted(why)
        ]
        self.found = sum(len(part.table) for part in parts)
        self.fingerprint = _fingerprint(parts, out)
        self._open: dict[int, _Handle] = {}  # by the shard's number, the one read last is the last
        self._members: dict[int, dict[str, tuple[int, int]]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries_N)

    def name(self, i: int) -> str:
        """The path below the folder, or "shard/member"; as the file system has it."""
        return self._parts[self._part_N[i]].name(int(self._row_N[i]))

    @property
    def bits_N(self) -> np.ndarray:
        """int (n,): the bits a channel of each image, where more than 8."""
        return self._entries_N["bits"]

    @property
    def times_ns(self) -> np.ndarray:
        """When what is used was last changed: of each file (n,), then of each shard."""
        shards = [part.table.stamp[1] for part in self._parts if part.shard]
        return np.concatenate([self._entries_N["mtime_ns"], np.array(shards, np.int64)])

    def shard(self, i: int) -> Path | None:
        """The shard that image i lies in, None in a folder."""
        return self._parts[self._part_N[i]].shard

    def _used(self) -> Iterator[tuple[Part, np.ndarray]]:
        """Each part, and its rows that are used."""
        ends = np.searchsorted(self._part_N, np.arange(1, len(self._parts)))
        return zip(self._parts, np.split(self._row_N, ends), strict=True)

    @functools.cached_property
    def usable_fingerprint(self) -> str:
        """Hash of the usable images' names and sizes in bytes, in order: of two sets with the same,
        the same number is the same image."""
        digest = hashlib.sha256()
        for part, rows in self._used():
            _hash_rows(digest, part.table, rows)
        return digest.hexdigest()[:32]

    def files(self) -> Iterator[bytes]:
        """Where each image lies, in order: its file, whose folder has no links in it, or its shard
        and its name there. The same for the same, whether a folder or a list names it."""
        real = functools.cache(os.path.realpath)
        for part, rows in self._used():
            names, root = part.table.names(), os.path.realpath(os.fsencode(part.shard or part.root))
            for row in rows.tolist():
                folder, slash, base = names[row].rpartition(b"/")
                path = os.path.join(root, folder + slash)
                yield (path if part.shard else real(path)).rstrip(b"/") + b"/" + base

    def require_channels(self, channels: int) -> None:
        """Raises ValueError, naming the first image that has another number. Three is RGB, which
        pictures of any kind become; only arrays must have three."""
        found_N = self._entries_N["channels"]
        others = np.flatnonzero(found_N != channels)
        if not len(others) or (channels == 3 and not self.has_arrays):
            return
        first = int(others[0])
        has = f"{printable(self.name(first))} has {found_N[first]}"
        more = f", and {len(others) - 1} more are not of {channels}" if len(others) > 1 else ""
        raise ValueError(
            f"data.channels = {channels}: {has}{more}; "
            "all images of a set must have the same: set data.channels, with a mean and std for "
            "each, or keep the others apart"
        )

    def read(self, i: int, channels: int = 3) -> bytes:
        """Bytes that DALI decodes to an upright picture of so many channels, or an array's own.
        Raises OSError if they cannot be had."""
        data, entry = self.read_original(i), self._entries_N[i]
        if entry["there_pct"] < 100:
            data += JPEG_END
        if self.has_arrays:
            return data
        bits = self.limits.bit_depth if entry["bits"] > 8 else None
        if entry["kind"] == formats.CONVERT or bits:
            image = formats.decode_rgb(data, self.limits.max_pixels, bits, channels)
            return formats.as_ppm(image)
        return data

    def read_original(self, i: int) -> bytes:
        """The file's bytes as they are. Raises OSError if they cannot be had, MachineFailed for
        what is not the file's fault."""
        with watched(self.name(i)):
            return faults.patiently(lambda: self._read(i), self.name(i))

    def _read(self, i: int) -> bytes:
        entry, part = self._entries_N[i], self._parts[self._part_N[i]]
        where = int(entry["length"]), int(entry["offset"])
        if part.shard:
            return self._read_shard(int(self._part_N[i]), *where)
        indexed = int(entry["length"]), int(entry["mtime_ns"])
        path = os.path.join(os.fsencode(part.root), part.table.name(self._row_N[i]))
        fd = index.open_regular(path)
        try:
            return index.read_unchanged(fd, indexed, *where)
        finally:
            os.close(fd)

    def _read_shard(self, number: int, count: int, offset: int) -> bytes:
        part, handle = self._parts[number], self._opened(number)
        try:
            return index.read_unchanged(handle.fd, part.table.stamp, count, offset)
        except OSError as error:
            if faults.of_the_machine(error):  # a stale handle stays so: the next try opens anew
                with self._lock:
                    self._open.pop(number, None)
            raise

    def _opened(self, number: int) -> "_Handle":
        """The handle of a shard: an open one, or a new one in the place of the least recently
        used."""
        with self._lock:
            if (handle := self._open.pop(number, None)) is not None:
                self._open[number] = handle
                return handle
        handle = _Handle(self._parts[number].shard)  # however slow, it holds up no other shard
        with self._lock:
            self._open[number] = handle
            too_many = max(0, len(self._open) - _most_open())
            gone = [self._open.pop(other) for other in list(self._open)[:too_many]]
        del gone  # closed here, outside the lock, unless someone is reading
        return handle

    def sidecar(self, i: int, ext: str) -> bytes | None:
        """The sample's sibling with extension `ext` ("json", ".json"), None where there is none."""
        number, ext = int(self._part_N[i]), ext.lstrip(".")
        part = self._parts[number]
        name = os.fsdecode(part.table.name(int(self._row_N[i])))
        if not part.shard:
            path = (part.root / name).with_suffix(f".{ext}")
            return path.read_bytes() if path.is_file() else None
        if number not in self._members:
            self._members[number] = listing.members(part.shard)
        keys = name.rpartition(".")[0], listing.split_key(name)[0]
        siblings = (self._members[number].get(f"{key}.{ext}") for key in keys)
        where = next(filter(None, siblings), None)
        return None if where is None else self._read_shard(number, where[1], where[0])


class Subset:
    """Some images of a set, by position: DecodableImages. keep_n: int64 (n,) positions."""

    def __init__(self, images: DecodableImages, keep_n: torch.Tensor):
        self.images, self.keep_n = images, keep_n
        self.root, self.limits, self.has_arrays = images.root, images.limits, images.has_arrays
        self.sizes_N2 = images.sizes_N2[keep_n.numpy()]
        self.require_channels = images.require_channels

    def __len__(self) -> int:
        return len(self.keep_n)

    @property
    def fingerprint(self) -> str:
        kept = hashlib.sha256(self.keep_n.numpy().tobytes()).hexdigest()
        return f"{self.images.fingerprint}-{kept[:16]}"

    def name(self, i: int) -> str:
        return self.images.name(int(self.keep_n[i]))

    def shard(self, i: int) -> Path | None:
        return self.images.shard(int(self.keep_n[i]))

    def read(self, i: int, channels: int = 3) -> bytes:
        return self.images.read(int(self.keep_n[i]), channels)

    def read_original(self, i: int) -> bytes:
        return self.images.read_original(int(self.keep_n[i]))


class _Handle:
    """A shard that is open: closed when nobody holds it any more."""

    def __init__(self, shard: Path):
        self.fd = index.open_regular(shard)

    def __del__(self, close=os.close):
        if hasattr(self, "fd"):
            close(self.fd)


def _most_open() -> int:
    """A quarter of the files that this process may hold: others need some."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return OPEN_SHARDS if soft == resource.RLIM_INFINITY else min(OPEN_SHARDS, soft // 4)


def _left_out(table: index.Table, limits: Limits) -> dict[int, str]:
    """{row: why it is not used}: what the index says, and what is beyond the limits."""
    entries_N = table.entries_N
    out = dict(table.reasons)
    pixels_N = entries_N["height"].astype(np.int64) * entries_N["width"]
    # In memory an array of many channels is as large as so many pictures of three.
    array_N = entries_N["kind"] == formats.ARRAY
    pixels_N *= np.where(array_N, -(-entries_N["channels"].astype(np.int64) // 3), 1)
    for i in np.flatnonzero(pixels_N > limits.max_pixels).tolist():
        more = f", of {entries_N['channels'][i]} channels, three a pixel" * int(array_N[i])
        out.setdefault(i, formats.over(*_size(entries_N[i]), limits.max_pixels) + more)
    for i in np.flatnonzero(entries_N["there_pct"] < 100 * limits.min_jpeg).tolist():
        out.setdefault(i, f"truncated: no end marker, {entries_N['there_pct'][i]} % of it is there")
    return out


def _without_arrays(parts: list[Part], out: list[dict[int, str]]) -> None:
    """Leave out, by name, the arrays of a set that has pictures."""
    pairs = list(zip(parts, out, strict=True))
    used = [np.delete(part.table.entries_N["kind"], list(why)) for part, why in pairs]
    if all((kind_N == formats.ARRAY).all() for kind_N in used):
        return
    for part, why in pairs:
        entries_N = part.table.entries_N
        for i in np.flatnonzero(entries_N["kind"] == formats.ARRAY).tolist():
            count = entries_N["channels"][i]
            said = f"an array of {count} channel{'s' * int(count > 1)} among pictures"
            why.setdefault(i, said)


def _others(table: index.Table, out: dict[int, str]) -> np.ndarray:
    return np.setdiff1d(np.arange(len(table)), list(out))


def _size(entry: np.void) -> tuple[int, int]:
    return int(entry["height"]), int(entry["width"])


def _merged(label_by_part, parts: list[Part]) -> tuple[list[np.ndarray], labels.Classes]:
    """Labels of all parts by one list of classes; numbers and names are not mixed."""
    if all(part.classes == parts[0].classes for part in parts):
        return label_by_part, parts[0].classes
    classes = sorted({name for part in parts for name in part.classes or ()})
    number = {name: i for i, name in enumerate(classes)}
    found = []
    for label_N, part in zip(label_by_part, parts, strict=True):
        number_of = np.array([*(number[name] for name in part.classes or ()), index.UNLABELLED])
        found.append(number_of[np.where(label_N < len(number_of) - 1, label_N, index.UNLABELLED)])
    return found, classes


def _fingerprint(parts: list[Part], out: list[dict[int, str]]) -> str:
    """Hash of what is there, but for images of kinds that nobody reads, and of what the limits, a
    missing label or a failed read leave out."""
    digest = hashlib.sha256()
    for part, why in zip(parts, out, strict=True):
        ours = np.flatnonzero(part.table.entries_N["kind"] != formats.FOREIGN)
        _hash_rows(digest, part.table, ours)
        beyond = (why.keys() - part.table.reasons.keys()) | set(part.table.unread)
        beyond -= set(np.flatnonzero(part.table.entries_N["kind"] == formats.ARRAY).tolist())
        if beyond:
            digest.update(repr(sorted(beyond)).encode())
    return digest.hexdigest()[:32]


def _hash_rows(digest, table: index.Table, rows: np.ndarray) -> None:
    """The names and sizes in bytes of a table's rows, into a digest of hashlib."""
    if len(rows) < len(table):
        names = table.names()
        table = index.Table.of([names[i] for i in rows], table.entries_N[rows], {})
    for piece in (table.blob, table.ends_N.tobytes(), table.entries_N["length"].tobytes()):
        digest.update(piece)


def open_images(
    path: str | Path | Sequence[str | Path],
    *,
    limits: Limits = LIMITS,
    labelled: bool = False,
    label_list: str | Path | None = None,
    cache: Path | None = None,
    workers: int | None = None,
    report: Path | None = None,
    log: Callable[[str], None] = print,
) -> ImageSet:
    """Open, index (once; cached) and describe an image set.

    path: a folder (nested; classes are its first-level sub-folders, unlabelled if it has none), a
    folder of .tar shards, one .tar, a pattern "x-{000000..000009}.tar", a list (.txt, .csv),
    "shapes" or "shapes:val"; or several of these. labelled: images without a label are left out.
    label_list: a file with the labels (lists.labels_for), instead of those that the images have.
    report: a file that will name all that is left out; default: in the cache. Raises
    FileNotFoundError or ValueError, naming the path and the way out, where nothing usable is found,
    and OSError where the disk or the machine fails.
    """
    paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    workers = workers or min(32, 4 * cores())
    found = [locations.find(str(one), log) for one in paths]
    prefixes = _prefixes([location.root for location in found])
    parts: list[Part] = []
    for location, prefix in zip(found, prefixes, strict=True):
        parts += _indexed(location, prefix, cache, workers, log)
    if label_list is not None:
        parts = _labelled_by(Path(label_list), parts, log)
    images = ImageSet(parts, limits, labelled)
    report = report or index.cache_name(found[0].root, cache).with_suffix(".unusable.jsonl")
    tell(images.skipped, images.found, report, log)
    if not len(images):
        rows = next((one for one in paths if locations.parquet_files(Path(one))), None)
        if rows is not None:
            raise NothingUsable(locations.to_be_packed(rows))
        tars = [tar for one in found if not one.shards for tar in locations.tars_below(one.root)]
        raise NothingUsable(_nothing_usable(" and ".join(map(str, paths)), images, tars))
    unread = sum(len(part.table.unread) for part in parts)
    if unread > max(1, limits.max_skipped * images.found):
        raise OSError(
            f"{unread} of {images.found} files cannot be read, more than data.max_skipped = "
            f"{limits.max_skipped:g} of them: check the disk and the files' permissions ({report})"
        )
    _warn_of_darkness(images, log)
    return images


def _labelled_by(file: Path, parts: list[Part], log: Callable[[str], None]) -> list[Part]:
    names = [name for part in parts for name in part.table.names()]
    texts = lists.labels_for(file, names, log)
    classes = labels.of_list([part.table for part in parts], texts, file)
    return [replace(part, classes=classes) for part in parts]


def _warn_of_darkness(images: ImageSet, log: Callable[[str], None]) -> None:
    """Where deep images use few of their levels, as 12 bits in a file of 16 do."""
    deep = np.flatnonzero(images.bits_N > 8)
    brightest = 0
    for i in deep[:: max(1, len(deep) // TRIED_DEEP)][:TRIED_DEEP].tolist():
        try:
            brightest = max(brightest, _brightest(images, i))
        except OSError:
            continue
    if 0 < brightest < 256 // 8:
        log(
            f"WARNING: images of more than 8 bits use less than an eighth of their range (up to "
            f"{brightest} of 255): data.bit_depth says how many bits are in use"
        )


def _brightest(images: ImageSet, i: int) -> int:
    data = images.read(i)
    if images.has_arrays:
        return int(arrays.pixels(data, images.limits.bit_depth).max())
    picture = formats.decode_rgb(data, images.limits.max_pixels)
    return max(most for _, most in picture.getextrema())


def _indexed(location: locations.Location, prefix: str, cache, workers: int, log) -> list[Part]:
    with ThreadPoolExecutor(workers) as pool:
        try:
            return _parts(location, prefix, cache, pool, log)
        except BaseException:  # Ctrl-C, a lost disk: what waits in the pool is not begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _parts(location: locations.Location, prefix: str, cache, pool, log) -> list[Part]:
    root, shards = location
    if shards:
        tables, classes = listing.index_shards(shards, cache, pool, log)
        pairs = zip(tables, shards, strict=True)
        return [Part(table, root, shard, classes, prefix) for table, shard in pairs]
    if location.is_list:
        table, classes = listing.index_list(root, cache, pool, log)
        return [Part(table, root.parent, None, classes, prefix)]
    table, classes = listing.index_folder(root, cache, pool, log)
    return [Part(table, root, None, classes, prefix)]


def _prefixes(roots: list[Path]) -> list[str]:
    """What the names of each path's images begin with: nothing for one path alone."""
    if len(roots) == 1:
        return [""]
    if len(set(roots)) < len(roots):
        raise ValueError(f"{', '.join(map(str, roots))}: one of these is named twice")
    names = [root.name for root in roots]
    return [f"{n}/" if names.count(n) == 1 else f"{n}.{i}/" for i, n in enumerate(names)]


def _nothing_usable(path: str, images: ImageSet, tars: list[bytes]) -> str:
    """tars: in sub-folders, where nobody looks for shards."""
    first = next(iter(images.skipped), None)
    why = f"; the first of them, {first[0]}: {first[1]}" if first else ""
    return (
        f"no usable image in {path} ({images.found} files with the endings "
        f"{', '.join((*kinds.READ, *kinds.ARRAYS))} found{why}). "
        + (f"It holds {listing.first_of(tars)}: name the folder that these lie in." if tars else
           "Name a folder of images, of .tar shards with such members, or a list of images.")
    )  # fmt: skip
