"""Reads and writes the rows of a metadata.jsonl, or says what is wrong with one. Standard library only.

A row is `{"file_name": "a/b.png", "text": "a caption"}`, the format of datasets' imagefolder. `caption` is
accepted instead of `text`. `split` may be `validation` or `test`, and `prompt` is what the model is asked.
"""

import json
import os
import posixpath
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from caption_train.data.formats import MAX_CAPTION_BYTES, TEXT_COLUMNS, is_inside
from caption_train.data.text import refuse_odd_characters
from caption_train.errors import CaptionTrainError
from caption_train.system.console import escape_unprintable
from caption_train.system.files import open_atomically, parse_json

SPLITS = {None: "train", "train": "train", "validation": "validation", "val": "validation", "test": "test"}


def read_rows(path: Path) -> Iterator[tuple[int, dict | ValueError]]:
    """Yield (line number from 1, row) for each line that is not blank; a ValueError stands for a broken row.

    Raises:
        CaptionTrainError: the file cannot be read, or is UTF-16.
    """
    for number, line in read_lines(path):
        yield number, parse_row(line)


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line) for each line that is not blank; errors as of `read_rows`."""
    if not path.is_file():
        raise CaptionTrainError(f"{escape_unprintable(path)}: not a regular file")
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                # Windows editors put a byte order mark before the first line.
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    raise CaptionTrainError(f"{escape_unprintable(path)}: is UTF-16, save it as UTF-8")
                if line.strip():
                    yield number, line
    except OSError as error:
        raise CaptionTrainError(f"{escape_unprintable(path)}: {error.strerror or error}") from error


def parse_row(line: bytes) -> dict | ValueError:
    """Return the row of a line; a ValueError where it is broken."""
    try:
        row = parse_json(line)
    except ValueError as error:
        return error
    return row if isinstance(row, dict) else ValueError("not a JSON object")


def make_looker(root: Path, follow_symlinks: bool) -> Callable[[Any], tuple[str, os.stat_result]]:
    """Return a function that finds the image of a row.

    Args:
        root: the folder that holds the metadata.jsonl.
        follow_symlinks: whether an image may be a link that leads out of `root`.

    Returns:
        A function from a row's `file_name` to the image's path relative to `root`, and its status. It raises
        ValueError, with the reason, for a name that is not a regular, non-empty file in or below `root`.
    """
    real_root, start = os.path.realpath(root), f"{root}/"
    # Cached, since thousands of images lie in the same few folders.
    is_in_root = cache(lambda folder: is_inside(os.path.realpath(folder), real_root))

    def look(name: Any) -> tuple[str, os.stat_result]:
        if not isinstance(name, str) or not name or "\0" in name:
            raise ValueError("no file_name" if not name else "file_name is no file's name")
        relative = posixpath.normpath(name.replace("\\", "/"))
        if relative.startswith(("/", "../")) or relative == ".." or _DRIVE.match(relative):
            raise ValueError(f"{escape_unprintable(name)} points outside the dataset folder")
        path = start + relative
        try:
            status = os.lstat(path)
            is_link = stat.S_ISLNK(status.st_mode)
            if not follow_symlinks:
                inside = (
                    is_inside(os.path.realpath(path), real_root)
                    if is_link
                    else is_in_root(path.rpartition("/")[0])
                )
                if not inside:
                    raise ValueError(
                        f"{escape_unprintable(name)} is a link that leads outside the dataset folder"
                    )
            status = os.stat(path) if is_link else status  # noqa: PTH116 - of a million rows
        except FileNotFoundError:
            raise ValueError(f"{escape_unprintable(name)} is missing") from None
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or "is no file name"
            raise ValueError(f"{escape_unprintable(name)}: {reason}") from None
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{escape_unprintable(name)} is not a regular file")
        if not status.st_size:
            raise ValueError(f"{escape_unprintable(name)} is empty (0 bytes)")
        return relative, status

    return look


# An absolute path on Windows, C:/…
_DRIVE = re.compile("[A-Za-z]:/")


def caption_of(row: Mapping[str, Any]) -> str:
    """Return a row's caption without surrounding space; raise ValueError, with the reason, if it has none."""
    column = next((name for name in TEXT_COLUMNS if row.get(name) is not None), None)
    if column is None:
        raise ValueError(f"no {' or '.join(TEXT_COLUMNS)} column")
    caption = row[column]
    if not isinstance(caption, str):
        raise ValueError(f"{column} is not a string")
    caption = caption.strip()
    if not caption:
        raise ValueError(f"{column} is empty")
    if len(caption) > MAX_CAPTION_BYTES:
        raise ValueError(f"{column} is {len(caption):,} characters long (limit {MAX_CAPTION_BYTES:,})")
    refuse_odd_characters(caption)
    return caption


def prompt_of(row: Mapping[str, Any]) -> str | None:
    """Return the prompt of a row; None means the prompt of the run."""
    prompt = row.get("prompt")
    if not isinstance(prompt, str | None):
        raise ValueError("prompt is not a string")
    refuse_odd_characters(prompt or "")
    return prompt or None


def split_of(row: Mapping[str, Any]) -> str:
    """Return "train" (also for a row without a split), "validation" or "test"; ValueError for other names."""
    name = row.get("split")
    if not isinstance(name, str | None) or name not in SPLITS:
        raise ValueError(f"split is {escape_unprintable(name)[:40]!r}, not one of train, validation, test")
    return SPLITS[name]


def write_metadata(path: Path | str, rows: Iterable[Mapping[str, str]]) -> None:
    """Write rows to a metadata.jsonl, completely or not at all."""
    with open_atomically(path, follow_link=True) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
