"""The synthetic dataset: a labelled set of images, rendered on first use (scenes.py draws them).

    ensure("train") -> Path of a folder of WebDataset shards       (8,192 images; "val": 2,048)

Each sample is NNNNNN.jpg (48 x 48), .cls (the kind of the LARGEST object, an index into KINDS) and
.json ({"kind", "objects", "distance"}: the kind's name, how many objects, and how far the nearest
one stands, as Clevr/Count and Clevr/Dist ask; the distance is in units of the camera's height).
`python -m cjepa_fast.data.sets.shapes [--sheet FILE]` prints where the set lies and what it holds.
"""

import argparse
import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageDraw

from cjepa_fast.data.sets.scenes import KINDS, SIZE, render
from cjepa_fast.runtime import caches, children
from cjepa_fast.runtime.command_line import Parser
from cjepa_fast.runtime.files import read_json

VERSION = "shapes-v2"
COUNTS = {"train": 8192, "val": 2048}
SHARD = 1024  # images


def cache_folder() -> Path:
    """Where the set lies: $XDG_CACHE_HOME or ~/.cache, then cjepa_fast/shapes-v2."""
    return caches.folder(VERSION)


def ensure(split: str = "train", log=print) -> Path:
    """The folder of a split's shards, rendered where it is missing or damaged.

    Safe to call from several processes at once: one renders, the others wait. A folder appears
    whole or not at all. Raises ValueError for an unknown split, OSError where nothing can be
    written or a rendering process fails.
    """
    if split not in COUNTS:
        raise ValueError(f"no split {split!r} of the shapes set: use {' or '.join(COUNTS)}")
    folder = cache_folder() / split
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{split}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wrong = _damage(folder, split)
        if wrong is None:
            _name_classes(folder)  # an earlier version did not
            return folder
        began = time.perf_counter()
        log(f"rendering the shapes set, {split}: {COUNTS[split]:,} images ({wrong})")
        _make(split, folder)
        log(f"  {folder}: done in {time.perf_counter() - began:.0f} s")
    return folder


def _damage(folder: Path, split: str) -> str | None:
    """What is wrong with a split's folder, None where every shard is as it was written, by a
    program that draws as this one does."""
    try:
        manifest = read_json(folder / "manifest.json")
        for name, digest in manifest["sha256"].items():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
                return f"{name} is not as it was written"
        if manifest["first"] != _digest_of_first(split):
            return "the one there was drawn by another version"
    except FileNotFoundError:
        return "made once, on first use"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"the one there cannot be read: {error}"
    return None


def _name_classes(folder: Path) -> None:
    names = folder / "classes.txt"
    if not names.exists():
        names.write_text("".join(f"{kind}\n" for kind in KINDS), encoding="utf-8")


def _digest_of_first(split: str) -> str:
    return hashlib.sha256(render(split, 0)[0]).hexdigest()


def _make(split: str, folder: Path) -> None:
    """Render a split beside `folder`, then rename it to `folder`."""
    partial = Path(tempfile.mkdtemp(prefix=f".{split}-", dir=folder.parent))
    try:
        _render_parallel(split, partial)
        shards = sorted(partial.glob("*.tar"))
        digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in shards}
        manifest = {"kinds": KINDS, "first": _digest_of_first(split), "sha256": digests}
        (partial / "manifest.json").write_text(
            json.dumps(manifest, indent=2) + "\n", encoding="utf-8"
        )
        _name_classes(partial)
        for path in partial.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        partial.chmod(0o755)  # mkdtemp's folders are for their owner alone
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _render_parallel(split: str, folder: Path) -> None:
    """One process a core, each rendering every n-th shard.

    They are started as this module's own command: multiprocessing would import the caller's main
    module again in each (training's, with torch), or fork a process that has threads.
    """
    from cjepa_fast.runtime.hardware import cores  # torch, which no renderer needs

    images = COUNTS[split]
    paths = [str(Path(__file__).resolve().parents[3]), os.environ.get("PYTHONPATH", "")]
    environment = children.environment(PYTHONPATH=os.pathsep.join(filter(None, paths)))
    command = [sys.executable, "-m", "cjepa_fast.data.sets.shapes", "--render", split, str(folder)]
    count = min(cores(), -(-images // SHARD))
    with contextlib.ExitStack() as stack:
        workers = []
        for first in range(count):
            part = [str(images), str(first), str(count)]
            workers.append(stack.enter_context(subprocess.Popen(command + part, env=environment)))
            stack.callback(workers[-1].kill)  # an interrupted caller leaves nobody rendering
        failed = [code for code in [worker.wait() for worker in workers] if code]
    if failed:
        raise ChildProcessError(f"rendering the shapes set into {folder} failed (exit {failed[0]})")


def _render_shards(split: str, folder: Path, images: int, first: int, step: int) -> None:
    """Write shards first, first + step, ... of a split's first `images`."""
    for shard in range(first, -(-images // SHARD), step):
        with tarfile.open(folder / f"shapes-{split}-{shard:06d}.tar", "w") as tar:
            for index in range(shard * SHARD, min((shard + 1) * SHARD, images)):
                jpeg, label, facts = render(split, index)
                _add(tar, f"{index:06d}.jpg", jpeg)
                _add(tar, f"{index:06d}.cls", str(label).encode())
                _add(tar, f"{index:06d}.json", json.dumps(facts).encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # time and owner 0: the same bytes wherever it is made
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def contact_sheet(path: Path | str, split: str = "val", rows: int = 8, columns: int = 10) -> Path:
    """Draw the first images of a split, each with its label, to an image file."""
    gap, line = 4, 12
    tile = (SIZE + gap, SIZE + gap + line)
    sheet = Image.new("RGB", (columns * tile[0] + gap, rows * tile[1] + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for index in range(rows * columns):
        jpeg, _, facts = render(split, index)
        x, y = gap + index % columns * tile[0], gap + index // columns * tile[1]
        sheet.paste(Image.open(io.BytesIO(jpeg)), (x, y))
        text = f"{facts['kind']} {facts['objects']} {facts['distance']:.2f}"
        draw.text((x, y + SIZE), text, fill="black")
    sheet.save(path)
    return Path(path)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Make the shapes set and say what it holds.")
    parser.add_argument("--sheet", metavar="FILE", help="also draw a contact sheet")
    parser.add_argument("--render", nargs=5, metavar="X", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.render:
        children.end_with_parent()
        split, folder, *numbers = args.render
        _render_shards(split, Path(folder), *map(int, numbers))
        return 0
    for split, count in COUNTS.items():
        print(f"{split:6s} {count:6,} images of {SIZE} x {SIZE}: {ensure(split)}")
    print("kinds  " + ", ".join(KINDS))
    if args.sheet:
        print(f"sheet  {contact_sheet(args.sheet)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
