"""Reads a dataset in shards as pairs of image and caption, for training and evaluation. No torch.

A tar is read as the folder that it would be if it were unpacked: `shards/00000.tar` holds the files of
`00000/`. So a run on tars has the pairs of the same files in folders, in the same order, with the same
fingerprint.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from caption_train.data.dataset import inspect_dataset, require_good
from caption_train.data.formats import CAPTION_SUFFIXES, METADATA_NAME, natural_key
from caption_train.data.pairs import Pair
from caption_train.data.rows import SPLITS
from caption_train.data.scan import scan_folder
from caption_train.errors import UsageError
from caption_train.packed import PackedFile
from caption_train.shards.formats import write_samples
from caption_train.shards.parquet import ParquetReader
from caption_train.shards.places import (
    Shard,
    complete_url,
    find_shards,
    is_url,
    keep_shards,
    open_shard,
    suffix_of,
)
from caption_train.shards.records import Record, ShardError, ShardReader
from caption_train.shards.store import keep_copy, keep_remote
from caption_train.shards.tables import KeptTable, Table
from caption_train.shards.tar import TarReader, find_caption
from caption_train.system.console import escape_unprintable, print_line, summarize

_SPLIT_NAME = re.compile(r"(train|validation|val|valid|test)(?=[-_.])")
"""How datasets on the Hugging Face hub name their shards: validation-00000-of-00002.parquet."""


def is_in_shards(dataset_dir: Path | str) -> bool:
    """Tell whether `--dataset_dir` names shards: tars or Parquet files, or a folder of them without images.

    A folder with a metadata.jsonl, or with images at any depth, is what it always was.
    """
    place = complete_url(dataset_dir)
    if is_url(place) or suffix_of(place):
        return not os.path.isdir(place)  # noqa: PTH112 - a folder may be called a.tar
    root = Path(place)
    try:
        names = os.listdir(root)  # noqa: PTH208
    except OSError:
        return False
    if METADATA_NAME in names or not keep_shards(names):
        return False
    return not scan_folder(root).images


def inspect_any_dataset(dataset_dir: Path | str, **settings: Any) -> tuple[list[Pair], list[str]]:
    """Return the pairs of a dataset, in shards or files, and what is wrong with the rest.

    Args:
        dataset_dir: the folder of the dataset, or what names shards.
        settings: keyword arguments of `inspect_dataset`.

    Raises:
        UsageError: there is no pair at all.
    """
    if not is_in_shards(dataset_dir):
        return inspect_dataset(dataset_dir, **settings)
    return inspect_shards(
        dataset_dir,
        caption_extensions=settings.get("caption_extensions", CAPTION_SUFFIXES),
        split=settings.get("split", "train"),
    )


def read_any_dataset(dataset_dir: Path | str, **settings: Any) -> list[Pair]:
    """Return a dataset's pairs, or raise one CaptionTrainError that lists everything wrong with it.

    Args:
        dataset_dir: the folder of the dataset, or what names shards.
        settings: keyword arguments of `inspect_dataset`.
    """
    return require_good(dataset_dir, *inspect_any_dataset(dataset_dir, **settings))


def inspect_shards(
    dataset_dir: Path | str,
    *,
    caption_extensions: Sequence[str] = CAPTION_SUFFIXES,
    split: str | None = "train",
) -> tuple[list[Pair], list[str]]:
    """Return the pairs of shards, and what is wrong with the rest; records without a caption are left out.

    Args:
        dataset_dir: files, a folder, a glob or braces, or a URL of these.
        caption_extensions: endings of caption files, the preferred one first.
        split: which split to return; None returns all. Where the names of shards tell several splits apart,
            as in `validation-00000-of-00001.parquet`, they say which one a pair belongs to.

    Raises:
        UsageError: there are no shards, or no pair in them.
    """
    place = complete_url(dataset_dir)
    shards = find_shards([place], "--dataset_dir")
    splits = [_SPLIT_NAME.match(shard.name) for shard in shards]
    names = {match[1] if match else None for match in splits}
    pairs: list[Pair] = []
    problems: list[str] = []
    for shard, match in zip(shards, splits, strict=True):
        found, more = _read_shard(shard, caption_extensions)
        name = SPLITS.get({"valid": "val"}.get(match[1], match[1])) if match and len(names) > 1 else "train"
        pairs += found if name == "train" else [replace(pair, split=name) for pair in found]
        problems += more
    wanted = [pair for pair in pairs if split in (None, pair.split)]
    if not wanted:
        said = f"{len(shards)} shards without a caption" if not pairs else f"no pairs of the split {split!r}"
        raise UsageError(summarize(f"{escape_unprintable(place)}: nothing to read: {said}", problems))
    return wanted, problems


def _read_shard(shard: Shard, extensions: Sequence[str]) -> tuple[list[Pair], list[str]]:
    """Return the pairs of one shard, in the order in which a folder of its files would be read."""
    try:
        reader = _open(shard, extensions)
        if not isinstance(reader, TarReader):
            pairs, table = _collect(shard, reader)
        else:
            kept = KeptTable(reader.container, [reader.name, *reader.extensions])
            table = kept.read()
            if table is None:
                pairs, table = _collect(shard, reader)
                table.rows = [(p.image.inner, *p.image.span, p.caption, p.source) for p in pairs]
                kept.write(table)
            else:
                name, container = reader.name, reader.container
                pairs = [
                    Pair(PackedFile(name, inner, container, offset, size), caption, source)
                    for inner, offset, size, caption, source in table.rows
                ]
    except (ShardError, OSError) as error:
        return [], [str(error)]
    print_line(*table.notes)
    return pairs, table.problems


def _collect(shard: Shard, reader: ShardReader) -> tuple[list[Pair], Table]:
    """Read a shard to its end; return its pairs, and what else was found."""
    table = Table()
    found: dict[str, Pair] = {}
    for record in reader.records():
        if record.problem or record.bad_caption:
            table.problems.append(record.problem or record.bad_caption or "")
            continue
        try:
            caption = record.caption or find_caption(record.load_fields())
        except ValueError as error:
            table.problems.append(f"{reader.name_member(record.key)}: {error}")
            continue
        if not caption:
            continue
        name = str(record.image)
        if name in found:
            table.problems.append(f"{escape_unprintable(name)}: is there twice")
        elif isinstance(record.image, PackedFile) and not record.image.span[1]:
            table.problems.append(f"{escape_unprintable(name)}: empty (0 bytes)")
        else:
            found[name] = Pair(record.image, caption, f"{shard.name}/{record.key}")
    table.problems += reader.notes.problems
    table.notes = reader.notes.lines(shard.place)
    return [found[name] for name in sorted(found, key=natural_key)], table


def _open(shard: Shard, extensions: Sequence[str]) -> ShardReader:
    """Return a reader whose images can be read one by one, in any order, later."""
    path = keep_remote(shard) if shard.is_remote else None
    reader = open_shard(shard, path, extensions)
    if not isinstance(reader, ParquetReader) or not reader.holds_bytes:
        return reader

    def write(file: IO[bytes]) -> None:
        write_samples(file, _complete(reader))

    return TarReader(
        keep_copy(shard, ".tar", write, facts=str(reader.caption_column)), shard.place, (".txt",)
    )


def _complete(reader: ParquetReader) -> Iterator[Record]:
    """Yield all rows, so that what is wrong with one is found again in the copy."""
    for record in reader.records():
        if record.image is None:
            record.image = PackedFile(reader.name, record.key, content=b"")
        if record.bad_caption:
            record.caption = record.load_fields()[reader.caption_column]
        yield record
