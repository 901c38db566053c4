"""All that knows DALI: bytes and windows in, normalised (B, C, H, W) tensors out; whole images.

    external bytes -> decode the window -> resize (antialiased) -> [colour] -> [RandAugment]
      -> [mirror] normalise

The same definition serves training and evaluation, the CPU and the GPU. All that is random comes
in from outside (crops.py), so the pipeline holds no state that a checkpoint would have to keep.
RandAugment alone, which fine-tuning asks for, is DALI's own and draws by its own seed.
"""

import contextlib
import warnings

import numpy as np
import torch
from PIL import Image

from cjepa_fast.data import formats
from cjepa_fast.data.decoder import DEPTH, DecodeFailed, DecodeRequest, DecodeSettings
from cjepa_fast.runtime import oom
from cjepa_fast.runtime.library_stderr import LibraryStderr

# DALI raises RuntimeError for a sample, IndexError once the pipeline is no longer valid.
FAILURES = (RuntimeError, IndexError)
TRIED_LEVELS = (40, 90, 140, 190)  # of the channels
# What decodes for it: libjpeg and libpng write of damage, and not of which file.
WRITTEN = LibraryStderr(
    "libnvimgcodec.so", "libjpeg_turbo_ext.so", "libopencv_ext.so", "libtiff_ext.so"
)


def problem(device: torch.device, channels: int = 3) -> str | None:
    """Why such images cannot be decoded by DALI on this device, in a line; None if they can be.

    Raises what DALI raises where memory is short: that says nothing about DALI.
    """
    levels = TRIED_LEVELS[:channels]
    image = Image.new(formats.MODES[channels], (16, 16), levels if channels > 1 else levels[0])
    settings = DecodeSettings(8, (0.0,) * channels, (1.0,) * channels, device, torch.float32, 1)
    try:
        pipe = build(settings, 1, 1, 1)
        window_14 = np.array([[0, 0, 16, 16]], np.int32)
        _feed(pipe, settings, DecodeRequest([formats.as_ppm(image)], window_14))
        (made,) = pipe.run()
        made = made.as_cpu() if device.type == "cuda" else made
        found_C = 255 * np.asarray(made.as_tensor())[0].mean((1, 2))
        if found_C.shape != (channels,) or np.abs(found_C - levels).max() > 2:
            return f"of {levels} in {channels} channels it makes {found_C.tolist()}"
    except (ImportError, OSError, *FAILURES) as error:
        if oom.is_out_of_memory(error):
            raise
        lines = str(error).strip().split("\n")
        return next((line for line in lines if not line.endswith(":")), type(error).__name__)
    return None


@contextlib.contextmanager
def _failures():
    """What DALI raises of a batch, as the seam has it."""
    try:
        yield
    except FAILURES as error:
        raise DecodeFailed(str(error)) from error


def build(settings: DecodeSettings, batch_size: int, threads: int, depth: int):
    """A built DALI pipeline with the inputs of DecodeRequest. On the CPU it needs no GPU at all."""
    import nvidia.dali.fn as fn
    from nvidia.dali import pipeline_def, types
    from nvidia.dali.auto_aug.rand_augment import rand_augment

    on_gpu = settings.device.type == "cuda"
    kind = {1: types.GRAY, 3: types.RGB}.get(settings.channels, types.ANY_DATA)
    device_id = (settings.device.index or 0) if on_gpu else None

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
                encoded, device="mixed", output_type=kind, hw_decoder_load=settings.hw_decoder_load
            )
            images = fn.slice(images, start=start, shape=shape, axes=(0, 1))
        else:
            images = fn.decoders.image_slice(
                encoded, device="cpu", output_type=kind, start=start, shape=shape,
                axis_names="HW",
            )  # fmt: skip
        size = settings.height_width
        images = fn.resize(images, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
        if settings.colour:
            b, c, s = (given(n, types.FLOAT, 0) for n in ("brightness", "contrast", "saturation"))
            images = fn.color_twist(images, brightness=b, contrast=c, saturation=s)
        if settings.rand_augment:
            n, magnitude, seed = settings.rand_augment
            images = rand_augment(images, n, magnitude, shape=size, seed=seed)
        return fn.crop_mirror_normalize(
            images,
            dtype=types.FLOAT16 if settings.dtype == torch.float16 else types.FLOAT,
            output_layout="CHW",
            mean=[255.0 * m for m in settings.mean],
            std=[255.0 * s for s in settings.std],
            mirror=given("flip", types.INT32, 0) if settings.flip else 0,
        )

    conditional = settings.rand_augment is not None
    # In RandAugment DALI warns of its own names, whatever is ignored: so it is kept and dropped.
    with warnings.catch_warnings(record=conditional):
        pipe = pipeline_def(shown, enable_conditionals=conditional)(
            batch_size=batch_size, num_threads=threads, device_id=device_id,
            prefetch_queue_depth=depth,
        )  # fmt: skip
        pipe.build()
    WRITTEN.take()
    return pipe


def _feed(pipe, settings: DecodeSettings, request: DecodeRequest) -> None:
    pipe.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in request.encoded])
    pipe.feed_input("start", np.ascontiguousarray(request.window_B4[:, :2]))
    pipe.feed_input("shape", np.ascontiguousarray(request.window_B4[:, 2:]))
    if settings.flip:
        pipe.feed_input("flip", request.flip_B)
    if settings.colour:
        for column, name in enumerate(("brightness", "contrast", "saturation")):
            pipe.feed_input(name, np.ascontiguousarray(request.colour_B3[:, column]))


