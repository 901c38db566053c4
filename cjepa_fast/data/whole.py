"""Whole images in their own sizes, decoded by DALI on the CPU: what dense tasks begin with."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch

from cjepa_fast.data.dali import FAILURES

T = TypeVar("T")


class WholeImages:
    """Decodes up to batch_size files at once; used from one thread at a time."""

    def __init__(self, batch_size: int, threads: int):
        self._batch_size, self._threads = batch_size, threads
        self._pipe = None

    def __call__(self, encoded: list[bytes], names: list[str]) -> list[torch.Tensor]:
        """Upright RGB, each (3, H, W) uint8. Raises ValueError, naming what cannot be decoded."""
        try:
            return self._decode(encoded)
        except FAILURES as error:
            self._pipe = None  # a failure ends a pipeline
            for data, name in zip(encoded, names, strict=True):
                self._decode_alone(data, name)
            raise error  # each decodes alone: not a bad file

    def _decode_alone(self, data: bytes, name: str) -> None:
        try:
            self._decode([data])
        except FAILURES as error:
            self._pipe = None
            raise ValueError(f"{name} cannot be decoded: replace or remove it") from error

    def _decode(self, encoded: list[bytes]) -> list[torch.Tensor]:
        self._pipe = self._pipe or _build(self._batch_size, self._threads)
        self._pipe.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in encoded])
        (images,) = self._pipe.run()
        found = [np.array(images.at(b)) for b in range(len(encoded))]  # copies: DALI uses its again
        return [torch.from_numpy(image_HW3).permute(2, 0, 1) for image_HW3 in found]


def _build(batch_size: int, threads: int):
    import nvidia.dali.fn as fn
    from nvidia.dali import Pipeline, types

    pipe = Pipeline(batch_size, threads, None, prefetch_queue_depth=1)
    with pipe:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        pipe.set_outputs(fn.decoders.image(encoded, device="cpu", output_type=types.RGB))
    pipe.build()
    return pipe


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, none of them None; a thread makes the next while the last is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        task = pool.submit(next, items, None)
        while (item := task.result()) is not None:
            task = pool.submit(next, items, None)
            yield item
