"""Pack a folder of images into WebDataset shards (plain tars), which file systems like better.

    python -m cjepa_fast.data.pack FOLDER OUT [--shard-size 10000] [--short-side 256] [--workers 8]
    python -m cjepa_fast.data.pack PARQUET OUT [--split NAME]       # a file or a folder of them

Each image becomes KEY.jpg or KEY.png (by its content) with its bytes unchanged, and KEY.cls where
the folder has classes; classes.txt names them. Images are shuffled over the shards with a fixed
seed, so that readers in sequence see all classes too; rows of Parquet files stay in their order,
and each of several splits has a folder of its own in OUT. Every image is decoded once; those that
fail are left out and named. A shard is read back and compared before it gets its name; a run that
was interrupted resumes with the first shard that is missing.
"""

import hashlib
import io
import json
import os
import sys
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from cjepa_fast.data import arrays, faults, formats, listing, parquet, rng
from cjepa_fast.data.early_ends import gap
from cjepa_fast.data.headers import PNG_MAGIC
from cjepa_fast.data.locations import parquet_files
from cjepa_fast.data.sources import Limits, ReadableImages, open_images
from cjepa_fast.runtime import files, run_lock
from cjepa_fast.runtime.command_line import Parser
from cjepa_fast.runtime.hardware import cores
from cjepa_fast.runtime.printable import printable, printable_lines, say
from cjepa_fast.telemetry.progress import shown_bar

MANIFEST = "manifest.json"
CLASSES = "classes.txt"
IMAGES_A_TASK = 16
RECORD_BYTES = 120  # of an image in a shard's record, beside its name: two of its member, a hash
SURE_TO_FIT = 10_000  # images a shard: of names of up to 6,000 letters, as JSON has them


def pack(
    folder: str | Path,
    out: str | Path,
    *,
    shard_size: int = 10_000,
    short_side: int | None = None,
    quality: int = 90,
    workers: int | None = None,
    max_pixels: int = formats.MAX_PIXELS,
    bit_depth: int | None = None,
    cache: Path | None = None,
    log=print,
) -> list[tuple[str, str]]:
    """Write the shards and return (name, reason) of the images left out.

    short_side: shrink images whose short side is longer to it, in the channels that they have, as
    JPEG of `quality`, those with alpha as PNG; None keeps every byte. bit_depth: as data.bit_depth,
    of what is shrunk. Raises ValueError if `out` holds shards of other images, labels or settings
    or another process packs there, if the record of a shard would be too long, or if a shard does
    not read back as it was written.
    """
    how = Packing(shard_size, short_side, quality, workers, max_pixels, bit_depth)
    images = open_images(folder, limits=how.limits, cache=cache, log=log)
    if short_side is not None and images.has_arrays:
        raise ValueError(f"short_side {short_side}: arrays are packed as they are; leave it out")
    order = rng.permutation(0, 0, len(images)).tolist()
    return _pack_set(images, order, Path(out), how, log)


def pack_parquet(
    path: str | Path,
    out: str | Path,
    *,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    log=print,
    **options,
) -> list[tuple[str, str]]:
    """`pack` of Parquet files (parquet.py). split: only that one, else each in its own folder,
    where there are several. label_column: "" takes no labels. options: those of Packing."""
    how = Packing(**options)
    splits = parquet.by_split(parquet_files(Path(path)), log)
    if split is not None and split not in splits:
        raise ValueError(f"{path} has no split {split!r}: it has {', '.join(map(repr, splits))}")
    limits, left_out = how.limits, []
    chosen = splits if split is None else {split: splits[split]}
    for name, own in chosen.items():
        folder = Path(out) / name if len(chosen) > 1 else Path(out)
        images = parquet.ParquetImages(own, image_column, label_column, limits)
        log(f"{printable(name or path)} goes to {printable(folder)}: {images.summary}")
        left_out += _pack_set(images, list(range(len(images))), folder, how, log)
    return left_out


@runtime_checkable
class PackableImages(ReadableImages, Protocol):
    """skipped: (name, reason) of what is left out already; label_N: int64 (n,), below 0 where there
    is none; class_names: of its numbers, or None."""

    skipped: Sequence[tuple[str, str]]
    label_N: np.ndarray
    class_names: list[str] | None


class Packing(NamedTuple):
    """How images are packed, as in `pack`."""

    shard_size: int = 10_000
    short_side: int | None = None
    quality: int = 90
    workers: int | None = None
    max_pixels: int = formats.MAX_PIXELS
    bit_depth: int | None = None

    @property
    def limits(self) -> Limits:
        """Raises ValueError for a bit_depth that there is none of."""
        if self.bit_depth is not None and not 9 <= self.bit_depth <= 16:
            raise ValueError(f"bit_depth {self.bit_depth} must be from 9 to 16")
        return Limits(self.max_pixels, bit_depth=self.bit_depth)


