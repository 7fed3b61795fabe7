"""metadata.jsonl: reading it with every mistake named, writing it, splitting it. Standard library only.

A row is `{"file_name": "a/b.png", "text": "a caption"}`, the format of datasets' imagefolder; `caption` may
stand for `text`, and `split` may put a row aside as `validation` or `test`.
"""

import hashlib
import json
import os
import posixpath
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from caption_train.captions import (
    CAPTION_SUFFIXES,
    MAX_CAPTION_BYTES,
    Pair,
    is_inside,
    printable,
    scan_folder,
)
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.files import hash_file, open_atomically
from caption_train.pairing import match_captions

METADATA_NAME = "metadata.jsonl"
TEXT_COLUMNS = ("text", "caption")
SPLITS = {None: "train", "train": "train", "validation": "validation", "val": "validation", "test": "test"}


def read_dataset(dataset_dir: Path | str, **settings: Any) -> list[Pair]:
    """Return a dataset's pairs, or raise one CaptionTrainError that lists everything wrong with it.

    settings: as `inspect_dataset` takes them.
    """
    pairs, problems = inspect_dataset(dataset_dir, **settings)
    if problems:
        headline = f"{printable(dataset_dir)}: {len(problems)} bad rows or files"
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
    if not root.is_dir():
        raise UsageError(f"{printable(root)}: no such folder")
    if (root / METADATA_NAME).exists():
        pairs, problems = read_metadata(root / METADATA_NAME, follow_symlinks=follow_symlinks)
        found = f"{METADATA_NAME} has no usable row"
    else:
        pairs, problems, found = _read_pairs(root, caption_extensions, encoding, follow_symlinks)
    wanted = [pair for pair in pairs if split in (None, pair.split)]
    if not wanted:
        found = found if not pairs else f"{len(pairs)} pairs, none of them in the split {split!r}"
        raise UsageError(summarize(f"{printable(root)}: nothing to read: {found}", problems))
    return wanted, problems


def read_metadata(path: Path | str, *, follow_symlinks: bool = False) -> tuple[list[Pair], list[str]]:
    """Return the good rows of a metadata.jsonl in order, and a line for each bad one (`name:12: …`)."""
    path = Path(path)
    locate = _make_locator(path.parent, follow_symlinks)
    pairs, problems = [], []
    for number, row in read_rows(path):
        where = f"{path.name}:{number}"
        try:
            if isinstance(row, ValueError):
                raise row
            image, caption = locate(row.get("file_name")), _caption_of(row)
            pairs.append(Pair(image, caption, where, _split_of(row)))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    return pairs, problems


def read_rows(path: Path) -> Iterable[tuple[int, dict | ValueError]]:
    """Yield (line number from 1, row) for each line that is not blank, a ValueError for a broken one."""
    if not path.is_file():
        raise CaptionTrainError(f"{printable(path)}: not a regular file")
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    raise CaptionTrainError(f"{printable(path)}: is UTF-16, save it as UTF-8")
                if line.strip():
                    yield number, _parse(line)
    except OSError as error:
        raise CaptionTrainError(f"{printable(path)}: {error.strerror or error}") from error


