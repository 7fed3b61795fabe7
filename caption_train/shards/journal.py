"""Keeps the captions of an unfinished shard, as they come, and remembers what a finished shard was made of.

Beside the shard `00000.tar` of the output lie, until it is done, its journal `.00000.tar.part`, and from then
on its record `.00000.tar.done`. A caption is one line of the journal: a kill loses at most the last one. The
lines are in the order of the shard, so that no run holds more than one of them in memory.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from caption_train.errors import CaptionTrainError
from caption_train.shards.records import NewCaption
from caption_train.system.console import escape_unprintable
from caption_train.system.files import open_own, parse_json

_LONGEST_LINE = 4 << 20


@dataclass
class Done:
    """What is remembered of a finished shard.

    Attributes:
        stamp: of the input when it was read.
        run: identifies the settings that captions depend on.
        captioned, kept, unreadable: counts of its images.
    """

    stamp: str
    run: str
    captioned: int = 0
    kept: int = 0
    unreadable: int = 0

    def dump(self) -> bytes:
        """Return the record as it is written."""
        return (json.dumps(asdict(self)) + "\n").encode()

    @classmethod
    def parse(cls, content: bytes) -> Done | None:
        """Return what a record says; None for what is none."""
        try:
            found = parse_json(content)
            return cls(
                *(str(found[name]) for name in ("stamp", "run")),
                *(int(found.get(name, 0)) for name in ("captioned", "kept", "unreadable")),
            )
        except (ValueError, TypeError, KeyError, AttributeError):
            return None


@dataclass
class Journal:
    """The captions of one unfinished shard.

    Args:
        path: the file.
        where: the flag and its value, for messages.
    """

    path: Path
    where: str
    last: int = -1
    """The number of the last record that has an entry."""
    descriptor: int | None = field(default=None, repr=False)

    def resume(self, facts: Mapping[str, Any]) -> bool:
        """Open the journal, and keep what is in it if it is of the same work.

        Errors at its end are dropped: perhaps a server gave no answer any more, or a disk.

        Args:
            facts: what identifies the work: the input as it is now, and what becomes of old captions.

        Returns:
            Whether something was thrown away, which was of other work.
        """
        lost = False
        try:
            self.descriptor = open_own(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            head, end = self._find_end()
            if head != dict(facts):
                lost, end = head is not None, 0
                self.last = -1
            os.ftruncate(self.descriptor, end)
            if not end:
                self._append(dict(facts))
        except OSError as error:
            raise self._explain(error) from error
        return lost

    def add(self, caption: NewCaption) -> None:
        """Write down what became of a record."""
        row: dict[str, Any] = {"i": caption.index}
        named = (("t", caption.text), ("e", caption.error), ("r", caption.remarks), ("a", caption.answer))
        row |= {name: value for name, value in named if value or (name == "t" and value is not None)}
        try:
            self._append(row)
        except OSError as error:
            raise self._explain(error) from error
        self.last = caption.index

    def read(self) -> Iterator[NewCaption]:
        """Yield what is written down, in the order of the shard."""
        try:
            with os.fdopen(open_own(self.path), "rb") as file:
                file.readline(_LONGEST_LINE)
                for line in file:
                    row = _parse(line)
                    if row is not None:
                        yield NewCaption(row["i"], row.get("t"), row.get("e"), row.get("r", ()), row.get("a"))
        except OSError as error:
            raise self._explain(error) from error

    def close(self) -> None:
        """Close the file; it stays."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    def discard(self) -> None:
        """Delete the file: its shard is written."""
        self.close()
        self.path.unlink(missing_ok=True)

    def _append(self, row: Mapping[str, Any]) -> None:
        line = (json.dumps(row) + "\n").encode()
        # In one call: a kill leaves the whole line, or a part that the next run cuts off.
        if os.write(self.descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _find_end(self) -> tuple[Mapping[str, Any] | None, int]:
        """Return the first line, None in an empty file, and where the last caption ends."""
        end, head = 0, None
        with os.fdopen(os.dup(self.descriptor), "rb") as file:
            first = file.readline(_LONGEST_LINE)
            if not first:
                return None, 0
            try:
                head = parse_json(first)
            except ValueError:
                head = {}
            read = end = len(first)
            last = self.last
            while line := file.readline(_LONGEST_LINE):
                row = _parse(line)
                if row is None or not line.endswith(b"\n") or row["i"] <= last:
                    break
                read, last = read + len(line), row["i"]
                if row.get("t") is not None:
                    self.last, end = last, read
        return head if isinstance(head, dict) else {}, end

    def _explain(self, error: OSError) -> CaptionTrainError:
        return CaptionTrainError(f"{self.where}: {escape_unprintable(self.path)}: {error.strerror or error}")


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = parse_json(line)
    except ValueError:
        return None
    good = isinstance(row, dict) and isinstance(row.get("i"), int)
    return row if good and isinstance(row.get("t"), str | None) else None
