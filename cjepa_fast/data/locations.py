"""What a path names: a folder of images, shards, a list of images, or the synthetic dataset."""

import itertools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from cjepa_fast.data import kinds, listing, lists
from cjepa_fast.data.listing import PACKED, first_of
from cjepa_fast.runtime.printable import printable
from cjepa_fast.runtime.reads_in_progress import progressing

TRAINING = "train"
OTHER_SPLITS = ("val", "valid", "validation", "test")
PARQUET = ".parquet"


class Location(NamedTuple):
    """root: a folder, a list or what names the shards; shards: [] where it is not these."""

    root: Path
    shards: list[Path]

    @property
    def is_list(self) -> bool:
        return not self.shards and self.root.suffix.lower() in lists.ENDINGS


def find(path: str, log: Callable[[str], None] = print) -> Location:
    """Raises FileNotFoundError or ValueError, naming the path and the way out."""
    if not path.strip():
        raise ValueError(
            "the path of the images is empty: name a folder, shards or a list (an unset variable?)"
        )
    path = _synthetic(path)
    if "{" in path and not os.path.exists(path):
        return Location(Path(path), _braced(path))
    root = Path(path)
    if root.is_file():
        return Location(root, [] if root.suffix.lower() in lists.ENDINGS else [_plain_tar(root)])
    if not root.is_dir():
        raise FileNotFoundError(
            f"{path} does not exist: data.path is a folder, a .tar, a pattern such as "
            "x-{000000..000009}.tar, a list (.txt, .csv), or shapes"
        )
    if other := split_beside(root):
        log(f"{root} holds splits: {TRAINING}/ is taken, {other.name}/ is left for evaluation")
        root = root / TRAINING
    elif warning := _taken_together(root):
        log(warning)
    return Location(root, _shards_in(root, log))


def split_beside(root: Path) -> Path | None:
    """The folder that is to train/ what val/ is: with classes that train/ has too, or with shards
    as train/ has. None without."""
    classes, shards = _folders(root / TRAINING), _holds_shards(root / TRAINING)
    for name in OTHER_SPLITS:
        held_out = _folders(root / name)
        if (held_out and held_out <= classes) or (shards and _holds_shards(root / name)):
            return root / name
    return None


def _taken_together(root: Path) -> str:
    """A warning where a folder holds splits, by their names in any case, that `split_beside` does
    not take for such; "" where it holds none."""
    names = [os.fsdecode(entry.name) for entry in _entries(root) if _is_split(entry)]
    training = [name for name in names if name.lower() == TRAINING]
    others = [name for name in names if name not in training and _entries(root / name)]
    if not training or not others:
        return ""
    train, other = training[0], others[0]
    strange = sorted(_folders(root / other) - _folders(root / train))
    if any(name != name.lower() for name in (train, other)):
        why = "their names are not in lower case"
    elif strange:
        why = f"{other}/ has {printable(strange[0])}/, and {train}/ has not"
    else:
        why = f"{other}/ has no folders of classes, nor shards as {train}/ has"
    both = " and ".join(f"{name}/" for name in (train, *others))
    return (
        f"WARNING: {root} holds {both}, and the images of all are taken, so that a training sees "
        f"those that are held out ({why}): to train on {train}/ alone, name it: data.path = "
        f"{root / train}"
    )


def _is_split(entry: os.DirEntry) -> bool:
    name = os.fsdecode(entry.name).lower()
    return name in (TRAINING, *OTHER_SPLITS) and listing.is_folder(entry)


def _holds_shards(folder: Path) -> bool:
    return any(entry.name.endswith(b".tar") for entry in _entries(folder))


def _folders(root: Path) -> set[str]:
    return {os.fsdecode(entry.name) for entry in _entries(root) if listing.is_folder(entry)}


def _entries(folder: Path) -> list[os.DirEntry]:
    """[] of what is no folder. By scandir, which asks a network disk for no entry alone."""
    return listing.entries_of(os.fsencode(folder)) if folder.is_dir() else []


