"""C-JEPA's loss (Mo & Tong 2024, arXiv 2410.19560, Eq. 21-22): which views, which weights.

    loss = weight * jepa + beta * (sim_weight * sim + std_weight * std + cov_weight * cov)

weight is 1 in both papers; jepa is I-JEPA's prediction error; sim, std and cov are VICReg's
invariance, variance and covariance. sigreg.py has another regulariser, which replaces them.
Shapes: B images, M target blocks, P patches a block, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from cjepa_fast.kernels.common.ranks import Ranks, centred, sum_over_ranks, wide
from cjepa_fast.kernels.vicreg import vicreg_position_terms, vicreg_terms
from cjepa_fast.model.sigreg import SIGReg
from cjepa_fast.model.views import (
    Context,
    mean_over,
    one_row,
    pooled_context,
    projected,
    rows_by_position,
)

Terms = dict[str, torch.Tensor]


class BatchNorm(nn.Module):
    """BatchNorm1d over the rows of all ranks, without running statistics (never used to infer)."""

    def __init__(self, width: int, ranks: Ranks | None = None, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.ranks, self.eps = ranks, eps

    def forward(self, z_nD: torch.Tensor, live_n: torch.Tensor | None = None) -> torch.Tensor:
        """live: rows that count; the others are padding, which no other row's value hangs on."""
        if live_n is None:
            z, count = centred(wide(z_nD), self.ranks)
            squares = z.square()
        else:
            live = live_n[:, None]
            rows = torch.where(live, wide(z_nD), 0.0)
            count = rows.new_zeros(()) + live_n.sum()
            count = count if self.ranks is None else self.ranks.sum(count)
            z = rows - sum_over_ranks(rows.sum(0), self.ranks) / count
            squares = torch.where(live, z.square(), 0.0)
        variance = sum_over_ranks(squares.sum(0), self.ranks) / count
        z = z * (variance + self.eps).rsqrt() * wide(self.weight) + wide(self.bias)
        return z.to(z_nD.dtype)


class Projector(nn.Sequential):
    """VICReg's expander."""

    def forward(self, z_nD: torch.Tensor, live_n: torch.Tensor | None = None) -> torch.Tensor:
        for layer in self:
            z_nD = layer(z_nD, live_n) if isinstance(layer, BatchNorm) else layer(z_nD)
        return z_nD


def build_projector(
    width: int, widths: Sequence[int] | None, ranks: Ranks | None = None
) -> Projector | None:
    """Linear-BN-ReLU for all but the last width, then Linear without bias."""
    if not widths:
        return None
    layers: list[nn.Module] = []
    for hidden in widths[:-1]:
        layers += [nn.Linear(width, hidden), BatchNorm(hidden, ranks), nn.ReLU()]
        width = hidden
    return Projector(*layers, nn.Linear(width, widths[-1], bias=False))


