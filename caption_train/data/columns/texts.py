"""Many strings in one buffer: a list of a million short ones takes four times as much memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

_AT_ONCE = 10_000


class Texts:
    """Strings that are not changed any more, in one buffer of UTF-8; any string that Python can hold.

    >>> texts = Texts.of(["a cat", "", "zwölf"])
    >>> texts[2], list(texts.select([2, 0])), len(texts)
    ('zwölf', ['zwölf', 'a cat'], 3)

    Args:
        buffer: the bytes of all, one behind the other.
        ends: where each one begins and, at last, where the last one ends.
    """

    __slots__ = ("buffer", "ends")

    def __init__(self, buffer: np.ndarray, ends: np.ndarray) -> None:
        self.buffer, self.ends = buffer, ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> Texts:
        """Return strings in a buffer."""
        # Names on a disk, and captions of damaged tables, may have lone surrogates.
        pieces = [string.encode("utf-8", "surrogatepass") for string in strings]
        ends = np.zeros(len(pieces) + 1, np.int64)
        np.cumsum([len(piece) for piece in pieces], out=ends[1:])
        return cls(np.frombuffer(b"".join(pieces), np.uint8), ends)

    @classmethod
    def join(cls, parts: Sequence[Texts]) -> Texts:
        """Return the strings of all parts."""
        starts = np.cumsum([0, *(len(part.buffer) for part in parts)])
        ends = [part.ends[1:] + start for part, start in zip(parts, starts[:-1], strict=True)]
        return cls(
            np.concatenate([np.empty(0, np.uint8), *(part.buffer for part in parts)]),
            np.concatenate([np.zeros(1, np.int64), *ends]),
        )

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, row: int) -> str:
        return str(memoryview(self.buffer)[self.ends[row] : self.ends[row + 1]], "utf-8", "surrogatepass")

    def select(self, rows: Sequence[int] | np.ndarray) -> Iterator[str]:
        """Yield the strings of some rows."""
        whole = memoryview(self.buffer)
        for start, end in self._spans(np.asarray(rows, np.int64)):
            yield str(whole[start:end], "utf-8", "surrogatepass")

    def take(self, rows: np.ndarray) -> Texts:
        """Return the strings of some rows in a buffer of their own."""
        ends = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(self.ends[rows + 1] - self.ends[rows], out=ends[1:])
        buffer, whole, filled = np.empty(ends[-1], np.uint8), memoryview(self.buffer), 0
        for start in range(0, len(rows), _AT_ONCE):
            spans = self._spans(rows[start : start + _AT_ONCE])
            piece = np.frombuffer(b"".join([whole[a:b] for a, b in spans]), np.uint8)
            buffer[filled : filled + len(piece)] = piece
            filled += len(piece)
        return Texts(buffer, ends)

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Return how many bytes the strings of some rows have."""
        return self.ends[rows + 1] - self.ends[rows]

    def _spans(self, rows: np.ndarray) -> Iterator[tuple[int, int]]:
        for start in range(0, len(rows), _AT_ONCE):
            some = rows[start : start + _AT_ONCE]
            # As Python's numbers: numpy's take several times as long one by one.
            yield from zip(self.ends[some].tolist(), self.ends[some + 1].tolist(), strict=True)
