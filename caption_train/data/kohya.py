"""Reads datasets made for kohya-ss: `N_name` repeat folders and the metadata JSON. Standard library only.

The JSON is what finetune/merge_*_to_metadata.py of kohya-ss/sd-scripts writes: image → `{"caption": …,
"tags": …}`. An image is named by its path, its path without the extension, or its bare file name.
"""

import posixpath
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from caption_train.data.scan import Folder
from caption_train.data.text import join_lines, refuse_odd_characters
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.system.console import escape_unprintable
from caption_train.system.files import parse_json, read_regular_file

MAX_REPEATS = 10_000
Given = dict[str, tuple[str, str]]
"""Image, relative to the dataset folder → (caption, where it was read)"""


def count_repeats(name: str) -> int:
    """Return how often Kohya repeats an image: N if it lies in a folder `N_name` (the innermost one), else 1.

    >>> count_repeats("set/10_cats/a.png"), count_repeats("cats/a.png")
    (10, 1)
    """
    folders = reversed(name.split("/")[:-1])
    counts = (folder.partition("_")[0] for folder in folders if "_" in folder)
    return next((int(count) for count in counts if count.isascii() and count.isdigit()), 1)


def find_metadata(folder: Folder) -> Path | None:
    """Return the Kohya metadata JSON that lies directly in the dataset folder, or None.

    Raises:
        UsageError: there are several. Each of Kohya's steps leaves one, and only the user knows the last.
    """
    # A JSON with the name of an image describes that image only, so it is not the dataset's metadata.
    stems = {name[: name.rindex(".")] for name in folder.images} | set(folder.images)
    candidates = sorted(p for p in folder.root.glob("*.json") if p.stem not in stems and p.is_file())
    found = [path for path in candidates if _looks_like_metadata(path)]
    if len(found) > 1:
        names = ", ".join(escape_unprintable(path.name) for path in found)
        raise UsageError(f"several Kohya metadata files ({names}): name one with --kohya_metadata")
    return found[0] if found else None


def read_metadata(path: Path, folder: Folder) -> tuple[Given, list[str]]:
    """Read Kohya metadata as captions for the images of `folder`.

    Caption and tags are joined by a comma, as Kohya does before it trains (train_util.py, FineTuningDataset).

    Args:
        path: the metadata JSON.
        folder: the dataset folder, already scanned.

    Returns:
        Image → (caption, where it was read), and one line per entry that could not be used.

    Raises:
        CaptionTrainError: the file is not such a JSON.
    """
    entries = _load(path)
    if not _is_metadata(entries):
        raise CaptionTrainError(
            f'{escape_unprintable(path)}: not Kohya metadata, {{"image": {{"caption": …, "tags": …}}}}'
        )
    index = index_images(folder)
    given: Given = {}
    problems = []
    for key, entry in entries.items():
        where = f"{path.name}: {key}"
        try:
            given |= dict.fromkeys(find_images(index, key), (_join(entry), where))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    return given, problems


def find_images(index: Mapping[str, list[str]], name: str) -> list[str]:
    """Return the images that a name stands for: one, or several of one folder that differ in their ending.

    Args:
        index: what `index_images` returned.
        name: a path, perhaps of another machine, or the end of one, with or without the extension.

    Raises:
        ValueError: there is none, or it could be any of several.
    """
    images = next((index[tail] for tail in _tails(name) if tail in index), [])
    if not images:
        raise ValueError("no such image")
    if len({posixpath.dirname(image) for image in images}) > 1:
        raise ValueError(f"could be any of {', '.join(images)}")
    return images


def _join(entry: dict[str, Any]) -> str:
    parts = [entry.get(name) or "" for name in ("caption", "tags")]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("caption or tags is not a string")
    caption = ", ".join(filter(None, map(join_lines, parts)))
    refuse_odd_characters(caption)
    return caption


def _load(path: Path) -> Any:
    try:
        return parse_json(read_regular_file(path))
    except OSError as error:
        raise CaptionTrainError(f"{escape_unprintable(path)}: {error.strerror or error}") from error
    except ValueError as error:
        raise CaptionTrainError(f"{escape_unprintable(path)}: {error}") from error


def _is_metadata(entries: Any) -> bool:
    return (
        isinstance(entries, dict)
        and all(isinstance(entry, dict) for entry in entries.values())
        and any("caption" in entry or "tags" in entry for entry in entries.values())
    )


def _looks_like_metadata(path: Path) -> bool:
    try:
        return _is_metadata(_load(path))
    except CaptionTrainError:
        return False


def index_images(folder: Folder) -> dict[str, list[str]]:
    """Map each tail of an image's path, with and without extension, to the images; full paths come first."""
    index: dict[str, list[str]] = {}
    whole: dict[str, list[str]] = {}
    for name in folder.images:
        stem = name[: name.rindex(".")]
        whole[name] = [name]
        whole.setdefault(stem, []).append(name)
        for tail in (*_tails(name), *_tails(stem)):
            index.setdefault(tail, []).append(name)
    return index | whole


def _tails(path: str) -> Iterator[str]:
    """Yield `a/b/c`, `b/c`, `c`. Metadata made on another machine names folders that do not exist here."""
    parts = posixpath.normpath(path.replace("\\", "/")).strip("/").split("/")
    for start in range(len(parts)):
        yield "/".join(parts[start:])
