"""Keeps between runs what was found in tars: where each image is, and its caption. A tar is walked once.

A tar is known by its real path, size, times of change and inode, as the index of images knows files. What is
kept is only ever a short cut: whatever is wrong with it, the tar is walked as if there were nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from caption_train.packed import Container
from caption_train.system.files import cache_folder, parse_json, read_regular_file, write_atomically

FORMAT = 1
"""Goes up when something else is found in the same tar: nothing kept before is used then."""
UNUSED_DAYS = 180
_RACY_NS = 2_000_000_000
"""File systems keep times in steps of up to two seconds: a file may change twice within one."""
_MOST_BYTES = 4 << 30
_DAY = 86_400
_DIGEST_BYTES = 65
"""Of a SHA-256 in hexadecimal and the end of its line."""


@dataclass
class Table:
    """What was found in a tar.

    Attributes:
        rows: (name, offset, size, caption, source) of each pair.
        problems: what is wrong with the rest.
        notes: what is odd.
    """

    rows: list[tuple[str, int, int, str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class KeptTable:
    """The place where what was found in one tar is kept.

    Args:
        container: the tar as it is now.
        facts: what else the table depends on.
    """

    def __init__(self, container: Container, facts: Sequence[str]) -> None:
        self._container = container
        stamp = (container.size, container.mtime_ns, container.ctime_ns, container.inode)
        told = json.dumps([FORMAT, *stamp, os.path.realpath(container.path), *facts])
        name = hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        self.path = cache_folder("shards") / "tables" / f"{name}.json"

    def read(self) -> Table | None:
        """Return what was kept; None where there is nothing, or not what was written."""
        try:
            content = read_regular_file(self.path, _MOST_BYTES, is_own=True)
            digest, body = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
            if digest.strip().decode() != hashlib.sha256(body).hexdigest():
                return None
            if time.time() - self.path.stat().st_mtime > 7 * _DAY:
                os.utime(self.path)
            return Table(**parse_json(body))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, table: Table, *, is_own: bool = False) -> None:
        """Keep what was found, if the tar is old enough that a change of it would show, and can be kept.

        Args:
            table: what was found.
            is_own: the tar is a copy of ours, which nobody changes.
        """
        changed = max(self._container.mtime_ns, self._container.ctime_ns)
        if not is_own and changed + _RACY_NS >= time.time_ns():
            return
        kept = {"rows": table.rows, "problems": table.problems, "notes": table.notes}
        with suppress(OSError, UnicodeError):
            body = json.dumps(kept).encode()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _prune(self.path.parent)
            write_atomically(self.path, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


@cache
def _prune(folder: Path) -> None:
    """Delete what was not used for long, once in a process."""
    oldest = time.time() - UNUSED_DAYS * _DAY
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".json") and entry.stat(follow_symlinks=False).st_mtime < oldest:
                Path(entry.path).unlink(missing_ok=True)
