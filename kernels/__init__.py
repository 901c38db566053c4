"""The kernels, imported as `cjepa_fast.kernels`: Triton on CUDA, plain PyTorch elsewhere.

Each function takes plain tensors and can be used without the rest of the package; docs/kernels.md
documents them. They are found here by name (`from cjepa_fast.kernels import gather_tokens`), and
loaded at their first use: importing this package imports neither torch nor Triton.

A family is a file or a folder. A file is in this order: docstring (maths, shapes, bytes),
reference, kernels, launchers, operator, public function, what is compiled ahead of time. A folder
is split by operation or at forward and backward, each of its files in the same order:
    gather/      tokens by index, the targets and their loss, the predictor's input
    vicreg/      VICReg's variance and covariance terms, of all rows or apart at each position
    sigreg/      SIGReg's distance from a Gaussian along random directions
    attention/   attention for short sequences
    ema/         the EMA of weights, alone, with its rows in FP8, or with AdamW
    fp8.py       rows in FP8; norm.py: sum and LayerNorm; gelu.py: GELU
    common/      launch.py, dependent_launch.py, operators.py, tiles.py, sums.py, ranks.py,
                 maybe_triton.py
    tuned.py     the fastest configurations, by GPU

How it is found. The folder is kernels/ at the top of the repository, and setup.py installs it as
the package `cjepa_fast.kernels` (package_dir): a wheel holds a copy, an editable install a finder
that maps the name to the folder. PYTHONPATH alone does not find it. Pyright and Pylance run no
finder: they follow the imports through a link in typings/, where they look of their own accord, and
which git ignores:
    mkdir -p typings/cjepa_fast && ln -s ../../kernels typings/cjepa_fast/kernels
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cjepa_fast.kernels.attention import short_attention
    from cjepa_fast.kernels.common.ranks import Ranks
    from cjepa_fast.kernels.ema import adamw_ema_step, ema_update, ema_update_rows
    from cjepa_fast.kernels.fp8 import (
        Rows,
        quantise_add_norm,
        quantise_gelu,
        quantise_norm,
        quantise_rows,
    )
    from cjepa_fast.kernels.gather import (
        add_positions,
        embed_gather,
        gather_tokens,
        prediction_error,
        prediction_loss,
        predictor_input,
        target_gather,
    )
    from cjepa_fast.kernels.gelu import launch_gelu, launch_gelu_backward
    from cjepa_fast.kernels.norm import launch_add_norm, launch_add_norm_backward
    from cjepa_fast.kernels.sigreg import sigreg_statistic
    from cjepa_fast.kernels.vicreg import vicreg_position_terms, vicreg_terms

__all__ = [
    "Ranks",
    "Rows",
    "adamw_ema_step",
    "add_positions",
    "ema_update",
    "ema_update_rows",
    "embed_gather",
    "gather_tokens",
    "launch_add_norm",
    "launch_add_norm_backward",
    "launch_gelu",
    "launch_gelu_backward",
    "prediction_error",
    "prediction_loss",
    "predictor_input",
    "quantise_add_norm",
    "quantise_gelu",
    "quantise_norm",
    "quantise_rows",
    "short_attention",
    "sigreg_statistic",
    "target_gather",
    "vicreg_position_terms",
    "vicreg_terms",
]

_MODULES = {  # the names of __all__, by the module that has them
    "attention": ("short_attention",),
    "common.ranks": ("Ranks",),
    "ema": ("adamw_ema_step", "ema_update", "ema_update_rows"),
    "fp8": ("Rows", "quantise_add_norm", "quantise_gelu", "quantise_norm", "quantise_rows"),
    "gather": (
        "add_positions", "embed_gather", "gather_tokens", "prediction_error", "prediction_loss",
        "predictor_input", "target_gather",
    ),
    "gelu": ("launch_gelu", "launch_gelu_backward"),
    "norm": ("launch_add_norm", "launch_add_norm_backward"),
    "sigreg": ("sigreg_statistic",),
    "vicreg": ("vicreg_position_terms", "vicreg_terms"),
}  # fmt: skip
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