def write_metadata(path: Path | str, rows: Iterable[Mapping[str, str]]) -> None:
    """Write rows to a metadata.jsonl, all of it or nothing."""
    with open_atomically(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def split_by_content(pairs: Sequence[Pair], fraction: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Return (training, validation) pairs, each in the given order, about `fraction` of them in validation.

    Pairs of byte-identical images stay together. Images are ranked by a hash of the seed and their bytes, so
    the split depends on nothing but the images and the seed: not on names, order or captions.
    """
    digests = {image: _digest(image) for image in {pair.image for pair in pairs}}
    groups = Counter(digests[pair.image] for pair in pairs)
    ranked = sorted(groups, key=lambda digest: hashlib.sha256(f"{seed} {digest}".encode()).digest())
    target, taken, chosen = min(round(fraction * len(pairs)), len(pairs) - 1), 0, set()
    for digest in ranked:
        if taken + groups[digest] <= target:
            chosen.add(digest)
            taken += groups[digest]
    if not chosen and fraction > 0 and len(ranked) > 1:
        chosen = {min(ranked, key=lambda digest: groups[digest])}
    return (
        [pair for pair in pairs if digests[pair.image] not in chosen],
        [pair for pair in pairs if digests[pair.image] in chosen],
    )


def fingerprint(pairs: Sequence[Pair]) -> str:
    """Return a hash of names, file sizes and captions: the same wherever the dataset lies, in any order."""
    if not pairs:
        return hashlib.sha256().hexdigest()
    root = os.path.commonpath([pair.image.parent for pair in pairs])
    rows = sorted(
        (os.path.relpath(pair.image, root), _size(pair.image), pair.caption, pair.split) for pair in pairs
    )
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def summarize(headline: str, problems: Sequence[str], limit: int = 20) -> str:
    """Return a headline with the first problems below it, one line each."""
    lines = [f"  {printable(problem)}" for problem in problems[:limit]]
    more = [f"  … and {len(problems) - limit} more"] if len(problems) > limit else []
    return "\n".join([headline, *lines, *more])


def _read_pairs(
    root: Path, caption_extensions: Sequence[str], encoding: str, follow_symlinks: bool
) -> tuple[list[Pair], list[str], str]:
    folder = scan_folder(root, caption_extensions, follow_symlinks=follow_symlinks)
    matches = match_captions(folder, caption_extensions, encoding=encoding)
    found = (
        f"no {METADATA_NAME}, {len(folder.images)} images, {len(folder.captions)} "
        f"{'/'.join(caption_extensions)} files beside them"
    )
    empty = [f"{name}: no caption in it" for name in matches.empty]
    return list(matches.pairs.values()), matches.unreadable + empty + folder.unusable, found


def _parse(line: bytes) -> dict | ValueError:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return ValueError("not UTF-8 text")
    except (ValueError, RecursionError) as error:
        return ValueError(f"broken JSON: {error}")
    return row if isinstance(row, dict) else ValueError("not a JSON object")


def _make_locator(root: Path, follow_symlinks: bool) -> Callable[[Any], Path]:
    """Return a function from a row's file_name to the image; it raises ValueError with the reason."""
    real_root = os.path.realpath(root)
    real_folder = cache(os.path.realpath)

    def locate(name: Any) -> Path:
        if not isinstance(name, str) or not name or "\0" in name:
            raise ValueError("no file_name" if not name else "file_name is no file's name")
        shown, relative = printable(name), posixpath.normpath(name.replace("\\", "/"))
        if relative.startswith(("/", "../")) or relative == ".." or _DRIVE.match(relative):
            raise ValueError(f"{shown} points outside the dataset folder")
        path = root / relative
        try:
            if not follow_symlinks:
                real = os.path.realpath(path) if path.is_symlink() else real_folder(path.parent)
                if not is_inside(real, real_root):
                    raise ValueError(f"{shown} is a link that leads outside the dataset folder")
            status = path.stat()
        except FileNotFoundError:
            raise ValueError(f"{shown} is missing") from None
        except (OSError, UnicodeError) as error:
            raise ValueError(f"{shown}: {getattr(error, 'strerror', None) or 'is no file name'}") from None
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{shown} is not a regular file")
        if not status.st_size:
            raise ValueError(f"{shown} is empty (0 bytes)")
        return path

    return locate


_DRIVE = re.compile("[A-Za-z]:/")


def _caption_of(row: Mapping[str, Any]) -> str:
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
    if "\0" in caption or _SURROGATE.search(caption):
        raise ValueError(f"{column} holds NUL or half characters")
    return caption


_SURROGATE = re.compile("[\ud800-\udfff]")


def _split_of(row: Mapping[str, Any]) -> str:
    name = row.get("split")
    if not isinstance(name, str | None) or name not in SPLITS:
        raise ValueError(f"split is {printable(name)[:40]!r}, not one of train, validation, test")
    return SPLITS[name]


def _digest(image: Path) -> str:
    try:
        return hash_file(image)
    except OSError:
        # Alone in its group; whoever opens the image reports it.
        return f"unreadable {image}"


def _size(image: Path) -> int:
    try:
        return image.stat().st_size
    except OSError:
        return -1
