"""Whole images in their own sizes, decoded on the CPU: what dense tasks begin with."""

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch

from cjepa_fast.data import pillow_decoder
from cjepa_fast.data.decoder import DecodeFailed
from cjepa_fast.data.decoder_choice import choose_decoder, open_whole_decoder
from cjepa_fast.data.decoder_warnings import DecoderWarnings

T = TypeVar("T")


class WholeImages:
    """Decodes up to batch_size files at once; used from one thread at a time."""

    def __init__(self, batch_size: int, threads: int):
        kind = choose_decoder("auto", torch.device("cpu"))
        self._decode = open_whole_decoder(kind, batch_size, threads)
        self._warnings = DecoderWarnings(say=print, note=print)

    def __call__(self, encoded: list[bytes], names: list[str]) -> list[torch.Tensor]:
        """Upright RGB, each (3, H, W) uint8. Raises ValueError, naming what cannot be decoded."""
        try:
            found = self._decode(encoded)
        except DecodeFailed as error:
            alone = [self._alone(data, name) for data, name in zip(encoded, names, strict=True)]
            if not any(rescued for _, rescued in alone):
                raise error  # each decodes alone: not a bad file
            found = [image_HW3 for image_HW3, _ in alone]
        pairs = zip(names, encoded, strict=True)
        self._warnings.hear(
            self._decode, lambda: [(n, functools.partial(self._alone, d, n)) for n, d in pairs]
        )
        return [torch.from_numpy(image_HW3).permute(2, 0, 1) for image_HW3 in found]

    def _alone(self, data: bytes, name: str) -> tuple[np.ndarray, bool]:
        """(the image, whether it is by Pillow since the decoder cannot read it)."""
        try:
            return self._decode([data])[0], False
        except DecodeFailed:
            try:
                return pillow_decoder.pixels(data), True
            except OSError as error:
                raise ValueError(f"{name} cannot be decoded: replace or remove it") from error


def ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the items (none is None); a thread makes the next while the last is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        task = pool.submit(next, items, None)
        while (item := task.result()) is not None:
            task = pool.submit(next, items, None)
            yield item
