"""Images of a run that nobody has decoded yet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from caption_train.data.columns.table import Pairs, PairTable


@dataclass
class Unknown:
    """Images of pairs that no run has decoded yet, each once, in an order in which all processes agree.

    Attributes:
        table: has the pairs.
        rows: of the pairs, those with the same image side by side.
        starts: where in `rows` each image begins.
    """

    table: PairTable
    rows: np.ndarray
    starts: np.ndarray

    @classmethod
    def among(cls, *pairs: Pairs) -> Unknown:
        """Find them among pairs of one table."""
        table = pairs[0].table
        rows = np.concatenate([some.rows for some in pairs])
        rows = rows[table.pixels[rows] == 0]
        # By name: comparing paths part by part takes ten times as long.
        names = list(table.image_names(rows))
        order = sorted(range(len(names)), key=names.__getitem__)
        starts = [at for at, n in enumerate(order) if not at or names[n] != names[order[at - 1]]]
        return cls(table, rows[np.array(order, np.int64)], np.array(starts, np.int64))

    def __len__(self) -> int:
        return len(self.starts)

    def image(self, number: int) -> Path:
        """Return one image."""
        return self.table.image(int(self.rows[self.starts[number]]))

    def rows_of(self, number: int) -> np.ndarray:
        """Return the rows of an image's pairs."""
        end = self.starts[number + 1] if number + 1 < len(self) else len(self.rows)
        return self.rows[self.starts[number] : end]

    def images(self, start: int, end: int) -> list[Path | str]:
        """Return some images; files of their own as strings, which take less time to make and send."""
        rows = self.rows[self.starts[start:end]]
        if any(place.container or place.only for place in self.table.places):
            return [self.table.image(row) for row in rows.tolist()]
        return list(self.table.image_names(rows))

    def note_all(self, start: int, found: list[tuple[str, int] | None]) -> None:
        """Put what was found in images into the table, from one number on; None where nothing was."""
        numbers = start + np.flatnonzero([one is not None for one in found])
        known = [one for one in found if one is not None]
        rows = self.rows[self.starts[numbers]]
        digests = bytes.fromhex("".join(digest for digest, _ in known))
        self.table.digest[rows] = np.frombuffer(digests, np.uint8).reshape(-1, 32)
        self.table.pixels[rows] = [pixels for _, pixels in known]
        if len(self.rows) > len(self):
            for number, one in zip(numbers.tolist(), known, strict=True):
                self.note(number, *one)

    def note(self, number: int, digest: str, pixels: int) -> None:
        """Put what was found in an image into the table."""
        rows = self.rows_of(number)
        self.table.digest[rows] = np.frombuffer(bytes.fromhex(digest), np.uint8)
        self.table.pixels[rows] = pixels
