"""Puts new rows among those of a file, in the order of the images, with as little memory as for a few.

Standard library only.
"""

import marshal
from collections.abc import Iterable, Iterator

from caption_train.captioning.sinks.row_text import Row, TextRow
from caption_train.captioning.storage.database import Database, decode_name, encode_name

_TABLES = (
    "CREATE TABLE places (name BLOB PRIMARY KEY, place INTEGER) WITHOUT ROWID",
    "CREATE TABLE new (number INTEGER PRIMARY KEY, name BLOB UNIQUE, row BLOB)",
    "CREATE TABLE rows (number INTEGER PRIMARY KEY, name BLOB, text BLOB, cells BLOB)",
)


class RowMerge:
    """The rows of a file, new ones, and the order of all.

    >>> merge = RowMerge(["a", "b", "c"])
    >>> merge.add_new([{"file_name": "c", "text": "sea"}, {"file_name": "a", "text": "new"}])
    >>> merge.read([TextRow("of b", {"file_name": "b"}), TextRow("of a", {"file_name": "a"})])
    >>> [(text, row["text"]) for number, text, row in merge.find_met()]
    [('of a', 'new')]
    >>> merge.append(TextRow("of c", row) for row in merge.find_unmet())
    >>> [row.text for row in merge.in_order()]
    ['of a', 'of b', 'of c']

    Args:
        names: those of the images, in their order.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._database = Database(*_TABLES)
        places = ((encode_name(name), place) for place, name in enumerate(names))
        self._database.run_many("REPLACE INTO places VALUES (?, ?)", places)

    def add_new(self, rows: Iterable[Row]) -> None:
        """Take in new rows; the last one of a name counts."""
        self._database.run_many(
            "INSERT INTO new (name, row) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET row = excluded.row",
            ((encode_name(row["file_name"]), marshal.dumps(row)) for row in rows),
        )

    @property
    def has_new(self) -> bool:
        """Whether there is a new row."""
        return self._database.row("SELECT 1 FROM new LIMIT 1") is not None

    def place_of(self, name: str) -> int:
        """Return the place of an image by its name, -1 where it is none of the run."""
        row = self._database.row("SELECT place FROM places WHERE name = ?", (encode_name(name),))
        return -1 if row is None else row[0]

    def read(self, rows: Iterable[TextRow]) -> None:
        """Take in the rows of the file, in the place of those that were taken in before."""
        self._database.run("DELETE FROM rows")
        self.append(rows)

    def append(self, rows: Iterable[TextRow]) -> None:
        """Take in more rows."""
        self._database.run_many(
            "INSERT INTO rows (name, text, cells) VALUES (?, ?, ?)",
            ((encode_name(row.values["file_name"]), *_pack(row)) for row in rows),
        )

    def find_met(self) -> Iterator[tuple[int, str, Row]]:
        """Yield (number, text, new row) of each row of the file that a new one has the name of."""
        query = (
            "SELECT number, text, row FROM rows JOIN (SELECT name, row FROM new) USING (name) ORDER BY number"
        )
        for number, text, new in self._database.rows(query):
            yield number, decode_name(text), marshal.loads(new)

    def change(self, rows: Iterable[tuple[int, TextRow]]) -> None:
        """Give rows, by their numbers, another content."""
        self._database.run_many(
            "UPDATE rows SET text = ?, cells = ? WHERE number = ?",
            ((*_pack(row), number) for number, row in rows),
        )

    def find_unmet(self) -> Iterator[Row]:
        """Yield the new rows whose name no row has, those of images in their order, others before them."""
        query = (
            "SELECT row FROM new LEFT JOIN places USING (name) WHERE name NOT IN (SELECT name FROM rows) "
            "ORDER BY ifnull(place, -1), number"
        )
        for (row,) in self._database.rows(query):
            yield marshal.loads(row)

    def in_order(self) -> Iterator[TextRow]:
        """Yield all rows: those of no image of the run as they stood, then those of images in their order."""
        query = (
            "SELECT text, cells FROM rows LEFT JOIN places USING (name) ORDER BY ifnull(place, -1), number"
        )
        for text, cells in self._database.rows(query):
            yield TextRow(decode_name(text), {}, cells and marshal.loads(cells))


def _pack(row: TextRow) -> tuple[bytes, bytes | None]:
    return encode_name(row.text), None if row.cells is None else marshal.dumps(row.cells)