def _pack_set(
    images: PackableImages, order: list[int], out: Path, how: Packing, log
) -> list[tuple[str, str]]:
    if how.shard_size < 1 or (how.short_side is not None and how.short_side < 1):
        raise ValueError(
            f"shard_size {how.shard_size} and short_side {how.short_side} must be at least 1"
        )
    _check_records(images, order, how.shard_size)
    with run_lock.held(out, "{}: a packing is writing there"):
        return _pack_into(out, images, order, how, log)


def _check_records(images: PackableImages, order: list[int], shard_size: int) -> None:
    """Raises ValueError where the record of a shard would be too long to be read again."""
    if shard_size <= SURE_TO_FIT:
        return
    for first in range(0, len(order), shard_size):
        names = (images.name(i) for i in order[first : first + shard_size])
        if sum(RECORD_BYTES + len(json.dumps(name)) for name in names) > files.MOST_JSON_BYTES:
            raise ValueError(
                f"shard_size {shard_size}: the record of so many images is too long to be read "
                f"again, and an interrupted packing could not resume; {SURE_TO_FIT} are sure to fit"
            )


def _pack_into(
    out: Path, images: PackableImages, order: list[int], how: Packing, log
) -> list[tuple[str, str]]:
    settings = {
        "images": len(images), "fingerprint": images.fingerprint, "shard_size": how.shard_size,
        "short_side": how.short_side, "quality": how.quality if how.short_side else None,
        "bit_depth": images.limits.bit_depth if how.short_side else None,
        "labels": _digest_of_labels(images),
    }  # fmt: skip
    listed = "".join(f"{name}\n" for name in images.class_names or ())
    _claim(out / MANIFEST, settings, listed)
    if images.class_names and _can_be_listed(images.class_names, log):
        _write_text(out / CLASSES, listed)
    left_out = list(images.skipped)
    with (
        ThreadPoolExecutor(how.workers or cores()) as pool,
        shown_bar(len(images), "packing") as bar,
    ):
        for k, first in enumerate(range(0, len(order), how.shard_size)):
            chosen = order[first : first + how.shard_size]
            left_out += _pack_shard(images, chosen, out, k, pool, how, bar, log)
    return left_out


def _digest_of_labels(images: PackableImages) -> str:
    digest = hashlib.sha256(images.label_N.tobytes())
    digest.update(repr(images.class_names).encode())
    return digest.hexdigest()[:32]


def _can_be_listed(classes: list[str], log) -> bool:
    """Whether classes.txt, a name a line, can hold them: else a number would change its class."""
    odd = next((c for c in classes if not c.isprintable() or c != c.strip() or not c), None)
    if odd is not None:
        log(f"WARNING: classes.txt is not written, since it cannot hold the class {odd!r}")
    return odd is None


def _claim(manifest: Path, settings: dict, listed: str) -> None:
    """Record what is being packed, or check that it is what was being packed before.

    listed: the text of its classes.txt, which is compared where an earlier version wrote the
    manifest, without the labels. Raises ValueError.
    """
    if not manifest.exists():
        _write_text(manifest, json.dumps(settings, indent=1))
        return
    before = files.read_json(manifest)
    classes = manifest.with_name(CLASSES)
    if "labels" not in before and (not classes.is_file() or files.read_text(classes) == listed):
        before["labels"] = settings["labels"]
    changed = [key for key in settings if before.get(key) != settings[key]]
    if changed:
        told = {k: f"{k} {before.get(k)} there, {settings[k]} now" for k in changed}
        told |= {"labels": "other labels or classes"} if "labels" in changed else {}
        said = ", ".join(told.values())
        raise ValueError(
            f"{manifest.parent} holds shards of another packing ({said}): choose another folder "
            "or remove it"
        )


def _pack_shard(
    images: PackableImages, chosen: list[int], out: Path, k: int, pool, how: Packing, bar, log
) -> list[tuple[str, str]]:
    """Shard k, unless it is finished: the tar first, then its .json, which marks it as such."""
    tar, record = out / f"shard-{k:06d}.tar", out / f"shard-{k:06d}.json"
    if record.exists() and tar.exists():
        done = files.read_json(record)
        if done["bytes"] == tar.stat().st_size:
            bar.update(len(chosen))
            return [tuple(pair) for pair in done["left_out"]]
    hashes, left_out = {}, []
    temporary = tar.with_suffix(".tar.tmp")
    with open(temporary, "wb") as file, tarfile.open(fileobj=file, mode="w") as archive:
        for i, data, why in _prepared(images, chosen, pool, how):
            bar.update()
            if why:
                left_out.append((images.name(i), why))
                log(f"left out: {printable(images.name(i))}: {printable(why)}")
                continue
            member = f"{i:09d}{_ending(data)}"
            hashes[member] = hashlib.sha256(data).hexdigest()
            _add(archive, member, data)
            if images.label_N[i] >= 0:
                _add(archive, f"{i:09d}.cls", str(int(images.label_N[i])).encode())
        archive.close()  # writes the end of the archive, before the file is flushed
        file.flush()
        os.fsync(file.fileno())
    if not hashes:
        temporary.unlink()
        return left_out
    _verify(temporary, hashes, pool)
    os.replace(temporary, tar)
    files.sync_file(out)
    names = {member: images.name(int(member.partition(".")[0])) for member in hashes}
    done = {"bytes": tar.stat().st_size, "left_out": left_out, "names": names, "sha256": hashes}
    _write_text(record, json.dumps(done))
    return left_out