@dataclass(frozen=True)
class CJEPALoss:
    """The loss of one batch. beta 0 is exactly I-JEPA: VICReg is then measured, without gradient.

    views: "blocks" compares the predicted target blocks of an image, mean-pooled (Algorithm 1);
    "context_target" the mean-pooled outputs of the two encoders (App. C.2), with std and cov on the
    context's; "tokens" takes std and cov of all predicted tokens, no sim; "positions", ours and not
    the paper's, takes them of the context's tokens apart at each position of the grid, no sim
    (`vicreg_position_terms`). positions_weight: of these two, added to those of `views`. weight: of
    the prediction error, 1 in the papers. sigreg: replaces VICReg, beta and all. ranks: those whose
    batches together give the statistics, None for this one alone.
    """

    prediction: str = "smooth_l1"
    weight: float = 1.0
    views: str = "blocks"
    beta: float = 0.001
    sim: float = 25.0
    std: float = 25.0
    cov: float = 1.0
    gamma: float = 1.0
    eps: float = 1e-4
    positions_weight: float = 0.0
    sigreg: SIGReg | None = None
    ranks: Ranks | None = None

    def __call__(
        self,
        jepa: torch.Tensor,
        predicted_BMPD: torch.Tensor,
        context_BKD: torch.Tensor,
        target_tokens_BND: torch.Tensor,
        project: nn.Module | None = None,
        context: Context | None = None,
        directions_DK: torch.Tensor | None = None,
    ) -> Terms:
        """0-d tensors by name, at least fp32: loss (with gradient), jepa; sim, std, cov or sigreg.

        jepa: the prediction error (kernels.gather.prediction_loss). context: the positions of the
        context's tokens, int64 (B, K); or packed, for tokens (1, T, D) that lie end to end.
        directions: of the step, for SIGReg.
        """
        beta = self.sigreg.beta if self.sigreg else self.beta
        outputs = predicted_BMPD, context_BKD, target_tokens_BND
        with torch.set_grad_enabled(torch.is_grad_enabled() and beta > 0):
            if beta == 0 and self.ranks is None and len(predicted_BMPD) < 2:
                added = jepa.new_full((), torch.nan)  # one image has no statistics
                terms = dict.fromkeys(["sigreg"] if self.sigreg else ["sim", "std", "cov"], added)
            elif self.sigreg:
                added = self.sigreg(*outputs, project, context, directions_DK)
                terms = {"sigreg": added}
            else:
                sim, std, cov = self.vicreg(*outputs, project, context)
                if self.positions_weight:
                    more_std, more_cov = self.at_positions(*outputs[1:], project, context)
                    std = std + self.positions_weight * more_std
                    cov = cov + self.positions_weight * more_cov
                added = self.sim * sim + self.std * std + self.cov * cov
                terms = {"sim": sim, "std": std, "cov": cov}
        loss = jepa if self.weight == 1 else self.weight * jepa
        if beta > 0:
            loss = loss + beta * added
        terms = {"jepa": jepa, **terms}
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}

    def vicreg(
        self,
        predicted_BMPD: torch.Tensor,
        context_BKD: torch.Tensor,
        target_tokens_BND: torch.Tensor,
        project: nn.Module | None = None,
        context: Context | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """sim, std and cov of the chosen views, unweighted."""
        if self.views == "blocks":
            z_MBD = mean_over(predicted_BMPD, 2).transpose(0, 1)
            return block_terms(projected(project, z_MBD), self.gamma, self.eps, self.ranks)
        if self.views == "context_target":
            z_a = projected(project, pooled_context(context_BKD, context))
            with torch.no_grad():
                z_b = projected(project, mean_over(target_tokens_BND, 1))
            std, cov, _ = vicreg_terms(z_a, self.gamma, self.eps, self.ranks)
            return F.mse_loss(z_a, z_b), std, cov
        if self.views == "positions":
            std, cov = self.at_positions(context_BKD, target_tokens_BND, project, context)
            return std.new_zeros(()), std, cov
        z_nD = projected(project, predicted_BMPD.flatten(0, 2))
        std, cov, _ = vicreg_terms(z_nD, self.gamma, self.eps, self.ranks)
        return std.new_zeros(()), std, cov

    def at_positions(
        self,
        context_BKD: torch.Tensor,
        target_tokens_BND: torch.Tensor,
        project: nn.Module | None,
        context: Context | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """std and cov of the context's tokens, apart at each position of the grid."""
        tokens_TD, _, live_T = one_row(context_BKD, context)
        rows_NB = rows_by_position(context, target_tokens_BND.shape[1])
        z_TD = projected(project, tokens_TD, live_T)
        return vicreg_position_terms(z_TD, rows_NB, self.gamma, self.eps, self.ranks)


def block_terms(
    z_MBD: torch.Tensor,
    gamma: float = 1.0,
    eps: float = 1e-4,
    ranks: Ranks | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mean over ordered pairs i != j of blocks of VICReg(z_i, z_j), in closed form.

    The mean squared distance of a pair is twice the unbiased variance over the blocks. std takes
    half of each side and cov the sum of both (VICReg's code), so over all pairs every block counts
    once and twice. A single block has no pair: sim is 0.
    """
    std, cov, _ = vicreg_terms(z_MBD, gamma, eps, ranks)
    sim = 2 * z_MBD.var(0).mean() if len(z_MBD) > 1 else z_MBD.new_zeros(())
    return sim, std, 2 * cov
