"""Labels: of sub-folders, lists and shards, as numbers; and why an image has none.

An entry's label is a class's number, index.UNLABELLED, or -2 - k for the k-th word of its table,
until the classes of the whole set are known. In a shard it is KEY.cls, or "label" in KEY.json.
"""

import itertools
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cjepa_fast.data import index
from cjepa_fast.runtime import json_text
from cjepa_fast.runtime.files import read_text
from cjepa_fast.runtime.printable import printable

JSON_KEYS = ("label", "cls", "class", "class_name", "category")
MOST_BYTES = 1 << 20  # of a member with a label
MOST_LETTERS = 200  # of a class's name
MOST = 2**31 - 1
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)", re.ASCII)
LOOSE = "no label: it lies beside the class folders"
NONE_GIVEN = "no label"

Given = int | str | None  # a class's number or name; None: no label
Classes = list[str] | None


class Odd(str):
    """Why what is given as a label is none."""


def parsed(text: str) -> Given | Odd:
    """What a label's text means: a number (also "1.0"), or a word."""
    text = text.strip()
    if not text or len(text) > MOST_LETTERS:
        return Odd(f"its label has {len(text)} letters")
    if not NUMBER.fullmatch(text):
        return text if text.isprintable() else Odd(f"its label is {printable(text)}")
    number = float(text)
    if number != int(number) or not 0 <= number <= MOST:
        return Odd(f"its label is {printable(text)}, no class's number")
    return int(number)


def of_json(value: object) -> Given | Odd:
    """The label that a JSON member's object has under one of JSON_KEYS; None without these."""
    fields = value if isinstance(value, dict) else {}
    given = next((fields[key] for key in JSON_KEYS if key in fields), None)
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, (int, float, str)):
        return Odd(f"its label is {printable(given)[:MOST_LETTERS]}, neither number nor word")
    return parsed(str(given))


def in_shard(fd: int, members: dict[str, tuple[int, int]], name: str) -> Given | Odd:
    """The label of an image in a shard: from the member with its name, else with its sample's
    key."""
    folder, slash, base = name.rpartition("/")
    keys = dict.fromkeys([base.rpartition(".")[0], base.partition(".")[0]])
    for ext, read in ((".cls", _text), (".json", _json)):
        for key in keys:
            offset, size = members.get(f"{folder}{slash}{key}{ext}", (0, 0))
            if size > MOST_BYTES:
                return Odd(f"its {ext} has {size} bytes")
            if size and (found := read(index.pread_exactly(fd, size, offset))) is not None:
                return found
    return None


def _text(data: bytes) -> Given | Odd:
    try:
        return parsed(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Odd("its label is no text")


def _json(data: bytes) -> Given | Odd:
    try:
        return of_json(json_text.parse(data))
    except ValueError:
        return Odd("its .json is damaged")


def enter(entries_N: np.ndarray, given: list[Given | Odd]) -> tuple[tuple[str, ...], dict]:
    """Put labels into a table's entries. Returns its words, and {i: why} of the odd ones."""
    words = sorted({label for label in given if isinstance(label, str) and not _is_odd(label)})
    number = {word: -2 - k for k, word in enumerate(words)}
    odd = {i: str(label) for i, label in enumerate(given) if _is_odd(label)}
    for i, label in enumerate(given):
        if label is None or i in odd:
            entries_N["label"][i] = index.UNLABELLED
        else:
            entries_N["label"][i] = number.get(label, label)
    return tuple(words), odd


def _is_odd(label: object) -> bool:
    return isinstance(label, Odd)


def of_folders(table: index.Table, without: Iterable[int] = ()) -> Classes:
    """Label by first-level sub-folder; what lies beside these has no label. without: rows that make
    no class of their folder."""
    tops = [top if slash else None for top, slash, _ in (n.partition(b"/") for n in table.names())]
    for row in without:
        tops[row] = None
    classes = sorted(set(tops) - {None})
    number = {top: i for i, top in enumerate(classes)}
    table.entries_N["label"] = [number.get(top, index.UNLABELLED) for top in tops]
    if classes:
        table.odd.update({i: LOOSE for i, top in enumerate(tops) if top is None})
    return [os.fsdecode(top) for top in classes] or None


def of_list(tables: list[index.Table], texts: list[str], beside: Path) -> Classes:
    """Label as a list says, which has a text for each row of the tables: by numbers, or by words
    that are classes. beside: the list, which a classes.txt may lie beside."""
    given, words = iter(texts), []
    for table in tables:
        own = [parsed(text) if text else None for text in itertools.islice(given, len(table))]
        found, odd = enter(table.entries_N, own)
        table.odd.clear()
        table.odd.update(odd)
        words.append(found)
    return _resolve(tables, words, listed_beside(beside))


def listed_beside(path: Path) -> list[str]:
    """The classes of classes.txt in the same folder, a name a line; [] without it. Raises
    ValueError for one that is not UTF-8."""
    file = path.parent / "classes.txt"
    names = read_text(file).split("\n") if file.is_file() and file != path else []
    return [name.strip() for name in names if name.strip()]


def listed_beside_all(paths: list[Path]) -> list[str]:
    """The class names beside several files. Raises ValueError where they differ."""
    named = {path.parent: path for path in paths}
    first, *others = [(folder, listed_beside(path)) for folder, path in named.items()]
    for folder, classes in others:
        if classes != first[1]:
            raise ValueError(
                f"{first[0]} and {folder} differ in classes.txt, so a number may mean one "
                "class here and another there: give the folders as a list, not as one pattern, or "
                "put the same classes.txt into each"
            )
    return first[1]


def of_shards(tables: list[index.Table], named: list[str]) -> Classes:
    """Make the words of all shards numbers. named: the names of the numbers, [] if unknown."""
    return _resolve(tables, [table.words for table in tables], named)


def _resolve(tables: list[index.Table], words: list[tuple[str, ...]], named: list[str]) -> Classes:
    """Where numbers and words are mixed, the more frequent kind counts, and the other is odd."""
    label_N = np.concatenate([table.entries_N["label"] for table in tables])
    by_words = (label_N < index.UNLABELLED).sum() > (label_N > index.UNLABELLED).sum()
    classes = named or (sorted({w for own in words for w in own}) if by_words else [])
    for table, own in zip(tables, words, strict=True):
        _number(table, own, classes, by_words and not named)
    return classes or None


def _number(table: index.Table, words: tuple[str, ...], classes: list[str], by_words: bool) -> None:
    numbers = {name: number for number, name in enumerate(classes)}
    most = len(classes) if classes else MOST + 1
    for i, label in enumerate(table.entries_N["label"].tolist()):
        if label < index.UNLABELLED:
            word = words[-2 - label]
            table.entries_N["label"][i] = numbers.get(word, index.UNLABELLED)
            if word not in numbers:
                among = "no name in classes.txt" if classes else "a word, others are numbers"
                table.odd[i] = f"its label {printable(word)} is {among}"
        elif label >= 0 and (by_words or label >= most):
            table.entries_N["label"][i] = index.UNLABELLED
            among = "a number, others are words" if by_words else f"not below {most} classes"
            table.odd[i] = f"its label {label} is {among}"
