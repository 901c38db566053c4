"""Reading and decoding batches of an ImageSet, and what happens to images that fail.

A request goes through three hands: a small pool of threads reads bytes, a decoder (decoder.py)
makes tensors of them, the caller gets these in order. Threads rather than DALI's parallel external
source: its worker processes cost seconds at the start and at each rebuild, and signals meant for
the run reach them.
"""

import functools
import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from cjepa_fast.data import faults, formats
from cjepa_fast.data.decoder import DEPTH, DecodeFailed, Decoder, DecodeRequest, DecodeSettings
from cjepa_fast.data.decoder_warnings import DecoderWarnings, Suspect
from cjepa_fast.data.early_ends import EarlyEnds
from cjepa_fast.data.left_out import NAMED
from cjepa_fast.data.sources import ImageSet
from cjepa_fast.runtime.printable import printable

READ_AHEAD = 2  # batches whose bytes are being read beside those inside the decoder


class ImagesGone(RuntimeError):
    """Images cannot be read, and the training cannot do without: the message says which."""


class Skipped:
    """Images that turned out bad while reading or decoding, each name once.

    most: more different ones raise ImagesGone; the caller may raise it on the way. record: takes
    each name and reason; of those told by log, beyond NAMED, there is only the first of a shard, so
    that no shard goes bad unsaid. warnings: of images that the decoder reads all the same. ends:
    those that end early, of images that are shown by `look`. rescued: those that the decoder cannot
    read and Pillow can: they count as good, and from then on Pillow reads them at once.
    """

    def __init__(
        self,
        images: ImageSet,
        log: Callable[[str], None],
        look: DecodeSettings | None = None,
        most: float = math.inf,
    ):
        self._images, self.log, self.most = images, log, most
        self.record: Callable[[dict], None] = lambda row: None
        self.warnings = DecoderWarnings(lambda line: self.log(line), lambda line: None)
        self.ends = EarlyEnds(images, look)
        self.reasons: dict[int, str] = {}
        self.rescued: set[int] = set()
        self._shards: set[Path | None] = {None}
        self._all_named = True

    def note(self, i: int, reason: str) -> None:
        if i in self.reasons:
            return
        self.reasons[i] = reason
        shard, name = self._images.shard(i), self._images.name(i)
        self.record({"name": name, "why": reason})
        if len(self.reasons) <= NAMED or shard not in self._shards:
            self.log(f"bad image skipped: {printable(name)}: {printable(reason)}")
        elif self._all_named:
            self._all_named = False
            self.log("more bad images are skipped without being named here")
        self._shards.add(shard)
        if len(self.reasons) > (most := max(1, self.most)):
            raise ImagesGone(
                f"{printable(name)} cannot be used ({printable(reason)}), nor can "
                f"{len(self.reasons) - 1:,} other images of {self._images.root}: more than "
                f"data.max_skipped allows, which is {int(most):,} of those that this rank has "
                "met: see to their disk, or raise it"
            )

    def note_rescued(self, i: int) -> None:
        if i not in self.rescued and len(self.rescued) < NAMED:
            name = printable(self._images.name(i))
            self.log(f"image decoded by Pillow, since DALI cannot: {name}")
        self.rescued.add(i)

    @property
    def names(self) -> list[tuple[str, str]]:
        """(name, reason) of each image that failed, in the order of their failing."""
        return [(self._images.name(i), why) for i, why in self.reasons.items()]

    def __contains__(self, i: int) -> bool:
        return i in self.reasons


@dataclass(eq=False)
class BatchRequest:
    """A batch on its way: which images, how each is shown, then their bytes.

    show: index_B -> DecodeRequest without bytes; it is asked again when an image is replaced.
    tag: whatever the caller wants back with the tensors. holes: images that turned out bad.
    """

    index_B: np.ndarray
    show: Callable[[np.ndarray], DecodeRequest]
    tag: object = None
    reads: list[Future] = field(default_factory=list)
    feed: DecodeRequest | None = None
    holes: int = 0


# Given the work and the index b of a bad image: fills the hole, or returns False to drop it.
Mend = Callable[[BatchRequest, int, Decoder], bool]


def read_one(images: ImageSet, i: int, channels: int) -> bytes | OSError:
    """What images.read gives. Raises ImagesGone for what is not the file's fault: no other file is
    to take its place."""
    try:
        return images.read(int(i), channels)
    except faults.MachineFailed as error:
        raise ImagesGone(str(error.strerror)) from error
    except OSError as error:
        return error


def _read_some(
    images: ImageSet, indexes: np.ndarray, skipped: Skipped, channels: int
) -> list[bytes | OSError]:
    most_pixels, rescued = images.limits.max_pixels, skipped.rescued
    return [
        _as_decoded(read_one(images, i, channels), int(i) in rescued, most_pixels, channels)
        for i in indexes
    ]


def _as_decoded(
    data: bytes | OSError, by_pillow: bool, most_pixels: int, channels: int
) -> bytes | OSError:
    """What the decoder gets: the file's bytes, or Pillow's pixels of them."""
    if not by_pillow or isinstance(data, OSError):
        return data
    try:
        return formats.as_ppm(formats.decode_rgb(data, most_pixels, channels=channels))
    except OSError as error:
        return error


