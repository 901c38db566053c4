"""Sums over the processes of a group, with the gradient that data parallelism expects.

Every rank computes the same global term. Its gradient here is the sum of all ranks' gradients, so
that their average over the ranks is that of the term computed once on the concatenated batch.
"""

import torch
import torch.distributed as dist


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in fp32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


def all_reduced(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum of x over the group, as a new tensor."""
    x = x.contiguous().clone()
    dist.all_reduce(x, group=group)
    return x


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return all_reduced(x, group)

    @staticmethod
    def backward(ctx, grad):
        return all_reduced(grad, ctx.group), None


def sum_over_ranks(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The sum of x over the group's processes, differentiable; x itself where group is None."""
    return x if group is None else _SumOverRanks.apply(x, group)


def centred(z: torch.Tensor, group: dist.ProcessGroup | None) -> tuple[torch.Tensor, torch.Tensor]:
    """z (..., n, D) minus its mean over all n rows of all ranks, and that count of rows (0-d)."""
    count = torch.tensor(float(z.shape[-2]), device=z.device, dtype=z.dtype)
    if group is not None:
        dist.all_reduce(count, group=group)
    mean = sum_over_ranks(z.sum(-2, keepdim=True), group) / count
    return z - mean, count


def rows_of_ranks(rows: int, device: torch.device, group: dist.ProcessGroup) -> list[int]:
    """How many rows each rank has, known to every rank. The host waits for the device once."""
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(group.size())]
    dist.all_gather(counts, torch.tensor([rows], device=device), group=group)
    return torch.cat(counts).tolist()


def gathered(z_MnD: torch.Tensor, counts: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """All ranks' rows, concatenated in the order of ranks: (M, sum(counts), D), no gradient."""
    M, n, D = z_MnD.shape
    padded = z_MnD.new_zeros(M, max(counts), D)
    padded[:, :n] = z_MnD
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:, :rows] for part, rows in zip(parts, counts, strict=True)], dim=1)
