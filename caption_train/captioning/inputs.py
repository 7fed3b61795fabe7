"""Finds the images that `--images` names: files, folders, globs and list files. Standard library only."""

import glob
import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import translate
from functools import cache
from pathlib import Path

from caption_train.captioning.storage.database import encode_name
from caption_train.captioning.storage.image_list import ImageList
from caption_train.captioning.storage.names import FirstLines
from caption_train.captioning.storage.shard import Shard
from caption_train.data.formats import (
    IMAGE_SUFFIXES,
    UNREAD_SUFFIXES,
    describe_unread,
    natural_bytes,
    natural_key,
    sort_bytes,
)
from caption_train.data.scan import Folder, walk_folder
from caption_train.errors import UsageError
from caption_train.system.console import escape_unprintable
from caption_train.system.files import opening_regular_file, read_text_lines

LIST_SUFFIXES = frozenset({".txt", ".lst", ".list"})


@dataclass
class Inputs:
    """The images to caption.

    Attributes:
        images: each image once, in the order given; folders and globs in natural order.
        missing: one line per line of a list file that names no file, folder that cannot be read, and broken
            link with an image's name.
        unread: images in folders of formats that are not read; of more than a thousand the suffix alone.
    """

    images: ImageList = field(default_factory=ImageList)
    missing: FirstLines = field(default_factory=FirstLines)
    unread: list[str] = field(default_factory=list)

    def note_unread(self, name: str) -> None:
        """Remember an image of a format that is not read."""
        self.unread.append(name if len(self.unread) < 1000 else name[name.rfind(".") :].lower())


def find_inputs(patterns: Sequence[str], *, recursive: bool = False, shard: Shard | None = None) -> Inputs:
    """Find the images that `--images` names.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("10.png", "9.png", "9.txt"):
    ...     (folder / name).touch()
    >>> [path.name for path in find_inputs([str(folder)]).images]
    ['9.png', '10.png']

    Args:
        patterns: files, folders, globs, and .txt files that list one image per line.
        recursive: whether to look into subfolders.
        shard: the part of them to return; by default all.

    Raises:
        UsageError: a value names nothing, or no image is found.
    """
    inputs = Inputs(ImageList(shard))
    images, given = inputs.images, _without_sidecars(patterns)
    is_folder = len(given) == 1 and os.path.isdir(_expand_home(given[0]))  # noqa: PTH112
    for pattern in given:
        _resolve(pattern, recursive, inputs, may_repeat=not is_folder)
    if not images and not inputs.missing and not images.given_folders:
        folders = any(Path(pattern).is_dir() for pattern in patterns)
        hint = " (--recursive looks into the folders inside too)" if folders and not recursive else ""
        hint += "".join(f"; {line}" for line in describe_unread(inputs.unread))
        raise UsageError(f"--images {escape_unprintable(' '.join(patterns))}: no images there{hint}")
    images.finish()
    return inputs


def _without_sidecars(patterns: Sequence[str]) -> list[str]:
    """Return the values without the caption files and metadata.jsonl that a shell's `photos/*` includes."""
    if len(patterns) == 1:
        return list(patterns)
    images = [path for path in map(Path, patterns) if path.suffix.lower() in IMAGE_SUFFIXES]
    # a.txt and a.png.txt are both captions of a.png.
    captions = {path.with_suffix("") for path in images} | set(images)
    return [p for p in patterns if not (Path(p).name == "metadata.jsonl" or _is_sidecar(Path(p), captions))]


def _is_sidecar(path: Path, captions: Collection[Path]) -> bool:
    if path.suffix.lower() not in LIST_SUFFIXES:
        return False
    beside = (path.with_suffix(suffix) for suffix in IMAGE_SUFFIXES)
    return path.with_suffix("") in captions or any(image.is_file() for image in beside)


def _resolve(pattern: str, recursive: bool, inputs: Inputs, *, may_repeat: bool) -> None:
    path = _expand_home(pattern)
    # os.path, because it returns False for a name that is too long, where Path raises.
    if os.path.isdir(path):  # noqa: PTH112
        inputs.images.add_sorted(str(path), _scan(path, recursive, inputs), may_repeat=may_repeat)
    elif os.path.isfile(path):  # noqa: PTH113
        if path.suffix.lower() in LIST_SUFFIXES:
            _read_list(path, inputs)
        else:
            inputs.images.add([_describe(path)])
    # Checked last, because the name of an existing file may contain brackets.
    elif glob.has_magic(pattern):
        fixed = len(_find_fixed(str(path)))
        inputs.images.add_sorted("", _expand(str(path), recursive, inputs), fixed, may_repeat=True)
    else:
        raise UsageError(f"--images {escape_unprintable(pattern)}: there is no such file or folder")


def _describe(path: Path, label: str = "") -> tuple[str, str, str]:
    return str(path.parent), path.name, label or path.name


class _Ignored(list):
    """What nobody asks for: hidden files may be as many as images."""

    def append(self, name: str) -> None:
        pass


