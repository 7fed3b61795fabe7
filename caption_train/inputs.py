"""Which images `--images` means: files, folders, globs and list files. Standard library only."""

import glob
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from caption_train.captions import IMAGE_SUFFIXES, find_images, natural_key, printable
from caption_train.errors import UsageError

LIST_SUFFIXES = frozenset({".txt", ".lst", ".list"})


@dataclass
class Inputs:
    """The images to caption, each once, in the order given; folders and globs in natural order.

    missing: lines of list files that name no file, with the list they stand in.
    """

    images: list[Path] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def find_inputs(patterns: Sequence[str], *, recursive: bool = False) -> Inputs:
    """Resolve the values of `--images`. Raises UsageError where one names nothing, or no image is found."""
    inputs = Inputs()
    for pattern in _without_sidecars(patterns):
        inputs.images += _resolve(pattern, recursive, inputs.missing)
    inputs.images = list({path.absolute(): path for path in inputs.images}.values())
    if not inputs.images and not inputs.missing:
        folders = any(Path(pattern).is_dir() for pattern in patterns)
        hint = " (--recursive looks into the folders inside too)" if folders and not recursive else ""
        raise UsageError(f"--images {printable(' '.join(patterns))}: no images there{hint}")
    return inputs


def _without_sidecars(patterns: Sequence[str]) -> list[str]:
    """Return the values without what a shell's `photos/*` adds to images: their captions, metadata.jsonl."""
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


def _resolve(pattern: str, recursive: bool, missing: list[str]) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        return find_images(path, recursive=recursive, follow_symlinks=True)
    if path.is_file():
        return _read_list(path, missing) if path.suffix.lower() in LIST_SUFFIXES else [path]
    # Only now: a name that exists may hold brackets and be no pattern.
    if glob.has_magic(pattern):
        return _expand(str(path), recursive)
    raise UsageError(f"--images {printable(pattern)}: there is no such file or folder")


def _expand(pattern: str, recursive: bool) -> list[Path]:
    images = []
    # Path.glob takes no absolute pattern.
    for name in sorted(glob.glob(pattern, recursive=True), key=natural_key):  # noqa: PTH207
        path = Path(name)
        if path.is_dir() and recursive:
            images += find_images(path, follow_symlinks=True)
        elif path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            images.append(path)
    return images


def _read_list(path: Path, missing: list[str]) -> list[Path]:
    """Return the files that a list names, relative to the current folder or to the list's own."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--images {printable(path)}: cannot be read as a list of images: {error}"
        ) from error
    images = []
    for number, line in enumerate(lines, 1):
        name = Path(line.strip()).expanduser()
        found = next((p for p in (name, path.parent / name) if p.is_file()), None)
        if found:
            images.append(found)
        elif line.strip():
            missing.append(f"{printable(name)}: there is no such file ({printable(path)}:{number})")
    if not images and not missing:
        raise UsageError(f"--images {printable(path)}: the list is empty")
    return images
