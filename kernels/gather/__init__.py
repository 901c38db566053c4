"""Gathering tokens by index: the context of an image, the targets' tokens, the predictor's input.

    tokens.py      gather_tokens, embed_gather, add_positions
    targets.py     target_gather, prediction_loss, prediction_error
    predictor.py   predictor_input
    index.py       the checks and the layout of indices, which they share

Shapes: B images, N patches, K context patches, M target blocks, P patches a block, S = K or M * P
indices of an image, D and W widths. Indices are int32 or int64, row-major positions in the patch
grid; they need not be unique. None is ever expanded to the width of the tokens.

`x_reference` is the definition, and the path on the CPU and in float64; on CUDA a kernel takes its
place. An index outside 0..N-1 raises IndexError on the CPU. On CUDA the host would have to wait for
the device to know it: its rows come out NaN, and with CJEPA_DEBUG_INDICES=1 the kernel asserts.

The launchers take any strides but for the indices, which they make dense, and a `tile` in place of
the one that the shape would choose. Lengths that the masks draw anew each step are not specialised
on, or each would be compiled for once more. Launchers also run on CPU tensors where Triton
interprets.

Operations are a few for each value: all are bound by bytes, at any width. Nothing is added
atomically, so equal inputs give equal bits.
Source of the maths: I-JEPA (Assran et al. 2023, arXiv 2301.08243, section 3).
"""

from cjepa_fast.kernels.gather.predictor import predictor_input, predictor_input_reference
from cjepa_fast.kernels.gather.targets import (
    prediction_error,
    prediction_loss,
    prediction_loss_reference,
    target_gather,
    target_gather_reference,
)
from cjepa_fast.kernels.gather.tokens import (
    add_positions,
    add_positions_reference,
    embed_gather,
    embed_gather_reference,
    gather_tokens,
    gather_tokens_reference,
)

__all__ = [
    "add_positions",
    "add_positions_reference",
    "embed_gather",
    "embed_gather_reference",
    "gather_tokens",
    "gather_tokens_reference",
    "prediction_error",
    "prediction_loss",
    "prediction_loss_reference",
    "predictor_input",
    "predictor_input_reference",
    "target_gather",
    "target_gather_reference",
]
