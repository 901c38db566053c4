"""Encoders of other projects as the modules of this package: I-JEPA's and Hugging Face's files."""

from cjepa_fast.interop.ijepa import load_ijepa

__all__ = ["load_ijepa"]
