"""Names the file suffixes and metadata columns that are read, with small rules about paths. No torch."""

import os
import re

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"})
CAPTION_SUFFIXES = (".txt", ".caption")
MAX_CAPTION_BYTES = 1_000_000

_DIGITS = re.compile("([0-9]+)")

TEXT_COLUMNS = ("text", "caption")

METADATA_NAME = "metadata.jsonl"


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Return a sort key that compares paths folder by folder, and numbers in them by value.

    >>> sorted(["b/10.png", "b/9.png", "a.png"], key=natural_key)
    ['a.png', 'b/9.png', 'b/10.png']
    """
    # The extension is left out, or z2.png would come before z.png. The NUL makes `/` sort before all letters.
    parts = _DIGITS.split(_without_suffix(name).replace("/", "\0"))
    return [(1, int(part)) if i % 2 else (0, part) for i, part in enumerate(parts)] + [(0, name)]


def with_dot(extension: str) -> str:
    """Return `.txt` for `txt` and for `.txt`."""
    return extension if extension.startswith(".") else f".{extension}"


def _without_suffix(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    return name if "/" in suffix else stem or name


def is_inside(path: str, folder: str) -> bool:
    """Tell whether `path` is `folder` or lies below it. Both must be real paths, without symbolic links."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
