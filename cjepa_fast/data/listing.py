"""Listing what a folder tree or a shard holds, and indexing it with the help of the cache."""

import contextlib
import os
import stat
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cjepa_fast.data import faults, formats, index, kinds, labels, lists
from cjepa_fast.runtime.printable import printable
from cjepa_fast.runtime.reads_in_progress import progressed, progressing, watched
from cjepa_fast.telemetry.progress import shown_bar

Found = tuple[bytes, int, int, str]  # path, size, mtime_ns, why it cannot be used or ""
CAMERA_RAW = "a camera's raw file, which neither DALI nor Pillow reads"
TAR = ".tar"
PACKED = (".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst")
LISTED = 64  # shards that are listed before their images are checked
REST_BYTES = 1 << 20  # of what follows a shard's members, read at once
DOUBLED = "another member has this name"
LOST = "a link or a folder that cannot be followed"  # so begins the reason of such

# ------------------------------------------------------------------------------------- folders


def images_below(
    folder: bytes, tars: list[bytes] | None = None, under: bytes = b"", parents: tuple = ()
) -> Iterator[Found]:
    """Each file below `folder` that looks like an image by its name, and each link that leads
    nowhere (LOST), whatever its name: images may have been there. tars: takes the paths of the
    tars, plain or packed.

    Links are followed, save to a folder one is in; names that start with a dot are not looked at.
    Raises OSError for an error of the machine.
    """
    status = faults.patiently(lambda: os.stat(folder), folder)
    if (status.st_dev, status.st_ino) in parents:
        return
    parents = (*parents, (status.st_dev, status.st_ino))
    progressed()
    for entry in faults.patiently(lambda: entries_of(folder), folder):
        path = under + entry.name
        named_image = kinds.extension(entry.name)
        if is_folder(entry):
            below = list(_below(entry, tars, path, parents))
            if named_image and not below:
                yield path, 0, 0, "a folder, not a file"
            yield from below
        elif named_image:
            yield status_of(path, entry.stat)
        elif why := _lost(entry):
            yield path, 0, 0, why
        elif tars is not None and is_tar(entry.name):
            tars.append(path)


def entries_of(folder: bytes) -> list[os.DirEntry]:
    """A folder's entries by name, without those that begin with a dot."""
    with os.scandir(folder) as entries:
        return sorted((e for e in progressing(entries) if e.name[:1] != b"."), key=lambda e: e.name)


def is_tar(name: bytes) -> bool:
    """Plain or packed, by its name."""
    return os.fsdecode(name).endswith((TAR, *PACKED))


def first_of(names: list[bytes]) -> str:
    """In words: the first of them, and how many more there are."""
    more = f" and {len(names) - 1} more such" if len(names) > 1 else ""
    return f"{printable(names[0])}{more}"


def is_lost(found: Found) -> bool:
    return found[3].startswith(LOST)


def status_of(path: bytes, stat_it: Callable[[], os.stat_result]) -> Found:
    """Raises OSError for an error of the machine."""
    progressed()
    try:
        status = faults.patiently(stat_it, path)
    except faults.MachineFailed:
        raise
    except OSError as error:
        return path, 0, 0, f"{index.UNREAD} ({error.strerror})"
    if not stat.S_ISREG(status.st_mode):
        return path, 0, 0, "a pipe or a device, not a file"
    return path, *index.stamp(status), ""


def is_folder(entry: os.DirEntry) -> bool:
    """Raises OSError for an error of the machine."""
    try:
        return faults.patiently(entry.is_dir, entry.path)
    except faults.MachineFailed:
        raise
    except OSError:  # a link to itself, or one into a folder without rights: see _lost
        return False


def _lost(entry: os.DirEntry) -> str:
    """Why an entry whose name is no image's can be neither file nor folder; "" if it is one."""
    try:
        look = lambda: entry.stat() if entry.is_symlink() else entry.is_dir()  # noqa: E731
        faults.patiently(look, entry.path)
    except faults.MachineFailed:
        raise
    except OSError as error:
        return f"{LOST} ({error.strerror})"
    return ""


def _below(
    entry: os.DirEntry, tars: list[bytes] | None, path: bytes, parents: tuple
) -> Iterator[Found]:
    try:
        yield from images_below(entry.path, tars, path + b"/", parents)
    except PermissionError as error:
        yield path, 0, 0, f"{index.UNREAD}: a folder ({error.strerror})"


