"""VICReg's closed forms in plain PyTorch: the path on the CPU, and of float64.

The maths of the kernels, in place of automatic differentiation: see the package's docstring.
z (M, n, D), mean (2, M, D), variance (M, D), matrix (M, 1, S, S) with S = min(n, D).
"""

import torch

from cjepa_fast.kernels.common.ranks import wide
from cjepa_fast.kernels.vicreg.tiles import Saved, Terms


def plain_mean(z: torch.Tensor) -> torch.Tensor:
    first = wide(z).mean(1)
    return torch.stack([first, (wide(z) - first[:, None]).mean(1)])


def plain_centred(z: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    return (wide(z) - mean[0][:, None]).sub_(mean[1][:, None])


def plain_terms(squares: torch.Tensor, variance: torch.Tensor, gamma: float, eps: float) -> Terms:
    """The terms from the sum of all squares off the diagonal and the variances (M, D)."""
    std = (variance + eps).sqrt()
    return (gamma - std).relu().mean(), squares / variance.numel(), std.mean(0)


def split_diagonal(covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The diagonals (M, D) and the square sum of the rest of covariance (M, D, D), whose diagonal
    becomes 0: it is not subtracted, which would lose a small sum beside it."""
    diagonal = covariance.diagonal(dim1=1, dim2=2)
    variance = diagonal.clone()
    diagonal.zero_()
    return variance, covariance.square().sum()


def plain_forward(
    z: torch.Tensor, gamma: float, eps: float, need_grad: bool
) -> tuple[Terms, Saved]:
    _, n, D = z.shape
    mean = plain_mean(z)
    x = plain_centred(z, mean)
    if n < D:
        variance = x.square().sum(1) / (n - 1)
        wider = x.double()  # the Gram's gradient is a small difference; the matrix is the small one
        matrix = (wider @ wider.mT / (n - 1)).to(x.dtype)
        squares = (matrix.square().sum() - variance.square().sum()).clamp(min=0)
    else:
        matrix = x.mT @ x / (n - 1)
        variance, squares = split_diagonal(matrix)
    matrix = matrix[:, None] if need_grad else x.new_empty(0)
    return plain_terms(squares, variance, gamma, eps), Saved(mean, variance, matrix)


def plain_grad(
    z: torch.Tensor, saved: Saved, g_std: torch.Tensor, g_cov: torch.Tensor,
    gamma: float, eps: float, count: int,
) -> torch.Tensor:  # fmt: skip
    M, _, D = z.shape
    mean, variance, matrix = saved
    x, matrix = plain_centred(z, mean), matrix[:, 0]
    scale = 1 / (M * D * (count - 1))
    std = (variance + eps).sqrt()
    slope_cov = 4 * scale * g_cov
    slope = torch.where(std < gamma, -scale * g_std / std, 0.0)
    if matrix.shape[1] != D:
        slope, x = slope - slope_cov * variance, x.double()
        result = matrix.double() @ x
    else:
        result = x @ matrix
    return result.mul_(slope_cov).add_(x.mul_(slope[:, None])).to(z.dtype)
