"""Teach an image captioner your style: folder in, LoRA trained, captions out."""

__version__ = "0.1.0"
