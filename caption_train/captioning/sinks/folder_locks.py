"""Locks the folders that a run writes caption files into. Standard library only."""

import errno
import os
import re
from collections.abc import Sequence
from pathlib import Path

from caption_train.captioning.storage.shard import Shard
from caption_train.errors import CaptionTrainError
from caption_train.system.console import escape_unprintable, print_line
from caption_train.system.lock import OutputLock
from caption_train.system.processes import allow_open_files

SHARD = r"\.shard-[0-9]+-of-([0-9]+)"
"""What the names of a job's own files have of its `--shard`."""
_LOCKS = re.compile(rf"\.caption-train(?:{SHARD})?\.lock")


class FolderLocks:
    """The locks of one run, or of one of several jobs that caption a part of the images each.

    Args:
        shard: the part of the images that this job captions; others of the same count may be at work.
    """

    def __init__(self, shard: Shard | None = None) -> None:
        self._shard = shard
        self._name = f".caption-train.{shard.name}.lock" if shard else ".caption-train.lock"
        self._locks: list[OutputLock] = []

    def take(self, folders: Sequence[Path]) -> None:
        """Lock folders; CaptionTrainError where another run has one of them."""
        real = list(dict.fromkeys(Path(os.path.realpath(folder)) for folder in folders))
        allow_open_files(len(real))
        for folder in real:
            self._locks.append(_acquire(folder, self._name, len(real)))

    def refuse_others(self, folder: Path, hidden: Sequence[str]) -> None:
        """Raise CaptionTrainError where a run is at work that may caption the same images.

        Args:
            folder: one that is locked already: of two runs that start at once, one finds the other's lock.
            hidden: the names in it that begin with a dot.
        """
        for name in hidden:
            found = _LOCKS.fullmatch(name)
            if not found or name == self._name:
                continue
            if not (found[1] and self._shard and int(found[1]) == self._shard.count):
                _acquire(Path(os.path.realpath(folder)), name).release()

    def release(self) -> None:
        """Allow other runs to write to the folders."""
        for lock in self._locks:
            lock.release()
        self._locks = []


def _acquire(folder: Path, name: str, count: int = 1) -> OutputLock:
    """Take a lock in a folder, of `count` that are taken; CaptionTrainError where a run has it."""
    where = f"--save_captions: {escape_unprintable(folder)}"
    lock = OutputLock(folder, name, where, instead="wait until it is done")
    try:
        line = lock.acquire()
    except OSError as error:
        many = f"; {count:,} folders at once are too many" if error.errno == errno.EMFILE else ""
        raise CaptionTrainError(f"{where}: {error.strerror or error}{many}") from error
    if line:
        print_line(line)
    return lock
