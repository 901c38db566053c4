"""Reading and decoding batches of images, and what happens to images that fail.

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
from cjepa_fast.data.sources import DecodableImages
from cjepa_fast.runtime.printable import printable

READ_AHEAD = 2  # batches whose bytes are being read beside those inside the decoder


class ImagesGone(RuntimeError):
    """Images cannot be read, and the training cannot do without: the message says which."""


class Skipped:
    """Images that turned out bad while reading or decoding, each name once.

    most: more different ones raise ImagesGone; the caller may raise it on the way. log: takes a
    line for the terminal; beyond NAMED images there is only the first of a shard, so that no shard
    goes bad unsaid. warnings: of images that the decoder reads all the same. ends: those that end
    early, of images that are shown by `settings`. rescued: those that the decoder cannot read and
    Pillow can: they count as good, and from then on Pillow reads them at once.
    """

    def __init__(
        self,
        images: DecodableImages,
        log: Callable[[str], None],
        settings: DecodeSettings | None = None,
        most: float = math.inf,
    ):
        self._images, self.most = images, most
        self.warnings = DecoderWarnings(log, lambda line: None)
        self.attach(log, record=lambda row: None, note=lambda line: None)
        self.ends = EarlyEnds(images, settings)
        self.reasons: dict[int, str] = {}
        self.rescued: set[int] = set()
        self._shards: set[Path | None] = {None}
        self._all_named = True

    def attach(
        self,
        log: Callable[[str], None],
        record: Callable[[dict], None],
        note: Callable[[str], None],
        warn: Callable[[str], None] | None = None,
    ) -> None:
        """Where to tell of them from now on. record: takes the name and reason of each; warn, note:
        as say and note of DecoderWarnings, warn None: log."""
        self._log, self._record = log, record
        self.warnings.say, self.warnings.note = warn or log, note

    def note(self, i: int, reason: str) -> None:
        if i in self.reasons:
            return
        self.reasons[i] = reason
        shard, name = self._images.shard(i), self._images.name(i)
        self._record({"name": name, "why": reason})
        if len(self.reasons) <= NAMED or shard not in self._shards:
            self._log(f"bad image skipped: {printable(name)}: {printable(reason)}")
        elif self._all_named:
            self._all_named = False
            self._log("more bad images are skipped without being named here")
        self._shards.add(shard)
        if len(self.reasons) > (most := max(1, self.most)):
            raise ImagesGone(
                f"{printable(name)} cannot be used ({printable(reason)}), nor can "
                f"{len(self.reasons) - 1:,} other images of {self._images.root}: more than "
                f"data.max_skipped allows, which is {int(most):,} of those that this rank has "
                "met: check the disk, or raise it"
            )

    def note_rescued(self, i: int) -> None:
        if i not in self.rescued and len(self.rescued) < NAMED:
            name = printable(self._images.name(i))
            self._log(f"image decoded by Pillow, since DALI cannot: {name}")
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
    decode_request: DecodeRequest | None = None
    holes: int = 0


# Given a batch and the index b of a bad image: fills the hole, or returns False to drop it.
ReplaceImage = Callable[[BatchRequest, int, Decoder], bool]


def read_one(images: DecodableImages, i: int, channels: int) -> bytes | OSError:
    """What images.read gives. Raises ImagesGone for what is not the file's fault: no other file is
    to take its place."""
    try:
        return images.read(int(i), channels)
    except faults.MachineFailed as error:
        raise ImagesGone(str(error.strerror)) from error
    except OSError as error:
        return error


def _read_some(
    images: DecodableImages, indexes: np.ndarray, skipped: Skipped, channels: int
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
    batch_requests: Iterator[BatchRequest],
    images: DecodableImages,
    decoder: Decoder,
    skipped: Skipped,
    replace: ReplaceImage,
    readers: int = 4,
) -> Iterator[tuple[torch.Tensor, BatchRequest]]:
    """(images_BCHW, batch_request) in the order of `batch_requests`.

    replace: fills the hole that a bad image leaves, or drops it. readers: threads that read files.
    """
    reading: deque[BatchRequest] = deque()
    inside: deque[BatchRequest] = deque()
    with ThreadPoolExecutor(readers, thread_name_prefix="read") as pool:
        try:
            while True:
                _top_up(batch_requests, images, pool, readers, reading, skipped, decoder.channels)
                if reading and len(inside) < DEPTH:
                    batch_request = _complete(reading.popleft(), decoder, skipped, replace)
                    if len(batch_request.index_B):
                        inside.append(batch_request)
                        _submit(inside, decoder, skipped, replace)
                elif inside:
                    done = _collect(inside, images, decoder, skipped, replace)
                    if done is not None:
                        yield done
                else:
                    return
        finally:
            for batch_request in reading:
                for task in batch_request.reads:
                    task.cancel()


def _top_up(
    batch_requests,
    images: DecodableImages,
    pool,
    readers: int,
    reading: deque,
    skipped: Skipped,
    channels: int,
) -> None:
    while len(reading) <= READ_AHEAD and (batch_request := next(batch_requests, None)) is not None:
        index_B = batch_request.index_B
        parts = np.array_split(index_B, min(readers, len(index_B)))
        batch_request.reads = [
            pool.submit(_read_some, images, part, skipped, channels) for part in parts
        ]
        reading.append(batch_request)


def _complete(
    batch_request: BatchRequest, decoder: Decoder, skipped: Skipped, replace: ReplaceImage
) -> BatchRequest:
    """Wait for the bytes; replace what could not be read, and what was bad before and still is."""
    encoded = [data for task in batch_request.reads for data in task.result()]
    batch_request.reads = []
    batch_request.decode_request = batch_request.show(batch_request.index_B)
    batch_request.decode_request.encoded = encoded
    failed = {}
    for b, data in enumerate(encoded):
        if isinstance(data, OSError):
            failed[b] = f"cannot be read ({data.strerror or data})"
        elif int(batch_request.index_B[b]) in skipped and (
            why := decode_problem(batch_request, b, decoder, skipped)
        ):  # bad before: asked alone, so that it does not cost the whole pipeline again
            failed[b] = why
    _replace_all(batch_request, failed, decoder, skipped, replace)
    return batch_request


def decode_problem(batch_request: BatchRequest, b: int, decoder: Decoder, skipped: Skipped) -> str:
    """Why image b cannot be used, alone, as it is shown; "" if it can. If only Pillow can read its
    bytes, these become Pillow's pixels."""
    i = int(batch_request.index_B[b])
    if why := skipped.ends.known(i, batch_request.decode_request.window_B4[b]):
        return why
    data = decoder.decode_alone(batch_request.decode_request, b)
    if data is None:
        decoder.library_messages()  # of a file that is named anyway
        return "cannot be decoded"
    if data is not batch_request.decode_request.encoded[b]:
        skipped.note_rescued(i)
        batch_request.decode_request.encoded[b] = data
    return ""


