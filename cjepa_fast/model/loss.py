"""C-JEPA's loss (Mo & Tong 2024, arXiv 2410.19560, Eq. 21-22): which views, which weights.

    loss = jepa + beta * (sim_weight * sim + std_weight * std + cov_weight * cov)

jepa is I-JEPA's prediction error; sim, std and cov are VICReg's invariance, variance and
covariance. Shapes: B images, M target blocks, P patches a block, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from cjepa_fast.kernels.vicreg import centred, sum_over_ranks, vicreg_terms, wide
from cjepa_fast.model.packed import Sequences

Terms = dict[str, torch.Tensor]


def prediction_loss(
    predicted: torch.Tensor, target: torch.Tensor, kind: str = "smooth_l1"
) -> torch.Tensor:
    """Mean error over everything: "smooth_l1" (beta 1, I-JEPA's code) or "l2" (the papers)."""
    measure = {"smooth_l1": F.smooth_l1_loss, "l2": F.mse_loss}[kind]
    return measure(wide(predicted), wide(target))


class BatchNorm(nn.Module):
    """BatchNorm1d over the rows of all ranks, without running statistics (never used to infer)."""

    def __init__(self, width: int, group: dist.ProcessGroup | None = None, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.group, self.eps = group, eps

    def forward(self, z_nD: torch.Tensor) -> torch.Tensor:
        z, count = centred(wide(z_nD), self.group)
        variance = sum_over_ranks(z.square().sum(0), self.group) / count
        z = z * (variance + self.eps).rsqrt() * wide(self.weight) + wide(self.bias)
        return z.to(z_nD.dtype)


def build_projector(
    width: int, widths: Sequence[int] | None, group: dist.ProcessGroup | None = None
) -> nn.Sequential | None:
    """VICReg's expander: Linear-BN-ReLU for all but the last width, then Linear without bias."""
    if not widths:
        return None
    layers: list[nn.Module] = []
    for hidden in widths[:-1]:
        layers += [nn.Linear(width, hidden), BatchNorm(hidden, group), nn.ReLU()]
        width = hidden
    return nn.Sequential(*layers, nn.Linear(width, widths[-1], bias=False))


@dataclass(frozen=True)
class CJEPALoss:
    """The loss of one batch. beta 0 is exactly I-JEPA: VICReg is then measured, without gradient.

    views: "blocks" compares the predicted target blocks of an image, mean-pooled (Algorithm 1);
    "context_target" the mean-pooled outputs of the two encoders (App. C.2), with std and cov on the
    context's; "tokens" takes std and cov of all predicted tokens, no sim. group: the processes
    whose batches together give the statistics, None for this process alone.
    """

    prediction: str = "smooth_l1"
    views: str = "blocks"
    beta: float = 0.001
    sim: float = 25.0
    std: float = 25.0
    cov: float = 1.0
    gamma: float = 1.0
    eps: float = 1e-4
    group: dist.ProcessGroup | None = None

    def __call__(
        self,
        predicted_BMPD: torch.Tensor,
        targets_BMPD: torch.Tensor,
        context_BKD: torch.Tensor,
        target_tokens_BND: torch.Tensor,
        project: nn.Module | None = None,
    ) -> Terms:
        """0-d tensors by name, at least fp32: loss (with gradient), jepa, sim, std, cov.

        targets: the layer-normed tokens, gathered. The trainer never writes them: it takes jepa
        from kernels.gather.prediction_loss and the rest from `with_vicreg`.
        """
        jepa = prediction_loss(predicted_BMPD, targets_BMPD, self.prediction)
        return self.with_vicreg(jepa, predicted_BMPD, context_BKD, target_tokens_BND, project)

    def with_vicreg(
        self,
        jepa: torch.Tensor,
        predicted_BMPD: torch.Tensor,
        context_BKD: torch.Tensor,
        target_tokens_BND: torch.Tensor,
        project: nn.Module | None = None,
        packed: Sequences | None = None,
    ) -> Terms:
        """The terms by name, as the call gives them, from the prediction error jepa (0-d).

        packed: the images' contexts lie end to end in context_BKD, (1, T, D), cut so.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.beta > 0):
            if self.beta == 0 and self.group is None and len(predicted_BMPD) < 2:
                sim = std = cov = jepa.new_tensor(torch.nan)  # one image has no variance
            else:
                sim, std, cov = self.vicreg(
                    predicted_BMPD, context_BKD, target_tokens_BND, project, packed
                )
        vicreg = self.sim * sim + self.std * std + self.cov * cov
        loss = jepa + self.beta * vicreg if self.beta > 0 else jepa
        terms = {"jepa": jepa, "sim": sim, "std": std, "cov": cov}
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}

    def vicreg(
        self,
        predicted_BMPD: torch.Tensor,
        context_BKD: torch.Tensor,
        target_tokens_BND: torch.Tensor,
        project: nn.Module | None = None,
        packed: Sequences | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """sim, std and cov of the chosen views, unweighted."""
        if self.views == "blocks":
            z_MBD = wide(predicted_BMPD).mean(2).transpose(0, 1)
            return block_terms(_projected(project, z_MBD), self.gamma, self.eps, self.group)
        if self.views == "context_target":
            context = wide(context_BKD)
            pooled = context.mean(1) if packed is None else packed.means(context[0])
            z_a = _projected(project, pooled)
            with torch.no_grad():
                z_b = _projected(project, wide(target_tokens_BND).mean(1))
            std, cov, _ = vicreg_terms(z_a, self.gamma, self.eps, self.group)
            return F.mse_loss(z_a, z_b), std, cov
        z_nD = _projected(project, predicted_BMPD.flatten(0, 2))
        std, cov, _ = vicreg_terms(z_nD, self.gamma, self.eps, self.group)
        return std.new_zeros(()), std, cov


def _projected(project: nn.Module | None, z: torch.Tensor) -> torch.Tensor:
    if project is None:
        return z
    weight = next(project.parameters())
    return wide(project(z.flatten(0, -2).to(weight.dtype)).view(*z.shape[:-1], -1))


def block_terms(
    z_MBD: torch.Tensor,
    gamma: float = 1.0,
    eps: float = 1e-4,
    group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mean over ordered pairs i != j of blocks of VICReg(z_i, z_j), in closed form.

    The mean squared distance of a pair is twice the unbiased variance over the blocks. std takes
    half of each side and cov the sum of both (VICReg's code), so over all pairs every block counts
    once and twice. A single block has no pair: sim is 0.
    """
    std, cov, _ = vicreg_terms(z_MBD, gamma, eps, group)
    sim = 2 * z_MBD.var(0).mean() if len(z_MBD) > 1 else z_MBD.new_zeros(())
    return sim, std, 2 * cov