def _synthetic(path: str) -> str:
    if path != "shapes" and not path.startswith("shapes:"):
        return path
    from cjepa_fast.data.sets import shapes

    split = path.partition(":")[2] or "train"
    if split not in ("train", "val"):
        raise ValueError(f"unknown split in {path!r}: use shapes, shapes:train or shapes:val")
    return str(shapes.ensure(split))


def _braced(path: str) -> list[Path]:
    shards = [Path(p) for p in expand_braces(path)]
    missing = [p for p in progressing(shards) if not p.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(shards)} shards of {path} are missing, the first is "
            f"{missing[0]}: correct the numbers in the braces"
        )
    return [_plain_tar(p) for p in shards]


def _shards_in(root: Path, log: Callable[[str], None]) -> list[Path]:
    """The tars of a folder. Beside images, those that are larger together are the set, and the
    others are said to be left out: an unpacked archive, or a preview beside shards."""
    names = [os.fsdecode(e.name) for e in _entries(root) if listing.is_tar(e.name)]
    files = sorted(root / name for name in progressing(names) if (root / name).is_file())
    tars = [p for p in files if p.suffix == listing.TAR]
    packed = [os.fsencode(p.name) for p in files if p.name.endswith(PACKED)]
    if not tars and not packed:
        return []
    others: list[bytes] = []
    images = _images_below(root, others)
    first = next(images, None)
    if first is None and not tars:
        return [_plain_tar(root / os.fsdecode(packed[0]))]
    if not tars:
        log(f"{root} holds images, and {first_of(packed)}, which is not read")
        return []
    here = [os.fsencode(p.name) for p in tars]
    every = [first, *images] if first else []
    in_folders = any(b"/" in name for name, *_ in every)
    if in_folders or sum(size for _, size, *_ in every) > sum(p.stat().st_size for p in tars):
        unread = first_of(here + packed)
        log(f"{root} holds images, and {unread}, which is not read: name it to read it")
        return []
    if every:
        names = [name for name, *_ in every]
        log(f"{root} holds shards, and {first_of(names)} beside them, which is not read")
    if others := sorted(set(others) - set(here)):
        log(
            f"WARNING: {root} holds {len(tars):,} shards, and {first_of(others)}, which is not "
            "read: unpack what is packed, mend what is a broken link, name what lies in a "
            "sub-folder"
        )
    return tars


def _images_below(root: Path, others: list[bytes]) -> Iterator[listing.Found]:
    """The pictures below a folder. others: takes the tars, and the links to tars that lead
    nowhere."""
    for one in listing.images_below(os.fsencode(root), others):
        if listing.is_lost(one):
            others += [one[0]] if listing.is_tar(one[0]) else []
        elif kinds.extension(one[0]) not in kinds.ARRAYS:
            yield one


def tars_below(root: Path) -> list[bytes]:
    """The tars in the folders below one, [] for what is no folder."""
    if not root.is_dir():
        return []
    tars: list[bytes] = []
    for _ in listing.images_below(os.fsencode(root), tars):
        pass
    return sorted(tars)


def _plain_tar(path: Path) -> Path:
    if path.name.endswith(PACKED):
        raise ValueError(
            f"{path} is compressed, and its members cannot be read by position: unpack it first "
            f"(gunzip -k {path}) and name the .tar"
        )
    if path.suffix == PARQUET:
        raise ValueError(to_be_packed(path))
    if path.suffix != ".tar":
        raise ValueError(
            f"{path} is neither a folder nor a .tar, nor a list (.txt, .csv): name one of these"
        )
    return path


def parquet_files(path: Path) -> list[Path]:
    """The Parquet file, or those below a folder, in order; [] where there are none."""
    if path.is_file():
        return [path] if path.suffix == PARQUET else []
    found = (p for p in path.rglob(f"*{PARQUET}") if p.is_file())
    return sorted(p for p in found if not any(n.startswith(".") for n in p.relative_to(path).parts))


def to_be_packed(path: object) -> str:
    return (
        f"{printable(path)} holds Parquet files, whose rows cannot be read by position: pack them "
        f"once, python -m cjepa_fast.data.pack {printable(path)} SHARDS, and name SHARDS"
    )


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
