"""The images of a run in their order, some dozen bytes each and on disk where they are many. No torch."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from caption_train.captioning.storage.database import Database, decode_name, encode_name
from caption_train.captioning.storage.shard import Shard
from caption_train.system.processes import Processes

BLOCK = 4096
"""Images that are looked at together."""
_TABLES = (
    "CREATE TABLE images (place INTEGER PRIMARY KEY, folder INTEGER, name BLOB, shard INTEGER)",
    "CREATE TABLE found (key BLOB, folder INTEGER, name BLOB, shard INTEGER)",
    "CREATE TABLE same (folder INTEGER PRIMARY KEY, first INTEGER)",
)


@dataclass(frozen=True, slots=True)
class Entry:
    """An image that was found.

    Attributes:
        folder: as it was given.
        name: the rest of its path.
        label: what says in which shard it is: its path below what was given, `/` between the parts.
        key: its place among those that were found with it; see `natural_bytes`.
    """

    folder: str
    name: str
    label: str
    key: bytes = b""


class ImageList(Sequence[Path]):
    """Paths of images, which are made anew whenever they are asked for.

    >>> images = ImageList()
    >>> images.add([Entry("a", "1.png", "1.png"), Entry("b", "2.png", "2.png"), Entry("a", "1.png", "1.png")])
    >>> images.drop_repeated()
    >>> [path.as_posix() for path in images], len(images), images[1].name
    (['a/1.png', 'b/2.png'], 2, '2.png')

    Args:
        shard: the part of them that is kept; by default all.
    """

    def __init__(self, shard: Shard | None = None) -> None:
        self._shard = shard
        self._database = Database(*_TABLES)
        self._folders: list[Path] = []
        self._numbers: dict[str, int] = {}
        self._count = 0
        self.odd: list[Path] = []
        """The first image whose name is not UTF-8, if there is one."""

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Path:
        place = index + 1 if index >= 0 else self._count + index + 1
        row = self._database.row("SELECT folder, name FROM images WHERE place = ?", (place,))
        if row is None:
            raise IndexError(index)
        return self._folders[row[0]] / decode_name(row[1])

    def __iter__(self) -> Iterator[Path]:
        folders = self._folders
        for folder, name in self._database.rows("SELECT folder, name FROM images ORDER BY place"):
            yield folders[folder] / decode_name(name)

    @property
    def given_folders(self) -> list[Path]:
        """The folders of the images of all shards."""
        return list(self._folders)

    @property
    def folders(self) -> list[Path]:
        """The folders of the images, in the order in which they come."""
        query = "SELECT folder FROM images GROUP BY folder ORDER BY min(place)"
        return [self._folders[folder] for (folder,) in self._database.rows(query)]

    def add(self, entries: Iterable[Entry], *, is_sorted: bool = True, may_repeat: bool = True) -> None:
        """Append images.

        Args:
            entries: the images.
            is_sorted: whether they come in their order; if not, their keys say it.
            may_repeat: whether one may come again, now or later.
        """
        shard = self._shard
        if shard and not may_repeat:
            entries = (
                entry for entry in entries if self._number(entry.folder) >= 0 and shard.has(entry.label)
            )
        rows = (
            (
                entry.key,
                self._number(entry.folder),
                self._encode(entry),
                shard and shard.number_of(entry.label),
            )
            for entry in entries
        )
        if is_sorted:
            rows = (row[1:] for row in rows)
            self._database.run_many("INSERT INTO images (folder, name, shard) VALUES (?, ?, ?)", rows)
        else:
            self._database.run_many("INSERT INTO found VALUES (?, ?, ?, ?)", rows)
            self._database.run(
                "INSERT INTO images (folder, name, shard) SELECT folder, name, shard FROM found ORDER BY key"
            )
            self._database.run("DELETE FROM found")
        self._recount()

    def drop_repeated(self) -> None:
        """Leave each image once: where it stood first, in the spelling in which it stood last."""
        first: dict[Path, int] = {}
        same = [(number, first.setdefault(f.absolute(), number)) for number, f in enumerate(self._folders)]
        self._database.run("DELETE FROM same")
        self._database.run_many("INSERT INTO same VALUES (?, ?)", same)
        once = (
            "SELECT min(place) AS start, max(place) AS last FROM images JOIN same USING (folder) "
            "GROUP BY first, name"
        )
        # An image given twice is in the shard of its first label, or shards would depend on each other.
        self._keep(
            "SELECT a.folder, a.name, b.shard FROM "
            f"({once}) JOIN images a ON a.place = last JOIN images b ON b.place = start ORDER BY start"
        )

    def drop_other_shards(self) -> None:
        """Leave the images of this shard."""
        if self._shard:
            self._keep(
                f"SELECT folder, name, shard FROM images WHERE shard = {self._shard.index} ORDER BY place"
            )

    def spread(self, processes: Processes) -> None:
        """Give the list that the main process has to all processes."""
        if processes.count == 1:
            return
        query = "SELECT folder, name FROM images ORDER BY place"
        rows = self._database.rows(query) if processes.is_main else iter(())
        self._folders = processes.share(lambda: self._folders)
        self.odd = processes.share(lambda: self.odd)
        while block := processes.share(lambda: list(islice(rows, 16 * BLOCK))):
            if not processes.is_main:
                self._database.run_many("INSERT INTO images (folder, name) VALUES (?, ?)", block)
        self._recount()

    def _number(self, folder: str) -> int:
        number = self._numbers.get(folder)
        if number is None:
            number = self._numbers[folder] = len(self._folders)
            self._folders.append(Path(folder))
        return number

    def _encode(self, entry: Entry) -> bytes:
        try:
            return entry.name.encode()
        except UnicodeEncodeError:
            self.odd = self.odd or [Path(entry.folder) / entry.name]
            return encode_name(entry.name)

    def _keep(self, query: str) -> None:
        self._database.run(_TABLES[0].replace("images", "kept"))
        self._database.run(f"INSERT INTO kept (folder, name, shard) {query}")
        self._database.run("DROP TABLE images")
        self._database.run("ALTER TABLE kept RENAME TO images")
        self._recount()

    def _recount(self) -> None:
        (self._count,) = self._database.row("SELECT count(*) FROM images")


def folders_of(images: Sequence[Path]) -> list[Path]:
    """Return the folders of images, in the order in which they come."""
    if isinstance(images, ImageList):
        return images.folders
    return list(dict.fromkeys(image.parent for image in images))


def find_odd(images: Sequence[Path]) -> list[Path]:
    """Return at least the first image whose name is not UTF-8, if there is one; perhaps all images."""
    return images.odd if isinstance(images, ImageList) else list(images)


def blocks_of(images: Iterable[Path], size: int = BLOCK) -> Iterator[list[Path]]:
    """Yield images in lists of at most `size`."""
    images = iter(images)
    while block := list(islice(images, size)):
        yield block
