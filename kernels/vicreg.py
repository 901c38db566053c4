"""VICReg's variance and covariance terms, fused (Bardes et al. 2022, arXiv 2105.04906).

For z of shape (n, D), Zc = z - mean and C = Zc^T Zc / (n - 1):
    std_loss = mean_j max(0, gamma - s_j),  s_j = sqrt(C_jj + eps)
    cov_loss = sum_{i != j} C_ij^2 / D
and for (M, n, D) the means of both over M. With upstream gradients g_std and g_cov, and O for C
with a zero diagonal:
    dz = 4 g_cov / (M D (n-1)) * Zc O  -  g_std / (M D (n-1)) * Zc diag(1[s_j < gamma] / s_j)
Where n < D the n x n Gram matrix K = Zc Zc^T / (n - 1) takes the place of C, for it has the same
Frobenius norm and Zc C = K Zc: cov_loss = (|K|^2 - sum_j C_jj^2) / D, Zc O = K Zc - Zc diag(C_jj).

Launches: means and variances of stretches of rows; of all rows; tiles of the symmetric matrix,
S x S with S = min(n, D), on and above its diagonal, over stretches of the other dimension; their
sum, with its sum of squares taken as it is written (mirrored, for backward; not at all where no
gradient is wanted); the two terms. Backward is one launch. No atomics: sums run in a fixed order,
and the same input gives the same bits.

Precision. The mean is a pair of fp32 numbers (the first row, and the mean distance from it), good
far beyond fp32, so that a spread of 1e-5 of the mean survives. The variances are sums of squares of
the centred fp32 values, so std_loss and std_per_dim are fp32 for every input, and so is the
diagonal's part of the gradient, far the larger. The off-diagonal products accumulate in fp32; into
them values enter as follows (the tests' error budget decides):
    fp32 input            three tf32 products of two halves each, 2^-21 relative
    bf16 and fp16 input   three bf16 products of two halves each, 2^-17
One product of values rounded to bf16 would fail: forward where z is coarse, its mean 100 times its
spread, so that equal values round alike and cov_loss is off by up to 2^-7; backward where D is
small, so that little averages out. The error of the Gram's cov_loss is
relative to |K|^2 / D, of which cov_loss may be a small part.

Bytes that must move, for b bytes an element: forward n D b twice (means, then tiles) and the matrix
once; backward 2 n D b (z and dz) and the matrix once. Operations, 2 a multiply-add: forward
n D S (upper half), backward 2 n D S; three times that by the products above.
n = 25,088, D = 1280, bf16: 41 and 82 GFLOP against 128 MB each.
"""

import torch
from torch.autograd.function import once_differentiable

from cjepa_fast.kernels.common.launch import use_kernel
from cjepa_fast.kernels.common.ranks import (
    Ranks,
    centred,
    gathered,
    rows_of_ranks,
    sum_over_ranks,
    wide,
)
from cjepa_fast.kernels.vicreg_tiles import (
    MATRIX_FORMS,
    Saved,
    Terms,
    empty_matrix,
    fused_forward,
    launch_columns,
    launch_grad,
    launch_moments,
    launch_reduce,
    products_of,
)


def vicreg_terms_reference(
    z: torch.Tensor,
    gamma: float = 1.0,
    eps: float = 1e-4,
    ranks: Ranks | None = None,
) -> Terms:
    """The definition of `vicreg_terms`, in plain PyTorch and its automatic gradient."""
    _check(z, ranks)
    with torch.autocast(z.device.type, enabled=False):
        z, count = centred(wide(z), ranks)
        covariance = sum_over_ranks(z.transpose(-2, -1) @ z, ranks) / (count - 1)
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        std = (variance + eps).sqrt()
        off_diagonal = covariance - torch.diag_embed(variance)
        cov_loss = off_diagonal.square().sum((-2, -1)).mean() / z.shape[-1]
        std_per_dim = std if z.dim() == 2 else std.mean(0)
        return (gamma - std).relu().mean(), cov_loss, std_per_dim.detach()


def _check(z: torch.Tensor, ranks: Ranks | None) -> None:
    if z.dim() not in (2, 3):
        raise ValueError(f"z must be (n, D) or (M, n, D), not {tuple(z.shape)}")
    if ranks is None and z.shape[-2] < 2:
        raise ValueError(f"the variance needs at least 2 rows, z is {tuple(z.shape)}")


# --- the same closed forms in plain PyTorch: the CPU's path, and float64's


def _plain_mean(z: torch.Tensor) -> torch.Tensor:
    first = wide(z).mean(1)
    return torch.stack([first, (wide(z) - first[:, None]).mean(1)])


