"""Reads a dataset folder in parts, which several processes can share, into columns."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from caption_train.data.columns.table import PairTable, Place, TableBuilder
from caption_train.data.formats import advise_unread, natural_bytes, natural_key
from caption_train.data.pairs import match_texts
from caption_train.data.rows import caption_of, make_looker, parse_row, prompt_of, read_lines, split_of
from caption_train.data.scan import Folder, sort_files, walk_folder

FILES, ROWS = 5000, 2000
"""In a part: a tenth of a second of work or more."""

Stamp = tuple[int, int, int, int]
"""Size, times of modification and change in nanoseconds, and inode of an image."""


@dataclass
class PartFound:
    """What was found in one part of a dataset.

    Attributes:
        table: the good pairs.
        stamps: of their images, where they were looked at.
        problems: one line per bad row or file.
        notes: what is odd but harms nothing.
    """

    table: PairTable
    stamps: list[Stamp] | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class FilesFound(PartFound):
    """What was found among some files of a folder; its problems come later, sorted by kind.

    Attributes:
        keys: of the pairs, to sort them by.
        unreadable, empty, void, unread: lines on caption files that cannot be read or hold nothing, on images
            of 0 bytes and of formats that are not read.
        counts: how many images and captions there are, and files of each format that is not read.
    """

    keys: list[bytes] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    void: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    images: int = 0
    captions: int = 0
    suffixes: Counter = field(default_factory=Counter)


Part = Any
"""Something with a method `read`, which returns a PartFound; it can be pickled."""
Work = Callable[[Iterable[Part]], list[PartFound]]
"""Reads parts, and returns what was found in each, in their order."""


def read_here(parts: Iterable[Part]) -> list[PartFound]:
    """Read parts one after the other."""
    return [part.read() for part in parts]


@dataclass
class FilesPart:
    """Some files of a folder: of each image, all files that can hold its caption are among them.

    Attributes:
        root: the dataset folder.
        names: of the files, relative to it.
        extensions, encoding: of caption files.
    """

    root: Path
    names: list[str]
    extensions: Sequence[str]
    encoding: str

    def read(self) -> FilesFound:
        """Read the captions, and look at the size of each image."""
        folder = Folder(self.root)
        sort_files(folder, self.names, self.extensions)
        texts, matches = match_texts(folder, self.extensions, encoding=self.encoding)
        start, stamps = f"{self.root}/", {}
        for name in texts:
            stamps[name] = stamp_file(start + name) or (-1, 0, 0, 0)
        # Zero-byte images are left out here. Other damage is found later, when images are decoded.
        void = [name for name, stamp in stamps.items() if not stamp[0]]
        for name in void:
            del texts[name], stamps[name]
        table = PairTable.of(
            Place(str(self.root)),
            list(texts),
            [caption for caption, _ in texts.values()],
            [source for _, source in texts.values()],
            size=[stamp[0] for stamp in stamps.values()],
        )
        return FilesFound(
            table,
            list(stamps.values()),
            keys=[natural_bytes(name) for name in texts],
            unreadable=matches.unreadable,
            empty=matches.empty,
            void=void,
            unread=list(find_unread(folder)),
            images=len(folder.images),
            captions=len(folder.captions),
            suffixes=Counter(name[name.rfind(".") :].lower() for name in folder.unread),
        )


def stamp_file(path: str) -> Stamp | None:
    """Return what tells a file from others and from itself once changed; None if it is not there."""
    try:
        status = os.stat(path)  # noqa: PTH116 - a Path takes several times as long, of a million images
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def find_unread(folder: Folder) -> Iterator[str]:
    """Yield one line per image that has a caption beside it, but a format that is not read."""
    stems = {stem for stem, _ in folder.captions} if folder.unread else set()
    for name in folder.unread:
        stem, _, suffix = name.rpartition(".")
        if stem in stems or name in stems:
            yield f"{name}: .{suffix} files are not read: {advise_unread(f'.{suffix}')}"


def split_files(
    folder: Folder, extensions: Sequence[str], encoding: str, *, follow_symlinks: bool
) -> Iterator[FilesPart]:
    """Walk a folder, and yield its files in parts.

    Args:
        folder: its `hidden`, `links` and `unusable` get what is left alone.
        extensions, encoding: of caption files.
        follow_symlinks: whether to follow links that lead out of the folder.
    """
    walk = walk_folder(folder, recursive=True, follow_symlinks=follow_symlinks)
    names: list[str] = []
    for inner, found in groupby(walk, key=lambda entry: entry[0]):
        more = [f"{inner}/{base}" if inner else base for _, base in found]
        for part in _cut(more):
            names += part
            if len(names) >= FILES:
                yield FilesPart(folder.root, names, extensions, encoding)
                names = []
    yield FilesPart(folder.root, names, extensions, encoding)


def _cut(names: list[str]) -> Iterator[list[str]]:
    """Yield the files of one folder in parts that keep together what begins alike up to the first dot."""
    if len(names) <= 2 * FILES:
        yield names
        return
    names.sort()
    start = 0
    while start < len(names):
        end = min(start + FILES, len(names))
        # An image, its captions and those of a.b.png are neighbours: all begin with "a.".
        key = names[end - 1][: names[end - 1].find(".", names[end - 1].rfind("/") + 1) + 1]
        while key and end < len(names) and names[end].startswith(key):
            end += 1
        yield names[start:end]
        start = end


def join_files(found: list[FilesFound]) -> FilesFound:
    """Return what was found in all parts of a folder, in the natural order of its images; empty the list."""
    lines = {
        name: [line for part in found for line in getattr(part, name)]
        for name in ("unreadable", "empty", "void", "unread")
    }
    if len(found) > 1:
        lines = {name: sorted(some, key=natural_key) for name, some in lines.items()}
    every = FilesFound(
        PairTable.join([part.table for part in found]),
        images=sum(part.images for part in found),
        captions=sum(part.captions for part in found),
        suffixes=sum((part.suffixes for part in found), Counter()),
        **lines | {"void": sorted(lines["void"])},
    )
    keys = [key for part in found for key in part.keys]
    # Before the columns are there once more, in order.
    found.clear()
    # Each part is in order, and sorting makes use of that.
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
    every.table = every.table.take(order)
    return every


@dataclass
class RowsPart:
    """Some lines of a metadata.jsonl; follow_symlinks: as in `make_looker`."""

    path: Path
    lines: list[tuple[int, bytes]]
    follow_symlinks: bool

    def read(self) -> PartFound:
        """Read the rows, and look whether their images are there."""
        root = self.path.parent
        look, place, builder = make_looker(root, self.follow_symlinks), Place(str(root)), TableBuilder()
        found = PartFound(builder.build(), [])
        for number, line in self.lines:
            where, row = f"{self.path.name}:{number}", parse_row(line)
            try:
                if isinstance(row, ValueError):
                    raise row
                name, status = look(row.get("file_name"))
                caption, split, prompt = caption_of(row), split_of(row), prompt_of(row)
            except ValueError as error:
                found.problems.append(f"{where}: {error}")
                continue
            span = (0, status.st_size)
            builder.add(place, name, caption, where, split=split, prompt=prompt, span=span)
            found.stamps.append((span[1], status.st_mtime_ns, status.st_ctime_ns, status.st_ino))
        found.table = builder.build()
        return found


def split_rows(path: Path, *, follow_symlinks: bool) -> Iterator[RowsPart]:
    """Yield the lines of a metadata.jsonl in parts; errors as of `read_lines`."""
    lines: list[tuple[int, bytes]] = []
    for line in read_lines(path):
        lines.append(line)
        if len(lines) == ROWS:
            yield RowsPart(path, lines, follow_symlinks)
            lines = []
    yield RowsPart(path, lines, follow_symlinks)
