"""A database for one process: it stays in memory while it is small, and no kill leaves anything of it.

Standard library only.
"""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from caption_train.errors import CaptionTrainError

CACHE_KIB = 8 << 10
"""Memory of one database; what is beyond goes to a file without a name in the folder of temporary files."""


class Database:
    """SQLite in a temporary file, with errors of one line.

    >>> database = Database("CREATE TABLE seen (name BLOB PRIMARY KEY) WITHOUT ROWID")
    >>> database.run_many("INSERT INTO seen VALUES (?)", [(b"a",), (b"b",)])
    >>> list(database.rows("SELECT name FROM seen"))
    [(b'a',), (b'b',)]

    Args:
        tables: the statements that make its tables.

    Raises:
        CaptionTrainError: here and in all methods: there is no room for temporary files.
    """

    def __init__(self, *tables: str) -> None:
        with _explained():
            # No name: SQLite deletes the file as soon as it is open. Used by one thread at a time.
            self._connection = sqlite3.connect("", isolation_level=None, check_same_thread=False)
            for setting in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{CACHE_KIB}"):
                self._connection.execute(f"PRAGMA {setting}")
            for table in tables:
                self._connection.execute(table)
            # Never committed: a statement alone would be a transaction of its own.
            self._connection.execute("BEGIN")

    def run(self, statement: str, values: Sequence[Any] = ()) -> None:
        """Run one statement."""
        with _explained():
            self._connection.execute(statement, values)

    def run_many(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        """Run one statement for each row of values."""
        with _explained():
            self._connection.executemany(statement, rows)

    def row(self, statement: str, values: Sequence[Any] = ()) -> tuple | None:
        """Return the first row of a query."""
        try:
            return self._connection.execute(statement, values).fetchone()
        except sqlite3.Error as error:
            raise _explain(error) from error

    def rows(self, statement: str, values: Sequence[Any] = ()) -> Iterator[tuple]:
        """Yield the rows of a query, as they are asked for."""
        with _explained():
            yield from self._connection.execute(statement, values)


def encode_name(name: str) -> bytes:
    """Return the name of any file as bytes that sort as the text does; see `decode_name`."""
    return name.encode("utf-8", "surrogatepass")


def decode_name(name: bytes) -> str:
    """Return the text of `encode_name`."""
    return name.decode("utf-8", "surrogatepass")


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise _explain(error) from error


def _explain(error: sqlite3.Error) -> CaptionTrainError:
    return CaptionTrainError(
        f"temporary files: {error}: set TMPDIR to a folder with room for about 500 bytes an image"
    )
