"""Sums over ranks, with the gradient that data parallelism expects.

Every rank computes the same global term. Its gradient here is the sum of all ranks' gradients, so
that their mean over the ranks is that of the term computed once on the concatenated batch. How the
ranks talk to each other is the caller's: the kernels know no process group.
"""

from typing import Protocol

import torch


class Ranks(Protocol):
    """The ranks whose rows together give a statistic; all must make the same calls."""

    index: int  # this one's

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of x over the ranks, as a new tensor; no gradient."""

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's x, all of one shape, in the ranks' order; no gradient."""


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in fp32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


class _SumOverRanks(torch.autograd.Function):
    """A sum whose gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx, x, ranks):
        ctx.ranks = ranks
        return ranks.sum(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.ranks.sum(grad), None


def sum_over_ranks(x: torch.Tensor, ranks: Ranks | None) -> torch.Tensor:
    """The sum of x over the ranks, differentiable; x itself where ranks is None."""
    return x if ranks is None else _SumOverRanks.apply(x, ranks)


def centred(z: torch.Tensor, ranks: Ranks | None) -> tuple[torch.Tensor, torch.Tensor]:
    """z (..., n, D) minus its mean over all n rows of all ranks, and that count of rows (0-d)."""
    count = z.new_full((), float(z.shape[-2]))  # no copy from the host: it may be recorded
    if ranks is not None:
        count = ranks.sum(count)
    mean = sum_over_ranks(z.sum(-2, keepdim=True), ranks) / count
    return z - mean, count


def rows_of_ranks(rows: int, device: torch.device, ranks: Ranks) -> list[int]:
    """How many rows each rank has, known to every rank. The host waits for the device once."""
    return torch.cat(ranks.gather(torch.tensor([rows], device=device))).tolist()


def gathered(z_MnD: torch.Tensor, counts: list[int], ranks: Ranks) -> torch.Tensor:
    """All ranks' rows, concatenated in the ranks' order: (M, sum(counts), D), no gradient."""
    M, n, D = z_MnD.shape
    padded = z_MnD.new_zeros(M, max(counts), D)
    padded[:, :n] = z_MnD
    parts = ranks.gather(padded)
    return torch.cat([part[:, :rows] for part, rows in zip(parts, counts, strict=True)], dim=1)