def index_folder(root: Path, cache, pool: ThreadPoolExecutor, log) -> tuple[index.Table, list]:
    """(table, classes) of a folder tree; entries whose size and time are as cached are kept."""
    with shown_bar(None, f"looking for images in {printable(root)} (Ctrl-C stops)", "file") as bar:
        tars: list[bytes] = []
        found = sorted(_counted(images_below(os.fsencode(root), tars), bar))
    if found and (deeper := [name for name in tars if b"/" in name]):
        log(
            f"{printable(root)} holds images, and in sub-folders {first_of(deeper)}, which is not "
            "read: name their folder to read them"
        )
    found = kinds.without_arrays(found, lambda one: one[0])
    table = _index_files(root, root, found, cache, pool, log)
    lost = [i for i, one in enumerate(found) if is_lost(one)]
    classes = labels.of_folders(table, without=lost)
    if classes:
        _warn_of_classes(found, root, log)
    return table, classes


def _warn_of_classes(found: list[Found], root: Path, log) -> None:
    """Where what may be a class cannot be looked at: the numbers of the others depend on it."""
    gone = [one for one in found if b"/" not in one[0] and one[3] and not kinds.extension(one[0])]
    if gone:
        name, *_, why = gone[0]
        more = f", nor can {len(gone) - 1} more beside it" * (len(gone) > 1)
        log(
            f"WARNING: {printable(name)} in {printable(root)} cannot be looked at ({why}){more}: "
            "if that is a folder of a class, its images are missing, and the numbers of the "
            "classes after it are lower by one; mend or remove it"
        )


def index_list(path: Path, cache, pool: ThreadPoolExecutor, log) -> tuple[index.Table, list]:
    """The table of the files that a list names, in its order (lists.py)."""
    listed = lists.read(path)
    found = [_of_list(path.parent, name) for name in listed.names]
    table = _index_files(path.parent, path, found, cache, pool, log)
    return table, labels.of_list([table], listed.labels, path)


def _of_list(folder: Path, name: bytes) -> Found:
    return status_of(name, lambda: os.stat(os.path.join(os.fsencode(folder), name)))


def _counted(found: Iterator[Found], bar) -> Iterator[Found]:
    for one in found:
        bar.update()
        yield one


def _index_files(root: Path, key: Path, found: list[Found], cache, pool, log) -> index.Table:
    """Files below `root`; key: what they are remembered by."""
    names = [name for name, *_ in found]
    entries_N = np.zeros(len(found), index.ENTRY)
    entries_N["length"] = [size for _, size, _, _ in found]
    entries_N["mtime_ns"] = [time for _, _, time, _ in found]
    entries_N["label"], entries_N["bits"], entries_N["there_pct"] = index.UNLABELLED, 8, 100
    reasons = {i: why for i, (*_, why) in enumerate(found) if why}
    entries_N["kind"][list(reasons)] = formats.UNUSABLE
    raw = {i: CAMERA_RAW for i, n in enumerate(names) if kinds.extension(n) in kinds.RAW}
    lost = [i for i, one in enumerate(found) if is_lost(one)]  # it is not known to be an image
    entries_N["kind"][[*raw, *lost]] = formats.FOREIGN
    reasons = raw | reasons

    stamp = next(((size, time_ns) for _, size, time_ns, _ in found if time_ns), (0, 0))
    file = index.cache_file(key, cache, stamp)
    fresh_N = np.ones(len(found), bool)
    fresh_N[list(reasons)] = False

    def remembered() -> index.Table | None:
        old = index.load_newest(file)
        if old is not None:
            reasons.update(_reuse(old, names, entries_N, fresh_N))
        return old

    old = remembered()
    folder = os.fsencode(root)
    open_fd = lambda i: index.open_regular(os.path.join(folder, names[i]))  # noqa: E731

    def keep(rest_N: np.ndarray, found: dict[int, str]) -> None:
        part_N = entries_N.copy()
        part_N["mtime_ns"][rest_N] = index.NEVER_NS
        table = index.Table.of(names, part_N, reasons | found)
        _keep(file, table, lambda line: None)  # where it fails, the last saving says so

    with index.lock(file) if fresh_N.any() else contextlib.nullcontext():
        if fresh_N.any():
            old = remembered()  # another process may have checked them while this one waited
        todo = np.flatnonzero(fresh_N)
        with shown_bar(len(todo), "checking images") as bar:
            checked = index.check_all(open_fd, entries_N, todo, pool, bar, names.__getitem__, keep)
        table = index.Table.of(names, entries_N, reasons | checked)
        if len(todo) or old is None or len(old) != len(table):
            _keep(file, table, log)
    return table


