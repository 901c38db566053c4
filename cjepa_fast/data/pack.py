"""Pack a folder of images into WebDataset shards (plain tars), which file systems like better.

    python -m cjepa_fast.data.pack FOLDER OUT [--shard-size 10000] [--short-side 256] [--workers 8]

Each image becomes KEY.jpg or KEY.png (by its content) with its bytes unchanged, and KEY.cls where
the folder has classes; classes.txt names them. Images are shuffled over the shards with a fixed
seed, so that readers in sequence see all classes too. Every image is decoded once; those that fail
are left out and named. A shard is read back and compared before it gets its name; a run that was
interrupted resumes with the first shard that is missing.
"""

import argparse
import hashlib
import io
import json
import os
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from cjepa_fast.data import arrays, formats, listing, rng
from cjepa_fast.data.early_ends import gap
from cjepa_fast.data.headers import PNG_MAGIC
from cjepa_fast.data.sources import ImageSet, Limits, open_images
from cjepa_fast.runtime import files
from cjepa_fast.runtime.printable import printable, printable_lines
from cjepa_fast.telemetry.progress import shown_bar

MANIFEST = "manifest.json"
IMAGES_A_TASK = 16


def pack(
    folder: str | Path,
    out: str | Path,
    *,
    shard_size: int = 10_000,
    short_side: int | None = None,
    quality: int = 90,
    workers: int | None = None,
    max_pixels: int = formats.MAX_PIXELS,
    cache: Path | None = None,
    log=print,
) -> list[tuple[str, str]]:
    """Write the shards and return (name, reason) of the images left out.

    short_side: shrink images whose short side is longer to it, as JPEG of `quality`; None keeps
    every byte. Raises ValueError if `out` holds shards of other images or settings, or if a shard
    does not read back as it was written.
    """
    if shard_size < 1 or (short_side is not None and short_side < 1):
        raise ValueError(f"shard_size {shard_size} and short_side {short_side} must be at least 1")
    images = open_images(folder, limits=Limits(max_pixels), cache=cache, log=log)
    if short_side is not None and images.has_arrays:
        raise ValueError(f"short_side {short_side}: arrays are packed as they are; leave it out")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    settings = {
        "images": len(images), "fingerprint": images.fingerprint, "shard_size": shard_size,
        "short_side": short_side, "quality": quality if short_side else None,
    }  # fmt: skip
    _claim(out / MANIFEST, settings)
    if images.labels is not None and images.classes:
        _write_text(out / "classes.txt", "".join(f"{name}\n" for name in images.classes))
    order = rng.permutation(0, 0, len(images)).tolist()
    left_out = list(images.skipped)
    with (
        ThreadPoolExecutor(workers or os.cpu_count()) as pool,
        shown_bar(len(images), "packing") as bar,
    ):
        for k, first in enumerate(range(0, len(order), shard_size)):
            chosen = order[first : first + shard_size]
            left_out += _pack_shard(images, chosen, out, k, pool, short_side, quality, bar, log)
    return left_out


def _claim(manifest: Path, settings: dict) -> None:
    """Record what is being packed, or check that it is what was being packed before."""
    if not manifest.exists():
        _write_text(manifest, json.dumps(settings, indent=1))
        return
    before = files.read_json(manifest)
    changed = [key for key in settings if before.get(key) != settings[key]]
    if changed:
        said = ", ".join(f"{k} {before.get(k)} there, {settings[k]} now" for k in changed)
        raise ValueError(
            f"{manifest.parent} holds shards of another packing ({said}): choose another folder "
            "or remove it"
        )


def _pack_shard(
    images: ImageSet, chosen: list[int], out: Path, k: int, pool, short_side, quality, bar, log
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
        for i, data, why in _prepared(images, chosen, pool, short_side, quality):
            bar.update()
            if why:
                left_out.append((images.name(i), why))
                log(f"left out: {printable(images.name(i))}: {printable(why)}")
                continue
            member = f"{i:09d}{_ending(data)}"
            hashes[member] = hashlib.sha256(data).hexdigest()
            _add(archive, member, data)
            if images.labels is not None:
                _add(archive, f"{i:09d}.cls", str(int(images.labels[i])).encode())
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
    images: ImageSet, chosen: list[int], pool, short_side, quality
) -> Iterator[tuple[int, bytes, str]]:
    """(i, bytes, "") or (i, b"", why it is left out), in order, a bounded number at a time."""
    ahead = IMAGES_A_TASK * max(2, os.cpu_count() or 1)
    for a in range(0, len(chosen), ahead):
        some = chosen[a : a + ahead]
        yield from pool.map(lambda i: _prepare(images, i, short_side, quality), some)


def _prepare(images: ImageSet, i: int, short_side, quality) -> tuple[int, bytes, str]:
    try:
        data = images.read_original(i)
        if images.has_arrays:
            arrays.pixels(data)  # that it can be read
            return i, data, ""
        picture = formats.decode_rgb(data, images.limits.max_pixels)
    except OSError as error:
        return i, b"", str(error)
    if (cut := gap(data)) and cut.there_pct < 100 * images.limits.min_jpeg:
        return i, b"", cut.why
    if short_side is None or min(picture.size) <= short_side:
        return i, data, ""
    scale = short_side / min(picture.size)
    size = [max(1, round(side * scale)) for side in picture.size]
    buffer = io.BytesIO()
    picture.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=quality)
    return i, buffer.getvalue(), ""


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
    parser = argparse.ArgumentParser(
        prog="cjepa-pack", description="Pack a folder of images into shards."
    )
    parser.add_argument("folder", help="folder of images; its sub-folders are the classes")
    parser.add_argument("out", help="folder for the shards")
    parser.add_argument("--shard-size", type=int, default=10_000, help="images a shard")
    parser.add_argument("--short-side", type=int, help="shrink to this short side, in pixels")
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality after shrinking")
    parser.add_argument("--max-pixels", type=int, default=formats.MAX_PIXELS, help="of an image")
    parser.add_argument("--workers", type=int, help="threads (default: one a core)")
    given = parser.parse_args(arguments)
    try:
        left_out = pack(
            given.folder, given.out, shard_size=given.shard_size, short_side=given.short_side,
            quality=given.quality, workers=given.workers, max_pixels=given.max_pixels,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        print(f"error: {printable_lines(error)}", file=sys.stderr)
        return 2
    shards = len(list(Path(given.out).glob("shard-*.tar")))
    print(f"{shards} shards in {given.out}; {len(left_out)} images left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