def _plain_centred(z: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    return (wide(z) - mean[0][:, None]).sub_(mean[1][:, None])


def _plain_terms(squares: torch.Tensor, variance: torch.Tensor, gamma: float, eps: float) -> Terms:
    """The terms from the sum of all squares off the diagonal and the variances (M, D)."""
    std = (variance + eps).sqrt()
    return (gamma - std).relu().mean(), squares / variance.numel(), std.mean(0)


def _off_diagonal(covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The diagonals (M, D) and the square sum of the rest of covariance (M, D, D), whose diagonal
    becomes 0: it is not subtracted, which would lose a small sum beside it."""
    diagonal = covariance.diagonal(dim1=1, dim2=2)
    variance = diagonal.clone()
    diagonal.zero_()
    return variance, covariance.square().sum()


def _plain_forward(
    z: torch.Tensor, gamma: float, eps: float, need_grad: bool
) -> tuple[Terms, Saved]:
    _, n, D = z.shape
    mean = _plain_mean(z)
    x = _plain_centred(z, mean)
    if n < D:
        variance = x.square().sum(1) / (n - 1)
        wider = x.double()  # the Gram's gradient is a small difference; the matrix is the small one
        matrix = (wider @ wider.mT / (n - 1)).to(x.dtype)
        squares = (matrix.square().sum() - variance.square().sum()).clamp(min=0)
    else:
        matrix = x.mT @ x / (n - 1)
        variance, squares = _off_diagonal(matrix)
    matrix = matrix[:, None] if need_grad else x.new_empty(0)
    return _plain_terms(squares, variance, gamma, eps), Saved(mean, variance, matrix)


def _plain_grad(
    z: torch.Tensor, saved: Saved, g_std: torch.Tensor, g_cov: torch.Tensor,
    gamma: float, eps: float, count: int,
) -> torch.Tensor:  # fmt: skip
    M, _, D = z.shape
    mean, variance, matrix = saved
    x, matrix = _plain_centred(z, mean), matrix[:, 0]
    scale = 1 / (M * D * (count - 1))
    std = (variance + eps).sqrt()
    slope_cov = 4 * scale * g_cov
    slope = torch.where(std < gamma, -scale * g_std / std, 0.0)
    if matrix.shape[1] != D:
        slope, x = slope - slope_cov * variance, x.double()
        product = matrix.double() @ x
    else:
        product = x @ matrix
    return product.mul_(slope_cov).add_(x.mul_(slope[:, None])).to(z.dtype)


# --- the operators, of z (M, n, D) on one rank


def _fused(z: torch.Tensor) -> bool:
    return use_kernel(z) and z.numel() > 0


def _forward(z: torch.Tensor, gamma: float, eps: float, need_grad: bool) -> tuple[Terms, Saved]:
    with torch.autocast(z.device.type, enabled=False), torch.cuda.device_of(z):
        return (fused_forward if _fused(z) else _plain_forward)(z, gamma, eps, need_grad)


def _grad(
    z: torch.Tensor, saved: Saved, g_std: torch.Tensor, g_cov: torch.Tensor,
    gamma: float, eps: float, count: int,
) -> torch.Tensor:  # fmt: skip
    """The gradient of g_std * std_loss + g_cov * cov_loss at z; count: the statistics' rows."""
    with torch.autocast(z.device.type, enabled=False), torch.cuda.device_of(z):
        grad = launch_grad if _fused(z) else _plain_grad
        return grad(z, saved, g_std, g_cov, gamma, eps, count)


@torch.library.custom_op("cjepa_fast::vicreg_terms", mutates_args=())
def _terms_op(
    z: torch.Tensor, gamma: float, eps: float, need_grad: bool
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:  # fmt: skip
    """std_loss, cov_loss, std_per_dim, and what backward needs (see Saved)."""
    terms, saved = _forward(z, gamma, eps, need_grad)
    return (*terms, *saved)


@_terms_op.register_fake
def _(z, gamma, eps, need_grad):
    M, n, D = z.shape
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    like = lambda *shape: torch.empty(shape, dtype=dtype, device=z.device)  # noqa: E731
    if _fused(z):
        matrix = empty_matrix(z, n < D, need_grad)
    else:
        size = min(n, D)
        matrix = like(M, 1, size, size) if need_grad else like(0)
    return like(), like(), like(D), like(2, M, D), like(M, D), matrix


@torch.library.custom_op("cjepa_fast::vicreg_grad", mutates_args=())
def _grad_op(
    z: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, matrix: torch.Tensor,
    g_std: torch.Tensor, g_cov: torch.Tensor, gamma: float, eps: float,
) -> torch.Tensor:  # fmt: skip
    return _grad(z, Saved(mean, variance, matrix), g_std, g_cov, gamma, eps, z.shape[1])


@_grad_op.register_fake
def _(z, mean, variance, matrix, g_std, g_cov, gamma, eps):
    return torch.empty(z.shape, dtype=z.dtype, device=z.device)


def _keep_for_backward(ctx, inputs, output):
    z, ctx.gamma, ctx.eps, _ = inputs
    ctx.save_for_backward(z, *output[3:])
    # No zeros for the outputs without gradient: the matrix is large.
    ctx.set_materialize_grads(False)


def _backward(ctx, g_std, g_cov, *_):
    z, mean, variance, matrix = ctx.saved_tensors
    zero = variance.new_zeros(())
    g_std, g_cov = (zero if g is None else g for g in (g_std, g_cov))
    dz = _grad_op(z, mean, variance, matrix, g_std, g_cov, ctx.gamma, ctx.eps)
    return dz, None, None, None


_terms_op.register_autograd(_backward, setup_context=_keep_for_backward)


# --- several ranks


def _about(z: torch.Tensor, count: int, ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of all ranks' rows in two parts (2, M, D), and this rank's Zc^T Zc (M, D, D)."""
    M, n, D = z.shape
    kind, fused = wide(z[:0]).dtype, _fused(z)
    mean, variance = launch_columns(z) if fused else (_plain_mean(z), None)
    mean = mean.double().sum(0)
    # D numbers, reduced in float64 so that two of `kind` carry the mean as precisely as locally.
    common = ranks.sum(n * mean if n else torch.zeros_like(mean)) / count
    parts = torch.stack([common.to(kind), (common - common.to(kind)).to(kind)])
    if not fused:
        x = _plain_centred(z, parts)
        return parts, x.mT @ x
    second = torch.empty(M, 1, D, D, device=z.device)
    launch_reduce(launch_moments(z, parts, gram=False), D, 1.0, True, second)
    # The variances are as precise as on one rank, not as products of rounded values are.
    squares = variance * (n - 1) if n > 1 else torch.zeros_like(variance)
    second[:, 0].diagonal(dim1=1, dim2=2).copy_(squares + n * (mean - common).square())
    return parts, second[:, 0]


def _in_parts(matrix: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """A matrix (M, D, D) in the form that backward takes for z: (M, parts, D, D)."""
    dtype, parts = MATRIX_FORMS[products_of(z.dtype)] if _fused(z) else (matrix.dtype, 1)
    high = matrix.to(dtype)
    halves = [high, (matrix - high).to(dtype)]
    return torch.stack(halves[:parts], dim=1)


def _gathers(z: torch.Tensor, counts: list[int]) -> bool:
    """Whether all ranks' z is fewer bytes than D sums in float64 and D^2 moments in fp32."""
    D, size = z.shape[2], z.element_size()
    return len(counts) * max(counts) * size < 8 + D * max(size, 4)


class _GlobalTerms(torch.autograd.Function):
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
            terms, saved = _forward(z, gamma, eps, need_grad)
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
        dz = _grad(z, Saved(*saved), g_std, g_cov, *ctx.arguments)
        return dz if ctx.own is None else dz[:, ctx.own], None, None, None


def _reduced_forward(
    z: torch.Tensor, gamma: float, eps: float, count: int, ranks: Ranks, need_grad: bool
) -> tuple[Terms, Saved]:
    with torch.autocast(z.device.type, enabled=False), torch.cuda.device_of(z):
        mean, second = _about(z, count, ranks)
        covariance = ranks.sum(second).div_(count - 1)
        variance, squares = _off_diagonal(covariance)
        matrix = _in_parts(covariance, z) if need_grad else covariance.new_empty(0)
        return _plain_terms(squares, variance, gamma, eps), Saved(mean, variance, matrix)


def vicreg_terms(
    z: torch.Tensor,
    gamma: float = 1.0,
    eps: float = 1e-4,
    ranks: Ranks | None = None,
) -> Terms:
    """(std_loss, cov_loss, std_per_dim) of z (n, D), or their means over M of z (M, n, D).

    fp32 (float64 for float64 input), 0-d and (D,); std_per_dim takes no gradient. z: any strides.
    With `ranks` the statistics are those of the batch concatenated over them, of equal or uneven n,
    and each rank's gradient is that of the sum of all ranks' losses. All of the ranks must call it,
    and call backward. Each tells the others its n (the host waits for the
    device once), then either z is gathered, W * n * D elements of it for the largest n, or the
    columns' D sums in float64 and D^2 second moments in fp32 are reduced: whichever is fewer bytes.
    Raises ValueError for fewer than two rows, whose variance is undefined.
    """
    _check(z, ranks)
    z_MnD = z if z.dim() == 3 else z[None]
    if ranks is not None:
        return _GlobalTerms.apply(z_MnD, gamma, eps, ranks)
    need_grad = torch.is_grad_enabled() and z.requires_grad
    std_loss, cov_loss, std_per_dim, *_ = _terms_op(z_MnD, gamma, eps, need_grad)
    return std_loss, cov_loss, std_per_dim.detach()
