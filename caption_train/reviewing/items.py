"""Finds the images of the folder, and gives each an opaque id by which alone the page can name it."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from caption_train.data.formats import describe_unread, is_inside
from caption_train.data.scan import image_id, scan_folder
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.system.console import escape_unprintable


@dataclass(frozen=True, slots=True)
class Item:
    """One image.

    Attributes:
        id: what the page names it by: a digest of its name, so a restart does not change it.
        name: path relative to the folder, `/` between its parts.
        path: the file, as it was found.
        size: bytes of the file.
        mtime_ns: when it was last written; with `size` it tells one state of the file from the next.
    """

    id: str
    name: str
    path: Path
    size: int
    mtime_ns: int

    @property
    def version(self) -> str:
        """What changes when the file does, for addresses that a browser may keep."""
        return f"{self.mtime_ns:x}-{self.size:x}"


class Library(Mapping[str, Item]):
    """The images of a folder in natural order, by id. Nothing else can be asked for.

    Args:
        root: the folder. Links that lead out of it are not followed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.real_root = os.path.realpath(root)
        self.notes: list[str] = []
        self._items: dict[str, Item] = {}
        self.scan()

    def __getitem__(self, id: str) -> Item:
        return self._items[id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def scan(self) -> None:
        """Look for images again.

        Raises:
            UsageError: the folder is gone, or has no image.
        """
        folder = scan_folder(self.root, ())
        self.notes = describe_unread(folder.unread)
        self.notes += [
            f"{escape_unprintable(name)}: a link that leads out; left alone" for name in folder.links
        ]
        items = {}
        for name in folder.images:
            path = self.root / name
            try:
                status = path.stat()
            except OSError:
                continue  # gone since the scan
            id = image_id(name)
            items[id] = Item(id, name, path, status.st_size, status.st_mtime_ns)
        if not items:
            raise UsageError(f"--images {escape_unprintable(self.root)}: no images there")
        self._items = items

    def check(self, path: Path) -> Path:
        """Return the real path of a file in the folder, at the moment of its use.

        Raises:
            CaptionTrainError: it has become, or lies behind, a link that leads out of the folder.
        """
        real = os.path.realpath(path)
        if not is_inside(real, self.real_root):
            raise CaptionTrainError(f"{escape_unprintable(path)}: a link that leads out of the folder")
        return Path(real)
