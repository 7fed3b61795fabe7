"""Teaches image captioners a style of your own: trains a LoRA on captioned images, captions others with it.

The public names are imported when they are first used: `import caption_train` is light. docs/python.md has
examples.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from caption_train.version import __version__

if TYPE_CHECKING:
    from caption_train.api import caption, compile_dataset, evaluate, export, load_family, train
    from caption_train.errors import CaptionTrainError, UsageError

__all__ = [
    "CaptionTrainError",
    "UsageError",
    "__version__",
    "caption",
    "compile_dataset",
    "evaluate",
    "export",
    "load_family",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'caption_train' has no attribute {name!r}")
    module = "caption_train.errors" if name.endswith("Error") else "caption_train.api"
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
