"""Lists of images: a .txt with a path a line, or a path and a label, or a .csv of path and label.

    n01440764/a.JPEG                    path,label
    val/ILSVRC2012_val_00000001.JPEG 65     scans/1.png,cat

Paths are relative to the list's folder, or absolute. What is named twice is refused.
"""

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cjepa_fast.runtime.printable import printable

ENDINGS = (".txt", ".csv")
HEADING = ("path", "file", "filename", "image", "name")  # of a .csv's first column


class Listed(NamedTuple):
    """labels: a text each, "" where there is none."""

    names: list[bytes]
    labels: list[str]


def read(path: Path) -> Listed:
    """Raises ValueError, naming the line, for what is no list."""
    text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    try:
        rows = list(_of_csv(text) if path.suffix.lower() == ".csv" else _of_lines(path, text))
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV: {error}") from error
    first: dict[str, int] = {}
    for number, name, _ in rows:
        if "\0" in name:
            raise ValueError(f"{path}, line {number}: {printable(name)} is no path")
        if name in first:
            lines = f"lines {first[name]} and {number}"
            raise ValueError(f"{path} names {printable(name)} twice, in {lines}: remove one")
        first[name] = number
    if not rows:
        raise ValueError(f"{path} names no image: a line holds a path, or a path and a label")
    return Listed([os.fsencode(name) for _, name, _ in rows], [label for *_, label in rows])


def _of_csv(text: str) -> Iterator[tuple[int, str, str]]:
    lines = csv.reader(text.splitlines())
    for row in lines:
        cells = [cell.strip() for cell in row]
        if not any(cells) or (lines.line_num == 1 and cells[0].lower() in HEADING):
            continue
        yield lines.line_num, cells[0], cells[1] if len(cells) > 1 else ""


def _of_lines(path: Path, text: str) -> Iterator[tuple[int, str, str]]:
    """A file's name may have spaces: where the whole line is one, it has no label."""
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, _, label = line.rpartition(" ")
        if not name or os.path.exists(os.fsencode(path.parent / line)):
            name, label = line, ""
        yield number, name.strip(), label