def _replace_all(
    batch_request: BatchRequest,
    failed: dict[int, str],
    decoder,
    skipped: Skipped,
    replace: ReplaceImage,
) -> None:
    dropped = []
    for b, reason in failed.items():
        batch_request.holes += 1
        skipped.note(int(batch_request.index_B[b]), reason)
        if not replace(batch_request, b, decoder):
            dropped.append(b)
    if dropped:
        keep = [b for b in range(len(batch_request.index_B)) if b not in dropped]
        batch_request.index_B = batch_request.index_B[keep]
        batch_request.decode_request = batch_request.decode_request.rows(keep)


def _submit(inside: deque, decoder: Decoder, skipped: Skipped, replace: ReplaceImage) -> None:
    try:
        decoder.submit(inside[-1].decode_request)
    except DecodeFailed as error:
        _repair(inside, decoder, skipped, replace, error)


def _collect(
    inside: deque,
    images: DecodableImages,
    decoder: Decoder,
    skipped: Skipped,
    replace: ReplaceImage,
) -> tuple[torch.Tensor, BatchRequest] | None:
    while inside:
        try:
            tensor = decoder.collect()
        except DecodeFailed as error:
            _repair(inside, decoder, skipped, replace, error)
            continue
        skipped.warnings.hear(decoder, lambda: _suspects(inside, images, decoder))
        batch_request = inside[0]
        cut = skipped.ends.seen(tensor, batch_request.index_B, batch_request.decode_request)
        if not cut:
            return tensor, inside.popleft()
        _replace_all(batch_request, cut, decoder, skipped, replace)
        _resubmit(inside, decoder)
    return None  # every image that was inside turned out bad and was dropped


def _suspects(inside: deque, images: DecodableImages, decoder: Decoder) -> list[Suspect]:
    """What is inside the decoder, each image to be decoded alone."""
    alone = decoder.decode_alone
    return [
        (images.name(int(i)), functools.partial(alone, batch_request.decode_request, b))
        for batch_request in inside
        for b, i in enumerate(batch_request.index_B)
    ]


def _repair(inside: deque, decoder, skipped, replace, error: Exception) -> None:
    """After a failure: find the culprits, replace them, and start again with the same batches."""
    culprits = 0
    for batch_request in inside:
        before = list(batch_request.decode_request.encoded)
        batch = range(len(batch_request.index_B))
        problems = {b: decode_problem(batch_request, b, decoder, skipped) for b in batch}
        bad = {b: why for b, why in problems.items() if why}
        after = batch_request.decode_request.encoded
        rescued = [a for a, b in zip(before, after, strict=True) if a is not b]
        culprits += len(bad) + len(rescued)
        _replace_all(batch_request, bad, decoder, skipped, replace)
    if not culprits:
        raise error  # every image decodes alone: out of memory or the like, not a bad file
    _resubmit(inside, decoder)


def _resubmit(inside: deque, decoder: Decoder) -> None:
    """Decode anew what is inside, as it is now."""
    for empty in [requested for requested in inside if not len(requested.index_B)]:
        inside.remove(empty)
    decoder.restart()
    decoder.library_messages()  # what is good comes again
    for batch_request in inside:
        decoder.submit(batch_request.decode_request)
