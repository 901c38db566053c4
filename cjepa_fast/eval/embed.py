"""The features of a folder or shards of images, in a file with their names.

`cjepa-embed RUN IMAGES --out features.parquet`, or .npz, .csv, .safetensors (names in a .json
beside it). The images are taken a part at a time, each kept in OUT.parts until all are there, so
that the same command resumes; torchrun spreads a part over its ranks.
Shapes: n images, N patches, D width.
"""

import argparse
import csv
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cjepa_fast.checkpoint.encoders import load_encoder
from cjepa_fast.checkpoint.pretrained import LAYERS, POOLS
from cjepa_fast.data.sources import ImageSet, open_images
from cjepa_fast.eval.features import NoneRead, digest, digest_of_times, extract
from cjepa_fast.eval.options import add_reading
from cjepa_fast.runtime import distributed
from cjepa_fast.runtime.files import read_json, read_tensors, write_tensors, write_text
from cjepa_fast.runtime.hardware import default_device
from cjepa_fast.runtime.memory import free_bytes
from cjepa_fast.runtime.printable import printable

PART, PART_BYTES = 4096, 2**30  # images, and of their features: in a part at most
FACTS = "facts.json"
NAMES = ".json"  # beside a .safetensors


class Part(NamedTuple):
    """names, labels (-1 for an image that has none), and features (n, D) or (n, N, D) fp32."""

    names: list[str]
    labels_n: np.ndarray
    features: np.ndarray


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="RUN", help="a run, a checkpoint, an encoder")
    parser.add_argument("images", metavar="IMAGES", help="a folder, shards, a list, or 'shapes'")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="by its ending: "
                        + ", ".join(WRITERS))  # fmt: skip
    parser.add_argument("--pool", choices=POOLS, default="mean", help="the patches' mean, none, or "
                        "the means of the last 4 blocks side by side")  # fmt: skip
    parser.add_argument("--which", choices=("target", "context"), default="target", help="encoder")
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    add_reading(parser)
    parser.add_argument("--bf16", action="store_true", help="the encoder in bf16")


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for an ending without a writer, a file that is there, parts of others, and
    where no image could be read."""
    write = _writer(args.out, args.pool)
    encoder = load_encoder(args.checkpoint, args.which)
    images = open_images(args.images, limits=args.limits)
    facts = {
        "encoder": digest(encoder), "images": images.fingerprint, "pool": args.pool,
        "crop": args.crop, "bf16": args.bf16, "times": digest_of_times(images),
    }  # fmt: skip
    facts |= {"bit_depth": args.limits.bit_depth} if args.limits.bit_depth else {}
    facts["part"] = max(1, min(PART, PART_BYTES // (4 * math.prod(_shape(encoder, args.pool)))))
    parts = args.out.with_name(f"{args.out.name}.parts")
    newest_ns = int(images.times_ns.max())
    size = distributed.broadcast_from_rank_0(lambda: _begin(parts, facts, newest_ns))
    files = [*_extracted(encoder, images, parts, size, args)]
    if distributed.rank() != 0:
        return
    count = sum(len(read_tensors(file)["index"]) for file in files)
    if not count:
        shutil.rmtree(parts)
        raise NoneRead(f"{images.root}: none of the {len(images)} images could be read")
    partial = args.out.with_name(f".{args.out.stem}.partial{args.out.suffix}")
    write(partial, [*map(_Stored(images), files)], images)
    if partial.with_suffix(NAMES).exists():
        partial.with_suffix(NAMES).rename(args.out.with_suffix(NAMES))
    partial.rename(args.out)
    shutil.rmtree(parts)
    missing = len(images) - count + len(images.skipped)
    left_out = f"; {missing} images left out, which cannot be used" if missing else ""
    print(f"{printable(args.out)}: features of {count} images{left_out}")


def _writer(out: Path, pool: str) -> Callable:
    write = writer_of(out, WRITERS)
    if out.suffix == ".safetensors" and (names := out.with_suffix(NAMES)).exists():
        raise ValueError(f"--out {out}: its names go into {names}, which is there already: name "
                         "another, or remove it")  # fmt: skip
    if out.suffix == ".csv" and pool == "none":
        raise ValueError("--pool none has a row for each patch, which .csv has no place for: take "
                         ".npz, .parquet or .safetensors")  # fmt: skip
    return write


def writer_of(out: Path, writers: dict[str, Callable]) -> Callable:
    """By the ending of a file. Raises ValueError for another ending, or a file that is there."""
    if out.suffix not in writers:
        raise ValueError(f"--out {out}: its ending must be one of {', '.join(writers)}")
    if out.exists():
        raise ValueError(f"--out {out} is there already: name another, or remove it")
    return writers[out.suffix]


def _shape(encoder, pool: str) -> tuple[int, ...]:
    """The shape of an image's features: (D,), or (N, D)."""
    D = encoder.width * (len(encoder.last(LAYERS)) if pool == "last4" else 1)
    return (math.prod(encoder.grid), D) if pool == "none" else (D,)