def _scan(
    root: Path, recursive: bool, inputs: Inputs, before: bytes = b"", above: str = ""
) -> Iterator[bytes]:
    """Yield the images of a folder, not in their order: a sort key, a 0 and the path below the folder.

    before, above: what keys and paths begin with.
    """
    folder = Folder(root, hidden=_Ignored(), links=_Ignored())
    inside, key, path = None, b"", b""
    kinds = cache(_kind_of)
    for inner, name in walk_folder(folder, recursive=recursive, follow_symlinks=True):
        dot = name.rfind(".")
        kind = kinds(name[dot:])
        if kind == "image":
            if inner != inside:
                below = f"{inner}/" if inner else ""
                inside, key, path = inner, before + sort_bytes(below), encode_name(above + below)
            # The key of `natural_bytes`; that of the folder is made once for all its images.
            yield key + sort_bytes(name[:dot]) + b"\0" + path + encode_name(name)
        elif kind == "unread":
            inputs.note_unread(f"{inner}/{name}" if inner else name)
    for problem in sorted(folder.unusable, key=natural_key):
        _note_unusable(root, problem, inputs)


def _kind_of(suffix: str) -> str:
    suffix = suffix.lower()
    return "image" if suffix in IMAGE_SUFFIXES else "unread" if suffix in UNREAD_SUFFIXES else ""


def _note_unusable(root: Path, problem: str, inputs: Inputs) -> None:
    name, _, reason = problem.rpartition(": ")
    path = root / name
    if path.is_dir():
        inputs.missing.append(f"{escape_unprintable(path)}: {reason}")
    elif path.suffix.lower() in IMAGE_SUFFIXES:
        inputs.missing.append(
            f"{escape_unprintable(path)}: {'a link to nothing' if path.is_symlink() else reason}"
        )


def _expand_home(name: str) -> Path:
    """Return a path with `~` or `~user` replaced; if there is no such user, it is the name of a file."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def _expand(pattern: str, recursive: bool, inputs: Inputs) -> Iterator[bytes]:
    """Yield the images that a glob matches, not in their order: a sort key, a 0 and the path."""
    for name in _iterate_glob(pattern):
        path, key, shown = Path(name), natural_bytes(name) + b"\0", name.replace(os.sep, "/")
        if path.is_dir() and recursive:
            yield from _scan(path, recursive, inputs, key, shown.rstrip("/") + "/")
        elif path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            yield key + encode_name(shown)
        elif path.suffix.lower() in UNREAD_SUFFIXES and path.is_file():
            inputs.note_unread(name)


def _find_fixed(pattern: str) -> str:
    """Return the folder that all matches of a glob begin with."""
    fixed = pattern
    while glob.has_magic(fixed):
        fixed = os.path.dirname(fixed)  # noqa: PTH120
    return os.path.join(fixed, "") if fixed else ""  # noqa: PTH118


def _iterate_glob(pattern: str) -> Iterator[str]:
    """Yield what `glob.glob` returns, without a list of a whole folder where its last part alone says which.

    Not Path.glob, which accepts no absolute pattern.
    """
    head, tail = os.path.split(pattern)
    if "**" in pattern or not glob.has_magic(tail):
        yield from glob.iglob(pattern, recursive=True)  # noqa: PTH207
        return
    matches = re.compile(translate(os.path.normcase(tail))).match
    folders = glob.iglob(os.path.join(head, "")) if glob.has_magic(head) else [head]  # noqa: PTH118, PTH207
    for folder in folders:
        with suppress(OSError), os.scandir(folder or os.curdir) as entries:
            for entry in entries:
                is_shown = tail.startswith(".") or not entry.name.startswith(".")
                if is_shown and matches(os.path.normcase(entry.name)):
                    yield os.path.join(folder, entry.name)  # noqa: PTH118


def _read_list(path: Path, inputs: Inputs) -> None:
    """Add the files that a list names, relative to the current folder or to the folder of the list."""
    count, missing = len(inputs.images), inputs.missing.total
    try:
        inputs.images.add(_find_listed(path, inputs))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--images {escape_unprintable(path)}: cannot be read as a list of images: {error}"
        ) from error
    if len(inputs.images) == count and inputs.missing.total == missing:
        raise UsageError(f"--images {escape_unprintable(path)}: the list is empty")


def _find_listed(path: Path, inputs: Inputs) -> Iterator[tuple[str, str, str]]:
    number = 0
    with opening_regular_file(path) as file:
        for piece in read_text_lines(file, path, "utf-8-sig"):
            for line in piece.splitlines():
                number += 1
                name = _expand_home(line.strip())
                found = next((p for p in (name, path.parent / name) if os.path.isfile(p)), None)  # noqa: PTH113
                if found:
                    yield _describe(found, name.as_posix())
                elif line.strip():
                    shown = escape_unprintable(name)[:200]
                    inputs.missing.append(
                        f"{shown}: there is no such file ({escape_unprintable(path)}:{number})"
                    )
