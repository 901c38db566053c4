"""What an encoder makes of each image of a set: a vector, or one for each patch.

Kept on disk by what decides them: weights, images (their names, sizes in bytes and times of
change, and their bit depth, where it is set), crop, layers.
Of several ranks each takes its share of the images.
Shapes: n images of a set, B images of a batch, N patches, D width.
"""

import contextlib
import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from cjepa_fast.data.evaluation import eval_batches
from cjepa_fast.data.sources import ImageSet, Subset
from cjepa_fast.model.vit import Encoder
from cjepa_fast.runtime.distributed import (
    all_gather_objects,
    broadcast_from_rank_0,
    broadcast_tensor,
    gather_rows,
    rank,
    world_size,
)
from cjepa_fast.runtime.files import read_tensors, write_tensors
from cjepa_fast.runtime.image_size import ImageSize
from cjepa_fast.runtime.printable import say
from cjepa_fast.telemetry.progress import shown_bar

TOLD_BYTES = 2**30  # of a file of features, before it is told of
CACHE_VERSION = 2  # counted up where an image would be read in another way: older ones are stale


class NoneRead(ValueError):
    """None of the images that were asked for could be read."""


@torch.inference_mode()
def extract(
    encoder: Encoder,
    images: ImageSet,
    *,
    keep: torch.Tensor | None = None,
    crop: float = 1.0,
    flip: bool = False,
    layers: Sequence[int] | None = None,
    pooled: bool = True,
    batch_size: int = 128,
    device: torch.device | str = "cpu",
    bf16: bool = False,
    threads: int = 2,
    cache: Path | None = None,
    title: str = "features",
    everywhere: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (n, layers * D) fp32 and the images' positions in the set (n,) int64, on the CPU.

    keep: positions to use, ascending (default: all). crop: share of the largest centred window of
    the encoder's aspect. flip: left and right. layers: numbers of the blocks, from 1 and rising,
    whose normed outputs are set side by side (default: the last). pooled: the mean over the
    patches; else (n, N, layers * D). cache: a folder to keep them in. An image that turns out
    unreadable is left out, hence the positions, and then nothing is kept: it may be readable
    another time. everywhere: on all ranks; else the first has the features, and the others may have
    none. Raises ValueError for features that are not finite.
    """
    encoder = encoder.to(device).eval()
    layers = list(layers or encoder.last(1))
    device_type = torch.device(device).type
    make = functools.partial(
        _compute, encoder, images, keep=keep, crop=crop, flip=flip, layers=layers, pooled=pooled,
        batch_size=batch_size, device=device, bf16=bf16, threads=threads, title=title,
    )  # fmt: skip
    if cache is None:
        return make(everywhere=everywhere)
    kept = None if keep is None else hashlib.sha256(keep.numpy().tobytes()).hexdigest()
    facts = [
        CACHE_VERSION,
        digest(encoder),
        images.fingerprint,
        kept,
        crop,
        layers,
        pooled,
        bf16,
        device_type,
    ]
    facts += ["flip"] if flip else []
    facts += [{"bit_depth": images.limits.bit_depth}] if images.limits.bit_depth else []
    path = _file(cache, [*facts, {"times": digest_of_times(images)}])
    earlier = _file(cache, facts)  # of versions that left the times out
    if (found := _kept_for_all(path)) is None:
        found = _kept_for_all(earlier, int(images.times_ns.max()))
    if found is None:
        features, index = make(everywhere=False)
        whole = len(index) == len(images if keep is None else keep)
        if (
            broadcast_from_rank_0(lambda: whole and _keep(path, features, index))
            and world_size() > 1
        ):
            found = _kept_for_all(path)  # one copy for the ranks of a node: it is mapped
        if found is None:
            return broadcast_tensor(features) if everywhere else features, index
    return found["features"], found["places"]


def _compute(encoder: Encoder, images: ImageSet, *, flip, layers, pooled, device, bf16, **options):
    def function(images_BCHW: torch.Tensor) -> torch.Tensor:
        images_BCHW = images_BCHW.flip(-1) if flip else images_BCHW
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            found = encoder.layers(images_BCHW, layers)
        return torch.cat([x.float().mean(1) if pooled else x.float() for x in found], -1)

    features, index = image_vectors(
        images, function, image_size=encoder.image_size, mean=encoder.mean, std=encoder.std,
        device=device, **options,
    )  # fmt: skip
    if not broadcast_from_rank_0(lambda: all(x.isfinite().all() for x in features.split(4096))):
        raise ValueError("the encoder's features are not finite: its weights are of no use")
    return features, index


def digest(encoder: Encoder) -> str:
    """SHA-256 of the weights and all else that decides an encoder's output."""
    digest = hashlib.sha256(json.dumps([encoder.architecture, encoder.mean, encoder.std]).encode())
    for name, values in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def digest_of_times(images: ImageSet) -> str:
    """A file of the same name and size may have been written anew."""
    return hashlib.sha256(images.times_ns.tobytes()).hexdigest()


def _file(cache: Path, facts: list) -> Path:
    return cache / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.safetensors"


def _kept_for_all(path: Path, since_ns: int = 0) -> dict[str, torch.Tensor] | None:
    """What is in a file of features; None where a rank finds none, or a damaged one, or one that
    was not written after a time."""
    try:
        found = read_tensors(path) if path.stat().st_mtime_ns > since_ns else None
    except (ValueError, OSError):
        found = None
    return found if all(all_gather_objects(found is not None)) else None


def _keep(path: Path, features: torch.Tensor, index: torch.Tensor) -> bool:
    """Write them, whole or not at all; a disk that is full is said, and costs nothing else."""
    partial = path.with_suffix(f".partial{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors({"features": features, "places": index}, partial)
        partial.rename(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        say(f"features could not be kept in {path.parent}: {error}", sys.stderr)
        return False
    if path.stat().st_size > TOLD_BYTES:
        say(f"features kept: {path.stat().st_size / 2**30:.1f} GiB in {path}", sys.stderr)
    return True


def image_vectors(
    images: ImageSet,
    function: Callable[[torch.Tensor], torch.Tensor],
    *,
    image_size: ImageSize,
    mean: tuple,
    std: tuple,
    keep: torch.Tensor | None,
    crop: float,
    batch_size: int,
    device: torch.device | str,
    threads: int,
    title: str,
    windows_n4: np.ndarray | None = None,
    record: Callable[[dict], None] | None = None,
    everywhere: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`function` (B, 3, H, W) -> (B, D) over a set: (n, D) and the positions (n,), on the CPU.

    windows_n4: what to show of each of `keep`, instead of the centre; an image may then be there
    several times. record: takes name and reason of each bad image of this rank. everywhere: on all
    ranks, not on the first alone. Raises NoneRead where no image could be read.
    """
    keep = torch.arange(len(images)) if keep is None else keep
    share = torch.arange(len(keep))[rank() :: world_size()]
    chosen = Subset(images, keep[share])
    batches = eval_batches(
        chosen, image_size=image_size, resize=crop, batch_size=batch_size, device=device,
        dtype=torch.float32, mean=mean, std=std, threads=threads,
        windows_N4=None if windows_n4 is None else windows_n4[share.numpy()], record=record,
    )  # fmt: skip
    vectors, read = torch.empty(0), torch.zeros(len(share), dtype=torch.bool)
    with shown_bar(len(chosen), title) as bar:
        for images_BCHW, index_B in batches:
            found = function(images_BCHW).float().cpu()
            if not read.any():
                vectors = found.new_empty(len(share), *found.shape[1:])
            vectors[index_B], read[index_B] = found, True
            bar.update(len(index_B))
    mine = vectors if read.all() else vectors[read[: len(vectors)]]
    vectors, rows = gather_rows(mine, share[read])
    if not len(rows):
        raise NoneRead(f"{images.root}: none of the {len(keep)} images could be read")
    return broadcast_tensor(vectors) if everywhere else vectors, keep[rows]


def name_hashes(images: ImageSet) -> torch.Tensor:
    """A number in [0, 1) for each image, by its name alone: (n,) float64."""
    hashes = [hashlib.blake2b(images.name(i).encode("utf-8", "surrogateescape"), digest_size=8)
              for i in range(len(images))]  # fmt: skip
    whole = [int.from_bytes(h.digest(), "big") / 2**64 for h in hashes]
    return torch.tensor(whole, dtype=torch.float64)


def split_by_name(images: ImageSet, test_share: float = 0.2) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions for training and for testing: by a hash of each image's name, so that a picture
    stays in its split when others are added or removed."""
    test = name_hashes(images).float() < test_share
    return (~test).nonzero().flatten(), test.nonzero().flatten()
