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
    rankme = effective_rank(singular_values(torch.where(finite, features_BD, 0))).float()
    return {"feature_std": std, "rankme": torch.where(finite, rankme, torch.nan)}


def singular_values(x_BD: torch.Tensor) -> torch.Tensor:
    """fp64 (min(B, D),), as roots of the eigenvalues of the products of its rows, or columns: far
    less work than decomposing the matrix itself, which a GPU's step would wait for."""
    x_BD = x_BD.double()
    products = x_BD @ x_BD.T if len(x_BD) < x_BD.shape[1] else x_BD.T @ x_BD
    return torch.linalg.eigvalsh(products).clamp(min=0).sqrt()


@torch.no_grad()
def position_share(tokens_BND: torch.Tensor) -> torch.Tensor:
    """The share of the tokens' variance that position explains, the same in all images: 0-d, at
    least fp32. Near 1 they tell where a patch is and little else.

    Estimated as a component of variance (a two-way layout of images and positions): its mean is
    the share among all images, however few B are. NaN for one image or position, or where nothing
    varies.
    """
    tokens_BND = tokens_BND.to(torch.promote_types(tokens_BND.dtype, torch.float32))
    B, N, _ = tokens_BND.shape
    if min(B, N) < 2:
        return tokens_BND.new_full((), torch.nan)
    position_ND, image_BD = tokens_BND.mean(0), tokens_BND.mean(1)
    rest_BND = tokens_BND - position_ND - (image_BD - position_ND.mean(0))[:, None]
    rest = rest_BND.square().sum() / ((B - 1) * (N - 1))  # of what is in no other token
    position = position_ND.var(0).sum() - rest / B
    image = image_BD.var(0).sum() - rest / N
    return position / (position + image + rest)


def effective_rank(values_D: torch.Tensor) -> torch.Tensor:
    """exp of the entropy of values that are at least 0, normalised to sum to one: 0-d."""
    share = values_D / values_D.sum().clamp(min=torch.finfo(values_D.dtype).tiny)
    return torch.special.entr(share).sum().exp()
