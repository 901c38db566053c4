"""The training loader: an endless, resumable sequence of batches, made ahead by a thread.

Which image stands at index i of epoch e, its crop, its flip, its colours and its masks are pure
functions of (seed, e, i). A rank takes its part of the indices, so the data state of a run is its
step, on any number of ranks.
"""

import contextlib
import functools
import itertools
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from cjepa_fast.config import DataSection
from cjepa_fast.data import crops, rng
from cjepa_fast.data.decode_pipeline import (
    BatchRequest,
    ImagesGone,
    Skipped,
    decode,
    decode_problem,
    read_one,
)
from cjepa_fast.data.decoder import Decoder, DecodeRequest, DecodeSettings
from cjepa_fast.data.decoder_choice import choose_decoder, open_decoder
from cjepa_fast.data.masks import Masks
from cjepa_fast.data.sources import ImageSet
from cjepa_fast.runtime.one_thread import compute_on_one_thread

STAND_IN_TRIES = 64
POLL_S = 0.1  # how soon the thread notices that nobody wants its batches any more


@dataclass(frozen=True)
class Batch:
    """images_BCHW on the device in the compute dtype; index_B: positions in the ImageSet (CPU).

    step counts from the start of the epoch; micro is the number of the accumulation step; holes
    says how many images of it are stand-ins.
    """

    images_BCHW: torch.Tensor
    masks: Masks | None
    index_B: torch.Tensor
    epoch: int
    step: int
    micro: int
    holes: int = 0


@dataclass(frozen=True)
class _MicroBatch:
    """Which part of the run a batch is: the tag that its BatchRequest carries."""

    epoch: int
    step: int
    micro: int
    epoch_index_B: torch.Tensor


class BatchSplit(NamedTuple):
    """One rank's part of a step: global_batch images over all ranks, micro_batch at a time."""

    global_batch: int
    micro_batch: int
    rank: int = 0
    world_size: int = 1

    @property
    def accumulation(self) -> int:
        """Micro-batches a step."""
        return self.global_batch // (self.world_size * self.micro_batch)

    def check(self, images: int) -> None:
        """Raises ValueError where a step cannot be cut so, or the images do not fill one."""
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} does not exist among {self.world_size} ranks")
        if self.micro_batch < 1 or self.global_batch % (self.world_size * self.micro_batch):
            raise ValueError(
                f"the global batch of {self.global_batch} cannot be split into micro-batches of "
                f"{self.micro_batch} on {self.world_size} ranks: make it a multiple of "
                f"{self.world_size * self.micro_batch}"
            )
        if images < self.global_batch:
            most = images - images % self.world_size
            lower = f"set data.batch_size to at most {most}, or " if most else ""
            raise ValueError(
                f"{images} usable images do not fill one global batch of {self.global_batch}: "
                f"{lower}bring more images"
            )


