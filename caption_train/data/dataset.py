"""Datasets: metadata.jsonl or bare pairs, every mistake named; written, split, told apart. No torch."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from caption_train.data.formats import CAPTION_SUFFIXES, IMAGE_SUFFIXES, METADATA_NAME, is_inside
from caption_train.data.pairs import Pair, match_captions
from caption_train.data.rows import caption_of, make_locator, prompt_of, read_rows, split_of
from caption_train.data.scan import Folder, scan_folder
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.system.console import escape_unprintable, summarize


def read_dataset(dataset_dir: Path | str, **settings: Any) -> list[Pair]:
    """Return a dataset's pairs, or raise one CaptionTrainError that lists everything wrong with it.

    settings: as `inspect_dataset` takes them.
    """
    pairs, problems = inspect_dataset(dataset_dir, **settings)
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
    """Return a dataset's good pairs and what is wrong with the others, a line each naming file or row.

    metadata.jsonl is read where there is one, else the caption files beside the images. split: the rows to
    return, all of them for None; a row that names no split is for training. Images without a caption are no
    problem: they are what the trained model is for. Raises UsageError when no pair is left.
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
    """Return the good rows of a metadata.jsonl in order, and a line for each bad one (`name:12: …`)."""
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
    void = {name for name, pair in matches.pairs.items() if not _size(pair.image)}
    problems = [
        *matches.unreadable,
        *(f"{name}: no caption in it" for name in matches.empty),
        *(f"{name}: empty (0 bytes)" for name in sorted(void)),
        *folder.unusable,
        *_find_bad_links(folder, (*IMAGE_SUFFIXES, *caption_extensions)),
    ]
    return [pair for name, pair in matches.pairs.items() if name not in void], problems, found


def _find_bad_links(folder: Folder, endings: Sequence[str]) -> Iterator[str]:
    """Yield a line for each link that was left alone and could have led to data."""
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
