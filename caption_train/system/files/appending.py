"""Files of JSON lines that grow as a run goes on, so that a kill costs the last line at most."""

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from caption_train.system.files.reading import open_own, parse_json


class AppendedRows:
    """Appends rows to a file of ours, which is made with the first of them. No link is followed.

    Args:
        path: the file.
        is_synced: whether each row waits until it is on the disk.
    """

    def __init__(self, path: Path, *, is_synced: bool = False) -> None:
        self.path = path
        self._is_synced = is_synced
        self._descriptor: int | None = None

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row.

        Raises:
            OSError: it cannot be written, or the disk had room for a part of it.
        """
        line = (json.dumps(row) + "\n").encode()
        if self._descriptor is None:
            self._descriptor = open_own(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            if _ends_within_a_line(self._descriptor):
                line = b"\n" + line
        # In one call and without a buffer: a kill leaves the whole row or a part that is no JSON.
        if os.write(self._descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        if self._is_synced:
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; the next row opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def parse_rows(lines: Iterable[bytes]) -> Iterator[Any]:
    """Yield what lines say, without those that are no JSON: a killed process may have left half a line."""
    for line in lines:
        try:
            yield parse_json(line)
        except ValueError:
            continue


def _ends_within_a_line(descriptor: int) -> bool:
    if not os.lseek(descriptor, 0, os.SEEK_END):
        return False
    os.lseek(descriptor, -1, os.SEEK_END)
    return os.read(descriptor, 1) != b"\n"
