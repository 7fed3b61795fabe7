"""Names the file suffixes and metadata columns that are read, with small rules about paths. No torch."""

import os
import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from importlib.util import find_spec

HEIF_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
"""What iPhones save; read where the package pillow-heif is installed."""
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"}) | (
    HEIF_SUFFIXES if find_spec("pillow_heif") else frozenset()
)
UNREAD_SUFFIXES = (
    frozenset({".jxl", ".svg", ".jp2", ".j2k", ".psd", ".tga", ".ico", ".exr", ".hdr"})
    | frozenset({".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"})
    | HEIF_SUFFIXES
) - IMAGE_SUFFIXES
"""Images that are not read, but said."""
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


def natural_bytes(name: str) -> bytes:
    """Return a sort key in bytes: in the order of `natural_key`, at a tenth of its memory.

    >>> sorted(["b/10.png", "b/9.png", "a.png"], key=natural_bytes)
    ['a.png', 'b/9.png', 'b/10.png']
    """
    folder, slash, base = _without_suffix(name).rpartition("/")
    start = _sort_folder(folder) if slash else b""
    return start + sort_bytes(base) + b"\0" + name.encode("utf-8", "surrogatepass")


@lru_cache(maxsize=256)
def _sort_folder(folder: str) -> bytes:
    # Thousands of images lie in the same few folders.
    return sort_bytes(folder) + b"\2"


def sort_bytes(text: str) -> bytes:
    """Return bytes in whose order text stands that is compared with numbers by value, `/` before all letters.

    Those of `a` + "/" + `b` are those of `a`, a 2 and those of `b`.
    """
    if text.isascii() and text.isdigit():
        return _sort_number(text).encode()
    if not text.isprintable():
        text = _LOWEST.sub("\3\\g<0>", text)
    return _DIGITS.sub(lambda match: _sort_number(match[0]), text.replace("/", "\2")).encode(
        "utf-8", "surrogatepass"
    )


def _sort_number(digits: str) -> str:
    # A number stands before all letters; of two the longer one is larger.
    digits = digits.lstrip("0")
    return f"\1{chr(len(digits))}{digits}"


_LOWEST = re.compile("[\1-\3]")


def with_dot(extension: str) -> str:
    """Return `.txt` for `txt` and for `.txt`."""
    return extension if extension.startswith(".") else f".{extension}"


def name_ending(name: str, extension: str) -> str:
    """Return the ending of caption files of a prompt that `--prompts` names.

    >>> name_ending("long", ".txt"), name_ending("text", ".txt")
    ('.long.txt', '.txt')
    """
    return with_dot(extension) if name == "text" else f".{name}{with_dot(extension)}"


def _without_suffix(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    return name if "/" in suffix else stem or name


def describe_unread(names: Iterable[str]) -> list[str]:
    """Return a line for each image format among files that are not read, with what to do.

    >>> describe_unread(["b.JXL", "a.jxl"])
    ['2 .jxl files are not read: convert them to PNG or JPEG']
    """
    counts = Counter(name[name.rfind(".") :].lower() for name in names)
    return [
        f"{count:,} {suffix} {'file is' if count == 1 else 'files are'} not read: {_advise(suffix, count)}"
        for suffix, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


def advise_unread(suffix: str) -> str:
    """Return what to do about one file with a suffix of UNREAD_SUFFIXES."""
    return _advise(suffix.lower(), 1)


def _advise(suffix: str, count: int) -> str:
    if suffix in HEIF_SUFFIXES:
        return "pip install pillow-heif"
    return f"convert {'it' if count == 1 else 'them'} to PNG or JPEG"


def is_portable(name: str) -> bool:
    r"""Tell whether a row can hold a name and imagefolder finds it: JSON is UTF-8, and `\` is read as `/`."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return "\\" not in name


def is_inside(path: str, folder: str) -> bool:
    """Tell whether `path` is `folder` or lies below it. Both must be real paths, without symbolic links."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
