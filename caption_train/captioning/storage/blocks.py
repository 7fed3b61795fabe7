"""Lists of plain values in a temporary file that no kill leaves behind, and sorting by means of them.

Standard library only.
"""

import heapq
import marshal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from tempfile import SpooledTemporaryFile
from typing import Any

from caption_train.errors import CaptionTrainError

IN_MEMORY = 4 << 20
"""Bytes of a file that are not written to the disk."""
MOST_SORTED = 500_000
"""Entries that are sorted at once."""
_RUN = 4096


class BlockFile:
    """Blocks of values of plain types, found by their number.

    >>> blocks = BlockFile()
    >>> blocks.append(["a", "b"])
    >>> blocks.append(["c"])
    >>> len(blocks), blocks[1], list(blocks)
    (2, ['c'], [['a', 'b'], ['c']])

    Raises:
        CaptionTrainError: here and in all methods: there is no room for temporary files.
    """

    def __init__(self) -> None:
        # Deleted by the system as soon as it is open.
        self._file = SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115
        self._starts = [0]

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> Any:
        with _explained():
            start, end = self._starts[number : number + 2]
            self._file.seek(start)
            return marshal.loads(self._file.read(end - start))

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))

    def append(self, block: Any) -> None:
        """Add a block at the end."""
        with _explained():
            self._file.seek(self._starts[-1])
            self._file.write(marshal.dumps(block))
            self._starts.append(self._file.tell())


def sort_many(entries: Iterable[bytes]) -> Iterator[bytes]:
    """Yield entries in their order; of very many all but some are on disk.

    >>> list(sort_many([b"b", b"a"]))
    [b'a', b'b']
    """
    entries, runs = iter(entries), []
    while run := sorted(islice(entries, MOST_SORTED)):
        if len(run) < MOST_SORTED and not runs:
            yield from run
            return
        blocks = BlockFile()
        for start in range(0, len(run), _RUN):
            blocks.append(run[start : start + _RUN])
        runs.append(entry for block in blocks for entry in block)
        run.clear()
    yield from heapq.merge(*runs)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CaptionTrainError(
            f"temporary files: {error.strerror or error}: set TMPDIR to a folder with room for about 500 "
            "bytes an image"
        ) from error
