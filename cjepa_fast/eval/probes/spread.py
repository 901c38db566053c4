"""How much room features take: what collapse leaves less of.

Shapes: n images, q views of an image, N patches, D width. All take fp32 and compute in fp64.
"""

import torch
import torch.nn.functional as F

from cjepa_fast.telemetry import effective_rank

ROWS = 1024  # of images that are compared with all others at a time
DEAD = 0.01  # of the features' root mean square: a dimension that varies less is dead


def lidar(views_nqD: torch.Tensor, delta: float = 1e-4) -> float:
    """LiDAR (Thilak et al. 2023, arXiv 2312.04000): the effective rank of what tells images apart
    once what changes between the views of one is divided out, from 1 to min(n - 1, D).

    Each image is a class of q views. With the covariance B of the classes' means and W within
    classes, plus delta on its diagonal, it is exp of the entropy of the eigenvalues of
    W^(-1/2) B W^(-1/2). Raises ValueError for fewer than two images or views.
    """
    n, q, D = views_nqD.shape
    if n < 2 or q < 2:
        raise ValueError(f"LiDAR of {n} images in {q} views: it needs two of each at least")
    views_nqD = views_nqD.double()
    mean_nD = views_nqD.mean(1)
    apart_nD = mean_nD - mean_nD.mean(0)
    within_nD = (views_nqD - mean_nD[:, None]).flatten(0, 1)
    W_DD = within_nD.T @ within_nD / (n * q) + delta * torch.eye(D, dtype=torch.float64)
    half_DD = torch.linalg.cholesky(W_DD)
    whitened_Dn = torch.linalg.solve_triangular(half_DD, apart_nD.T, upper=False)
    return effective_rank(torch.linalg.svdvals(whitened_Dn) ** 2).item()


def deviations(features_nD: torch.Tensor) -> torch.Tensor:
    """The standard deviation of each dimension over the images, the largest first: (D,) fp64."""
    return features_nD.double().std(0).sort(descending=True).values


def dead_share(features_nD: torch.Tensor) -> float:
    """Share of the dimensions whose deviation is below DEAD of the features' root mean square."""
    scale = features_nD.double().square().mean().sqrt()
    return (deviations(features_nD) <= DEAD * scale).double().mean().item()


def uniformity(features_nD: torch.Tensor, t: float = 2.0) -> float:
    """log of the mean, over pairs of images, of exp(-t distance^2) on the unit sphere: 0 where all
    coincide, about -2 t (here -4, and a little below for small D) where they spread evenly.

    Wang & Isola, "Understanding contrastive representation learning", ICML 2020.
    """
    unit_nD, n = F.normalize(features_nD.double(), dim=1), len(features_nD)
    rows = (torch.cdist(unit_rD, unit_nD).square() for unit_rD in unit_nD.split(ROWS))
    each = sum((square_rn * -t).exp().sum() for square_rn in rows)
    return ((each - n) / (n * (n - 1))).log().item()  # each image has a distance of 0 to itself


def alignment(views_nqD: torch.Tensor) -> float:
    """Mean squared distance, on the unit sphere, between two views of an image: 0 to 4, the same
    authors'. The mean over the pairs of q points is twice their unbiased variance."""
    unit_nqD = F.normalize(views_nqD.double(), dim=2)
    return 2 * unit_nqD.var(1).sum(-1).mean().item()


def token_shares(tokens_nND: torch.Tensor) -> dict[str, float]:
    """How the variance of patch tokens divides; the three sum to one (a two-way layout).

    by_position: of the mean token at each position, the same in all images; near 1 the features
    tell where a patch is and little else. by_image: of each image's mean token, the same at all
    positions. by_both: the rest, which tells what is where. Tokens that do not vary give NaN. Of n
    unrelated images by_position is 1/n; the log's has no such remainder (telemetry.position_share).
    """
    tokens_nND = tokens_nND.double()
    mean_D = tokens_nND.mean((0, 1))
    total = (tokens_nND - mean_D).square().mean((0, 1)).sum()
    by_position = (tokens_nND.mean(0) - mean_D).square().mean(0).sum() / total
    by_image = (tokens_nND.mean(1) - mean_D).square().mean(0).sum() / total
    shares = {"by_position": by_position, "by_image": by_image}
    return {name: x.item() for name, x in (shares | {"by_both": 1 - sum(shares.values())}).items()}
