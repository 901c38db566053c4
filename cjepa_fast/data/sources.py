"""Where images come from: a folder tree, WebDataset shards (plain tars), or the synthetic dataset.

    images = open_images("/data/imagenet/train")          # classes: first-level sub-folders
    images = open_images("/data/shards/x-{000000..000127}.tar")
    images.read(7), images.name(7), images.sizes_N2[7]    # bytes, name, (height, width) upright

The set is indexed once (index.py) and read by position, so any image can be had at any time.
"""

import hashlib
import itertools
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from cjepa_fast.data import formats, index, listing

NAMES_LOGGED = 20
OPEN_SHARDS = 256  # shards kept open; a process may hold 1,024 files, and others need some


class ImageSet:
    """The usable images of a set, in a fixed order. Reading is thread-safe.

    root: what was opened, as it was named; labels: int64 (n,) or None where not every image has
    one; classes: their names or None; sizes_N2: int32 (n, 2) height and width, upright; skipped:
    (name, reason) of the unusable; fingerprint: hash of names and sizes in bytes, the same wherever
    the set lies.
    """

    def __init__(self, root: Path, shards: list[Path], tables: list[index.Table], classes):
        self.root, self._shards, self._tables = root, shards, tables
        usable = [np.flatnonzero(t.entries_N["kind"] != formats.UNUSABLE) for t in tables]
        self._table_N = np.repeat(np.arange(len(tables), dtype=np.int32), [len(u) for u in usable])
        self._row_N = np.concatenate(usable).astype(np.int32)
        pairs = zip(tables, usable, strict=True)
        self._entries_N = np.concatenate([t.entries_N[rows] for t, rows in pairs])
        self.sizes_N2 = np.stack([self._entries_N["height"], self._entries_N["width"]], axis=1)
        self.classes: list[str] | None = classes
        self.labels = _labels(self._entries_N["label"])
        self.skipped = [
            (self._name(t, i), why)
            for t, table in enumerate(tables)
            for i, why in sorted(table.reasons.items())
        ]
        self.fingerprint = _fingerprint(tables)
        self._open: dict[int, int] = {}
        self._members: dict[int, dict[str, tuple[int, int]]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries_N)

    def name(self, i: int) -> str:
        """The path below the folder, or "shard/member"."""
        return self._name(int(self._table_N[i]), int(self._row_N[i]))

    def _name(self, table: int, row: int) -> str:
        name = os.fsdecode(self._tables[table].name(row))
        return f"{self._shards[table].name}/{name}" if self._shards else name

    def shard(self, i: int) -> Path | None:
        """The shard that image i lies in, None in a folder."""
        return self._shards[int(self._table_N[i])] if self._shards else None

    def read(self, i: int) -> bytes:
        """Bytes that DALI decodes to upright RGB. Raises OSError if they cannot be had."""
        data = self.read_original(i)
        if self._entries_N["kind"][i] == formats.CONVERT:
            return formats.as_ppm(formats.decode_rgb(data))
        return data

    def read_original(self, i: int) -> bytes:
        """The file's bytes as they are. Raises OSError if they cannot be had."""
        entry = self._entries_N[i]
        table = int(self._table_N[i])
        where = int(entry["length"]), int(entry["offset"])
        if self._shards:
            return self._read_shard(table, *where)
        indexed = int(entry["length"]), int(entry["mtime_ns"])
        fd = os.open(os.path.join(os.fsencode(self.root), self._tables[0].name(self._row_N[i])),
                     os.O_RDONLY)  # fmt: skip
        try:
            return index.read_unchanged(fd, indexed, *where)
        finally:
            os.close(fd)

    def _read_shard(self, table: int, count: int, offset: int) -> bytes:
        with self._lock:
            fd = self._open.get(table)
            if fd is None:
                fd = os.open(self._shards[table], os.O_RDONLY)
                keep = len(self._open) < OPEN_SHARDS
                if keep:
                    self._open[table] = fd
            else:
                keep = True
        try:
            return index.read_unchanged(fd, self._tables[table].stamp, count, offset)
        finally:
            if not keep:
                os.close(fd)

    def sidecar(self, i: int, ext: str) -> bytes | None:
        """The sample's sibling with extension `ext` ("json", ".json"), None where there is none."""
        table, ext = int(self._table_N[i]), ext.lstrip(".")
        name = os.fsdecode(self._tables[table].name(int(self._row_N[i])))
        if not self._shards:
            path = (self.root / name).with_suffix(f".{ext}")
            return path.read_bytes() if path.is_file() else None
        if table not in self._members:
            self._members[table] = listing.members(self._shards[table])
        where = self._members[table].get(f"{listing.split_key(name)[0]}.{ext}")
        return None if where is None else self._read_shard(table, where[1], where[0])

    def __del__(self):
        for fd in getattr(self, "_open", {}).values():
            os.close(fd)


