"""The one DALI pipeline: bytes and windows in, normalised (B, 3, H, W) tensors out.

    external bytes -> decode the window -> resize (antialiased) -> [colour] -> [RandAugment]
      -> [mirror] normalise

The same definition serves training and evaluation, the CPU and the GPU. All that is random comes
in from outside (crops.py), so the pipeline holds no state that a checkpoint would have to keep.
RandAugment alone, which fine-tuning asks for, is DALI's own and draws by its own seed.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch

DEPTH = 2  # batches inside DALI at once, so that its threads and the GPU do not wait for each other
# DALI raises RuntimeError for a sample, IndexError once the pipeline is no longer valid.
FAILURES = (RuntimeError, IndexError)


@dataclass(frozen=True)
class Look:
    """How images are shown. mean, std: of RGB in 0..1. dtype: of the tensors that come out.

    rand_augment: how many changes an image gets, their magnitude in 0..30, a seed.
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    device: torch.device
    dtype: torch.dtype
    threads: int
    flip: bool = False
    colour: bool = False
    hw_decoder_load: float = 0.65
    rand_augment: tuple[int, int, int] | None = None


@dataclass
class Feed:
    """What the pipeline is fed for a batch: encoded bytes and, per image, how to show it.

    window_B4: int32 top, left, height, width; flip_B: int32 0 or 1, or None; colour_B3: float32
    brightness, contrast, saturation factors, or None.
    """

    encoded: list[bytes]
    window_B4: np.ndarray
    flip_B: np.ndarray | None = None
    colour_B3: np.ndarray | None = None

    def rows(self, keep: list[int]) -> "Feed":
        flip_B = None if self.flip_B is None else self.flip_B[keep]
        colour_B3 = None if self.colour_B3 is None else self.colour_B3[keep]
        return Feed([self.encoded[b] for b in keep], self.window_B4[keep], flip_B, colour_B3)


def build(look: Look, batch_size: int, threads: int, depth: int):
    """A built DALI pipeline with the inputs of Feed. On the CPU it needs no GPU at all."""
    import nvidia.dali.fn as fn
    from nvidia.dali import pipeline_def, types
    from nvidia.dali.auto_aug.rand_augment import rand_augment

    on_gpu = look.device.type == "cuda"
    device_id = (look.device.index or 0) if on_gpu else None

    def given(name, dtype, ndim):
        return fn.external_source(name=name, dtype=dtype, ndim=ndim)

    def shown():
        encoded = given("encoded", types.UINT8, 1)
        start, shape = given("start", types.INT32, 1), given("shape", types.INT32, 1)
        if on_gpu:
            # Whole image, then the window: decoding a region on the GPU crashes on Hopper with
            # nvImageCodec 0.9 (its issue 55), which DALI 2.4 requires, and the CPU's region decode
            # below is its way to save work, which the hardware JPEG engine does not need.
            images = fn.decoders.image(
                encoded, device="mixed", output_type=types.RGB, hw_decoder_load=look.hw_decoder_load
            )
            images = fn.slice(images, start=start, shape=shape, axes=(0, 1))
        else:
            images = fn.decoders.image_slice(
                encoded, device="cpu", output_type=types.RGB, start=start, shape=shape,
                axis_names="HW",
            )  # fmt: skip
        size = (look.image_size, look.image_size)
        images = fn.resize(images, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
        if look.colour:
            b, c, s = (given(n, types.FLOAT, 0) for n in ("brightness", "contrast", "saturation"))
            images = fn.color_twist(images, brightness=b, contrast=c, saturation=s)
        if look.rand_augment:
            n, magnitude, seed = look.rand_augment
            images = rand_augment(images, n, magnitude, shape=size, seed=seed)
        return fn.crop_mirror_normalize(
            images,
            dtype=types.FLOAT16 if look.dtype == torch.float16 else types.FLOAT,
            output_layout="CHW",
            mean=[255.0 * m for m in look.mean],
            std=[255.0 * s for s in look.std],
            mirror=given("flip", types.INT32, 0) if look.flip else 0,
        )

    conditional = look.rand_augment is not None
    # In RandAugment DALI warns of its own names, whatever is ignored: so it is kept and dropped.
    with warnings.catch_warnings(record=conditional):
        pipe = pipeline_def(shown, enable_conditionals=conditional)(
            batch_size=batch_size, num_threads=threads, device_id=device_id,
            prefetch_queue_depth=depth,
        )  # fmt: skip
        pipe.build()
    return pipe


def _feed(pipe, look: Look, feed: Feed) -> None:
    pipe.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in feed.encoded])
    pipe.feed_input("start", np.ascontiguousarray(feed.window_B4[:, :2]))
    pipe.feed_input("shape", np.ascontiguousarray(feed.window_B4[:, 2:]))
    if look.flip:
        pipe.feed_input("flip", feed.flip_B)
    if look.colour:
        for column, name in enumerate(("brightness", "contrast", "saturation")):
            pipe.feed_input(name, np.ascontiguousarray(feed.colour_B3[:, column]))


class Decoder:
    """Runs the pipeline a few batches deep: submit() batches, collect() them in the same order.

    Used from one thread. After one of FAILURES the pipeline is dead: call restart(), which forgets
    what was submitted, and submit again.
    """

    def __init__(self, look: Look, batch_size: int):
        self._look, self._batch_size = look, batch_size
        self._stream = torch.cuda.Stream(look.device) if look.device.type == "cuda" else None
        self._probe = None
        self.restart()

    def restart(self) -> None:
        self._pipe = None  # first, so that two are never alive at once
        self._pipe = build(self._look, self._batch_size, self._look.threads, DEPTH)
        self._fed = 0

    def submit(self, feed: Feed) -> None:
        _feed(self._pipe, self._look, feed)
        self._last = feed
        self._fed += 1
        if self._fed >= DEPTH:  # the first call starts DEPTH runs, and each run needs its input
            self._pipe.schedule_run()

    def collect(self) -> torch.Tensor:
        """The oldest submitted batch: (B, 3, S, S), ready for any stream."""
        while self._fed < DEPTH:  # fewer batches than the pipeline is deep: repeats fill it
            self.submit(self._last)
        (images,) = self._pipe.share_outputs()
        try:
            return self._copied(images.as_tensor())
        finally:
            self._pipe.release_outputs()

    def _copied(self, images) -> torch.Tensor:
        if self._stream is None:
            return torch.from_numpy(np.asarray(images)).to(self._look.dtype, copy=True)
        from nvidia.dali.plugin.pytorch import feed_ndarray

        native = torch.float16 if self._look.dtype == torch.float16 else torch.float32
        with torch.cuda.stream(self._stream):
            copy = torch.empty(images.shape(), dtype=native, device=self._look.device)
            feed_ndarray(images, copy, cuda_stream=self._stream)
            copy = copy.to(self._look.dtype)
        self._stream.synchronize()  # the loader's own thread waits, the training does not
        return copy

    def decodes(self, feed: Feed, b: int) -> bool:
        """Whether image b of the batch decodes when it is alone: DALI's own verdict, on its own
        device. It judges the window that was asked for, so it depends on nothing before."""
        if self._probe is None:
            self._probe = build(self._look, 1, 1, 1)
        try:
            _feed(self._probe, self._look, feed.rows([b]))
            self._probe.schedule_run()
            self._probe.share_outputs()
            self._probe.release_outputs()
        except FAILURES:
            self._probe = None
            return False
        return True
