"""VICReg's terms of all ranks' rows together, z (M, n, D) on each.

Either z is gathered or the columns' sums and second moments are reduced, whichever is fewer bytes.
"""

import torch
from torch.autograd.function import once_differentiable

from cjepa_fast.kernels.common.ranks import Ranks, gathered, rows_of_ranks, wide
from cjepa_fast.kernels.vicreg.backward import terms_grad
from cjepa_fast.kernels.vicreg.columns import launch_columns
from cjepa_fast.kernels.vicreg.forward import (
    launch_moments,
    launch_reduce,
    runs_kernels,
    terms_forward,
)
from cjepa_fast.kernels.vicreg.plain import (
    plain_centred,
    plain_mean,
    plain_terms,
    split_diagonal,
)
from cjepa_fast.kernels.vicreg.tiles import MATRIX_FORMS, Saved, Terms, matmuls_of


def _about(z: torch.Tensor, count: int, ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of all ranks' rows in two parts (2, M, D), and this rank's Zc^T Zc (M, D, D)."""
    M, n, D = z.shape
    kind, fused = wide(z[:0]).dtype, runs_kernels(z)
    mean, variance = launch_columns(z) if fused else (plain_mean(z), None)
    mean = mean.double().sum(0)
    # D numbers, reduced in float64 so that two of `kind` carry the mean as precisely as locally.
    common = ranks.sum(n * mean if n else torch.zeros_like(mean)) / count
    parts = torch.stack([common.to(kind), (common - common.to(kind)).to(kind)])
    if not fused:
        x = plain_centred(z, parts)
        return parts, x.mT @ x
    second = torch.empty(M, 1, D, D, device=z.device)
    launch_reduce(launch_moments(z, parts, gram=False), D, 1.0, True, second)
    # The variances are as precise as on one rank, not as products of rounded values are.
    squares = variance * (n - 1) if n > 1 else torch.zeros_like(variance)
    second[:, 0].diagonal(dim1=1, dim2=2).copy_(squares + n * (mean - common).square())
    return parts, second[:, 0]


def in_parts(matrix: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """A matrix (M, D, D) in the form that backward takes for z: (M, parts, D, D)."""
    dtype, parts = MATRIX_FORMS[matmuls_of(z.dtype)] if runs_kernels(z) else (matrix.dtype, 1)
    high = matrix.to(dtype)
    halves = [high, (matrix - high).to(dtype)]
    return torch.stack(halves[:parts], dim=1)


def _gathers(z: torch.Tensor, counts: list[int]) -> bool:
    """Whether all ranks' z is fewer bytes than D sums in float64 and D^2 moments in fp32."""
    D, size = z.shape[2], z.element_size()
    return len(counts) * max(counts) * size < 8 + D * max(size, 4)


def _reduced_forward(
    z: torch.Tensor, gamma: float, eps: float, count: int, ranks: Ranks, need_grad: bool
) -> tuple[Terms, Saved]:
    with torch.autocast(z.device.type, enabled=False):
        mean, second = _about(z, count, ranks)
        covariance = ranks.sum(second).div_(count - 1)
        variance, squares = split_diagonal(covariance)
        matrix = in_parts(covariance, z) if need_grad else covariance.new_empty(0)
        return plain_terms(squares, variance, gamma, eps), Saved(mean, variance, matrix)


class GlobalTerms(torch.autograd.Function):
    """The terms of all ranks' rows together, on every rank; z (M, n, D)."""

    @staticmethod
    def forward(ctx, z, gamma, eps, ranks):
        n = z.shape[1]
        counts = rows_of_ranks(n, z.device, ranks)
        count = sum(counts)
        if count < 2:
            raise ValueError(f"the variance needs at least 2 rows, all ranks together have {count}")
        need_grad = ctx.needs_input_grad[0]
        ctx.arguments, ctx.ranks, ctx.own = (gamma, eps, count), ranks, None
        if _gathers(z, counts):
            before = sum(counts[: ranks.index])
            ctx.own = slice(before, before + n)
            z = gathered(z, counts, ranks)
            terms, saved = terms_forward(z, gamma, eps, need_grad)
        else:
            terms, saved = _reduced_forward(z, gamma, eps, count, ranks, need_grad)
        ctx.mark_non_differentiable(terms[2])
        if need_grad:
            ctx.save_for_backward(z, *saved)
        return terms

    @staticmethod
    @once_differentiable
    def backward(ctx, g_std, g_cov, _):
        z, *saved = ctx.saved_tensors
        g_std, g_cov = ctx.ranks.sum(torch.stack([g_std, g_cov]))
        dz = terms_grad(z, Saved(*saved), g_std, g_cov, *ctx.arguments)
        return dz if ctx.own is None else dz[:, ctx.own], None, None, None
