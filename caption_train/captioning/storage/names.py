"""Lists that stay short: the first lines are kept, the others counted. Standard library only."""

from collections.abc import Iterable
from typing import Self


class FirstLines(list):
    """The first lines of many, and how many more there were.

    >>> lines = FirstLines()
    >>> lines += (f"{number}.png: damaged" for number in range(1200))
    >>> len(lines), lines.more, lines.total
    (1000, 200, 1200)
    """

    most = 1000
    more = 0

    def __init__(self, lines: Iterable[str] = ()) -> None:
        super().__init__()
        self += lines

    @property
    def total(self) -> int:
        """How many lines there were."""
        return len(self) + self.more

    def append(self, line: str) -> None:
        """Keep a line, or count it."""
        if len(self) < self.most:
            super().append(line)
        else:
            self.more += 1

    def clear(self) -> None:
        """Forget all lines."""
        super().clear()
        self.more = 0

    def extend(self, lines: Iterable[str]) -> None:
        """Keep lines, or count them."""
        for line in lines:
            self.append(line)
        self.more += getattr(lines, "more", 0)

    def __add__(self, lines: Iterable[str]) -> Self:
        both = type(self)(self)
        both += lines
        return both

    def __iadd__(self, lines: Iterable[str]) -> Self:
        self.extend(lines)
        return self


class FirstNames(FirstLines):
    """The first few names of many."""

    most = 5
