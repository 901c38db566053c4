"""VICReg's variance and covariance terms, fused (Bardes et al. 2022, arXiv 2105.04906).

    terms.py           vicreg_terms: the reference, the operator, the public function
    several_ranks.py   the terms of all ranks' rows
    columns.py         means and variances
    forward.py         the symmetric matrix and the terms; backward.py: the gradient
    tiles.py           configurations, saved tensors, centred loads
    plain.py           the same closed forms in plain PyTorch
    positions.py       vicreg_position_terms: the terms apart at each position, with
                       position_statistics.py and position_matmuls.py

For z of shape (n, D), Zc = z - mean and C = Zc^T Zc / (n - 1):
    std_loss = mean_j max(0, gamma - s_j),  s_j = sqrt(C_jj + eps)
    cov_loss = sum_{i != j} C_ij^2 / D
and for (M, n, D) the means of both over M. With upstream gradients g_std and g_cov, and O for C
with a zero diagonal:
    dz = 4 g_cov / (M D (n-1)) * Zc O  -  g_std / (M D (n-1)) * Zc diag(1[s_j < gamma] / s_j)
Where n < D the n x n Gram matrix K = Zc Zc^T / (n - 1) replaces C, for it has the same
Frobenius norm and Zc C = K Zc: cov_loss = (|K|^2 - sum_j C_jj^2) / D, Zc O = K Zc - Zc diag(C_jj).

No atomics: sums run in a fixed order, and the same input gives the same bits.

Precision. The mean is a pair of fp32 numbers (the first row, and the mean distance from it), good
far beyond fp32, so that a spread of 1e-5 of the mean survives. The variances are sums of squares of
the centred fp32 values, so std_loss and std_per_dim are fp32 for every input, and so is the
diagonal's part of the gradient, far the larger. The off-diagonal matmuls accumulate in fp32; into
them values enter as follows (the tests' error budget decides):
    fp32 input            three tf32 matmuls of two halves each, 2^-21 relative
    bf16 and fp16 input   three bf16 matmuls of two halves each, 2^-17
One matmul of values rounded to bf16 would fail: forward where z is coarse, its mean 100 times its
spread, so that equal values round alike and cov_loss is off by up to 2^-7; backward where D is
small, so that little averages out. The error of the Gram's cov_loss is relative to |K|^2 / D, of
which cov_loss may be a small part.

Bytes that must move, for b bytes an element: forward n D b twice (means, then tiles) and the matrix
once; backward 2 n D b (z and dz) and the matrix once. Operations, 2 a multiply-add: forward
n D S (upper half), backward 2 n D S; three times that by the matmuls above.
n = 25,088, D = 1280, bf16: 41 and 82 GFLOP against 128 MB each.
"""

from cjepa_fast.kernels.vicreg.positions import (
    vicreg_position_terms,
    vicreg_position_terms_reference,
)
from cjepa_fast.kernels.vicreg.terms import vicreg_terms, vicreg_terms_reference

__all__ = [
    "vicreg_position_terms",
    "vicreg_position_terms_reference",
    "vicreg_terms",
    "vicreg_terms_reference",
]