def _begin(parts: Path, facts: dict, newest_ns: int) -> int:
    """The images of a part: as many as those that are there have. newest_ns: when the images' files
    were changed last. Raises ValueError where there are parts of other features."""
    parts.mkdir(parents=True, exist_ok=True)
    if not (parts / FACTS).is_file():
        write_text(parts / FACTS, json.dumps(facts, indent=2))
    before = read_json(parts / FACTS)
    if "times" not in before and (parts / FACTS).stat().st_mtime_ns > newest_ns:
        before["times"] = facts["times"]  # earlier versions left it out
    size, names = before.get("part"), (facts.keys() | before) - {"part"}
    differs = sorted(name for name in names if before.get(name) != facts.get(name))
    if differs == ["times"]:
        raise ValueError(
            f"{parts} holds parts of images that have been written since, or of another copy of "
            "them (a copy that keeps the files' times, as cp -p makes, resumes): remove it, or "
            "name another --out"
        )
    if differs:
        raise ValueError(
            f"{parts} holds parts of other features (another {', '.join(differs)}): remove it, or "
            "name another --out"
        )
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"{parts / FACTS} is damaged: remove {parts}, or name another --out")
    return size


def _extracted(encoder, images: ImageSet, parts: Path, size: int, args) -> Iterator[Path]:
    """The files of parts of `size` images, made where they are missing; all ranks call it."""
    layers = encoder.last(LAYERS) if args.pool == "last4" else None
    count = -(-len(images) // size)
    for number in range(count):
        path = parts / f"part_{number:06d}.safetensors"
        if not distributed.broadcast_from_rank_0(path.is_file):
            try:
                features, index = extract(
                    encoder, images, keep=torch.arange(number * size, len(images))[:size],
                    crop=args.crop, layers=layers, pooled=args.pool != "none",
                    device=default_device(), bf16=args.bf16, batch_size=args.batch_size,
                    threads=args.threads, title=f"features, part {number + 1} of {count}",
                    everywhere=False,
                )  # fmt: skip
            except NoneRead:  # the other parts may have some
                features = torch.empty(0, *_shape(encoder, args.pool))
                index = torch.empty(0, dtype=torch.int64)
            if distributed.rank() == 0:
                partial = path.with_suffix(".partial")
                write_tensors({"features": features, "index": index}, partial)
                partial.rename(path)
        yield path


class _Stored:
    """A part of its file, with the images' names and labels."""

    def __init__(self, images: ImageSet):
        self._images = images

    def __call__(self, path: Path) -> Callable[[], Part]:
        def read() -> Part:
            found = read_tensors(path)
            index_n = found["index"]
            names = [as_text(self._images.name(i)) for i in index_n.tolist()]
            return Part(names, self._images.label_N[index_n.numpy()], found["features"].numpy())

        return read


def as_text(name: str) -> str:
    """A name of a file or a class as text: bytes that are no UTF-8 as \\xe9."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _whole(parts: list) -> Part:
    """All parts in one. Raises ValueError where they do not fit into memory."""
    needed, free = 2 * len(parts) * max(part().features.nbytes for part in parts), free_bytes()
    if free is not None and needed > free:
        raise ValueError(
            f"the features take up to {needed / 2**30:.0f} GiB at once, of {free / 2**30:.0f} "
            "free: take .parquet or .csv, which are written a part at a time"
        )
    found = [part() for part in parts]
    names = [name for part in found for name in part.names]
    arrays = (np.concatenate([part[i] for part in found]) for i in (1, 2))
    return Part(names, *arrays)


def _labels(part: Part, images: ImageSet) -> dict[str, np.ndarray]:
    return {"labels": part.labels_n} if _any_label(images) else {}


def _any_label(images: ImageSet) -> bool:
    return bool((images.label_N >= 0).any())


def _classes(images: ImageSet) -> list[str] | None:
    return images.class_names if _any_label(images) else None


def write_npz(path: Path, parts: list, images: ImageSet) -> None:
    """names, features, and labels with classes where images have them: without pickles."""
    part = _whole(parts)
    classes = {"classes": np.array(found)} if (found := _classes(images)) else {}
    np.savez(path, names=np.array(part.names), features=part.features,
             **_labels(part, images), **classes)  # fmt: skip


def write_safetensors(path: Path, parts: list, images: ImageSet) -> None:
    """features, and labels; in a .json beside it the names and the classes."""
    part = _whole(parts)
    tensors = {"features": part.features, **_labels(part, images)}
    write_tensors({name: torch.from_numpy(x) for name, x in tensors.items()}, path)
    named = {"names": part.names, "classes": _classes(images)}
    write_text(path.with_suffix(NAMES), json.dumps(named) + "\n")


def write_csv(path: Path, parts: list, images: ImageSet) -> None:
    """name, label (empty without one), f0, f1, ..."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        for number, read in enumerate(parts):
            part = read()
            if number == 0:
                heads = [f"f{i}" for i in range(part.features.shape[1])]
                rows.writerow(["name", "label", *heads])
            for name, label, features in zip(*part, strict=True):
                rows.writerow([name, _class(label, images), *map(repr, features.tolist())])


def _class(label: int, images: ImageSet) -> str:
    if label < 0:
        return ""
    return str(images.class_names[label] if images.class_names else label)


def write_parquet(path: Path, parts: list, images: ImageSet) -> None:
    """name, label (null without one), and features: a list of D, or of N lists of D."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(".parquet needs pyarrow: pip install pyarrow, or take .npz") from None
    writer = None
    for read in parts:
        part = read()
        column = pa.array(part.features.reshape(-1))
        for size in reversed(part.features.shape[1:]):
            column = pa.FixedSizeListArray.from_arrays(column, size)
        labels = [_class(x, images) or None for x in part.labels_n]
        texts = {"name": part.names, "label": labels}  # typed, as a part may have no row
        texts = {key: pa.array(words, pa.string()) for key, words in texts.items()}
        table = pa.table({**texts, "features": column})
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()


WRITERS = {
    ".parquet": write_parquet,
    ".npz": write_npz,
    ".csv": write_csv,
    ".safetensors": write_safetensors,
}
