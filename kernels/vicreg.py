"""VICReg's variance and covariance terms (Bardes et al. 2022, arXiv 2105.04906).

For z of shape (n, D), C = (z - mean)^T (z - mean) / (n - 1):
    std_loss = mean_j max(0, gamma - sqrt(C_jj + eps))
    cov_loss = sum_{i != j} C_ij^2 / D
The statistics are those of the global batch. This is the plain-PyTorch definition, on every
device.
"""

import torch
import torch.distributed as dist


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in fp32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is the sum of all ranks' gradients.

    Each rank computes the same global term. Its gradient, averaged over ranks as data parallelism
    does, is then that of the term computed once on the concatenated batch.
    """

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


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


def vicreg_terms(
    z: torch.Tensor,
    gamma: float = 1.0,
    eps: float = 1e-4,
    group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(std_loss, cov_loss, std_per_dim) of z (n, D), or their means over M of z (M, n, D).

    fp32 throughout (float64 for float64 input): z is centred before it is squared. With `group`
    the statistics are those of the batch concatenated over its processes, of equal or uneven n.
    Raises ValueError for fewer than two rows, whose variance is undefined.
    """
    if z.dim() not in (2, 3):
        raise ValueError(f"z must be (n, D) or (M, n, D), not {tuple(z.shape)}")
    if group is None and z.shape[-2] < 2:
        raise ValueError(f"the variance needs at least 2 rows, z is {tuple(z.shape)}")
    z, count = centred(wide(z), group)
    covariance = sum_over_ranks(z.transpose(-2, -1) @ z, group) / (count - 1)
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    std = (variance + eps).sqrt()
    off_diagonal = covariance - torch.diag_embed(variance)
    cov_loss = off_diagonal.square().sum((-2, -1)).mean() / z.shape[-1]
    std_per_dim = std if z.dim() == 2 else std.mean(0)
    return (gamma - std).relu().mean(), cov_loss, std_per_dim.detach()
