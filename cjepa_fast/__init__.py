"""C-JEPA pretraining of Vision Transformers (Mo & Tong, NeurIPS 2024, arXiv 2410.19560)."""

from cjepa_fast.runtime.version import VERSION as __version__

__all__ = ["__version__", "load_encoder", "pretrain"]


def __getattr__(name: str):
    # Loaded on first use, so that `import cjepa_fast` does not import torch.
    if name == "load_encoder":
        from cjepa_fast.checkpoint.encoders import load_encoder

        return load_encoder
    if name == "pretrain":
        from cjepa_fast.train import pretrain

        return pretrain
    raise AttributeError(f"module 'cjepa_fast' has no attribute {name!r}")
