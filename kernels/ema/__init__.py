"""The target's EMA, alone or with AdamW, in one pass over all parameters.

    plain_update.py   ema_update        t <- m t + (1 - m) w, and optionally the copy of t in
                                        another dtype
    rows_update.py    ema_update_rows   the same of matrices, and each row of t in FP8 with its
                                        scale (fp8.py)
    adamw.py          adamw_ema_step    AdamW's step, then the EMA of the new weights
    lists.py          the checks and the tables of lists of tensors, which they share

w, AdamW's moments and t are fp32 lists of tensors of any shapes; gradients are fp32 or narrower.
`x_reference` is the definition, in torch._foreach operations; a CPU computes it so too. On CUDA one
launch serves the whole list.

All are bound by bytes. So a copy in the same pass is predicted to make ema_update 1.29 times as
fast as foreach, and adamw_ema_step 1.3 times; without a copy ema_update moves foreach's bytes.
"""

from cjepa_fast.kernels.ema.adamw import adamw_ema_step, adamw_ema_step_reference
from cjepa_fast.kernels.ema.lists import Number, Tensors
from cjepa_fast.kernels.ema.plain_update import ema_update, ema_update_reference
from cjepa_fast.kernels.ema.rows_update import ema_update_rows, ema_update_rows_reference

__all__ = [
    "Number",
    "Tensors",
    "adamw_ema_step",
    "adamw_ema_step_reference",
    "ema_update",
    "ema_update_reference",
    "ema_update_rows",
    "ema_update_rows_reference",
]
