"""Finds the images that `--images` names: files, folders, globs and list files. Standard library only."""

import glob
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from caption_train.data.formats import IMAGE_SUFFIXES, UNREAD_SUFFIXES, describe_unread, natural_key
from caption_train.data.scan import scan_folder
from caption_train.errors import UsageError
from caption_train.system.console import escape_unprintable
from caption_train.system.files import read_regular_file

LIST_SUFFIXES = frozenset({".txt", ".lst", ".list"})


@dataclass
class Inputs:
    """The images to caption.

    Attributes:
        images: each image once, in the order given; folders and globs in natural order.
        missing: one line per line of a list file that names no file, folder that cannot be read, and broken
            link with an image's name.
        unread: images in folders of formats that are not read.
    """

    images: list[Path] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


def find_inputs(patterns: Sequence[str], *, recursive: bool = False) -> Inputs:
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

    Raises:
        UsageError: a value names nothing, or no image is found.
    """
    inputs = Inputs()
    for pattern in _without_sidecars(patterns):
        inputs.images += _resolve(pattern, recursive, inputs)
    inputs.images = list({path.absolute(): path for path in inputs.images}.values())
    if not inputs.images and not inputs.missing:
        folders = any(Path(pattern).is_dir() for pattern in patterns)
        hint = " (--recursive looks into the folders inside too)" if folders and not recursive else ""
        hint += "".join(f"; {line}" for line in describe_unread(inputs.unread))
        raise UsageError(f"--images {escape_unprintable(' '.join(patterns))}: no images there{hint}")
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


def _resolve(pattern: str, recursive: bool, inputs: Inputs) -> list[Path]:
    path = _expand_home(pattern)
    # os.path, because it returns False for a name that is too long, where Path raises.
    if os.path.isdir(path):  # noqa: PTH112
        return _scan(path, recursive, inputs)
    if os.path.isfile(path):  # noqa: PTH113
        return _read_list(path, inputs.missing) if path.suffix.lower() in LIST_SUFFIXES else [path]
    # Checked last, because the name of an existing file may contain brackets.
    if glob.has_magic(pattern):
        return _expand(str(path), recursive, inputs)
    raise UsageError(f"--images {escape_unprintable(pattern)}: there is no such file or folder")


def _scan(root: Path, recursive: bool, inputs: Inputs) -> list[Path]:
    folder = scan_folder(root, (), recursive=recursive, follow_symlinks=True)
    inputs.unread += folder.unread
    for problem in folder.unusable:
        name, _, reason = problem.rpartition(": ")
        path = root / name
        if path.is_dir():
            inputs.missing.append(f"{escape_unprintable(path)}: {reason}")
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            inputs.missing.append(
                f"{escape_unprintable(path)}: {'a link to nothing' if path.is_symlink() else reason}"
            )
    return [root / name for name in folder.images]


def _expand_home(name: str) -> Path:
    """Return a path with `~` or `~user` replaced; if there is no such user, it is the name of a file."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def _expand(pattern: str, recursive: bool, inputs: Inputs) -> list[Path]:
    images = []
    # Not Path.glob, which accepts no absolute pattern.
    for name in sorted(glob.glob(pattern, recursive=True), key=natural_key):  # noqa: PTH207
        path = Path(name)
        if path.is_dir() and recursive:
            images += _scan(path, recursive, inputs)
        elif path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            images.append(path)
        elif path.suffix.lower() in UNREAD_SUFFIXES and path.is_file():
            inputs.unread.append(name)
    return images


def _read_list(path: Path, missing: list[str]) -> list[Path]:
    """Return the files that a list names, relative to the current folder or to the folder of the list."""
    try:
        lines = read_regular_file(path).decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--images {escape_unprintable(path)}: cannot be read as a list of images: {error}"
        ) from error
    images = []
    for number, line in enumerate(lines, 1):
        name = _expand_home(line.strip())
        found = next((p for p in (name, path.parent / name) if os.path.isfile(p)), None)  # noqa: PTH113
        if found:
            images.append(found)
        elif line.strip():
            shown = escape_unprintable(name)[:200]
            missing.append(f"{shown}: there is no such file ({escape_unprintable(path)}:{number})")
    if not images and not missing:
        raise UsageError(f"--images {escape_unprintable(path)}: the list is empty")
    return images
