"""Parquet files with an image a row, as Hugging Face's datasets lie on disk: read to be packed.

    image: struct<bytes, path>     label: int64, its names in the schema's metadata "huggingface"
    DIR/data/train-00000-of-00002.parquet, DIR/data/test-00000-of-00001.parquet

A row cannot be read without the rows around it, so no training reads from here: pack.py goes
through the files once, in their order. pyarrow reads them; no extension type of theirs is made.
"""

import contextlib
import hashlib
import os
import re
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cjepa_fast.data import faults, index, labels, listing
from cjepa_fast.data.locations import parquet_files
from cjepa_fast.data.sources import LIMITS, Limits
from cjepa_fast.runtime import json_text
from cjepa_fast.runtime.printable import printable

SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing")
PART = re.compile(r"(.+?)-(\d{5})-of-(\d{5})(-[0-9a-f]+)?$")
LABELS = ("label", "labels", "target", *labels.JSON_KEYS)  # of a column, where nothing says more
IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes")
ROWS = 32  # read at once
OPEN_FILES = 2  # where one ends, threads read from two
BATCHES = 4  # of so many rows that are kept: threads ask in nearly their order


class NoPyarrow(ValueError):
    """Parquet files are there, and nothing to read them with."""


def _pyarrow():
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise NoPyarrow(
            f"Parquet files are read by pyarrow, which is not installed ({error}): "
            "pip install '.[parquet]'"
        ) from error
    return pyarrow


def is_all_of(path: Path) -> bool:
    """Whether a path names Parquet files, and no images beside them: then it must be packed."""
    if not parquet_files(path):
        return False
    return path.is_file() or all(map(listing.is_lost, listing.images_below(os.fsencode(path))))


def by_split(files: list[Path], log: Callable[[str], None]) -> dict[str, list[Path]]:
    """Files by the split that their name or folder says, "" where it says none. Parts that are
    missing of a numbered split are said."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(file), []).append(file)
    for split, own in splits.items():
        numbers = [(int(m[2]), int(m[3])) for p in own if (m := PART.match(p.stem))]
        missing = sorted(set(range(max((n for _, n in numbers), default=0))) - set(dict(numbers)))
        if missing:
            log(
                f"WARNING: {len(missing)} of {numbers[0][1]} parts of {printable(split)} are "
                f"missing, the first is number {missing[0]}: what they hold is left out"
            )
    return splits


def _split_of(file: Path) -> str:
    if numbered := PART.match(file.stem):
        return numbered[1]
    return next((name for name in (file.stem, file.parent.name) if name in SPLITS), "")


class Columns(NamedTuple):
    """image: a struct's name, or that of a column of bytes; label: "" for none; classes: the names
    of the labels' numbers, or None."""

    image: str
    in_struct: bool
    label: str
    classes: labels.Classes


def columns_of(file: Path, schema, image: str | None, label: str | None) -> Columns:
    """Which columns hold images and labels. image, label: what the user says; label "": none.

    Raises ValueError where that is not plain, naming the columns that there are.
    """
    features = _features(file, schema)
    structs = [f.name for f in schema if _is_image_struct(f.type)]
    plain = [f.name for f in schema if _holds_bytes(f.type)]
    named = [name for name in features if features[name].get("_type") == "Image"]
    candidates = [n for n in named if n in (*structs, *plain)] or structs or plain
    image = _chosen(file, "image", image, (*structs, *plain), candidates, IMAGES)
    if image is None:
        raise ValueError(f"{file} has no column of images (its columns: {_named(schema.names)})")
    if label != "":
        known = [n for n in features if features[n].get("_type") == "ClassLabel"]
        likely = known or [n for n in schema.names if n in LABELS]
        label = _chosen(file, "label", label, schema.names, likely, LABELS) or ""
    names = features.get(label, {}).get("names") if label else None
    return Columns(image, image in structs, label, _checked_names(file, names))


def _features(file: Path, schema) -> dict[str, dict]:
    """Hugging Face's, of each column, from the schema's metadata; {} without."""
    said = (schema.metadata or {}).get(b"huggingface")
    try:
        info = json_text.parse(said) if said else {}
    except ValueError as error:
        raise ValueError(f"{file}: its metadata 'huggingface' is damaged: {error}") from error
    for key in ("info", "features"):
        info = info.get(key) if isinstance(info, dict) else None
    found = info if isinstance(info, dict) else {}
    return {k: v for k, v in found.items() if isinstance(v, dict) and k in schema.names}


