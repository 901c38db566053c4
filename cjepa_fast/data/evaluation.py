"""Images for evaluation: centre crops, in the set's order, each once."""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch

from cjepa_fast.data import crops
from cjepa_fast.data.decode_pipeline import BatchRequest, Skipped, decode
from cjepa_fast.data.decoder import DecodeRequest, DecodeSettings
from cjepa_fast.data.decoder_choice import choose_decoder, open_decoder
from cjepa_fast.data.decoder_warnings import summary
from cjepa_fast.data.sources import DecodableImages
from cjepa_fast.runtime.image_size import ImageSize


def eval_batches(
    images: DecodableImages,
    *,
    image_size: ImageSize,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch_size: int,
    device: torch.device | str,
    dtype: torch.dtype,
    threads: int,
    resize: float = 1.0,
    windows_N4: np.ndarray | None = None,
    decoder: str = "auto",
    log=print,
    record: Callable[[dict], None] | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(images_BCHW, index_B), in order, the last batch partial; a bad image is left out.

    Each image is cropped to the centred window of image_size's aspect with `resize` times the sides
    of the largest, then resized to it. windows_N4: of each image (crops.py), instead. decoder:
    decoder_choice.CHOICES. record: takes name and reason of each bad image. index_B: int64
    positions in the set, on the CPU.
    """
    if not 0 < resize <= 1:
        raise ValueError(
            f"resize is the share of the largest centred window to keep, in (0, 1], not {resize}"
        )
    settings = DecodeSettings(
        image_size, tuple(mean), tuple(std), torch.device(device), dtype, threads,
        max_pixels=images.limits.max_pixels, arrays=images.has_arrays,
        bit_depth=images.limits.bit_depth,
    )  # fmt: skip
    images.require_channels(settings.channels)
    kind = choose_decoder(
        decoder, settings.device, log, channels=settings.channels, arrays=settings.arrays
    )
    made = open_decoder(kind, settings, batch_size)
    if windows_N4 is None:
        windows_N4 = crops.centre(images.sizes_N2, resize, image_size)

    def show(index_B: np.ndarray) -> DecodeRequest:
        return DecodeRequest([], windows_N4[index_B])

    every_N = np.arange(len(images))
    batch_requests = (
        BatchRequest(every_N[a : a + batch_size], show) for a in range(0, len(images), batch_size)
    )
    drop = lambda batch_request, b, decoder: False  # noqa: E731
    skipped = Skipped(images, log, settings)
    if record:
        skipped.attach(log, record, note=lambda line: None)
    decoded = decode(batch_requests, images, made, skipped, drop)
    with contextlib.closing(decoded):
        for images_BCHW, batch_request in decoded:
            yield images_BCHW, torch.from_numpy(batch_request.index_B)
    if line := summary(skipped.warnings.count):
        log(line)
