"""VICReg's terms of tokens about the mean of their position, so that position explains nothing.

z (T, D), tokens of several images; rows (N, B): which token stands at each of N positions in each
of B images, -1 for none, each token at most once. With c_n tokens at position n, d their deviations
from its mean and F = sum_n (c_n - 1) over the positions that have any:
    std = sum_n (c_n - 1) mean_j max(0, gamma - s_nj) / F,  s_nj = sqrt(sum d_j^2 / (c_n - 1) + eps)
    cov = sum_{i != j} (sum d_i d_j / F)^2 / D
A position of one token has no variance and counts for nothing. Tokens in no row are padding, which
counts for nothing whatever it holds.

position_statistics.py and position_matmuls.py have the kernels. On a CPU, and for float64, sums by
position are matmuls with a one-hot matrix. Neither has atomics: the same input gives the same bits.

Precision. As in the package's docstring: means in two parts, variances of centred fp32 values,
off-diagonal matmuls of halves.
Bytes that must move, for b bytes an element: forward T D (2 b + 8), z for the means and for the
deviations, these once written and once read; backward T D (4 + b); the matrix in both. Of bf16
tokens these are 12 and 6 T D. The matmuls with a one-hot matrix move 54 and 94 T D, and 36 N T of
that matrix.
"""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from cjepa_fast.kernels.common.launch import use_kernel
from cjepa_fast.kernels.common.operators import operator
from cjepa_fast.kernels.common.ranks import Ranks, sum_over_ranks, wide
from cjepa_fast.kernels.vicreg.forward import empty_matrix, launch_reduce
from cjepa_fast.kernels.vicreg.position_matmuls import (
    launch_position_grad,
    launch_position_moments,
)
from cjepa_fast.kernels.vicreg.position_statistics import (
    Statistics,
    empty_deviations,
    launch_deviations,
    launch_finish,
    launch_hinge,
    launch_statistics,
)
from cjepa_fast.kernels.vicreg.several_ranks import in_parts
from cjepa_fast.kernels.vicreg.terms import vicreg_terms

Pair = tuple[torch.Tensor, torch.Tensor]

# --- the reference


def vicreg_position_terms_reference(
    z_TD: torch.Tensor,
    rows_NB: torch.Tensor,
    gamma: float = 1.0,
    eps: float = 1e-4,
    ranks: Ranks | None = None,
) -> Pair:
    """The definition of `vicreg_position_terms`, in plain PyTorch and its automatic gradient."""
    _check(z_TD, rows_NB, ranks)
    with torch.autocast(z_TD.device.type, enabled=False):
        std, free, deviation_TD = _std_and_deviations(z_TD, rows_NB, gamma, eps, ranks)
        covariance_DD = sum_over_ranks(deviation_TD.T @ deviation_TD, ranks) / free
        off_diagonal = covariance_DD - torch.diag(covariance_DD.diagonal())
        return std, off_diagonal.square().sum() / z_TD.shape[1]


