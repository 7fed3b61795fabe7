"""Reads a dataset folder, or reports everything that is wrong with it. No torch."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from caption_train.data.formats import (
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    METADATA_NAME,
    advise_unread,
    describe_unread,
    is_inside,
)
from caption_train.data.pairs import Pair, match_captions
from caption_train.data.rows import caption_of, make_locator, prompt_of, read_rows, split_of
from caption_train.data.scan import Folder, scan_folder
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.system.console import escape_unprintable, summarize


def read_dataset(dataset_dir: Path | str, **settings: Any) -> list[Pair]:
    """Return a dataset's pairs, or raise one CaptionTrainError that lists everything wrong with it.

    Args:
        dataset_dir: the dataset folder.
        settings: keyword arguments of `inspect_dataset`.
    """
    return require_good(dataset_dir, *inspect_dataset(dataset_dir, **settings))


def require_good(dataset_dir: Path | str, pairs: list[Pair], problems: Sequence[str]) -> list[Pair]:
    """Return the pairs of a dataset, or raise one CaptionTrainError that lists everything wrong with it."""
    if problems:
        headline = f"{escape_unprintable(dataset_dir)}: {len(problems)} bad rows or files"
        raise CaptionTrainError(summarize(headline, problems))
    return pairs


def inspect_dataset(
    dataset_dir: Path | str,
    *,
    caption_extensions: Sequence[str] = CAPTION_SUFFIXES,
    encoding: str = "utf-8",
    follow_symlinks: bool = False,
    split: str | None = "train",
) -> tuple[list[Pair], list[str]]:
    """Return a dataset's good pairs, and what is wrong with the rest.

    A metadata.jsonl is read if there is one, otherwise the caption files beside the images. An image without
    a caption is not reported: captioning such images is what the model is trained for.

    Args:
        dataset_dir: the dataset folder.
        caption_extensions: endings of caption files, the preferred one first.
        encoding: the encoding of the caption files; a metadata.jsonl is always UTF-8.
        follow_symlinks: whether to follow links that lead out of the folder.
        split: which rows to return: "train", "validation" or "test"; None returns all. A row that names no
            split belongs to "train".

    Returns:
        The good pairs, and one line per problem that names the file or row.

    Raises:
        UsageError: there is no pair at all in this split.
    """
    root = Path(dataset_dir)
    if (root / METADATA_NAME).exists():
        pairs, problems = read_metadata(root / METADATA_NAME, follow_symlinks=follow_symlinks)
        found = f"{METADATA_NAME} has no usable row"
    else:
        pairs, problems, found = _read_pairs(root, caption_extensions, encoding, follow_symlinks)
    wanted = [pair for pair in pairs if split in (None, pair.split)]
    if not wanted:
        found = found if not pairs else f"{len(pairs)} pairs, none of them in the split {split!r}"
        raise UsageError(summarize(f"{escape_unprintable(root)}: nothing to read: {found}", problems))
    return wanted, problems


def read_metadata(path: Path | str, *, follow_symlinks: bool = False) -> tuple[list[Pair], list[str]]:
    """Read a metadata.jsonl.

    Args:
        path: the file; the images of its rows must lie in or below its folder.
        follow_symlinks: whether an image may be a link that leads out of that folder.

    Returns:
        The pairs of the good rows in the file's order, and one line per bad row (`metadata.jsonl:12: …`).
    """
    path = Path(path)
    locate = make_locator(path.parent, follow_symlinks)
    pairs, problems = [], []
    for number, row in read_rows(path):
        where = f"{path.name}:{number}"
        try:
            if isinstance(row, ValueError):
                raise row
            image, caption = locate(row.get("file_name")), caption_of(row)
            pairs.append(Pair(image, caption, where, split_of(row), prompt_of(row)))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    return pairs, problems


def _read_pairs(
    root: Path, caption_extensions: Sequence[str], encoding: str, follow_symlinks: bool
) -> tuple[list[Pair], list[str], str]:
    folder = scan_folder(root, caption_extensions, follow_symlinks=follow_symlinks)
    matches = match_captions(folder, caption_extensions, encoding=encoding)
    found = (
        f"no {METADATA_NAME}, {len(folder.images)} images, {len(folder.captions)} "
        f"{'/'.join(caption_extensions)} files beside them"
    )
    found = "; ".join([found, *describe_unread(folder.unread)])
    # Zero-byte images are left out here. Other damage is found later, when images are decoded.
    void = {name for name, pair in matches.pairs.items() if not _size(pair.image)}
    problems = [
        *matches.unreadable,
        *(f"{name}: no caption in it" for name in matches.empty),
        *(f"{name}: empty (0 bytes)" for name in sorted(void)),
        *_find_unread(folder),
        *folder.unusable,
        *_find_bad_links(folder, (*IMAGE_SUFFIXES, *caption_extensions)),
    ]
    return [pair for name, pair in matches.pairs.items() if name not in void], problems, found


def _find_unread(folder: Folder) -> Iterator[str]:
    """Yield one line per image that has a caption beside it, but a format that is not read."""
    stems = {stem for stem, _ in folder.captions}
    for name in folder.unread:
        stem, _, suffix = name.rpartition(".")
        if stem in stems or name in stems:
            yield f"{name}: .{suffix} files are not read: {advise_unread(f'.{suffix}')}"


def _find_bad_links(folder: Folder, endings: Sequence[str]) -> Iterator[str]:
    """Yield one line per link that was not followed although data could be behind it."""
    root, endings = os.path.realpath(folder.root), tuple(map(str.lower, endings))
    for name in folder.links:
        path = folder.root / name
        counts = path.is_dir() or name.lower().endswith(endings)
        if counts and not is_inside(os.path.realpath(path), root):
            yield f"{name}: a link that leads out of the folder (--follow_symlinks follows it)"
        elif counts and not path.exists():
            yield f"{name}: a link to nothing"


def _size(image: Path) -> int:
    try:
        return image.stat().st_size
    except OSError:
        return -1
