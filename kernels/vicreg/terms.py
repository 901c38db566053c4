"""VICReg's terms: the reference and the public function, on one rank or several.

z (n, D) or (M, n, D); std_loss and cov_loss 0-d, std_per_dim (D,). The maths, the precision and the
bytes are in the package's docstring.
"""

import torch

from cjepa_fast.kernels.common.operators import operator
from cjepa_fast.kernels.common.ranks import Ranks, centred, sum_over_ranks, wide
from cjepa_fast.kernels.vicreg.backward import grad_op
from cjepa_fast.kernels.vicreg.forward import empty_matrix, runs_kernels, terms_forward
from cjepa_fast.kernels.vicreg.several_ranks import GlobalTerms
from cjepa_fast.kernels.vicreg.tiles import Terms

# --- the reference


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


# --- the operator of one rank, of z (M, n, D)


@operator("vicreg_terms")
def terms_op(
    z: torch.Tensor, gamma: float, eps: float, need_grad: bool
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:  # fmt: skip
    """std_loss, cov_loss, std_per_dim, and what backward needs (see Saved)."""
    terms, saved = terms_forward(z, gamma, eps, need_grad)
    return (*terms, *saved)


@torch.library.register_fake(terms_op)
def _(z, gamma, eps, need_grad):
    M, n, D = z.shape
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    like = lambda *shape: torch.empty(shape, dtype=dtype, device=z.device)  # noqa: E731
    if runs_kernels(z):
        matrix = empty_matrix(z, n < D, need_grad)
    else:
        size = min(n, D)
        matrix = like(M, 1, size, size) if need_grad else like(0)
    return like(), like(), like(D), like(2, M, D), like(M, D), matrix


def _keep_for_backward(ctx, inputs, output):
    z, ctx.gamma, ctx.eps, _ = inputs
    ctx.save_for_backward(z, *output[3:])
    # No zeros for the outputs without gradient: the matrix is large.
    ctx.set_materialize_grads(False)


def _backward(ctx, g_std, g_cov, *_):
    z, mean, variance, matrix = ctx.saved_tensors
    zero = variance.new_zeros(())
    g_std, g_cov = (zero if g is None else g for g in (g_std, g_cov))
    dz = grad_op(z, mean, variance, matrix, g_std, g_cov, ctx.gamma, ctx.eps)
    return dz, None, None, None


torch.library.register_autograd(terms_op, _backward, setup_context=_keep_for_backward)


# --- public


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
        return GlobalTerms.apply(z_MnD, gamma, eps, ranks)
    need_grad = torch.is_grad_enabled() and z.requires_grad
    std_loss, cov_loss, std_per_dim, *_ = terms_op(z_MnD, gamma, eps, need_grad)
    return std_loss, cov_loss, std_per_dim.detach()