class DaliDecoder:
    """decoder.Decoder by the pipeline above, on the device of the tensors."""

    def __init__(self, settings: DecodeSettings, batch_size: int):
        self._settings, self._batch_size, self.channels = settings, batch_size, settings.channels
        on_gpu = settings.device.type == "cuda"
        self._stream = torch.cuda.Stream(settings.device) if on_gpu else None
        self._probe = None
        self.restart()

    def restart(self) -> None:
        self._pipe = None  # first, so that two are never alive at once
        self._pipe = build(self._settings, self._batch_size, self._settings.threads, DEPTH)
        self._fed = self._repeats = 0

    def submit(self, request: DecodeRequest) -> None:
        with _failures():
            while self._repeats:  # come out before the next batch, and nobody asked for them
                self._pipe.share_outputs()
                self._pipe.release_outputs()
                self._repeats -= 1
            self._put_in(request)

    def _put_in(self, request: DecodeRequest) -> None:
        _feed(self._pipe, self._settings, request)
        self._last = request
        self._fed += 1
        if self._fed >= DEPTH:  # the first call starts DEPTH runs, and each run needs its input
            self._pipe.schedule_run()

    def collect(self) -> torch.Tensor:
        with _failures():
            while self._fed < DEPTH:  # fewer batches than the pipeline is deep: repeats fill it
                self._put_in(self._last)
                self._repeats += 1
            (images,) = self._pipe.share_outputs()
            try:
                return self._copied(images.as_tensor())
            finally:
                self._pipe.release_outputs()

    def _copied(self, images) -> torch.Tensor:
        if self._stream is None:
            return torch.from_numpy(np.asarray(images)).to(self._settings.dtype, copy=True)
        from nvidia.dali.plugin.pytorch import feed_ndarray

        native = torch.float16 if self._settings.dtype == torch.float16 else torch.float32
        with torch.cuda.stream(self._stream):
            copy = torch.empty(images.shape(), dtype=native, device=self._settings.device)
            feed_ndarray(images, copy, cuda_stream=self._stream)
            copy = copy.to(self._settings.dtype)
        self._stream.synchronize()  # the loader's own thread waits, the training does not
        return copy

    def decode_alone(self, request: DecodeRequest, b: int) -> bytes | None:
        one = request.rows([b])
        if self._decodes(one):
            return request.encoded[b]
        try:
            image = formats.decode_rgb(
                request.encoded[b], self._settings.max_pixels, channels=self.channels
            )
            one.encoded = [formats.as_ppm(image)]
        except OSError:
            return None
        return one.encoded[0] if self._decodes(one) else None

    def library_messages(self) -> list[str]:
        return WRITTEN.lines()

    def _decodes(self, one: DecodeRequest) -> bool:
        """DALI's own verdict, on its own device, about a batch of one."""
        if self._probe is None:
            self._probe = build(self._settings, 1, 1, 1)
        try:
            _feed(self._probe, self._settings, one)
            self._probe.schedule_run()
            self._probe.share_outputs()
            self._probe.release_outputs()
        except FAILURES:
            self._probe = None
            return False
        return True


class DaliWholeDecoder:
    """decoder.WholeDecoder."""

    def __init__(self, batch_size: int, threads: int):
        self._batch_size, self._threads = batch_size, threads
        self._pipe = None

    def __call__(self, encoded: list[bytes]) -> list[np.ndarray]:
        self._pipe = self._pipe or _build_whole(self._batch_size, self._threads)
        try:
            plain = [formats.as_plain(data) for data in encoded]
        except OSError as error:
            raise DecodeFailed(str(error)) from error
        try:
            with _failures():
                self._pipe.feed_input("encoded", [np.frombuffer(d, np.uint8) for d in plain])
                (images,) = self._pipe.run()
        except DecodeFailed:
            self._pipe = None  # a failure ends a pipeline
            raise
        return [np.array(images.at(b)) for b in range(len(encoded))]  # DALI uses its memory again

    def library_messages(self) -> list[str]:
        return WRITTEN.lines()


def _build_whole(batch_size: int, threads: int):
    import nvidia.dali.fn as fn
    from nvidia.dali import Pipeline, types

    pipe = Pipeline(batch_size, threads, None, prefetch_queue_depth=1)
    with pipe:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        pipe.set_outputs(fn.decoders.image(encoded, device="cpu", output_type=types.RGB))
    pipe.build()
    WRITTEN.take()
    return pipe
