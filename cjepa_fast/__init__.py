"""C-JEPA pretraining of Vision Transformers (Mo & Tong, NeurIPS 2024, arXiv 2410.19560)."""

from cjepa_fast.runtime.lazy import exports
from cjepa_fast.runtime.version import VERSION as __version__

__all__, __getattr__, __dir__ = exports(
    __name__, {"checkpoint.encoders": "load_encoder", "train": "pretrain"}
)
__all__ += ["__version__"]
