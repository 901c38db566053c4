"""What all kernels share: launching, Triton or its stand-in, sums of partial results."""

from cjepa_fast.kernels.common.ranks import Ranks

__all__ = ["Ranks"]
