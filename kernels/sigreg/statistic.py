"""SIGReg's statistic: the reference, the operators and the public function.

z (T, D), directions (D, K), rows (G, n); the statistic 0-d. The maths, the precision and the bytes
are in the package's docstring.
"""

import torch

from cjepa_fast.kernels.common.launch import use_kernel
from cjepa_fast.kernels.common.operators import operator
from cjepa_fast.kernels.common.ranks import Ranks, sum_over_ranks, wide
from cjepa_fast.kernels.sigreg.backward import launch_grad
from cjepa_fast.kernels.sigreg.forward import launch_sums
from cjepa_fast.kernels.sigreg.plain import plain_grad, plain_sums

# --- the reference


def sigreg_statistic_reference(
    z_TD: torch.Tensor,
    directions_DK: torch.Tensor,
    rows: torch.Tensor | None = None,
    knots: int = 17,
    t_max: float = 3.0,
    ranks: Ranks | None = None,
) -> torch.Tensor:
    """The definition of `sigreg_statistic`, in plain PyTorch and its automatic gradient."""
    _check(z_TD, directions_DK, rows, knots, ranks)
    with torch.autocast(z_TD.device.type, enabled=False):
        z = wide(z_TD)
        rows_Gn = _table(z_TD, rows)
        live = (rows_Gn >= 0)[..., None, None]
        t, phi, weight = quadrature(knots, t_max, z)
        angle = (z @ directions_DK.to(z.dtype))[rows_Gn.clamp(min=0)][..., None] * t  # (G, n, K, Q)
        angle = angle.masked_fill(~live, 0.0)
        parts = torch.stack([angle.cos() * live, angle.sin() * live], 1).sum(2)
        sums_G2KQ = sum_over_ranks(parts, ranks)
        count_G = _counts(rows_Gn, z.dtype, ranks)
        cos, sin = (sums_G2KQ / count_G.clamp(min=1)[:, None, None, None]).unbind(1)
        distance_GK = ((cos - phi).square() + sin.square()) @ weight
        return _mean_of_groups(count_G[:, None] * distance_GK, count_G)


