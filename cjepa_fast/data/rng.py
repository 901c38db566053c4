"""Random numbers as pure functions of where they are used: (seed, RNG stream, epoch, index).

No generator carries a state, so a draw is the same on every rank, for every world size and after
every restart, and nothing about it need be saved. The mixing function is SplitMix64's finaliser
(Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), applied once
for each part of the key.
"""

import torch

ORDER, CROP, FLIP, COLOUR, MASK_SIZE, MASK_POSITION, MASK_KEEP, SUBSTITUTE = range(8)
AUGMENT, DIRECTION = range(8, 10)

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_WORD = 2**64 - 1


def _signed(value: int) -> int:
    """The 64-bit pattern of `value` as a Python int that fits a torch int64."""
    value &= _WORD
    return value - 2**64 if value >= 2**63 else value


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift: torch's `>>` on int64 copies the sign bit."""
    return (x >> bits).bitwise_and_(2 ** (64 - bits) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = x + _signed(_GOLDEN)  # a tensor of its own, so that the rest may be in place
    x.bitwise_xor_(_shift(x, 30)).mul_(_signed(_MIX_1))
    x.bitwise_xor_(_shift(x, 27)).mul_(_signed(_MIX_2))
    return x.bitwise_xor_(_shift(x, 31))


def _mixed(x: int) -> int:
    """`_mix` of a number, which as a tensor of one takes 100 times as long."""
    x = (x + _GOLDEN) & _WORD
    x = (x ^ (x >> 30)) * _MIX_1 & _WORD
    x = (x ^ (x >> 27)) * _MIX_2 & _WORD
    return x ^ (x >> 31)


def bits(seed: int, stream: int, epoch: int, index: torch.Tensor) -> torch.Tensor:
    """64 random bits for each index: int64 in the shape of `index` (int64, any device)."""
    key = _mixed(seed)
    for part in (stream, epoch):
        key = _mixed(key ^ part)
    return _mix(_mix(index ^ _signed(key)))


def uniforms(seed: int, stream: int, epoch: int, index_B: torch.Tensor, count: int) -> torch.Tensor:
    """`count` independent uniforms in [0, 1) for each index: (B, count) float64.

    index_B: int64 (B,), any device. 53 bits of each draw are used, so 1.0 is never reached.
    """
    bits_B1 = bits(seed, stream, epoch, index_B)[:, None]
    column_C = torch.arange(count, dtype=torch.int64, device=index_B.device)
    return _shift(_mix(bits_B1 ^ _mix(column_C)), 11).double() * 2.0**-53


def permutation(seed: int, epoch: int, n: int) -> torch.Tensor:
    """A permutation of 0..n-1, int64 (n,): the image that stands at each index of an epoch.

    Sorting by hashed keys depends on no library's generator, so it outlives their versions.
    """
    return torch.argsort(bits(seed, ORDER, epoch, torch.arange(n)), stable=True)


def directions(seed: int, step: int, width: int, count: int, device: torch.device) -> torch.Tensor:
    """`count` directions, uniform on the unit sphere: fp32 (width, count), for step `step`.

    Normal numbers by Box and Muller's transform, divided by their length.
    """
    index = torch.arange(width, dtype=torch.int64, device=device)
    draws = uniforms(seed, DIRECTION, step, index, 2 * count)
    radius, angle = (-2 * (1 - draws[:, :count]).log()).sqrt(), 2 * torch.pi * draws[:, count:]
    return torch.nn.functional.normalize(radius * angle.cos(), dim=0).float()