def _prepared(
    images: PackableImages, chosen: list[int], pool, how: Packing
) -> Iterator[tuple[int, bytes, str]]:
    """(i, bytes, "") or (i, b"", why it is left out), in order, a bounded number at a time."""
    ahead = IMAGES_A_TASK * max(2, cores())
    for a in range(0, len(chosen), ahead):
        some = chosen[a : a + ahead]
        yield from pool.map(lambda i: _prepare(images, i, how), some)


def _prepare(images: PackableImages, i: int, how: Packing) -> tuple[int, bytes, str]:
    try:
        data = images.read_original(i)
        if images.has_arrays:
            arrays.pixels(data)  # that it can be read
            return i, data, ""
        limits = images.limits
        picture = formats.decode_rgb(data, limits.max_pixels, limits.bit_depth, channels=None)
    except faults.MachineFailed:
        raise
    except OSError as error:
        return i, b"", str(error)
    if (cut := gap(data)) and cut.there_pct < 100 * images.limits.min_jpeg:
        return i, b"", cut.why
    if how.short_side is None or min(picture.size) <= how.short_side:
        return i, data, ""
    scale = how.short_side / min(picture.size)
    size = [max(1, round(side * scale)) for side in picture.size]
    return i, _shrunk(picture, size, how.quality), ""


def _shrunk(picture: Image.Image, size: list[int], quality: int) -> bytes:
    """As JPEG; as PNG with alpha, whose channels are each by itself, where Pillow would weigh
    colours by their alpha."""
    buffer = io.BytesIO()
    if picture.mode in ("LA", "RGBA"):
        bands = [band.resize(size, Image.Resampling.LANCZOS) for band in picture.split()]
        Image.merge(picture.mode, bands).save(buffer, "PNG")
    else:
        picture.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _ending(data: bytes) -> str:
    if data.startswith(arrays.NPY_MAGIC):
        return ".npy"
    return ".png" if data.startswith(PNG_MAGIC) else ".jpg"  # by name; the content decides


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # time 0, no owner: the same images give the same bytes
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def _verify(tar: Path, hashes: dict[str, str], pool) -> None:
    found = listing.members(tar)

    def differs(member: str) -> bool:
        offset, size = found.get(member, (0, 0))
        with open(tar, "rb") as file:
            file.seek(offset)
            return hashlib.sha256(file.read(size)).hexdigest() != hashes[member]

    wrong = [m for m, bad in zip(hashes, pool.map(differs, hashes), strict=True) if bad]
    if wrong:
        raise ValueError(
            f"{tar}: {len(wrong)} members do not read back as written, the first is {wrong[0]}: "
            "check the disk, then pack again"
        )


def _write_text(path: Path, text: str) -> None:
    files.write_text(path, text)
    files.sync_file(path.parent)  # a rename lasts through a power cut only once this is written


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="cjepa-pack",
        description="Pack a folder of images, or Parquet files with their bytes, into shards.",
    )
    parser.add_argument("folder", help="images, classes in sub-folders; or Parquet files")
    parser.add_argument("out", help="folder for the shards")
    parser.add_argument("--shard-size", type=int, default=10_000, help="images a shard")
    parser.add_argument("--short-side", type=int, help="shrink to this short side, in pixels")
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality after shrinking")
    parser.add_argument("--max-pixels", type=int, default=formats.MAX_PIXELS, help="of an image")
    parser.add_argument("--bit-depth", type=int, help="as data.bit_depth, of what is shrunk")
    parser.add_argument("--workers", type=int, help="threads (default: one a core)")
    rows = parser.add_argument_group("of Parquet files")
    rows.add_argument("--split", metavar="NAME", help="only this one, such as train")
    rows.add_argument("--image-column", metavar="NAME", help="where it is not plain")
    rows.add_argument("--label-column", metavar="NAME", help="where it is not plain; '': no labels")
    given = vars(parser.parse_args(arguments))
    folder, out = given.pop("folder"), given.pop("out")
    of_rows = {name: given.pop(name) for name in ("split", "image_column", "label_column")}
    try:
        if parquet.is_all_of(Path(folder)):
            left_out = pack_parquet(folder, out, **of_rows, **given)
        elif said := [name for name, value in of_rows.items() if value is not None]:
            raise ValueError(f"{folder} holds no Parquet files, of which {said[0]} speaks")
        else:
            left_out = pack(folder, out, **given)
    except (ValueError, OSError) as error:
        say(f"error: {printable_lines(error)}", sys.stderr)
        return 2
    shards = len(list(Path(out).rglob("shard-*.tar")))
    print(f"{shards} shards in {printable(out)}; {len(left_out)} images left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
