"""Reads a dataset folder, or reports everything that is wrong with it. No torch."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from caption_train.data.columns.parts import (
    FilesFound,
    PartFound,
    Work,
    join_files,
    read_here,
    split_files,
    split_rows,
)
from caption_train.data.columns.table import SPLITS, Pairs, PairTable
from caption_train.data.formats import (
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    METADATA_NAME,
    describe_unread,
    is_inside,
    natural_key,
)
from caption_train.data.pairs import Pair
from caption_train.data.scan import Folder, open_folder
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.system.console import escape_unprintable, summarize


def read_dataset(dataset_dir: Path | str, **settings: Any) -> list[Pair]:
    """Return a dataset's pairs, or raise one CaptionTrainError that lists everything wrong with it.

    Args:
        dataset_dir: the dataset folder.
        settings: keyword arguments of `inspect_table`.
    """
    return require_good(dataset_dir, *inspect_dataset(dataset_dir, **settings))


def require_good(dataset_dir: Path | str, pairs: list[Pair], problems: Sequence[str]) -> list[Pair]:
    """Return the pairs of a dataset, or raise one CaptionTrainError that lists everything wrong with it."""
    if problems:
        headline = f"{escape_unprintable(dataset_dir)}: {len(problems)} bad rows or files"
        raise CaptionTrainError(summarize(headline, problems))
    return pairs


def inspect_dataset(dataset_dir: Path | str, **settings: Any) -> tuple[list[Pair], list[str]]:
    """Return what `inspect_table` does, the pairs in a list.

    Args:
        dataset_dir: the dataset folder.
        settings: keyword arguments of `inspect_table`.

    Raises:
        UsageError: there is no pair at all in this split.
    """
    pairs, problems = inspect_table(dataset_dir, **settings)
    return list(pairs), problems


def inspect_table(
    dataset_dir: Path | str,
    *,
    caption_extensions: Sequence[str] = CAPTION_SUFFIXES,
    encoding: str = "utf-8",
    follow_symlinks: bool = False,
    split: str | None = "train",
    work: Work = read_here,
) -> tuple[Pairs, list[str]]:
    """Return a dataset's good pairs in columns, and what is wrong with the rest.

    A metadata.jsonl is read if there is one, otherwise the caption files beside the images. An image without
    a caption is not reported: captioning such images is what the model is trained for.

    Args:
        dataset_dir: the dataset folder.
        caption_extensions: endings of caption files, the preferred one first.
        encoding: the encoding of the caption files; a metadata.jsonl is always UTF-8.
        follow_symlinks: whether to follow links that lead out of the folder.
        split: which rows to return: "train", "validation" or "test"; None returns all. A row that names no
            split belongs to "train".
        work: reads the parts of the dataset.

    Returns:
        The good pairs, and one line per problem that names the file or row.

    Raises:
        UsageError: there is no pair at all in this split.
    """
    root = Path(dataset_dir)
    if (root / METADATA_NAME).exists():
        pairs, problems = _read_metadata(root / METADATA_NAME, follow_symlinks, work)
        found = f"{METADATA_NAME} has no usable row"
    else:
        pairs, problems, found = _read_files(root, caption_extensions, encoding, follow_symlinks, work)
    wanted = pairs if split is None else pairs.keep(pairs.table.split[pairs.rows] == SPLITS.index(split))
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
    pairs, problems = _read_metadata(Path(path), follow_symlinks, read_here)
    return list(pairs), problems


def _read_metadata(path: Path, follow_symlinks: bool, work: Work) -> tuple[Pairs, list[str]]:
    found = work(split_rows(path, follow_symlinks=follow_symlinks))
    return join_found(found), [line for part in found for line in part.problems]


def join_found(found: Sequence[PartFound]) -> Pairs:
    """Return the pairs of all parts."""
    return Pairs(PairTable.join([part.table for part in found]))


def _read_files(
    root: Path, caption_extensions: Sequence[str], encoding: str, follow_symlinks: bool, work: Work
) -> tuple[Pairs, list[str], str]:
    folder = open_folder(root)
    parts: list[FilesFound] = work(
        split_files(folder, caption_extensions, encoding, follow_symlinks=follow_symlinks)
    )
    every = join_files(parts)
    found = (
        f"no {METADATA_NAME}, {every.images} images, {every.captions} "
        f"{'/'.join(caption_extensions)} files beside them"
    )
    found = "; ".join([found, *describe_unread(every.suffixes.elements())])
    problems = [
        *every.unreadable,
        *(f"{name}: no caption in it" for name in every.empty),
        *(f"{name}: empty (0 bytes)" for name in every.void),
        *every.unread,
        *sorted(folder.unusable, key=natural_key),
        *_find_bad_links(folder, (*IMAGE_SUFFIXES, *caption_extensions)),
    ]
    return Pairs(every.table), problems, found


def _find_bad_links(folder: Folder, endings: Sequence[str]) -> Iterator[str]:
    """Yield one line per link that was not followed although data could be behind it."""
    root, endings = os.path.realpath(folder.root), tuple(map(str.lower, endings))
    for name in sorted(folder.links, key=natural_key):
        path = folder.root / name
        counts = path.is_dir() or name.lower().endswith(endings)
        if counts and not is_inside(os.path.realpath(path), root):
            yield f"{name}: a link that leads out of the folder (--follow_symlinks follows it)"
        elif counts and not path.exists():
            yield f"{name}: a link to nothing"
