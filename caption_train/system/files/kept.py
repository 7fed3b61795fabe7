"""Keeps files that can be made again: where, and how many bytes of them."""

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from caption_train.errors import CaptionTrainError


def cache_folder(name: str) -> Path:
    """Return where things of one kind are kept between runs: in $XDG_CACHE_HOME, or in ~/.cache.

    Raises:
        CaptionTrainError: there is neither, as for a user in a container that has no entry in /etc/passwd.
    """
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise CaptionTrainError(
            f"there is no home folder to keep {name} in: set XDG_CACHE_HOME to a folder"
        ) from error
    return root / "caption-train" / name


@dataclass(frozen=True, order=True)
class Kept:
    """A file that can be made again.

    Attributes:
        used: when it was last used, in nanoseconds: whoever reads one sets its time of modification.
        size: in bytes.
        path: the file.
    """

    used: int
    size: int
    path: Path


def list_kept(folder: Path, suffix: str) -> Iterator[Kept]:
    """Yield the regular files of a folder whose names end with `suffix`; none if it cannot be read."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(suffix):
                with suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        yield Kept(status.st_mtime_ns, status.st_size, Path(entry.path))


def remove_least_used(
    files: Iterable[Kept], most_bytes: int, keep: Callable[[Path], bool] = lambda path: False
) -> int:
    """Remove the files that were not used for the longest time, until all have `most_bytes` together.

    Args:
        files: as `list_kept` finds them.
        most_bytes: how many bytes they may have.
        keep: whether a file must stay.

    Returns:
        How many bytes were removed.
    """
    found = sorted(files)
    excess, removed = sum(file.size for file in found) - most_bytes, 0
    for file in found:
        if removed >= excess:
            break
        if not keep(file.path):
            with suppress(OSError):
                file.path.unlink()
                removed += file.size
    return removed
