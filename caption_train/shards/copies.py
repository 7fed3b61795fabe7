"""Copies shards of buckets and other remote places to this machine, one ahead of those that are read."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import IO

from caption_train.errors import CaptionTrainError
from caption_train.shards.places import Shard, explain_remote, open_filesystem
from caption_train.shards.records import ShardError
from caption_train.system.console import escape_unprintable
from caption_train.system.files import cache_folder
from caption_train.system.holder import is_running

_PIECE = 1 << 24


class Copies:
    """Copies of remote shards in this user's cache, which live as long as this process works on them.

    Args:
        shards: what is read, in this order.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._following = dict(pairwise(shards))
        self._coming: dict[Shard, Future[Path]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._folder = Path()
        if any(shard.is_remote for shard in shards):
            self._folder = cache_folder("shards") / "fetched"
            self._folder.mkdir(parents=True, exist_ok=True)
            _clear_copies(self._folder)
            self._pool = ThreadPoolExecutor(1)

    def take(self, shard: Shard) -> Path:
        """Return the copy of a remote shard, which the caller deletes.

        Raises:
            ShardError: it cannot be fetched.
        """
        coming = self._coming.pop(shard, None)
        return coming.result() if coming else fetch(shard, self._folder)

    def fetch_next(self, shard: Shard) -> None:
        """Start to fetch the shard after this one."""
        following = self._following.get(shard)
        if following and following.is_remote and self._pool:
            self._coming[following] = self._pool.submit(fetch, following, self._folder)

    def drop(self, shard: Shard) -> None:
        """Delete the copy of a shard that is not needed, if it was asked for."""
        coming = self._coming.pop(shard, None)
        if coming and not coming.cancel():
            with suppress(CaptionTrainError, OSError):
                coming.result().unlink(missing_ok=True)

    def close(self) -> None:
        """Delete what nobody has taken."""
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
        for coming in self._coming.values():
            with suppress(CaptionTrainError, OSError):
                if not coming.cancelled():
                    coming.result().unlink(missing_ok=True)
        self._coming = {}


def fetch(shard: Shard, folder: Path) -> Path:
    """Copy a remote shard into a folder, under a name of its own, and return the copy.

    Raises:
        ShardError: it cannot be fetched.
    """
    copy = folder / f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}{shard.kind}"
    try:
        with copy.open("wb") as file:
            read_remote(shard, file, "--images")
    except BaseException:
        copy.unlink(missing_ok=True)
        raise
    return copy


def read_remote(shard: Shard, file: IO[bytes], flag: str) -> None:
    """Write the bytes of a remote shard to a file.

    Args:
        shard: the shard.
        file: where to write.
        flag: that names the shard, for messages.

    Raises:
        ShardError: it cannot be fetched.
    """
    try:
        system, path, _ = open_filesystem(shard.place, flag)
        with system.open(path, "rb") as remote:
            while piece := remote.read(_PIECE):
                file.write(piece)
    except CaptionTrainError:
        raise
    # fsspec's plugins raise errors of many types.
    except Exception as error:
        raise ShardError(f"{escape_unprintable(shard.place)}: {explain_remote(error)}") from error


def _clear_copies(folder: Path) -> None:
    """Delete what killed processes of this machine have left."""
    start = f"{socket.gethostname()}."
    for copy in folder.iterdir():
        number = copy.name.removeprefix(start).partition(".")[0]
        if copy.name.startswith(start) and number.isdigit() and not is_running(int(number)):
            copy.unlink(missing_ok=True)
