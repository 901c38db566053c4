"""Attention, forward and backward, straight from and to the projections; made for short sequences.

    o = softmax(q k^T / sqrt(d)) v        of each sequence and head; no mask, no dropout
With P the softmax and do the gradient of o:
    dv = P^T do,   dS = P * (do v^T - rowsum(do * o)) / sqrt(d),   dq = dS k,   dk = dS^T q

    forward.py    short_attention: the reference, the forward's kernel, the public function
    descriptor_forward.py  another kernel of the forward, for the tensor memory accelerator
    backward.py   the gradients: the launcher of one_pass_backward.py and two_pass_backward.py
    heads.py      reading, multiplying and writing the values of a head

Shapes: B sequences, S queries, T keys, H heads of d values; rows of all heads lie side by side, as
the projections write them, so q, k and v may be parts of one (B, T, 3 H d) tensor, and their
gradients then are parts of one too. Lengths are not specialised on. For 16-bit types; what is
summed is fp32, P and dS are rounded once to the inputs' type, as in FlashAttention-2 (Dao 2023,
arXiv 2307.08691).

The backward passes once over the keys where a program can hold all queries of a sequence and head,
so that q, k, v, o and do are read once, dq, dk and dv written once; of longer sequences, or where
that is faster, it makes two passes.

Bytes that must move, with e bytes a value and L = B H d: forward (2 S + 2 T) L e, backward
(4 S + 4 T) L e: q, o, do, dq; k, v, dk, dv. Operations: 4 S T L forward, 10 S T L backward.
"""

from cjepa_fast.kernels.attention.forward import (
    short_attention,
    short_attention_reference,
    takes,
)

__all__ = ["short_attention", "short_attention_reference", "takes"]
