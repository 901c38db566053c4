"""Lists of images: a .txt with a path a line, or a path and a label, or a .csv of path and label.

    n01440764/a.JPEG                    path,label
    val/ILSVRC2012_val_00000001.JPEG 65     scans/1.png,cat

Paths are relative to the list's folder, or absolute. What is named twice is refused. In a .txt a
line that begins with # is a comment, unless a file of that name is there. A .csv of more columns
has a heading, which names the label's (LABELS), and the file's unless it is the first (FILES).
"""

import csv
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from cjepa_fast.data import kinds
from cjepa_fast.data.labels import JSON_KEYS
from cjepa_fast.runtime.printable import printable
from cjepa_fast.runtime.reads_in_progress import progressing

ENDINGS = (".txt", ".csv")
# In the heading of a .csv; of several words the first counts.
FILES = (
    "path", "file", "filename", "file_name", "filepath", "image_path", "image", "name", "image_id",
)  # fmt: skip
LABELS = (*JSON_KEYS, "labels", "target", "class_id")


class Listed(NamedTuple):
    """labels: a text each, "" where there is none."""

    names: list[bytes]
    labels: list[str]


def read(path: Path) -> Listed:
    """Raises ValueError, naming the line, for what is no list."""
    text = _text(path)
    if path.suffix.lower() == ".csv":
        rows = _of_csv(path, text, lambda name: os.path.isfile(os.fsencode(path.parent / name)))
    else:
        rows = list(_of_lines(path, text))
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


def labels_for(path: Path, names: list[bytes], log: Callable[[str], None]) -> list[str]:
    """The label of each of `names`, "" where there is none, by a file beside or elsewhere.

    Its lines are `name label` or `name,label`, the name with or without its ending, below the
    images' folder; or a label each, in the order of the names. Raises ValueError for what is
    neither, and for what `read` refuses.
    """
    text = _text(path)
    known = [(name, os.path.splitext(name)[0]) for name in map(os.fsdecode, names)]
    known_names = set(itertools.chain(*known))
    if path.suffix.lower() == ".csv":
        rows = _of_csv(path, text, known_names.__contains__)
        lines = [cell for _, cell, _ in rows]
    else:
        rows = [(number, *_pair(line)) for number, line in _lines(text)]
        lines = [line for _, line in _lines(text)]
    given = _by_name(path, rows, known_names)
    if given:
        if odd := [name for _, name, label in rows if label and name not in given]:
            log(f"{path}: {len(odd)} lines name no image of the set, such as {printable(odd[0])}")
        return [given.get(name, given.get(stem, "")) for name, stem in known]
    if len(lines) != len(names) or _name_files(path, rows):
        firsts = [name for _, name, _ in rows[:1]] + [name for name, _ in known[:1]]
        raise ValueError(
            f"{path} names none of the {len(names)} images, and has {len(lines)} lines (its first "
            f"name and the first image's: {'; '.join(map(printable, firsts))}): give a line `name "
            "label` for each, or a label alone for each in the order of the names (one of several "
            "words in a .csv)"
        )
    return lines


def _by_name(path: Path, rows: list[tuple[int, str, str]], known: set[str]) -> dict[str, str]:
    """{name: label} of the rows that have both, and a name that is known. Raises ValueError for
    one with two labels."""
    found: dict[str, str] = {}
    for number, name, label in rows:
        if label and name in known and found.setdefault(name, label) != label:
            raise ValueError(f"{path}, line {number}: another label of {printable(name)}")
    return found


def _name_files(path: Path, rows: list[tuple[int, str, str]]) -> bool:
    """Whether the lines are of images, of another set than this one, and not a label each: the
    first begins with a file's name, a .csv has a second cell, or all lines of a .txt have several
    words and begin in different ways."""
    if not rows or kinds.extension(rows[0][1]):
        return bool(rows)
    if path.suffix.lower() == ".csv":
        return any(label for *_, label in rows)
    return all(label for *_, label in rows) and len({name for _, name, _ in rows}) == len(rows)


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8-sig", "surrogateescape")


def _of_csv(path: Path, text: str, is_image: Callable[[str], bool]) -> list[tuple[int, str, str]]:
    """(line, name, label) of each row. Raises ValueError for more than two columns without a
    heading that names the label's."""
    lines, rows = csv.reader(text.splitlines()), []
    try:
        for row in lines:
            if any(cells := [cell.strip() for cell in row]):
                rows.append((lines.line_num, cells))
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV: {error}") from error
    heading = rows[0][1] if rows and _is_heading(rows[0][1], is_image) else []
    rows = rows[1:] if heading else rows
    columns = _named_columns(heading)
    if columns is None and (wide := next((n for n, cells in rows if any(cells[2:])), None)):
        raise ValueError(
            f"{path}, line {wide}: more than two columns, and no heading that names the label's: "
            "begin the file with one, such as path,width,label; or keep a path and a label alone "
            "(in quotes what holds a comma)"
        )
    return [(n, *(_cell(cells, k) for k in columns or (0, 1))) for n, cells in rows]


def _is_heading(cells: list[str], is_image: Callable[[str], bool]) -> bool:
    """Whether a first row begins with one of FILES, or has one of LABELS and begins with nothing
    that is an image, or is named like one."""
    words = [cell.lower() for cell in cells]
    if words[0] in FILES:
        return True
    labelled = len(words) > 1 and any(word in LABELS for word in words)
    return labelled and not kinds.extension(cells[0]) and not is_image(cells[0])


def _named_columns(heading: list[str]) -> tuple[int, int] | None:
    """Those of the file and the label; None where no label is named."""
    words = [cell.lower() for cell in heading]
    label = next((words.index(word) for word in LABELS if word in words), None)
    if label is None:
        return None
    first = 1 if label == 0 else 0
    return next((words.index(word) for word in FILES if word in words), first), label


def _cell(cells: list[str], column: int) -> str:
    return cells[column] if column < len(cells) else ""


def _of_lines(path: Path, text: str) -> Iterator[tuple[int, str, str]]:
    """A file's name may have spaces: where the whole line is one, it has no label."""
    for number, line in progressing(_lines(text, path.parent)):
        if os.path.exists(os.fsencode(path.parent / line)):
            yield number, line, ""
        else:
            yield number, *_pair(line)


def _lines(text: str, folder: Path | None = None) -> Iterator[tuple[int, str]]:
    """Those that are neither empty nor a comment, numbered from 1. folder: of the files; what names
    one that is there is no comment."""
    for number, line in enumerate(map(str.strip, text.split("\n")), 1):
        if line and (not line.startswith("#") or (folder and _names_a_file(line, folder))):
            yield number, line


def _names_a_file(line: str, folder: Path) -> bool:
    names = (line, _pair(line)[0])
    return any(os.path.exists(os.fsencode(folder / name)) for name in names)


def _pair(line: str) -> tuple[str, str]:
    """(name, label); a line of one word, or that ends as an image's name, has no label."""
    name, *label = [line] if kinds.extension(line) else line.rsplit(None, 1)
    return name, label[0] if label else ""
