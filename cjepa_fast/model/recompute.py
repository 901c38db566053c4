"""What a trained block saves for its backward, and what that recomputes: model.checkpointing.

Saved activations in values a token at MLP ratio 4, D the width, beside the maps or sums of
attention. The rest is recomputed, to the same bits (but for tanh's GELU in a fused block, which is
a matmul's own without recomputation, and a kernel's with it).
    "none"       all that autograd asks for, 16 D
    "norm_gelu"  all but the outputs of LayerNorm and GELU, 10 D. No matmul runs twice (but the
                 queries of a predictor's last block, where nothing is compiled)
    "selective"  x, q, k, v, attention's output and the sum after it, 6 D. fc1 runs twice: 1/9 of
                 the matmuls of forward and backward more, attention's left out
    "full"       x alone, D (fused, x and the branch not yet added to it, 2 D). All but fc2 runs
                 twice, attention too: 2/9 more
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

# The parts of a block that are recomputed, by policy: "heads" is norm1 with q, k and v, "hidden"
# norm2 with fc1, "output" GELU with fc2, "mlp" both of these, "block" all of it.
PARTS = {
    "none": (),
    "norm_gelu": ("heads", "hidden", "output"),
    "selective": ("heads", "mlp"),
    "full": ("block",),
}


class RecomputePolicy:
    """name: a key of PARTS."""

    def __init__(self, name: str = "none"):
        self.parts = frozenset(PARTS[name])

    def __contains__(self, part: str) -> bool:
        return part in self.parts

    def recomputes(self, part: str) -> bool:
        """Whether a part is recomputed, here and now: only what is trained is."""
        return part in self.parts and torch.is_grad_enabled()

    def run(self, part: str, function: Callable, *args) -> Any:
        """function(*args). Of a part that is recomputed only the arguments are saved.

        It runs again until all is there that its own backward asks for: a Linear at its end does
        not. A compiler would have it run where the next part's backward asks for its output, so it
        is told to keep that.
        """
        if not self.recomputes(part):
            return function(*args)
        options = {}
        if part in ("heads", "hidden") and torch.compiler.is_compiling():
            options["context_fn"] = _keep_matmuls
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **options)


def _keep_matmuls():
    """For checkpoint: the contexts in which the outputs of matmuls stay."""
    aten = torch.ops.aten
    kept = [aten.addmm.default, aten.mm.default, aten._scaled_mm.default]
    return create_selective_checkpoint_contexts(kept)