def _labels(label_N: np.ndarray) -> torch.Tensor | None:
    if (label_N == index.UNLABELLED).any():
        return None
    return torch.from_numpy(label_N.astype(np.int64))


def _fingerprint(tables: list[index.Table]) -> str:
    digest = hashlib.sha256()
    for table in tables:
        for part in (table.blob, table.ends_N.tobytes(), table.entries_N["length"].tobytes()):
            digest.update(part)
    return digest.hexdigest()[:32]


def open_images(
    path: str | Path, *, cache: Path | None = None, workers: int | None = None, log=print
) -> ImageSet:
    """Open, index (once; cached) and describe an image set.

    path: a folder (nested; classes are its first-level sub-folders, unlabelled if it has none), a
    folder of .tar shards, one .tar, a pattern "x-{000000..000009}.tar", "shapes" or "shapes:val".
    Raises FileNotFoundError or ValueError, naming the path and the way out, where nothing usable
    is found. Unusable images are listed in .skipped and logged.
    """
    path = _synthetic(str(path))
    shards = find_shards(path)
    root = Path(path)
    workers = workers or min(32, 4 * (os.cpu_count() or 1))
    with index.lock(index.cache_file(root, cache)), ThreadPoolExecutor(workers) as pool:
        if shards:
            tables, classes = listing.index_shards(shards, cache, pool, log)
        else:
            tables, classes = listing.index_folder(root, cache, pool, log)
    if not sum(int((t.entries_N["kind"] != formats.UNUSABLE).sum()) for t in tables):
        raise ValueError(_nothing_usable(path, tables))
    images = ImageSet(root, shards, tables, classes)
    _log_skipped(images, log)
    return images


def _nothing_usable(path: str, tables: list[index.Table]) -> str:
    table = tables[0]
    first = next(iter(sorted(table.reasons.items())), None)
    why = f"; the first of them, {os.fsdecode(table.name(first[0]))}: {first[1]}" if first else ""
    found = sum(len(t) for t in tables)
    kinds = ", ".join(formats.EXTENSIONS)
    return (
        f"no usable image in {path} ({found} files with the endings {kinds} found{why}). "
        "Name a folder of images, or of .tar shards with such members."
    )


def _log_skipped(images: ImageSet, log) -> None:
    for name, why in images.skipped[:NAMES_LOGGED]:
        log(f"unusable image left out: {name}: {why}")
    if len(images.skipped) > NAMES_LOGGED:
        log(f"... and {len(images.skipped) - NAMES_LOGGED} more unusable images left out")


def _synthetic(path: str) -> str:
    if path != "shapes" and not path.startswith("shapes:"):
        return path
    from cjepa_fast.data.sets import shapes

    split = path.partition(":")[2] or "train"
    if split not in ("train", "val"):
        raise ValueError(f"unknown split in {path!r}: use shapes, shapes:train or shapes:val")
    return str(shapes.ensure(split))


def find_shards(path: str) -> list[Path]:
    """The shards that `path` names, in order; [] where it is a folder of images."""
    if "{" in path and not os.path.exists(path):
        shards = [Path(p) for p in expand_braces(path)]
        missing = [p for p in shards if not p.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of the {len(shards)} shards of {path} are missing, the first is "
                f"{missing[0]}: correct the numbers in the braces"
            )
        return [_plain_tar(p) for p in shards]
    root = Path(path)
    if root.is_file():
        return [_plain_tar(root)]
    if not root.is_dir():
        raise FileNotFoundError(
            f"{path} does not exist: data.path is a folder, a .tar, a pattern such as "
            "x-{000000..000009}.tar, or shapes"
        )
    files = sorted(p for p in root.iterdir() if p.is_file() and not p.name.startswith("."))
    tars = [p for p in files if p.suffix == ".tar"]
    images = listing.images_below(os.fsencode(root))
    if tars:  # tars beside images are what an unpacked archive leaves: the images count
        return [] if next(images, None) else tars
    for packed in files:
        if packed.name.endswith((".tar.gz", ".tgz")) and next(images, None) is None:
            _plain_tar(packed)
    return []


def _plain_tar(path: Path) -> Path:
    if path.name.endswith((".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst")):
        raise ValueError(
            f"{path} is compressed, and its members cannot be read by position: unpack it first "
            f"(gunzip -k {path}) and name the .tar"
        )
    if path.suffix != ".tar":
        raise ValueError(f"{path} is neither a folder nor a .tar: name one of these")
    return path


def expand_braces(pattern: str) -> list[str]:
    """ "a-{08..11}.tar" -> a-08.tar .. a-11.tar; also {x,y}; several braces multiply."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [_choices(part, pattern) if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(body: str, pattern: str) -> list[str]:
    span = re.fullmatch(r"(\d+)\.\.(\d+)", body)
    if span is None:
        return body.split(",")
    first, last = span.groups()
    if int(last) < int(first):
        raise ValueError(f"{{{body}}} in {pattern} counts down: write the smaller number first")
    return [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