def _chosen(file, what: str, said, allowed, candidates: list[str], usual) -> str | None:
    if said and said not in allowed:
        raise ValueError(f"{file} has no column {said!r} for --{what}-column: {_named(allowed)}")
    if said or len(candidates) < 2:
        return said or next(iter(candidates), None)
    if found := next((name for name in usual if name in candidates), None):
        return found
    raise ValueError(f"{file} has several: choose one by --{what}-column: {_named(candidates)}")


def _named(names) -> str:
    return ", ".join(printable(name) for name in names) or "none"


def _checked_names(file: Path, names: object) -> labels.Classes:
    if names is None:
        return None
    if not isinstance(names, list) or len(set(map(str, names))) < len(names):
        raise ValueError(f"{file}: the names of its classes in the metadata are damaged")
    return [str(name) for name in names]


def _holds_bytes(kind) -> bool:
    return str(kind) in ("binary", "large_binary")


def _is_image_struct(kind) -> bool:
    if not _pyarrow().types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return False
    return _holds_bytes(kind.field("bytes").type)


class ParquetImages:
    """The rows of some files: pack.PackableImages.

    label_N: int64, index.UNLABELLED where there is none; class_names: of its numbers, or None. No
    row is left out here: one without bytes fails when it is read. Raises ValueError, naming the
    file.
    """

    skipped: tuple[tuple[str, str], ...] = ()
    has_arrays = False

    def __init__(
        self,
        files: list[Path],
        image: str | None = None,
        label: str | None = None,
        limits: Limits = LIMITS,
    ):
        self.limits, self._files = limits, [_File(f, image, label) for f in files]
        self._open: deque[_File] = deque()  # the one that was read last is the last
        self._lock = threading.Lock()
        first = self._files[0]
        for other in self._files[1:]:
            if other.columns != first.columns:
                raise ValueError(
                    f"{other.path} and {first.path} differ in their columns or classes: pack them "
                    "apart"
                )
        self._starts = [0, *accumulate(len(f) for f in self._files)]
        self.label_N, self.class_names = self._labels(first.columns.classes)
        said = [(f.path.name, f.path.stat().st_size, len(f)) for f in self._files]
        said += [first.columns]
        self.fingerprint = hashlib.sha256(repr(said).encode()).hexdigest()[:32]

    def _labels(self, classes: labels.Classes) -> tuple[np.ndarray, labels.Classes]:
        given = [label for file in self._files for label in file.labels]
        words = sorted({label for label in given if isinstance(label, str)})
        if words and (classes or not all(isinstance(g, (str, type(None))) for g in given)):
            raise ValueError(f"{self._files[0].path}: its labels are numbers and words mixed")
        number = {word: i for i, word in enumerate(words)}
        most = len(classes) if classes else labels.MOST + 1
        found = [number.get(g, g) if g is not None else index.UNLABELLED for g in given]
        label_N = np.array(found, np.int64)
        if len(label_N) and label_N.max() >= most:
            largest = label_N.max()
            raise ValueError(f"{self._files[0].path}: a label is {largest}, of {most} classes")
        return label_N.clip(index.UNLABELLED), words or classes

    @property
    def summary(self) -> str:
        """How much there is, in words."""
        without = int((self.label_N == index.UNLABELLED).sum())
        if without == len(self):
            of_labels = "no labels"
        else:
            known = f" of {len(self.class_names)} classes with names" if self.class_names else ""
            of_labels = f"labels{known}" + (f", {without:,} rows without" if without else "")
        return f"{len(self):,} rows of {len(self._files)} files, {of_labels}"

    def __len__(self) -> int:
        return self._starts[-1]

    def _at(self, i: int) -> tuple["_File", int]:
        number = bisect_right(self._starts, i) - 1
        return self._files[number], i - self._starts[number]

    def name(self, i: int) -> str:
        file, row = self._at(i)
        return f"{file.path.name}/{row}{file.said[row]}"

    def read_original(self, i: int) -> bytes:
        """Raises OSError if there are no bytes, or the file is damaged there; MachineFailed for
        what is not the file's fault. Thread-safe, fast where it goes onwards."""
        file, row = self._at(i)
        with self._lock:
            if file in self._open:
                self._open.remove(file)
            elif len(self._open) == OPEN_FILES:
                self._open.popleft().close()
            self._open.append(file)
            first, batch = file.holding(row)
        return file.bytes_of(row, batch, row - first)


