"""Encoders written for others: safetensors, Hugging Face, timm, ONNX, with a model card."""

from cjepa_fast.runtime.lazy import exports

__all__, __getattr__, __dir__ = exports(
    __name__,
    {
        "__main__": "export",
        "formats": "FORMATS Source",
        "origin": "Origin origin_of",
    },
)