class Loader:
    """Batches of an ImageSet for one rank. Raises ValueError for impossible sizes.

    data: the configuration's section, of which path and the batch sizes are not read. split: this
    rank's part of a step, which is split.accumulation Batches. rand_augment: how many changes an
    image gets, their magnitude in 0..30; DALI draws by its own generator, Pillow by rng.AUGMENT.
    masks: called as masks(epoch, step, index_B), for the CPU, in the loader's thread. skipped: what
    turned out corrupt (decode_pipeline.Skipped); log: called once a corrupt image. decoder: the one
    that was chosen.
    """

    def __init__(
        self,
        images: ImageSet,
        data: DataSection,
        split: BatchSplit,
        *,
        seed: int,
        device: torch.device | str,
        dtype: torch.dtype,
        rand_augment: tuple[int, int] | None = None,
        masks: Callable[[int, int, torch.Tensor], Masks] | None = None,
        log: Callable[[str], None] = print,
    ):
        split.check(len(images))
        self.images, self.split = images, split
        self.steps_per_epoch = len(images) // split.global_batch
        self.accumulation = split.accumulation
        self._data, self._seed, self._masks = data, seed, masks
        self._device = _with_index(torch.device(device))
        first = split.rank == 0
        images.require_channels(len(data.mean))
        self.decoder = choose_decoder(
            data.decoder, self._device, log if first else lambda line: None,
            channels=len(data.mean), arrays=images.has_arrays,
        )  # fmt: skip
        self._settings = DecodeSettings(
            data.image_size, data.mean, data.std, self._device, dtype, data.threads, data.flip,
            data.colour > 0, data.hw_decoder_load,
            rand_augment and (*rand_augment, seed + split.rank), images.limits.max_pixels,
            images.has_arrays, images.limits.bit_depth,
        )  # fmt: skip
        most = data.max_skipped * len(images) / split.world_size  # of the first epoch: see _begin
        self.skipped = Skipped(images, log, self._settings, most)
        self._epochs_begun: set[int] = set()
        # Two epochs: batches read ahead may belong to the next one while a hole is filled in this.
        self.order = functools.lru_cache(2)(functools.partial(_order, seed, len(images)))
        self._running: weakref.WeakSet[_Iteration] = weakref.WeakSet()

    def iterate(self, start_step: int) -> Iterator[Batch]:
        """Endless Batches from optimiser step `start_step` (0-based, over all epochs) on.

        The thread starts at once. It ends with close() of what is returned, with that object, or
        with close() of the loader. An error in the thread is raised from next().
        """
        iteration = _Iteration(lambda: self._batches(start_step), self._data.prefetch, self._device)
        self._running.add(iteration)
        return iteration

    def close(self) -> None:
        for iteration in list(self._running):
            iteration.close()

    def _batch_requests(self, start_step: int) -> Iterator[BatchRequest]:
        for overall in itertools.count(start_step):
            epoch, step = divmod(overall, self.steps_per_epoch)
            self._begin(epoch)
            for micro in range(self.accumulation):
                # All ranks' slots lie side by side, so that the images which share VICReg's
                # statistics are the same on any number of ranks.
                slot = micro * self.split.world_size + self.split.rank
                first = step * self.split.global_batch + slot * self.split.micro_batch
                epoch_index_B = torch.arange(first, first + self.split.micro_batch)
                index_B = self.order(epoch)[epoch_index_B].numpy()
                part = _MicroBatch(epoch, step, micro, epoch_index_B)
                yield BatchRequest(index_B, functools.partial(self._show, part), part)

    def _begin(self, epoch: int) -> None:
        """Allow a rank's part of data.max_skipped for each epoch that this process has begun: in
        each it meets another part of the set, in time all of it."""
        self._epochs_begun.add(epoch)
        met = min(1.0, len(self._epochs_begun) / self.split.world_size)
        self.skipped.most = self._data.max_skipped * len(self.images) * met

    def _show(self, part: _MicroBatch, index_B: np.ndarray) -> DecodeRequest:
        def uniforms(stream: int, count: int) -> np.ndarray:
            return rng.uniforms(self._seed, stream, part.epoch, part.epoch_index_B, count).numpy()

        sizes_B2 = self.images.sizes_N2[index_B]
        crop_BC = uniforms(rng.CROP, crops.CROP_UNIFORMS)
        return DecodeRequest(
            [],
            crops.random_resized(
                sizes_B2,
                crop_BC,
                self._data.crop_scale,
                self._data.crop_ratio,
                self._data.image_size,
            ),
            crops.flips(uniforms(rng.FLIP, 1)) if self._settings.flip else None,
            crops.colour_factors(uniforms(rng.COLOUR, 3), self._data.colour)
            if self._settings.colour
            else None,
            uniforms(rng.AUGMENT, 2 * self._settings.rand_augment[0])
            if self._settings.rand_augment
            else None,
        )

    def _stand_in(self, batch_request: BatchRequest, b: int, decoder: Decoder) -> bool:
        """Fill the hole at b: with an image of the epoch's dropped tail, else of the whole epoch.

        Candidates are drawn by (seed, epoch, index) and the first good one stays, so any rank and
        any restart choose the same. Raises ImagesGone if none is good.
        """
        part: _MicroBatch = batch_request.tag
        draw_1T = rng.uniforms(self._seed, rng.SUBSTITUTE, part.epoch,
                                 part.epoch_index_B[b : b + 1], STAND_IN_TRIES)  # fmt: skip
        order_N = self.order(part.epoch)
        tail = order_N[self.steps_per_epoch * self.split.global_batch :]
        pools = (tail if len(tail) else order_N), order_N  # a short tail may be bad itself
        halves = zip(pools, draw_1T[0].chunk(2), strict=True)
        drawn_T = torch.cat([pool[(draw * len(pool)).long()] for pool, draw in halves])
        hole = self.images.name(int(batch_request.index_B[b]))
        for candidate in drawn_T.tolist():
            data = read_one(self.images, candidate, self._settings.channels)
            if isinstance(data, OSError):
                self.skipped.note(candidate, f"cannot be read ({data.strerror or data})")
                continue
            batch_request.index_B = batch_request.index_B.copy()
            batch_request.index_B[b] = candidate
            encoded = list(batch_request.decode_request.encoded)
            encoded[b] = data
            batch_request.decode_request = self._show(part, batch_request.index_B)
            batch_request.decode_request.encoded = encoded
            if not (why := decode_problem(batch_request, b, decoder, self.skipped)):
                return True
            self.skipped.note(candidate, why)
        raise ImagesGone(
            f"{hole} cannot be used, and none of {STAND_IN_TRIES} other images drawn for its "
            f"index can: are the files still there? They were in {self.images.root}"
        )

    def _batches(self, start_step: int) -> Iterator[Batch]:
        decoder = open_decoder(self.decoder, self._settings, self.split.micro_batch)
        batch_requests = self._batch_requests(start_step)
        decoded = decode(
            batch_requests, self.images, decoder, self.skipped, self._stand_in, self._data.readers
        )
        with contextlib.closing(decoded):  # or an error below would leave its reading threads
            for images_BCHW, batch_request in decoded:
                part: _MicroBatch = batch_request.tag
                masks = self._masks and self._masks(part.epoch, part.step, part.epoch_index_B)
                if masks is not None and self._device.type == "cuda":
                    masks = masks.pin_memory().to(self._device, non_blocking=True)
                index_B = torch.from_numpy(batch_request.index_B)
                yield Batch(
                    images_BCHW,
                    masks,
                    index_B,
                    part.epoch,
                    part.step,
                    part.micro,
                    batch_request.holes,
                )