def _reuse(old: index.Table, names: list[bytes], entries_N, fresh_N) -> dict[int, str]:
    """Copy what is known of unchanged files; mark them as not fresh; {i: why unusable} of them."""
    row_of = {name: row for row, name in enumerate(old.names())}
    row_N = np.array([row_of.get(name, -1) for name in names], np.int64)
    same_N = fresh_N & (row_N >= 0)
    for field in ("length", "mtime_ns"):
        same_N[same_N] = old.entries_N[field][row_N[same_N]] == entries_N[field][same_N]
    rows = row_N[same_N]
    for field in formats.ImageHeader._fields:
        entries_N[field][same_N] = old.entries_N[field][rows]
    fresh_N[same_N] = False
    known = np.flatnonzero(same_N).tolist()
    return {i: old.reasons[r] for i, r in zip(known, rows.tolist(), strict=True)
            if r in old.reasons}  # fmt: skip


def _keep(file: Path, table: index.Table, log) -> None:
    try:
        index.save(file, table)
    except OSError as error:
        log(f"the index of the images is not kept, so the next start checks them again: {error}")


# -------------------------------------------------------------------------------------- shards


def split_key(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot of the file name; (key, extension)."""
    folder, slash, base = name.rpartition("/")
    key, _, ext = base.partition(".")
    return folder + slash + key, ext


def images_of(members: Iterable[str]) -> dict[str, str]:
    """{name: why it is not used, or ""} of a shard's members that look like images.

    KEY.jpg is the image of sample KEY; KEY.npy is, where the shard has no pictures. KEY.more.jpg
    belongs to it where there is a KEY.jpg (a label map, a second view), and is not used; where
    there is none it is an image by itself.
    """
    looking = [n for n in members if not n.rpartition("/")[2].startswith(".")]
    looking = [n for n in looking if kinds.extension(n)]
    looking = kinds.without_arrays(looking, str)
    plain = {}
    for name in looking:
        key, ext = split_key(name)
        if "." not in ext:
            plain[key] = name
    return {name: _beside(name, plain) for name in looking}


def _beside(name: str, plain: dict[str, str]) -> str:
    key, ext = split_key(name)
    return f"belongs to {plain[key]}" if "." in ext and key in plain else ""


class Members(NamedTuple):
    """A shard's members: {name: (offset, size)} of those that can be read, {name: why} of those
    that are refused, and a name for each that a later one of the same name stands for."""

    found: dict[str, tuple[int, int]]
    refused: dict[str, str]
    doubled: list[str]


def members(shard: Path) -> dict[str, tuple[int, int]]:
    """{name: (offset, size)} of a shard's regular members. Raises ValueError on a damaged tar, and
    OSError for an error of the machine."""
    return faults.patiently(lambda: _walk(shard), shard).found


def _walk(shard: Path) -> Members:
    """Nothing is unpacked. Of several members of one name the last counts, as it does to tar."""
    size = shard.stat().st_size
    walked = Members({}, {}, [])
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in progressing(tar):
                whole = 0 <= member.size <= size - member.offset_data
                if member.isreg() and not member.issparse() and not whole:
                    claim = f"{member.name} claims {member.size} bytes, the file has {size}"
                    raise ValueError(_damaged(shard, claim))
                if why := _refusal(member):
                    walked.refused[member.name] = why
                elif member.isreg():
                    walked.doubled.extend([member.name] * (member.name in walked.found))
                    walked.found[member.name] = member.offset_data, member.size
            end = tar.offset
    except tarfile.TarError as error:
        raise ValueError(_damaged(shard, str(error))) from error
    _check_end(shard, end)
    return walked


def _check_end(shard: Path, end: int) -> None:
    """Raises ValueError where what follows the members is not a block of zeros, or not all zeros:
    tarfile takes a bad header, too, for the end, and looks no further than the first end."""
    with open(shard, "rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(_damaged(shard, f"its list of members breaks off at byte {end}"))
        while data := file.read(REST_BYTES):
            if data.count(0) < len(data):
                raise ValueError(
                    f"{shard} does not end where its list of members does, at byte {end}: another "
                    "archive follows, as after `cat a.tar b.tar`, or a part is damaged. Keep the "
                    "archives apart, or pack it again"
                )


def _refusal(member: tarfile.TarInfo) -> str:
    """Why a member is not read; "" where nothing speaks against it."""
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "its path leaves the shard's folder"
    if member.issparse():
        return "stored sparse: pack again without --sparse"
    return "a link, not a file" if member.issym() or member.islnk() else ""


def _damaged(shard: Path, why: str) -> str:
    return (
        f"{shard} is cut short or is no plain tar ({why}): fetch or pack it again, "
        "or leave it out of the pattern"
    )


def index_shards(shards: list[Path], cache, pool: ThreadPoolExecutor, log):
    """([Table a shard], classes from classes.txt beside them, else those that words name). Raises
    ValueError where their folders have others."""
    named = labels.listed_beside_all(shards)
    stamps = [index.stamp(faults.patiently(s.stat, s)) for s in progressing(shards)]
    files = [index.cache_file(s, cache, stamp) for s, stamp in zip(shards, stamps, strict=True)]

    def remembered() -> tuple[list[index.Table | None], list[int]]:
        """What is known of them, and the numbers of those whose index is missing or stale."""
        tables = list(pool.map(index.load, files))
        return tables, [k for k, t in enumerate(tables) if t is None or t.stamp != stamps[k]]

    tables, stale = remembered()
    if stale:
        with index.lock(files[0]):
            tables, stale = remembered()  # another process may have listed them meanwhile
            _list_and_check(shards, stamps, files, stale, tables, pool, log)
    return tables, labels.of_shards(tables, named)


def _list_and_check(shards, stamps, files, stale, tables, pool: ThreadPoolExecutor, log) -> None:
    """List and check the shards of the numbers `stale`, into `tables` and their cached files.

    Some at a time, so that an indexing that is stopped keeps what it has. Those that are damaged
    are told when all others are kept: raises ValueError.
    """
    damaged: list[ValueError] = []
    for first in range(0, len(stale), LISTED):
        some = stale[first : first + LISTED]
        damaged += _list_and_check_some(shards, stamps, files, some, tables, pool, log)
    if damaged:
        others = f" ({len(damaged) - 1} more are damaged)" if len(damaged) > 1 else ""
        raise ValueError(f"{damaged[0]}{others}")


def _list_and_check_some(shards, stamps, files, some, tables, pool, log) -> list[ValueError]:
    """What is wrong with those that are damaged."""

    def listed_or_error(k: int) -> index.Table | ValueError:
        try:
            return faults.patiently(lambda: _list_shard(shards[k]), shards[k])
        except ValueError as error:
            return error

    with shown_bar(len(some), "listing shards", "shard") as bar:
        listed = {}
        for k, one in zip(some, pool.map(listed_or_error, some), strict=True):
            listed[k] = one
            bar.update()
    whole = {k: one for k, one in listed.items() if isinstance(one, index.Table)}
    with shown_bar(sum(map(len, whole.values())), "checking images") as bar:
        for k, table in whole.items():
            open_fd = lambda _, shard=shards[k]: index.open_regular(shard)  # noqa: E731
            name = lambda i, shard=shards[k], t=table: f"{shard}/{os.fsdecode(t.name(i))}"  # noqa: E731
            todo = np.setdiff1d(np.arange(len(table)), list(table.reasons))
            checked = index.check_all(open_fd, table.entries_N, todo, pool, bar, name)
            tables[k] = replace(table, reasons=table.reasons | checked, stamp=stamps[k])
            _keep(files[k], tables[k], log)
    return [one for one in listed.values() if isinstance(one, ValueError)]


def _list_shard(shard: Path) -> index.Table:
    """The images of a shard with their labels, still to be checked."""
    with watched(shard):
        found, refused, doubled = _walk(shard)
    every = dict.fromkeys([*found, *refused])
    why = images_of(every)
    if not why:
        raise ValueError(
            f"{shard} holds no image ({len(every)} members, none named KEY with one of "
            f"{', '.join((*kinds.READ, *kinds.ARRAYS))}): leave it out of the pattern, or pack it "
            "again"
        )
    names = [*why, *(n for n in doubled if n in why)]
    entries_N = np.zeros(len(names), index.ENTRY)
    entries_N["offset"], entries_N["length"] = np.array([found.get(n, (0, 0)) for n in names]).T
    entries_N["bits"], entries_N["there_pct"] = 8, 100
    foreign = {i: why[n] for i, n in enumerate(names) if why[n]}
    foreign |= {i: CAMERA_RAW for i, n in enumerate(names) if kinds.extension(n) in kinds.RAW}
    foreign |= dict.fromkeys(range(len(why), len(names)), DOUBLED)
    reasons = {i: refused[n] for i, n in enumerate(names) if n not in found}
    entries_N["kind"][list(foreign)] = formats.FOREIGN
    entries_N["kind"][list(reasons)] = formats.UNUSABLE
    fd = os.open(shard, os.O_RDONLY)
    try:
        given = [labels.in_shard(fd, found, n) for n in progressing(names)]
    finally:
        os.close(fd)
    words, odd = labels.enter(entries_N, given)
    raw = [os.fsencode(n) for n in names]
    return index.Table.of(raw, entries_N, foreign | reasons, words=words, odd=odd)
