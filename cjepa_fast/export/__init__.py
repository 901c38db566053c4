"""Encoders written for others: safetensors, Hugging Face, timm, ONNX, with a model card."""
