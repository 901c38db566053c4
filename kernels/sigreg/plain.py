"""SIGReg's sums and their gradient in plain PyTorch: the CPU's path, and float64's.

The same closed forms as the kernels', with complex numbers: p = exp(i step x), its powers, and
Horner's rule. Shapes as in forward.py and backward.py.
"""

import torch

from cjepa_fast.kernels.common.ranks import wide


def plain_sums(
    z: torch.Tensor, directions: torch.Tensor, rows: torch.Tensor, Q: int, step: float
) -> torch.Tensor:
    rotation_GnK, live_Gn = _rotations(z, directions, rows, step)
    power = rotation_GnK * live_Gn[..., None]
    sums = []
    for _ in range(Q):
        sums.append(power.sum(1))
        power = power * rotation_GnK
    sums_GQK = torch.stack(sums, 1)
    return torch.stack([sums_GQK.real, sums_GQK.imag], 1)


def plain_grad(
    z: torch.Tensor, directions: torch.Tensor, rows: torch.Tensor, slopes: torch.Tensor, step: float
) -> torch.Tensor:
    rotation_GnK, live_Gn = _rotations(z, directions, rows, step)
    Q = slopes.shape[2]
    t_Q11 = step * torch.arange(1, Q + 1, device=z.device).to(slopes.dtype)[:, None]
    weight_GQK = t_Q11 * torch.complex(slopes[:, 0], -slopes[:, 1])
    total = torch.zeros_like(rotation_GnK)
    for q in reversed(range(Q)):
        total = (total + weight_GQK[:, q, None]) * rotation_GnK
    slope_GnK = -total.imag
    # The entries of -1 write into a row of their own, the last.
    index = torch.where(live_Gn, rows, len(z)).flatten()
    slope_TK = slope_GnK.new_zeros(len(z) + 1, slope_GnK.shape[2])
    slope_TK.index_copy_(0, index, slope_GnK.flatten(0, 1))
    return (slope_TK[:-1] @ wide(directions).to(slope_TK.dtype).T).to(z.dtype)


def _rotations(
    z: torch.Tensor, directions: torch.Tensor, rows: torch.Tensor, step: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(i step x) (G, n, K), 1 where there is no row; and where there is one (G, n)."""
    z = wide(z)
    x_TK = z @ directions.to(z.dtype)
    live_Gn = rows >= 0
    angle_GnK = step * x_TK[rows.clamp(min=0)]
    angle_GnK = angle_GnK.masked_fill(~live_Gn[..., None], 0.0)
    return torch.polar(torch.ones_like(angle_GnK), angle_GnK), live_Gn