def quadrature(
    knots: int, t_max: float, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """t, phi(t) and the weight of each knot on [0, t_max], (knots,) each: the trapezoid rule for
    both halves of the line, times the window, which is phi too."""
    q = torch.arange(knots, dtype=torch.float64, device=like.device)
    t = t_max / (knots - 1) * q
    phi = (-t.square() / 2).exp()
    ends = (q == 0) | (q == knots - 1)
    weight = torch.where(ends, 1.0, 2.0) * t_max / (knots - 1) * phi
    return tuple(x.to(like.dtype) for x in (t, phi, weight))


def _counts(rows_Gn: torch.Tensor, dtype: torch.dtype, ranks: Ranks | None) -> torch.Tensor:
    """The rows of each group, over all ranks: (G,)."""
    count_G = (rows_Gn >= 0).sum(1).to(dtype)
    return count_G if ranks is None else ranks.sum(count_G)


def _mean_of_groups(statistic_GK: torch.Tensor, count_G: torch.Tensor) -> torch.Tensor:
    """Over the directions, and over the groups of at least two rows; 0 where there is none."""
    live_G = count_G >= 2
    statistic_G = statistic_GK.mean(1).where(live_G, 0.0)
    return statistic_G.sum() / live_G.sum().clamp(min=1)


def _table(z_TD: torch.Tensor, rows_Gn: torch.Tensor | None) -> torch.Tensor:
    return torch.arange(len(z_TD), device=z_TD.device)[None] if rows_Gn is None else rows_Gn


def _check(
    z: torch.Tensor, directions: torch.Tensor, rows: torch.Tensor | None, knots: int,
    ranks: Ranks | None,
) -> None:  # fmt: skip
    if z.dim() != 2 or directions.dim() != 2 or z.shape[1] != directions.shape[0]:
        raise ValueError(
            f"z must be (T, D) and the directions (D, K), not {tuple(z.shape)} and "
            f"{tuple(directions.shape)}"
        )
    if rows is not None and rows.dim() != 2:
        raise ValueError(f"the table of rows must be (G, n), not {tuple(rows.shape)}")
    if knots < 2:
        raise ValueError(f"knots = {knots}: the integral needs at least 2")
    if rows is None and ranks is None and len(z) < 2:
        raise ValueError(f"a sample needs at least 2 rows, z is {tuple(z.shape)}")


# --- the operators: by the kernels or in plain PyTorch


def _runs_kernels(z: torch.Tensor, rows: torch.Tensor) -> bool:
    return use_kernel(z) and z.numel() > 0 and rows.numel() > 0


@operator("sigreg_sums")
def sums_op(
    z: torch.Tensor, directions: torch.Tensor, rows: torch.Tensor, Q: int, step: float
) -> torch.Tensor:
    """(G, 2, Q, K): see forward.py."""
    with torch.autocast(z.device.type, enabled=False):
        if not _runs_kernels(z, rows):
            return plain_sums(z, directions, rows, Q, step)
        return launch_sums(*_dense(z, directions, rows), Q, step)


@torch.library.register_fake(sums_op)
def _(z, directions, rows, Q, step):
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    shape = len(rows), 2, Q, directions.shape[1]
    return torch.empty(shape, dtype=dtype, device=z.device)


@operator("sigreg_grad")
def grad_op(
    z: torch.Tensor, directions: torch.Tensor, rows: torch.Tensor, slopes: torch.Tensor, step: float
) -> torch.Tensor:
    """dz (T, D): see backward.py."""
    with torch.autocast(z.device.type, enabled=False):
        if not _runs_kernels(z, rows):
            return plain_grad(z, directions, rows, slopes, step)
        return launch_grad(*_dense(z, directions, rows), slopes.contiguous(), step)


@torch.library.register_fake(grad_op)
def _(z, directions, rows, slopes, step):
    return torch.empty(z.shape, dtype=z.dtype, device=z.device)


def _dense(
    z: torch.Tensor, directions: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return z.contiguous(), directions.float().contiguous(), rows.long().contiguous()


def _keep_for_backward(ctx, inputs, output):
    *tensors, _, ctx.step = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, slopes):
    return grad_op(*ctx.saved_tensors, slopes, ctx.step), None, None, None, None


torch.library.register_autograd(sums_op, _backward, setup_context=_keep_for_backward)


# --- public


def sigreg_statistic(
    z_TD: torch.Tensor,
    directions_DK: torch.Tensor,
    rows: torch.Tensor | None = None,
    knots: int = 17,
    t_max: float = 3.0,
    ranks: Ranks | None = None,
) -> torch.Tensor:
    """SIGReg's statistic of the rows z along the directions, 0-d fp32 (float64 for float64).

    directions: of unit length, the same on all ranks; no gradient. rows, int (G, n): which row
    stands where in each group, -1 where none, each row at most once; without it all rows are one
    group. With `ranks` the groups are those of all ranks' rows together, and each rank's gradient
    is that of the sum of all ranks' losses; all of them must call it, and call backward, with as
    many groups. Nothing waits for the device.
    Raises ValueError for shapes that do not fit, and for a single row on one rank.
    """
    _check(z_TD, directions_DK, rows, knots, ranks)
    rows_Gn = _table(z_TD, rows)
    sums_G2QK = sums_op(z_TD, directions_DK, rows_Gn, knots - 1, t_max / (knots - 1))
    sums_G2QK = sum_over_ranks(sums_G2QK, ranks)
    count_G = _counts(rows_Gn, sums_G2QK.dtype, ranks)
    with torch.autocast(z_TD.device.type, enabled=False):
        _, phi, weight = quadrature(knots, t_max, sums_G2QK)
        cos, sin = (sums_G2QK / count_G.clamp(min=1)[:, None, None, None]).unbind(1)
        error_GQK = (cos - phi[1:, None]).square() + sin.square()
        statistic_GK = count_G[:, None] * (weight[1:, None] * error_GQK).sum(1)
        return _mean_of_groups(statistic_GK, count_G)
