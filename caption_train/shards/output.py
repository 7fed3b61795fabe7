"""The folder that captioned shards go to: what is done there, who works on what, how a shard gets its name.

A shard is written beside its place and renamed when it is whole; for a remote place it is written here
and sent whole. Locks and journals lie beside the shards, or for a remote place in this user's cache.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

from caption_train.errors import CaptionTrainError, UsageError
from caption_train.shards.formats import FORMATS
from caption_train.shards.journal import Done, Journal
from caption_train.shards.places import Shard, complete_url, explain_remote, is_url, open_filesystem
from caption_train.system.console import escape_unprintable
from caption_train.system.files import (
    cache_folder,
    clear_temporary,
    finish_temporary,
    mode_of,
    open_temporary,
    read_regular_file,
    write_atomically,
)
from caption_train.system.lock import OutputLock

_FLAG = "--output_shards"
_MOST_BYTES = 1 << 20


class OutputFolder:
    """A folder of captioned shards.

    Args:
        place: the folder, or its URL.
        output_format: a key of FORMATS; None writes each shard in the format of its input.

    Raises:
        UsageError: there is no such file system.
    """

    def __init__(self, place: str, output_format: str | None = None) -> None:
        self.place = complete_url(place).rstrip("/") or "/"
        self.where = f"{_FLAG} {escape_unprintable(self.place)}"
        self._format = output_format
        self._system, self._root = None, ""
        if is_url(self.place):
            self._system, self._root, _ = open_filesystem(self.place, _FLAG)
            digest = hashlib.sha256(self.place.encode()).hexdigest()[:16]
            self.work = cache_folder("shards") / f"output-{digest}"
        else:
            self.work = Path(self.place)

    def format_of(self, shard: Shard) -> str:
        """Return in which format a shard is written."""
        return self._format or next(name for name, suffix in FORMATS.items() if suffix == shard.kind)

    def name_of(self, shard: Shard) -> str:
        """Return the name of the shard that is made of another one."""
        return shard.name[: -len(shard.kind)] + FORMATS[self.format_of(shard)]

    def prepare(self, shards: list[Shard]) -> None:
        """Make the folder, delete what killed runs have left half written, and check what will be written.

        Raises:
            UsageError: nothing can be written there, or two shards would get one name.
        """
        named: dict[str, Shard] = {}
        for shard in shards:
            other = named.setdefault(self.name_of(shard), shard)
            if other is not shard:
                raise UsageError(
                    f"{self.where}: {escape_unprintable(other.place)} and {escape_unprintable(shard.place)} "
                    "would both be written there by one name: caption them into two folders"
                )
        try:
            self.work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{self.where}: {error.strerror or error}") from error
        if not os.access(self.work, os.W_OK):
            raise UsageError(f"{self.where}: cannot be written to")
        for shard in shards:
            if not shard.is_remote and self._system is None and self._is_input(shard):
                raise UsageError(f"{self.where}: holds the shards themselves: name another folder")
        clear_temporary(self.work)

    def _is_input(self, shard: Shard) -> bool:
        parent = Path(shard.place).parent
        return self.name_of(shard) == shard.name and os.path.realpath(parent) == os.path.realpath(self.work)

    def lock(self, shard: Shard) -> OutputLock:
        """Return the lock that keeps other runs of this machine or folder away from one shard."""
        return OutputLock(self.work, f".{self.name_of(shard)}.lock", self.where, instead="let it finish")

    def journal(self, shard: Shard) -> Journal:
        """Return the journal of a shard's captions."""
        return Journal(self.work / f".{self.name_of(shard)}.part", self.where)

    def find_done(self, shard: Shard) -> Done | None:
        """Return what is remembered of a shard that is finished; None where it is not."""
        try:
            if self._system is None:
                content = read_regular_file(self._done_path(shard), _MOST_BYTES, is_own=True)
            else:
                content = self._system.cat_file(f"{self._root}/.{self.name_of(shard)}.done")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:
            raise self._explain(error) from error
        return Done.parse(content) if self.has(shard) else None

    def has(self, shard: Shard) -> bool:
        """Tell whether something has the name of a finished shard."""
        try:
            if self._system is None:
                return os.path.lexists(self.work / self.name_of(shard))
            return self._system.exists(f"{self._root}/{self.name_of(shard)}")
        except Exception as error:
            raise self._explain(error) from error

    def publish(self, shard: Shard, write: Callable[[IO[bytes]], None], done: Done) -> None:
        """Write a finished shard, all of it or nothing, and then remember that it is done.

        Args:
            shard: the shard.
            write: writes the content to a file.
            done: what is remembered.

        Raises:
            CaptionTrainError: it cannot be written.
        """
        name = self.name_of(shard)
        path = self.work / name
        try:
            with open_temporary(path) as (file, temporary):
                write(file)
                finish_temporary(file, temporary, mode_of(path))
                # What is remembered of one that was deleted would be taken for this one's after a kill.
                self._forget(shard)
                if self._system is None:
                    temporary.replace(path)
                else:
                    self._system.makedirs(self._root, exist_ok=True)
                    self._system.put_file(str(temporary), f"{self._root}/{name}")
            if self._system is None:
                write_atomically(self._done_path(shard), done.dump())
            else:
                self._system.pipe_file(f"{self._root}/.{name}.done", done.dump())
        except CaptionTrainError:
            raise
        except Exception as error:
            if self._system is None and not isinstance(error, OSError):
                raise
            raise self._explain(error) from error

    def _forget(self, shard: Shard) -> None:
        if self._system is None:
            self._done_path(shard).unlink(missing_ok=True)
        elif self._system.exists(record := f"{self._root}/.{self.name_of(shard)}.done"):
            self._system.rm_file(record)

    def _done_path(self, shard: Shard) -> Path:
        return self.work / f".{self.name_of(shard)}.done"

    def _explain(self, error: Exception) -> CaptionTrainError:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else explain_remote(error)
        return CaptionTrainError(f"{self.where}: {reason}")
