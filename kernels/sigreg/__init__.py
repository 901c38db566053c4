"""SIGReg's statistic, fused: how far rows are from an isotropic Gaussian, along random directions.

    statistic.py   sigreg_statistic: the reference, the operator, the public function
    forward.py     the sums of cosines and sines; backward.py: the gradient
    tiles.py       tiles, loads, the projection, cosine and sine in a kernel
    plain.py       the same in plain PyTorch

It is the statistic of LeJEPA (Balestriero & LeCun 2025, arXiv 2511.08544): Epps and Pulley's test
of normality (1983) of the rows' projections, averaged over the directions. For n rows z of width D,
K unit directions a and x_rk = z_r a_k:
    C_k(t) = sum_r cos(t x_rk),  S_k(t) = sum_r sin(t x_rk),  phi(t) = exp(-t^2 / 2)
    T_k = n * integral of ((C_k(t) / n - phi(t))^2 + (S_k(t) / n)^2) phi(t) dt over [-t_max, t_max]
    statistic = mean_k T_k
The integral is a trapezoid rule. The integrand is even, so `knots` points on [0, t_max] are taken
and counted twice: t_q = q h, h = t_max / (knots - 1). At t = 0 it is 0, so the kernels leave that
point out. This is the form of LeJEPA's code, with its 17 knots and its t_max of 3. The listing in
the paper, 17 points on [-5, 5], is 9 knots and a t_max of 5.

Rows may be in G groups, each a sample of its own: the statistic is the mean over the groups, as
LeJEPA's is over views. A table (G, n) says which row stands where, -1 where none: groups differ in
size, and rows in no group count for nothing. A group with fewer than two rows is left out: its
distance is smallest where all rows are 0. Over several ranks the sums and the counts are those of
all ranks' rows.

Gradient, with p = exp(i h x_rk) and the sums' gradients dC and dS:
    dz_r = sum_k g_rk a_k,  g_rk = -Im sum_q t_q p^q (dC_qk - i dS_qk)
Both passes compute p once for each row and direction. The forward multiplies its powers up, each a
rotation by p; the backward takes the sum by Horner's rule. No other cosine or sine is needed.

No atomics: each program sums a stretch of rows, then `sum_parts` adds the stretches in a fixed
order. The same input gives the same bits.

Precision. Projections are three tf32 matmuls of two halves each, 2^-21 relative, of z in fp32 and
a in fp32, for inputs of any dtype. Cosine and sine are good to 1e-7. Each rotation adds about 1e-7,
differently for each row, so that it averages out.

Bytes that must move, for b bytes an element and n rows in all: forward n D b (z, once for each 64
directions, after the first from the cache) and 8 K Q for each stretch of 64 rows of a group,
Q = knots - 1; backward 2 n D b and 8 n K (the slopes g). Operations, 2 a multiply-add: forward
6 n D K by three matmuls, backward twice that; and 8 n K Q for the rotations of either.
"""

from cjepa_fast.kernels.sigreg.statistic import sigreg_statistic, sigreg_statistic_reference

__all__ = ["sigreg_statistic", "sigreg_statistic_reference"]
