"""Finds files that are there several times, by their bytes."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from caption_train.system.files import hash_file

Key = TypeVar("Key")


def find_copies(files: Mapping[Key, Path], is_stopped: Callable[[], bool] = lambda: False) -> dict[Key, str]:
    """Return key → digest for the files whose bytes another file has too.

    Only files of the same size are read. What is gone, or cannot be read, is left out: whoever opens the
    image says what is wrong with it.

    Args:
        files: the files, by what the caller names them.
        is_stopped: asked before each file is read; where it says so, what was found so far is returned.
    """
    by_size: dict[int, list[Key]] = defaultdict(list)
    for key, path in files.items():
        try:
            by_size[path.stat().st_size].append(key)
        except OSError:
            continue
    by_digest: dict[str, list[Key]] = defaultdict(list)
    for key in (key for keys in by_size.values() if len(keys) > 1 for key in keys):
        if is_stopped():
            break
        try:
            by_digest[hash_file(files[key])].append(key)
        except OSError:
            continue
    return {key: digest for digest, keys in by_digest.items() if len(keys) > 1 for key in keys}
