"""The images of a run in their order, on disk where they are many. No torch."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from caption_train.captioning.storage.blocks import BlockFile, sort_many
from caption_train.captioning.storage.database import Database, decode_name, encode_name
from caption_train.captioning.storage.shard import Shard
from caption_train.system.processes import Processes

BLOCK = 4096
"""Images that are looked at together."""


class ImageList(Sequence[Path]):
    """Paths of images, which are made anew whenever they are asked for.

    >>> images = ImageList()
    >>> images.add([("a", "1.png", "1.png"), ("b", "2.png", "2.png"), ("a", "1.png", "1.png")])
    >>> images.finish()
    >>> [path.as_posix() for path in images], len(images), images[1].name
    (['a/1.png', 'b/2.png'], 2, '2.png')

    Args:
        shard: the part of them that is kept; by default all.
    """

    def __init__(self, shard: Shard | None = None) -> None:
        self._shard = shard
        self._blocks = BlockFile()
        self._waiting: list[tuple[int, str, int]] = []
        self._folders: list[Path] = []
        self._numbers: dict[str, int] = {}
        self._may_repeat = False
        self.odd: list[Path] = []
        """The first image whose name is not UTF-8, if there is one."""

    def __len__(self) -> int:
        return BLOCK * len(self._blocks) + len(self._waiting)

    def __getitem__(self, index: int) -> Path:
        index += len(self) if index < 0 else 0
        if not 0 <= index < len(self):
            raise IndexError(index)
        folder, name, _ = self._entry(index)
        return self._folders[folder] / name

    def __iter__(self) -> Iterator[Path]:
        folders = self._folders
        for folder, name, _ in self._entries():
            yield folders[folder] / name

    @property
    def given_folders(self) -> list[Path]:
        """The folders of the images of all shards."""
        return list(self._folders)

    @property
    def folders(self) -> list[Path]:
        """The folders of the images, in the order in which they come."""
        return [self._folders[number] for number in dict.fromkeys(folder for folder, _, _ in self._entries())]

    def add(self, entries: Iterable[tuple[str, str, str]]) -> None:
        """Append images in the order given, perhaps again.

        entries: (folder, name, label) of each; the label, its path below what was given with `/` between the
        parts, says in which shard it is.
        """
        self._may_repeat = True
        for folder, name, label in entries:
            self._append(self._number(folder), name, self._shard.number_of(label) if self._shard else 0)

    def add_sorted(self, root: str, entries: Iterable[bytes], skipped: int = 0, *, may_repeat: bool) -> None:
        """Append images in the order of their keys.

        Args:
            root: what their paths are below.
            entries: a key, a 0 and the path, with `/` between its parts, of each, in any order.
            skipped: how many characters of a path are no part of its label; see `add`.
            may_repeat: whether an image may come again, now or later.
        """
        self._may_repeat = self._may_repeat or may_repeat
        shard, above, number = self._shard, None, 0
        for entry in sort_many(entries):
            path = entry.rpartition(b"\0")[2]
            try:
                path = path.decode()
            except UnicodeDecodeError:
                path = decode_name(path)
                self.odd = self.odd or [Path(root, path)]
            head, slash, name = path.rpartition("/")
            if head + slash != above:
                above, number = head + slash, self._number(str(Path(root, head + slash)))
            if shard is None:
                self._append(number, name, 0)
            else:
                index = shard.number_of(path[skipped:])
                if index == shard.index or self._may_repeat:
                    self._append(number, name, index)

    def finish(self) -> None:
        """Leave each image once, where it stood first, as it was spelled last; and of them this shard."""
        if self._may_repeat and self._find_repeated():
            self._rewrite(self._drop_repeated())
        if self._shard and self._may_repeat:
            self._rewrite(entry for entry in self._entries() if entry[2] == self._shard.index)

    def spread(self, processes: Processes) -> None:
        """Give the list that the main process has to all processes."""
        if processes.count == 1:
            return
        entries = self._entries()
        self._folders = processes.share(lambda: self._folders)
        self.odd = processes.share(lambda: self.odd)
        while block := processes.share(lambda: list(islice(entries, 16 * BLOCK))):
            if not processes.is_main:
                for entry in block:
                    self._append(*entry)

    def _append(self, folder: int, name: str, shard: int) -> None:
        self._waiting.append((folder, name, shard))
        if len(self._waiting) == BLOCK:
            self._blocks.append(self._waiting)
            self._waiting = []

    def _entries(self) -> Iterator[tuple[int, str, int]]:
        for block in self._blocks:
            yield from block
        yield from self._waiting

    def _number(self, folder: str) -> int:
        number = self._numbers.get(folder)
        if number is None:
            number = self._numbers[folder] = len(self._folders)
            self._folders.append(Path(folder))
        return number

    def _find_same(self) -> list[int]:
        """Return for each folder the number of the first one that is the same."""
        first: dict[Path, int] = {}
        return [first.setdefault(folder.absolute(), number) for number, folder in enumerate(self._folders)]

    def _find_repeated(self) -> bool:
        """Tell whether an image may be there twice: by hashes, which take 8 bytes each."""
        import numpy as np

        same = self._find_same()
        hashes = array("q", (hash((same[folder], name)) for folder, name, _ in self._entries()))
        found = np.frombuffer(hashes, np.int64) if hashes else np.empty(0, np.int64)
        found.sort()
        return bool((found[1:] == found[:-1]).any())

    def _drop_repeated(self) -> Iterator[tuple[int, str, int]]:
        same = self._find_same()
        database = Database("CREATE TABLE images (place INTEGER PRIMARY KEY, same INTEGER, name BLOB)")
        rows = ((same[folder], encode_name(name)) for folder, name, _ in self._entries())
        database.run_many("INSERT INTO images (same, name) VALUES (?, ?)", rows)
        query = (
            "SELECT min(place) - 1 AS start, max(place) - 1 FROM images GROUP BY same, name ORDER BY start"
        )
        for start, last in database.rows(query):
            # In the shard of its first label, or it would be in several.
            yield *self._entry(last)[:2], self._entry(start)[2]

    def _entry(self, index: int) -> tuple[int, str, int]:
        number, place = divmod(index, BLOCK)
        if number == len(self._blocks):
            return self._waiting[place]
        if self._read_block[0] != number:
            self._read_block = number, self._blocks[number]
        return self._read_block[1][place]

    _read_block: tuple[int, list] = (-1, [])

    def _rewrite(self, entries: Iterable[tuple[int, str, int]]) -> None:
        new = ImageList()
        for entry in entries:
            new._append(*entry)
        self._blocks, self._waiting, self._read_block = new._blocks, new._waiting, (-1, [])


def folders_of(images: Sequence[Path]) -> list[Path]:
    """Return the folders of images, in the order in which they come."""
    if isinstance(images, ImageList):
        return images.folders
    return list(dict.fromkeys(image.parent for image in images))


def find_odd(images: Sequence[Path]) -> list[Path]:
    """Return at least the first image whose name is not UTF-8, if there is one; perhaps all images."""
    return images.odd if isinstance(images, ImageList) else list(images)


def blocks_of(images: Iterable[Path]) -> Iterator[list[Path]]:
    """Yield images in lists of at most BLOCK."""
    images = iter(images)
    while block := list(islice(images, BLOCK)):
        yield block
