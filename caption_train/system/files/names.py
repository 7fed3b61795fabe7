"""Finds files by their names, follows what points to one, and finds a name that is free."""

import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path


def list_names(folder: Path) -> Iterator[str]:
    """Yield the names in a folder, of millions perhaps; OSError if it cannot be read."""
    with os.scandir(folder) as entries:
        for entry in entries:
            yield entry.name


def find_matching(folder: Path, start: str | tuple[str, ...], pattern: re.Pattern) -> list[Path]:
    """Return the files in a folder, of millions perhaps, whose whole name a pattern matches, sorted.

    start: what their names begin with.
    """
    names = (name for name in list_names(folder) if name.startswith(start))
    return [folder / name for name in sorted(filter(pattern.fullmatch, names))]


def find_free_name(path: Path) -> Path:
    """Return `path`, with a number appended if it exists."""
    names = itertools.chain([path], (path.with_name(f"{path.name}-{count}") for count in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))


def behind_link(path: Path | str) -> Path:
    """Return the regular file that a link leads to; the path itself where it is no link, or leads to none."""
    path = Path(path)
    return path.resolve() if path.is_symlink() and path.is_file() else path


def follow_pointer(path: Path) -> Path:
    """Return the folder that `path` is or points to, resolved; `path` itself if it points to none."""
    try:
        if path.is_file() and path.stat().st_size < 1000:
            path = path.with_name(path.read_text(encoding="utf-8"))
        return path.resolve()
    # RuntimeError: a loop of links.
    except (OSError, ValueError, RuntimeError):
        return path
