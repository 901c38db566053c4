"""How spread out features are: what a collapse shows in first."""

import torch


@torch.no_grad()
def representation_stats(features_BD: torch.Tensor) -> dict[str, torch.Tensor]:
    """Signs of collapse in a batch of representations, as 0-d fp32 tensors.

    feature_std: the standard deviation over the batch (unbiased), averaged over dimensions.
    rankme: exp of the entropy of the singular values, normalised to sum to one: between 1 and
      min(B, D) (Garrido et al., "RankMe", ICML 2023, arXiv 2210.02885; features not centred).
    Features that are not finite give NaN; a single image gives a standard deviation of 0.
    """
    features_BD = features_BD.detach().float()
    finite = features_BD.isfinite().all()
    std = features_BD.std(0, correction=min(1, len(features_BD) - 1)).mean()
    # the decomposition raises on NaN: decompose zeros instead and put the NaN back after
    rankme = effective_rank(torch.linalg.svdvals(torch.where(finite, features_BD, 0)))
    return {"feature_std": std, "rankme": torch.where(finite, rankme, torch.nan)}


def effective_rank(values_D: torch.Tensor) -> torch.Tensor:
    """exp of the entropy of values that are at least 0, normalised to sum to one: 0-d."""
    share = values_D / values_D.sum().clamp(min=torch.finfo(values_D.dtype).tiny)
    return torch.special.entr(share).sum().exp()
