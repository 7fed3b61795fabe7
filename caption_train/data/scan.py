"""Finds the images and caption files of a dataset folder. Standard library only."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from caption_train.data.formats import (
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    UNREAD_SUFFIXES,
    is_inside,
    natural_bytes,
    natural_key,
    with_dot,
)
from caption_train.errors import UsageError
from caption_train.system.console import escape_unprintable


@dataclass
class Folder:
    """The files of one dataset folder: paths relative to `root`, `/` between their parts, in natural order.

    Attributes:
        root: the dataset folder.
        images: files with an image suffix.
        unread: images of formats that are not read.
        captions: (path without extension, extension as the user wrote it) → caption files.
        metadata: files that datasets' imagefolder would read as metadata.
        hidden: files and folders whose name starts with a dot; they are not read.
        links: symbolic links that were not followed.
        unusable: what is not a regular file and folders that cannot be listed, each with the reason.
    """

    root: Path
    images: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    captions: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    metadata: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)


def scan_folder(
    root: Path | str,
    caption_extensions: Sequence[str] = CAPTION_SUFFIXES,
    *,
    recursive: bool = True,
    follow_symlinks: bool = False,
) -> Folder:
    """Walk a folder once, and sort its files into images, captions and what is left alone.

    >>> import tempfile
    >>> root = Path(tempfile.mkdtemp())
    >>> for name in ("2.PNG", "10.png", "2.txt", ".hidden.png", "notes.md"):
    ...     (root / name).touch()
    >>> folder = scan_folder(root)
    >>> folder.images, folder.captions, folder.hidden
    (['2.PNG', '10.png'], {('2', '.txt'): ['2.txt']}, ['.hidden.png'])

    Args:
        root: the dataset folder.
        caption_extensions: endings of caption files, with or without the dot. Upper and lower case are equal.
        recursive: whether to look into subfolders.
        follow_symlinks: whether to follow links that lead out of the folder; loops are walked once.

    Raises:
        UsageError: `root` is not a folder.
    """
    folder = open_folder(root)
    names = [
        f"{inner}/{base}" if inner else base
        for inner, base in walk_folder(folder, recursive=recursive, follow_symlinks=follow_symlinks)
    ]
    sort_files(folder, names, caption_extensions)
    for found in (folder.hidden, folder.links, folder.unusable):
        found.sort(key=natural_key)
    return folder


def open_folder(root: Path | str) -> Folder:
    """Return a folder of which nothing is known yet; UsageError where `root` is none."""
    folder = Folder(Path(root))
    if not folder.root.is_dir():
        raise UsageError(
            f"{escape_unprintable(root)}: {'not a folder' if folder.root.exists() else 'no such folder'}"
        )
    return folder


def sort_files(folder: Folder, names: Iterable[str], caption_extensions: Sequence[str]) -> None:
    """Put files into a folder's `images`, `captions`, `metadata` and `unread`; all others are left alone.

    Args:
        folder: gets them.
        names: of regular files, relative to the folder.
        caption_extensions: as in `scan_folder`.
    """
    # The longest extension is tried first: `a.wd14.txt` ends with `.txt` too.
    extensions = [(e, e.lower()) for e in sorted(map(with_dot, caption_extensions), key=len, reverse=True)]
    endings = tuple(lower for _, lower in extensions)
    captions: list[tuple[str, str]] = []
    for name in names:
        lower = name.lower()
        suffix = lower[lower.rfind(".") :]
        if suffix in IMAGE_SUFFIXES:
            folder.images.append(name)
        elif lower.endswith(endings):
            captions.append((name, next(e for e, ending in extensions if lower.endswith(ending))))
        elif name.rpartition("/")[2] in ("metadata.jsonl", "metadata.csv", "metadata.parquet"):
            folder.metadata.append(name)
        elif suffix in UNREAD_SUFFIXES:
            folder.unread.append(name)
    folder.images.sort(key=natural_bytes)
    folder.unread.sort(key=natural_bytes)
    # If both `a.txt` and `a.TXT` exist, the spelling that the user gave comes first.
    for name, extension in sorted(captions, key=lambda c: (not c[0].endswith(c[1]), c[0])):
        folder.captions.setdefault((name[: -len(extension)], extension), []).append(name)


def image_id(name: str) -> str:
    """Return what the review page and links into it name an image by: a digest of its name.

    >>> image_id("parks/bench.png")
    '7916904d9ce0ad10e71f8d1f'

    Args:
        name: the path relative to the folder of images, `/` between its parts.
    """
    return hashlib.blake2b(os.fsencode(name), digest_size=12).hexdigest()


def walk_folder(folder: Folder, *, recursive: bool, follow_symlinks: bool) -> Iterator[tuple[str, str]]:
    """Yield (folder relative to the root, name) of all regular files below `folder.root`, in no order.

    Args:
        folder: its `hidden`, `links` and `unusable` get what is left alone.
        recursive: whether to look into subfolders.
        follow_symlinks: whether to follow links that lead out of the folder; loops are walked once.
    """
    real_root = os.path.realpath(folder.root)
    seen: set[tuple[int, int]] = set()
    # Links are followed last, so that a link to a folder inside the dataset does not list its files twice.
    pending, linked = [""], []
    while pending or linked:
        inner = pending.pop() if pending else linked.pop()
        try:
            status = (folder.root / inner).stat()
            # Device and inode identify a folder, whatever path leads to it; this ends loops of links.
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            # Not as a list: an entry takes 300 bytes, and a folder may have a million.
            with os.scandir(folder.root / inner) as entries:
                for entry in entries:
                    # The disk says this of nearly all without another question.
                    if entry.is_file(follow_symlinks=False) and entry.name[0] != ".":
                        yield inner, entry.name
                        continue
                    kind = _kind(entry, real_root, follow_symlinks)
                    name = f"{inner}/{entry.name}" if inner else entry.name
                    if entry.name.startswith("."):
                        folder.hidden.append(name)
                    elif kind == "file":
                        yield inner, entry.name
                    elif kind == "folder" and recursive:
                        (linked if entry.is_symlink() else pending).append(name)
                    elif kind == "link":
                        folder.links.append(name)
                    elif kind == "other":
                        folder.unusable.append(f"{name}: not a regular file")
        except OSError as error:
            folder.unusable.append(f"{inner or '.'}: {error.strerror}")


def _kind(entry: os.DirEntry, real_root: str, follow_symlinks: bool) -> str:
    """Return "file", "folder", "link" (a link that is not followed) or "other"."""
    try:
        if not follow_symlinks and entry.is_symlink():
            inside = is_inside(os.path.realpath(entry.path), real_root)
            return "file" if inside and entry.is_file() else "link"
        return "file" if entry.is_file() else "folder" if entry.is_dir() else "other"
    except OSError:  # a loop of links
        return "other"
