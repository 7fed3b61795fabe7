"""Datasets: metadata.jsonl or bare pairs, every mistake named; written, split, told apart. No torch."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from caption_train.captions import (
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    Folder,
    Pair,
    is_inside,
    printable,
    scan_folder,
)
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.files import hash_file, open_atomically
from caption_train.pairing import match_captions
from caption_train.rows import caption_of, make_locator, prompt_of, read_rows, split_of

METADATA_NAME = "metadata.jsonl"


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


def write_metadata(path: Path | str, rows: Iterable[Mapping[str, str]]) -> None:
    """Write rows to a metadata.jsonl, all of it or nothing."""
    with open_atomically(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def split_by_content(
    pairs: Sequence[Pair], fraction: float, seed: int, digests: Mapping[Path, str] | None = None
) -> tuple[list[Pair], list[Pair]]:
    """Return (training, validation) pairs, each in the given order, about `fraction` of them in validation.

    Pairs of byte-identical images stay together. Images are ranked by a hash of the seed and their bytes, so
    the split depends on nothing but the images and the seed: not on names, order or captions.
    digests: the images' SHA-256, where they are known already.
    """
    digests = digests or {image: _digest(image) for image in {pair.image for pair in pairs}}
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


def fingerprint(pairs: Sequence[Pair], digests: Mapping[Path, str]) -> str:
    """Return a hash of names, digests, captions, prompts: the same wherever the data lies, in any order."""
    if not pairs:
        return hashlib.sha256().hexdigest()
    root = os.path.commonpath([pair.image.parent.absolute() for pair in pairs])
    rows = sorted(
        (os.path.relpath(pair.image, root), digests[pair.image], pair.caption, pair.split)
        + ((pair.prompt,) if pair.prompt else ())
        for pair in pairs
    )
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def summarize(headline: str, problems: Sequence[str], limit: int | None = 20) -> str:
    """Return a headline with the first problems, or all of them, below it, one line each."""
    lines = [f"  {printable(problem)}" for problem in problems[:limit]]
    more = [f"  … and {len(problems) - limit} more"] if limit and len(problems) > limit else []
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
