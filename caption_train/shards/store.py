"""Keeps copies of shards that single images cannot be read from: remote ones, and Parquet files.

A row of a Parquet file can only be reached by decoding hundreds of others, and training reads images in any
order. So its images are written to a tar once, in this user's cache, as `datasets` keeps a copy of what it
loads.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from caption_train.shards.copies import read_remote
from caption_train.shards.places import Shard
from caption_train.shards.records import ShardError
from caption_train.system.console import escape_unprintable, print_line
from caption_train.system.files import cache_folder, clear_temporary, open_atomically, open_own
from caption_train.system.holder import fcntl

FORMAT = 1
"""Goes up when a copy would hold something else: no older one is used then."""


def keep_copy(shard: Shard, kind: str, write: Callable[[IO[bytes]], None], facts: str = "") -> Path:
    """Return a copy of a shard in the cache, made now if need be; several processes may ask at once.

    Args:
        shard: the shard.
        kind: the suffix of the copy.
        write: writes the copy to a file.
        facts: what else the copy depends on.

    Raises:
        ShardError: the copy cannot be made.
    """
    folder = cache_folder("shards") / "copies"
    place = shard.place if shard.is_remote else os.path.realpath(shard.place)
    told = f"{FORMAT} {shard.stamp} {place} {facts}".encode("utf-8", "surrogateescape")
    path = folder / f"{hashlib.sha256(told).hexdigest()[:32]}{kind}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            return path
        with _waiting(folder / ".lock", path.name):
            if not path.is_file():
                clear_temporary(folder)
                shown = escape_unprintable(shard.place)
                print_line(f"{shown}: copied to {escape_unprintable(folder)}, once for all runs")
                with open_atomically(path, "wb", None) as file:
                    write(file)
    except OSError as error:
        raise ShardError(
            f"{escape_unprintable(shard.place)}: cannot be copied to {escape_unprintable(folder)}: "
            f"{error.strerror or error}; XDG_CACHE_HOME names another folder"
        ) from error
    return path


def keep_remote(shard: Shard) -> Path:
    """Return a copy of a remote shard in the cache; see `keep_copy`."""
    return keep_copy(shard, shard.kind, lambda file: read_remote(shard, file, "--dataset_dir"))


@contextmanager
def _waiting(path: Path, name: str) -> Iterator[None]:
    """Wait for another process that makes the copy of this name; the system ends the lock of one that dies.

    Each name has a byte of the file to lock, so that several copies can be made at a time.
    """
    descriptor = open_own(path, os.O_RDWR | os.O_CREAT)
    try:
        if fcntl is not None:
            fcntl.lockf(descriptor, fcntl.LOCK_EX, 1, int(name[:7], 16))
        yield
    finally:
        os.close(descriptor)
