"""Who decodes: DALI (dali.py) where it works, else Pillow (pillow_decoder.py).

Both show the same windows of the same images, in the same order. On the CPU their pixels differ by
one level of 255 at most (tests/data/test_data_pillow_decoder.py).
"""

import functools
import os
from collections.abc import Callable

import torch

from cjepa_fast.data import dali
from cjepa_fast.data.dali import DaliDecoder, DaliWholeDecoder
from cjepa_fast.data.decoder import Decoder, DecodeSettings, WholeDecoder
from cjepa_fast.data.pillow_decoder import PillowDecoder, PillowWholeDecoder

DALI, PILLOW = "dali", "pillow"
CHOICES = ("auto", DALI, PILLOW)  # of data.decoder
VARIABLE = "CJEPA_DECODER"  # what "auto" means, for the evaluations too


def open_decoder(kind: str, settings: DecodeSettings, batch_size: int) -> Decoder:
    """kind: what choose_decoder() answered."""
    if kind == PILLOW:
        return PillowDecoder(settings)
    return DaliDecoder(settings, batch_size)


def open_whole_decoder(kind: str, batch_size: int, threads: int) -> WholeDecoder:
    """A decoder of up to batch_size whole images at once. kind: what choose_decoder() answered."""
    if kind == PILLOW:
        return PillowWholeDecoder(threads)
    return DaliWholeDecoder(batch_size, threads)


def choose_decoder(
    wanted: str,
    device: torch.device,
    log: Callable[[str], None] = print,
    *,
    channels: int = 3,
    arrays: bool = False,
) -> str:
    """DALI or PILLOW, the latter for arrays. "auto": by CJEPA_DECODER, else DALI where it works on
    `device` with so many channels, else Pillow, and then log is told once. Raises ValueError for
    another word, or if DALI is demanded in vain.
    """
    key = "data.decoder"
    if wanted == "auto":
        key, wanted = VARIABLE, os.environ.get(VARIABLE) or "auto"
    if wanted not in CHOICES:
        raise ValueError(f"{key} = {wanted!r}: must be {', '.join(CHOICES)}")
    if wanted == PILLOW:
        return PILLOW
    if arrays and wanted == DALI:
        raise ValueError(f"{key} = {DALI!r}: it does not decode arrays (.npy, a TIFF of bands)")
    if arrays:
        return PILLOW
    problem = _problem_of_dali(str(device), channels)
    if problem and wanted == "auto":
        lacks = "work here" if channels == 3 else f"decode images of {channels} channels here"
        _say_once(log, f"Pillow decodes the images, since DALI does not {lacks}: {problem}")
        return PILLOW
    if problem:
        raise ValueError(
            f"{key} = {DALI!r}: DALI does not work here ({problem}); install it "
            "(pip install nvidia-dali-cuda130), or leave the choice to 'auto'"
        )
    return DALI


@functools.cache
def _problem_of_dali(device: str, channels: int) -> str | None:
    return dali.problem(torch.device(device), channels)


_said: set[str] = set()


def _say_once(log: Callable[[str], None], line: str) -> None:
    if line not in _said:
        _said.add(line)
        log(line)