def decode(
    works: Iterator[BatchRequest],
    images: ImageSet,
    decoder: Decoder,
    skipped: Skipped,
    mend: Mend,
    readers: int = 4,
) -> Iterator[tuple[torch.Tensor, BatchRequest]]:
    """(images_BCHW, work) in the order of `works`; bad images replaced or dropped by `mend`.

    readers: threads that read files.
    """
    reading: deque[BatchRequest] = deque()
    inside: deque[BatchRequest] = deque()
    with ThreadPoolExecutor(readers, thread_name_prefix="read") as pool:
        try:
            while True:
                _top_up(works, images, pool, readers, reading, skipped, decoder.channels)
                if reading and len(inside) < DEPTH:
                    work = _complete(reading.popleft(), decoder, skipped, mend)
                    if len(work.index_B):
                        inside.append(work)
                        _submit(inside, decoder, skipped, mend)
                elif inside:
                    done = _collect(inside, images, decoder, skipped, mend)
                    if done is not None:
                        yield done
                else:
                    return
        finally:
            for work in reading:
                for task in work.reads:
                    task.cancel()


def _top_up(
    works, images: ImageSet, pool, readers: int, reading: deque, skipped: Skipped, channels: int
) -> None:
    while len(reading) <= READ_AHEAD and (work := next(works, None)) is not None:
        parts = np.array_split(work.index_B, min(readers, len(work.index_B)))
        work.reads = [pool.submit(_read_some, images, part, skipped, channels) for part in parts]
        reading.append(work)


def _complete(work: BatchRequest, decoder: Decoder, skipped: Skipped, mend: Mend) -> BatchRequest:
    """Wait for the bytes; treat what could not be read and what is known to be doubtful."""
    encoded = [data for task in work.reads for data in task.result()]
    work.reads = []
    work.feed = work.show(work.index_B)
    work.feed.encoded = encoded
    failed = {}
    for b, data in enumerate(encoded):
        if isinstance(data, OSError):
            failed[b] = f"cannot be read ({data.strerror or data})"
        elif int(work.index_B[b]) in skipped and (why := flaw(work, b, decoder, skipped)):
            # Bad before: asked alone, so that it does not cost the whole pipeline again.
            failed[b] = why
    _mend_all(work, failed, decoder, skipped, mend)
    return work


def flaw(work: BatchRequest, b: int, decoder: Decoder, skipped: Skipped) -> str:
    """Why image b cannot be used, alone, as it is shown; "" if it can. If only Pillow can read its
    bytes, these become Pillow's pixels."""
    i = int(work.index_B[b])
    if why := skipped.ends.known(i, work.feed.window_B4[b]):
        return why
    data = decoder.alone(work.feed, b)
    if data is None:
        decoder.written()  # of a file that is named anyway
        return "cannot be decoded"
    if data is not work.feed.encoded[b]:
        skipped.note_rescued(i)
        work.feed.encoded[b] = data
    return ""


def _mend_all(
    work: BatchRequest, failed: dict[int, str], decoder, skipped: Skipped, mend: Mend
) -> None:
    dropped = []
    for b, reason in failed.items():
        work.holes += 1
        skipped.note(int(work.index_B[b]), reason)
        if not mend(work, b, decoder):
            dropped.append(b)
    if dropped:
        keep = [b for b in range(len(work.index_B)) if b not in dropped]
        work.index_B, work.feed = work.index_B[keep], work.feed.rows(keep)


def _submit(inside: deque, decoder: Decoder, skipped: Skipped, mend: Mend) -> None:
    try:
        decoder.submit(inside[-1].feed)
    except DecodeFailed as error:
        _repair(inside, decoder, skipped, mend, error)


def _collect(
    inside: deque, images: ImageSet, decoder: Decoder, skipped: Skipped, mend: Mend
) -> tuple[torch.Tensor, BatchRequest] | None:
    while inside:
        try:
            tensor = decoder.collect()
        except DecodeFailed as error:
            _repair(inside, decoder, skipped, mend, error)
            continue
        skipped.warnings.hear(decoder, lambda: _suspects(inside, images, decoder))
        work = inside[0]
        cut = skipped.ends.seen(tensor, work.index_B, work.feed)
        if not cut:
            return tensor, inside.popleft()
        _mend_all(work, cut, decoder, skipped, mend)
        _again(inside, decoder)
    return None  # every image that was inside turned out bad and was dropped


def _suspects(inside: deque, images: ImageSet, decoder: Decoder) -> list[Suspect]:
    """What is inside the decoder, each image to be decoded alone."""
    return [
        (images.name(int(i)), functools.partial(decoder.alone, work.feed, b))
        for work in inside
        for b, i in enumerate(work.index_B)
    ]


def _repair(inside: deque, decoder, skipped, mend, error: Exception) -> None:
    """After a failure: find the culprits, mend them, and start again with the same batches."""
    culprits = 0
    for work in inside:
        before = list(work.feed.encoded)
        flaws = {b: flaw(work, b, decoder, skipped) for b in range(len(work.index_B))}
        bad = {b: why for b, why in flaws.items() if why}
        rescued = [a for a, b in zip(before, work.feed.encoded, strict=True) if a is not b]
        culprits += len(bad) + len(rescued)
        _mend_all(work, bad, decoder, skipped, mend)
    if not culprits:
        raise error  # every image decodes alone: out of memory or the like, not a bad file
    _again(inside, decoder)


def _again(inside: deque, decoder: Decoder) -> None:
    """Decode anew what is inside, as it is now."""
    for work in [work for work in inside if not len(work.index_B)]:
        inside.remove(work)
    decoder.restart()
    decoder.written()  # what is good comes again
    for work in inside:
        decoder.submit(work.feed)