def _order(seed: int, n: int, epoch: int) -> torch.Tensor:
    """int64 (n,): the image at each index of an epoch; what is past its last step is dropped."""
    return rng.permutation(seed, epoch, n)


def _with_index(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


class _Failure:
    def __init__(self, error: BaseException):
        self.error = error


def _produce(make, ready: queue.Queue, stop: threading.Event, device: torch.device) -> None:
    """The thread's body. It holds no reference to the _Iteration, so that one can be collected.

    A new thread's current device is GPU 0, whatever the process's is: there torch would make a
    context, of 0.5 GB or so, for each rank of the machine.
    """
    compute_on_one_thread()

    def offer(item) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=POLL_S)
                return True
            except queue.Full:
                continue
        return False

    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        batches = make()
        try:
            for batch in batches:
                if not offer(batch):
                    return
        finally:
            batches.close()
    except BaseException as error:
        offer(_Failure(error))  # raised again in the consumer


def _end(stop: threading.Event, ready: queue.Queue, thread: threading.Thread) -> None:
    stop.set()
    if thread is not threading.current_thread():  # the garbage collector may run in any thread
        thread.join(timeout=30)
    while not ready.empty():  # the tensors are let go now, not when the garbage is collected
        ready.get_nowait()


class _Iteration:
    """Iterator over what the thread makes. weakref.finalize ends the thread when this object goes,
    and at interpreter exit: a daemon thread inside DALI must not outlive the interpreter."""

    def __init__(self, make, prefetch: int, device: torch.device):
        self._device = device
        self._ready: queue.Queue = queue.Queue(max(1, prefetch))
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=_produce,
            args=(make, self._ready, self._stop, device),
            name="loader",
            daemon=True,
        )
        self._thread.start()
        self.close = weakref.finalize(self, _end, self._stop, self._ready, self._thread)

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        item = None
        while item is None:
            if self._stop.is_set():
                raise StopIteration
            with contextlib.suppress(queue.Empty):  # the thread offers a batch or its error, always
                item = self._ready.get(timeout=1.0)
        if isinstance(item, _Failure):
            self.close()
            raise item.error
        if self._device.type == "cuda":
            _claim(item, torch.cuda.current_stream(self._device))
        return item


def _claim(batch: Batch, stream) -> None:
    """Tell the allocator that a CUDA stream uses memory which the loader's allocated."""
    batch.images_BCHW.record_stream(stream)
    if batch.masks is not None:
        batch.masks.record_stream(stream)
