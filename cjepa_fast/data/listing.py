"""Listing what a folder tree or a shard holds, and indexing it with the help of the cache."""

import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from cjepa_fast.data import formats, index
from cjepa_fast.telemetry.progress import shown_bar

# ------------------------------------------------------------------------------------- folders


def images_below(folder: bytes, under: bytes = b"", parents: tuple = ()) -> Iterator[tuple]:
    """(path below the root, size, mtime_ns, why it cannot be used or "") of each image file.

    Links are followed, save to a folder one is in; names that start with a dot are not looked at.
    """
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in parents:
        return
    parents = (*parents, (status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        kept = sorted((e for e in entries if not e.name.startswith(b".")), key=lambda e: e.name)
    for entry in kept:
        path = under + entry.name
        named_image = os.fsdecode(entry.name).lower().endswith(formats.EXTENSIONS)
        if _is_folder(entry):
            below = list(_below(entry, path, parents))
            if named_image and not below:
                yield path, 0, 0, "a folder, not a file"
            yield from below
        elif named_image:
            try:
                status = entry.stat()
                yield path, status.st_size, status.st_mtime_ns, ""
            except OSError as error:
                yield path, 0, 0, f"cannot be read ({error.strerror})"


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: its stat() below fails too, and so names it
        return False


def _below(entry: os.DirEntry, path: bytes, parents: tuple) -> Iterator[tuple]:
    try:
        yield from images_below(entry.path, path + b"/", parents)
    except PermissionError as error:
        yield path, 0, 0, f"a folder that cannot be read ({error.strerror})"


def index_folder(root: Path, cache, pool: ThreadPoolExecutor, log):
    """([Table], classes) of a folder tree; entries whose size and time are as cached are kept."""
    found = sorted(images_below(os.fsencode(root)))
    names = [name for name, *_ in found]
    entries_N = np.zeros(len(found), index.ENTRY)
    entries_N["length"] = [size for _, size, _, _ in found]
    entries_N["mtime_ns"] = [time for _, _, time, _ in found]
    reasons = {i: why for i, (*_, why) in enumerate(found) if why}
    entries_N["kind"][list(reasons)] = formats.UNUSABLE
    classes = _classes(names, entries_N)

    file = index.cache_file(root, cache)
    old = index.load(file)
    fresh_N = np.ones(len(found), bool)
    fresh_N[list(reasons)] = False
    if old is not None:
        reasons |= _reuse(old, names, entries_N, fresh_N)
    todo = np.flatnonzero(fresh_N)
    folder = os.fsencode(root)
    open_fd = lambda i: os.open(os.path.join(folder, names[i]), os.O_RDONLY)  # noqa: E731
    with shown_bar(len(todo), "checking images") as bar:
        reasons |= index.check_all(open_fd, entries_N, todo, pool, bar)
    table = index.Table.of(names, entries_N, reasons)
    if len(todo) or old is None or len(old) != len(table):
        _keep(file, table, log)
    return [table], classes


def _classes(names: list[bytes], entries_N: np.ndarray) -> list[str] | None:
    """Label entries by first-level sub-folder; unlabelled where an image lies in none."""
    tops = [name.partition(b"/") for name in names]
    if not names or not all(slash for _, slash, _ in tops):
        entries_N["label"] = index.UNLABELLED
        return None
    classes = sorted({top for top, _, _ in tops})
    number = {top: i for i, top in enumerate(classes)}
    entries_N["label"] = [number[top] for top, _, _ in tops]
    return [os.fsdecode(top) for top in classes]


def _reuse(old: index.Table, names: list[bytes], entries_N, fresh_N) -> dict[int, str]:
    """Copy what is known of unchanged files; mark them as not fresh; {i: why unusable} of them."""
    row_of = {name: row for row, name in enumerate(old.names())}
    row_N = np.array([row_of.get(name, -1) for name in names], np.int64)
    same_N = fresh_N & (row_N >= 0)
    for field in ("length", "mtime_ns"):
        same_N[same_N] = old.entries_N[field][row_N[same_N]] == entries_N[field][same_N]
    rows = row_N[same_N]
    for field in ("height", "width", "kind"):
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


def members(shard: Path) -> dict[str, tuple[int, int]]:
    """{name: (offset, size)} of a shard's regular members. Raises ValueError on a damaged tar."""
    return _walk(shard)[0]


def _walk(shard: Path) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """(members that can be read, {name: why} of those that are refused). Nothing is unpacked."""
    size = shard.stat().st_size
    found, refused = {}, {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isreg() and not 0 <= member.size <= size - member.offset_data:
                    claim = f"{member.name} claims {member.size} bytes, the file has {size}"
                    raise ValueError(_damaged(shard, claim))
                if why := _refusal(member):
                    refused[member.name] = why
                elif member.isreg():
                    found[member.name] = member.offset_data, member.size
            end = tar.offset
    except tarfile.TarError as error:
        raise ValueError(_damaged(shard, str(error))) from error
    with open(shard, "rb") as file:  # tarfile takes a bad header, too, for the end of the archive
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(_damaged(shard, f"its list of members breaks off at byte {end}"))
    return found, refused


def _refusal(member: tarfile.TarInfo) -> str:
    """Why a member is not read; "" where nothing speaks against it."""
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "its path leaves the shard's folder"
    return "a link, not a file" if member.issym() or member.islnk() else ""


def _damaged(shard: Path, why: str) -> str:
    return (
        f"{shard} is cut short or is no plain tar ({why}): fetch or pack it again, "
        "or leave it out of the pattern"
    )


def index_shards(shards: list[Path], cache, pool: ThreadPoolExecutor, log):
    """([Table a shard], classes from classes.txt beside the first, else None)."""
    stamps = [index.stamp(s.stat()) for s in shards]
    files = [index.cache_file(s, cache) for s in shards]
    tables = list(pool.map(index.load, files))
    stale = [k for k, t in enumerate(tables) if t is None or t.stamp != stamps[k]]
    with shown_bar(len(stale), "listing shards", "shard") as bar:
        listed = []
        for one in pool.map(lambda k: _list_shard(shards[k]), stale):
            listed.append(one)
            bar.update()
    total = sum(len(names) for names, *_ in listed)
    with shown_bar(total, "checking images") as bar:
        for k, (names, entries_N, refused) in zip(stale, listed, strict=True):
            open_fd = lambda _, shard=shards[k]: os.open(shard, os.O_RDONLY)  # noqa: E731
            todo = np.setdiff1d(np.arange(len(names)), list(refused))
            reasons = refused | index.check_all(open_fd, entries_N, todo, pool, bar)
            tables[k] = index.Table.of(names, entries_N, reasons, stamps[k])
            _keep(files[k], tables[k], log)
    listed_classes = shards[0].parent / "classes.txt"
    classes = listed_classes.read_text().split("\n") if listed_classes.is_file() else None
    return tables, [c.strip() for c in classes if c.strip()] if classes else None


def _list_shard(shard: Path) -> tuple[list[bytes], np.ndarray, dict[int, str]]:
    """(names of the images, entries_N still to be checked, {i: why refused})."""
    found, refused = _walk(shard)
    every = [*found, *(name for name in refused if name not in found)]
    images = [n for n in every if f".{split_key(n)[1].lower()}" in formats.EXTENSIONS]
    if not images:
        raise ValueError(
            f"{shard} holds no image ({len(every)} members, none named KEY with one of "
            f"{', '.join(formats.EXTENSIONS)}): leave it out of the pattern or pack it again"
        )
    entries_N = np.zeros(len(images), index.ENTRY)
    entries_N["offset"], entries_N["length"] = np.array([found.get(n, (0, 0)) for n in images]).T
    fd = os.open(shard, os.O_RDONLY)
    try:
        entries_N["label"] = [_label(fd, found.get(f"{split_key(n)[0]}.cls")) for n in images]
    finally:
        os.close(fd)
    reasons = {i: refused[name] for i, name in enumerate(images) if name not in found}
    entries_N["kind"][list(reasons)] = formats.UNUSABLE
    return [os.fsencode(n) for n in images], entries_N, reasons


def _label(fd: int, where: tuple[int, int] | None) -> int:
    """The number in a .cls member; UNLABELLED where there is none."""
    if where is None:
        return index.UNLABELLED
    text = index.pread_exactly(fd, where[1], where[0]).strip()
    return int(text) if text.isdigit() else index.UNLABELLED