def _std_and_deviations(
    z_TD: torch.Tensor, rows_NB: torch.Tensor, gamma: float, eps: float, ranks: Ranks | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """std, F (at least 1), and the deviations (T, D), which are 0 for padding."""
    x, at_NT = wide(z_TD), _one_hot(rows_NB, z_TD)
    x = x.masked_fill(at_NT.sum(0)[:, None] == 0, 0.0)
    count_N = sum_over_ranks(at_NT.sum(1), ranks)
    mean_ND = sum_over_ranks(at_NT @ x, ranks) / count_N.clamp(min=1)[:, None]
    deviation_TD = x - at_NT.T @ mean_ND
    squares_ND = sum_over_ranks(at_NT @ deviation_TD.square(), ranks)
    free_N = (count_N - 1).clamp(min=0)
    free = free_N.sum().clamp(min=1)
    variance_ND = squares_ND / free_N.clamp(min=1)[:, None]
    hinge_N = (gamma - (variance_ND + eps).sqrt()).relu().mean(1)
    return (hinge_N * free_N).sum() / free, free, deviation_TD


def _one_hot(rows_NB: torch.Tensor, z_TD: torch.Tensor) -> torch.Tensor:
    """1 where a token stands at a position: (N, T)."""
    at = wide(z_TD[:0]).new_zeros(len(rows_NB), len(z_TD) + 1)
    n = torch.arange(len(rows_NB), device=at.device)[:, None]
    at[n, rows_NB.long().clamp(min=-1) + 1] = 1.0  # no token: into a column before
    return at[:, 1:].contiguous()


def _check(z: torch.Tensor, rows: torch.Tensor, ranks: Ranks | None) -> None:
    if z.dim() != 2 or rows.dim() != 2:
        raise ValueError(
            f"z must be (T, D) and the table of rows (N, B), not {tuple(z.shape)} and "
            f"{tuple(rows.shape)}"
        )
    if ranks is None and len(z) < 2:
        raise ValueError(f"the variance needs at least 2 rows, z is {tuple(z.shape)}")


# --- in plain PyTorch


def plain_position_terms(
    z: torch.Tensor, rows: torch.Tensor, gamma: float, eps: float, ranks: Ranks | None
) -> Pair:
    with torch.autocast(z.device.type, enabled=False):
        std, free, deviation_TD = _std_and_deviations(z, rows, gamma, eps, ranks)
        # Deviations sum to zero, so their covariance is vicreg_terms' but for its count of rows.
        count = sum_over_ranks(deviation_TD.new_full((), float(len(z))), ranks)
        _, cov, _ = vicreg_terms(deviation_TD, gamma, eps, ranks)
        return std, cov * ((count - 1) / free).square()


# --- by the kernels


class Saved(NamedTuple):
    """What backward needs: see position_matmuls.py. The matrix is without elements where no
    gradient is wanted."""

    deviations: torch.Tensor
    position: torch.Tensor
    variance: torch.Tensor
    matrix: torch.Tensor
    slopes: torch.Tensor


def fused_forward(
    z: torch.Tensor, rows: torch.Tensor, gamma: float, eps: float, need_grad: bool
) -> tuple[Pair, Saved]:
    (T, D), z, rows = z.shape, z.contiguous(), rows.long().contiguous()
    count, mean, squares, position = launch_statistics(z, rows)
    variance, hinge = launch_hinge(count, squares, gamma, eps)
    deviations = launch_deviations(z, mean, position)
    matrix = empty_matrix(z[None], False, need_grad)
    partial = launch_position_moments(deviations)
    pieces = launch_reduce(partial, D, 1 / T, False, matrix)
    std, cov, slopes = launch_finish(count, hinge, pieces, D, float(T))
    return (std, cov), Saved(deviations, position, variance, matrix, slopes)


def fused_over_ranks(
    z: torch.Tensor, rows: torch.Tensor, gamma: float, eps: float, need_grad: bool, ranks: Ranks
) -> tuple[Pair, Saved]:
    """Two sums over the ranks: of N (D + 1) numbers in float64, and of N D + D^2 in fp32."""
    (T, D), z, rows = z.shape, z.contiguous(), rows.long().contiguous()
    count, mean, squares, position = _about_all(launch_statistics(z, rows), ranks)
    deviations = launch_deviations(z, mean, position)
    second = torch.zeros(1, 1, D, D, device=z.device)
    if T:
        launch_reduce(launch_position_moments(deviations), D, 1.0, False, second)
    both = ranks.sum(torch.cat([squares, second[0, 0]]))
    squares, second = both.split([len(rows), D])
    variance, hinge = launch_hinge(count, squares.contiguous(), gamma, eps)
    std, cov, slopes = launch_finish(count, hinge, second.square().sum(), D, 1.0)
    matrix = in_parts(second[None], z) if need_grad else second.new_empty(0)
    return (std, cov), Saved(deviations, position, variance, matrix, slopes)


def _about_all(own: Statistics, ranks: Ranks) -> Statistics:
    """The counts and means of all ranks' tokens, and this rank's squares about those means.

    The sums are in float64, so that the mean's two parts carry it as precisely as on one rank.
    """
    count, mean = own.count.double()[:, None], own.mean.double().sum(0)
    sums = ranks.sum(torch.cat([count, count * mean], 1))
    common = sums[:, 1:] / sums[:, :1].clamp(min=1)
    parts = torch.stack([common.float(), (common - common.float()).float()])
    squares = own.squares + (count * (mean - common).square()).float()
    return Statistics(sums[:, 0].float(), parts, squares, own.position)


# --- the operators of one rank, on the kernels' devices


@operator("vicreg_position_terms")
def position_terms_op(
    z: torch.Tensor, rows: torch.Tensor, gamma: float, eps: float, need_grad: bool
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:  # fmt: skip
    """std, cov, and what backward needs (see Saved)."""
    terms, saved = fused_forward(z, rows, gamma, eps, need_grad)
    return (*terms, *saved)


@torch.library.register_fake(position_terms_op)
def _(z, rows, gamma, eps, need_grad):
    (T, D), N = z.shape, rows.shape[0]
    like = lambda *shape: torch.empty(shape, dtype=torch.float32, device=z.device)  # noqa: E731
    position = torch.empty(T, dtype=torch.int32, device=z.device)
    matrix = empty_matrix(z[None], False, need_grad)
    return like(), like(), empty_deviations(z), position, like(N, D), matrix, like(2)


@operator("vicreg_position_grad")
def position_grad_op(
    deviations: torch.Tensor, position: torch.Tensor, variance: torch.Tensor, matrix: torch.Tensor,
    slopes: torch.Tensor, g_std: torch.Tensor, g_cov: torch.Tensor,
    gamma: float, eps: float, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    saved = Saved(deviations, position, variance, matrix, slopes)
    return launch_position_grad(*saved, g_std, g_cov, gamma, eps, dtype)


@torch.library.register_fake(position_grad_op)
def _(deviations, position, variance, matrix, slopes, g_std, g_cov, gamma, eps, dtype):
    return torch.empty(deviations.shape[1:], dtype=dtype, device=deviations.device)


def _keep_for_backward(ctx, inputs, output):
    z, _, ctx.gamma, ctx.eps, _ = inputs
    ctx.dtype = z.dtype
    ctx.save_for_backward(*output[2:])
    ctx.set_materialize_grads(False)  # no zeros for the outputs without gradient


def _backward(ctx, g_std, g_cov, *_):
    saved = Saved(*ctx.saved_tensors)
    zero = saved.slopes.new_zeros(())
    g_std, g_cov = (zero if g is None else g for g in (g_std, g_cov))
    dz = position_grad_op(*saved, g_std, g_cov, ctx.gamma, ctx.eps, ctx.dtype)
    return dz, None, None, None, None


torch.library.register_autograd(position_terms_op, _backward, setup_context=_keep_for_backward)


class GlobalPositionTerms(torch.autograd.Function):
    """The terms of all ranks' tokens together, on every rank, by the kernels."""

    @staticmethod
    def forward(ctx, z, rows, gamma, eps, ranks):
        need_grad = ctx.needs_input_grad[0]
        terms, saved = fused_over_ranks(z, rows, gamma, eps, need_grad, ranks)
        ctx.arguments, ctx.ranks = (gamma, eps, z.dtype), ranks
        if need_grad:
            ctx.save_for_backward(*saved)
        return terms

    @staticmethod
    @once_differentiable
    def backward(ctx, g_std, g_cov):
        g_std, g_cov = ctx.ranks.sum(torch.stack([g_std, g_cov]))
        dz = launch_position_grad(*ctx.saved_tensors, g_std, g_cov, *ctx.arguments)
        return dz, None, None, None, None


# --- public


def vicreg_position_terms(
    z_TD: torch.Tensor,
    rows_NB: torch.Tensor,
    gamma: float = 1.0,
    eps: float = 1e-4,
    ranks: Ranks | None = None,
) -> Pair:
    """(std_loss, cov_loss) of the tokens z apart at each position, 0-d fp32 (float64 for float64).

    rows, int (N, B): which token stands at each position of each image, -1 where none, each at most
    once. With `ranks` the statistics are those of all ranks' tokens together, at as many positions,
    and each rank's gradient is that of the sum of all ranks' losses; all of them must call it, and
    call backward. By the kernels the host waits for nothing.
    Raises ValueError for shapes that do not fit, and for a single token on one rank.
    """
    _check(z_TD, rows_NB, ranks)
    if not (use_kernel(z_TD) and z_TD.shape[1] and len(rows_NB)):
        return plain_position_terms(z_TD, rows_NB, gamma, eps, ranks)
    if ranks is not None:
        return GlobalPositionTerms.apply(z_TD, rows_NB, gamma, eps, ranks)
    need_grad = torch.is_grad_enabled() and z_TD.requires_grad
    std, cov, *_ = position_terms_op(z_TD, rows_NB, gamma, eps, need_grad)
    return std, cov
