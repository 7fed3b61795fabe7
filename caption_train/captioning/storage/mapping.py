"""A dictionary that may have more entries than memory has room for. Standard library only."""

import marshal
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from caption_train.captioning.storage.database import Database, decode_name, encode_name

V = TypeVar("V")
MOST_IN_MEMORY = 20_000


class DiskDict(Generic[V]):
    """A dictionary from text to values of plain types; beyond some thousand entries it is kept on disk.

    >>> captions = DiskDict(most=2)
    >>> for name in ("a", "b", "c", "a"):
    ...     captions[name] = name * 2
    >>> captions.get("b"), captions.get("d"), "c" in captions, sorted(captions.items())
    ('bb', None, True, [('a', 'aa'), ('b', 'bb'), ('c', 'cc')])

    A value is what was stored: changing one that was read changes nothing here.

    Args:
        most: how many entries are in memory at once; by default MOST_IN_MEMORY.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = MOST_IN_MEMORY if most is None else most
        self._recent: dict[str, V] = {}
        self._database: Database | None = None

    def __setitem__(self, key: str, value: V) -> None:
        self._recent[key] = value
        if len(self._recent) > self._most:
            self._spill()

    def __getitem__(self, key: str) -> V:
        found = self._find(key)
        if found is None:
            raise KeyError(key)
        return found[0]

    def __contains__(self, key: str) -> bool:
        return key in self._recent or self._find(key) is not None

    def __bool__(self) -> bool:
        return bool(self._recent) or self._database is not None

    def get(self, key: str, default: Any = None) -> V | Any:
        """Return the value of a key, or `default`."""
        found = self._find(key)
        return default if found is None else found[0]

    def items(self) -> Iterator[tuple[str, V]]:
        """Yield all entries; in the order in which they came where all are in memory."""
        if self._database is None:
            yield from self._recent.items()
            return
        self._spill()
        for key, value in self._database.rows("SELECT key, value FROM kept"):
            yield decode_name(key), marshal.loads(value)

    def _find(self, key: str) -> tuple[V] | None:
        if key in self._recent:
            return (self._recent[key],)
        if self._database is None:
            return None
        row = self._database.row("SELECT value FROM kept WHERE key = ?", (encode_name(key),))
        return row and (marshal.loads(row[0]),)

    def _spill(self) -> None:
        if self._database is None:
            self._database = Database("CREATE TABLE kept (key BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID")
        # In order, which a tree takes in fastest.
        rows = sorted((encode_name(key), marshal.dumps(value)) for key, value in self._recent.items())
        self._database.run_many("REPLACE INTO kept VALUES (?, ?)", rows)
        self._recent.clear()