class _File:
    """A file, open from its first read on until it is closed. labels: of each row an int, a str or
    None; said: of each row what it says of its name, after a colon, or ""."""

    def __init__(self, path: Path, image: str | None, label: str | None):
        self._arrow = _pyarrow()
        self.path = path
        self.close()
        try:
            faults.patiently(lambda: self._learn(image, label), path)
        except faults.MachineFailed:
            raise
        except (self._arrow.ArrowException, OSError, KeyError) as error:
            raise ValueError(f"{path} is no Parquet file, or a damaged one: {error}") from error

    def _learn(self, image: str | None, label: str | None) -> None:
        self._stamp = index.stamp(self.path.stat())
        with self._opened() as parquet:
            self.columns = columns_of(self.path, parquet.schema_arrow, image, label)
            self._rows = parquet.metadata.num_rows
            groups = map(parquet.metadata.row_group, range(parquet.num_row_groups))
            self._groups = [0, *accumulate(g.num_rows for g in groups)]  # where each begins
            self.said, self.labels = self._names_and_labels(parquet)

    def _opened(self):
        return self._arrow.parquet.ParquetFile(self.path, page_checksum_verification=True)

    def close(self) -> None:
        if getattr(self, "_parquet", None) is not None:
            self._parquet.close()
        self._parquet = self._following = None
        self._group, self._next = 0, 0
        self._kept: deque[tuple[int, object]] = deque(maxlen=BATCHES)  # of (first row, rows)

    def __len__(self) -> int:
        return self._rows

    def _names_and_labels(self, parquet) -> tuple[list[str], list]:
        columns, label = self.columns, self.columns.label
        schema = parquet.schema_arrow
        struct = schema.field(columns.image).type
        paths = columns.in_struct and struct.get_field_index("path") >= 0
        wanted = [f"{columns.image}.path"] * paths + [label] * bool(label)
        if not wanted:
            return [""] * len(self), [None] * len(self)
        table = parquet.read(columns=wanted)
        rows = table.column(columns.image).to_pylist() if paths else [None] * len(self)
        names = [(row or {}).get("path") for row in rows]
        said = [f": {name}" if name else "" for name in names]
        given = table.column(label).to_pylist() if label else [None] * len(self)
        for value in given:
            if isinstance(value, bool) or not isinstance(value, (int, str, type(None))):
                raise ValueError(
                    f"{self.path}: its column {label} holds {printable(value)[:99]}, which is no "
                    "class: name another by --label-column, or none by --label-column ''"
                )
        return said, given

    def bytes_of(self, row: int, batch, at: int) -> bytes:
        """The image bytes of a row, which is row `at` of `batch`. Raises OSError where it has
        none."""
        value = batch.column(0)[at].as_py()
        data = (value or {}).get("bytes") if self.columns.in_struct else value
        if data is None:
            told = f", only a path{self.said[row]}" if self.said[row] else ""
            raise OSError(f"the row has no bytes{told}")
        return data

    def holding(self, row: int) -> tuple[int, object]:
        """(first row, the rows) of the batch with a row. Raises OSError where it is damaged, and
        MachineFailed."""
        for first, batch in self._kept:
            if first <= row < first + len(batch):
                return first, batch
        return faults.patiently(lambda: self._read_up_to(row), self.path)

    def _is_the_same(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return index.stamp(self.path.stat()) == self._stamp
        return False

    def _read_up_to(self, row: int) -> tuple[int, object]:
        if self._parquet is None and not self._is_the_same():
            raise faults.MachineFailed(
                f"{self.path} has changed or gone since its labels were read: pack again"
            )
        try:
            self._parquet = self._parquet or self._opened()
            group = bisect_right(self._groups, row) - 1
            if self._following is None or group != self._group or row < self._next:
                name = self.columns.image + ".bytes" * self.columns.in_struct
                batches = self._parquet.iter_batches(ROWS, row_groups=[group], columns=[name])
                self._following = batches
                self._group, self._next = group, self._groups[group]
            while self._next <= row:
                batch = next(self._following)
                self._kept.append((self._next, batch))
                self._next += len(batch)
        except (self._arrow.ArrowException, OSError, StopIteration) as error:
            self._following = None  # of this row group; the next one may be whole
            if isinstance(error, OSError) and faults.of_the_machine(error):
                self.close()  # so that the next try opens it anew
                raise
            raise OSError(f"the file is damaged there: {error}") from error
        return self._kept[-1]
