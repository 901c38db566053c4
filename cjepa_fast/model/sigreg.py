"""SIGReg, LeJEPA's regulariser (arXiv 2511.08544), instead of VICReg.

    loss = weight * jepa + beta * sigreg

jepa is I-JEPA's prediction error; sigreg is the statistic of kernels/sigreg: how far the views'
rows are from a standard normal, along random directions that each step draws anew. It is the form
of LeJEPA's code: 17 knots on [0, 3], times the number of rows. LeJEPA's loss around it is another:
its prediction error is the distance of augmented views from their mean, behind a projector, without
a predictor and a target encoder, and its weights are 1 - lambda and lambda, so that beta stands for
lambda / (1 - lambda). Its minimal example has a lambda of 0.02.
"""

from dataclasses import dataclass

import torch
from torch import nn

from cjepa_fast.kernels.common.ranks import Ranks
from cjepa_fast.kernels.sigreg import sigreg_statistic
from cjepa_fast.model.views import (
    Context,
    mean_over,
    one_row,
    pooled_context,
    projected,
    rows_by_position,
)


@dataclass(frozen=True)
class SIGReg:
    """The statistic of one batch.

    views: "context_target" takes the mean-pooled context of each image (the target encoder, which
    has no gradient, is left alone); "blocks" the mean-pooled predictions, apart for each target
    block; "tokens" all predicted tokens; "positions" the context's tokens apart at each position of
    the grid. Apart: each is a sample of its own, of at least two images, and the statistic is their
    mean. ranks: those whose batches together give it, None for this one alone.
    """

    views: str = "context_target"
    beta: float = 0.02
    knots: int = 17
    t_max: float = 3.0
    ranks: Ranks | None = None

    def __call__(
        self,
        predicted_BMPD: torch.Tensor,
        context_BKD: torch.Tensor,
        target_tokens_BND: torch.Tensor,
        project: nn.Module | None = None,
        context: Context | None = None,
        directions_DK: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The arguments are those of the loss; 0-d, at least fp32."""
        if directions_DK is None:
            raise ValueError("SIGReg needs the directions of the step: see data/rng.py")
        N = target_tokens_BND.shape[1]
        z_TD, rows, live_T = self.sample(predicted_BMPD, context_BKD, N, context)
        z_TD = projected(project, z_TD, live_T)
        return sigreg_statistic(z_TD, directions_DK, rows, self.knots, self.t_max, self.ranks)

    def sample(
        self,
        predicted_BMPD: torch.Tensor,
        context_BKD: torch.Tensor,
        positions: int,
        context: Context | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The views' rows (T, D), which of them stands where in each group (None for one group),
        and which are no padding (None for all).

        positions: patches of the grid.
        """
        if self.views == "blocks":
            B, M = predicted_BMPD.shape[:2]
            rows = torch.arange(B * M, device=predicted_BMPD.device).view(B, M).T
            return mean_over(predicted_BMPD, 2).flatten(0, 1), rows, None
        if self.views == "context_target":
            return pooled_context(context_BKD, context), None, None
        if self.views == "positions":
            tokens_TD, _, live_T = one_row(context_BKD, context)
            return tokens_TD, rows_by_position(context, positions), live_T
        return predicted_BMPD.flatten(0, 2), None, None
