"""Reads a dataset in shards as pairs of image and caption, for training and evaluation. No torch.

A tar is read as the folder that it would be if it were unpacked: `shards/00000.tar` holds the files of
`00000/`. So a run on tars has the pairs of the same files in folders, in the same order, with the same
fingerprint.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from caption_train.data.columns.parts import PartFound, Work, read_here, stamp_file
from caption_train.data.columns.table import SPLITS as CODES
from caption_train.data.columns.table import Pairs, PairTable, Place
from caption_train.data.dataset import inspect_table, join_found, require_good
from caption_train.data.formats import CAPTION_SUFFIXES, MAX_CAPTION_BYTES, METADATA_NAME, natural_key
from caption_train.data.pairs import Pair
from caption_train.data.rows import SPLITS
from caption_train.data.scan import scan_folder
from caption_train.errors import UsageError
from caption_train.packed import PackedFile, inode_inside
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
        settings: keyword arguments of `inspect_table`.

    Raises:
        UsageError: there is no pair at all.
    """
    pairs, problems, notes = inspect_any_table(dataset_dir, **settings)
    print_line(*notes)
    return list(pairs), problems


def inspect_any_table(
    dataset_dir: Path | str, *, work: Work = read_here, **settings: Any
) -> tuple[Pairs, list[str], list[str]]:
    """Return what `inspect_any_dataset` does, the pairs in columns, and what is odd but harms nothing.

    Args:
        dataset_dir: the folder of the dataset, or what names shards.
        work: reads the parts of the dataset.
        settings: keyword arguments of `inspect_table`.

    Raises:
        UsageError: there is no pair at all.
    """
    if not is_in_shards(dataset_dir):
        return *inspect_table(dataset_dir, work=work, **settings), []
    return _inspect_shards(
        dataset_dir,
        settings.get("caption_extensions", CAPTION_SUFFIXES),
        settings.get("split", "train"),
        work,
    )


def read_any_dataset(dataset_dir: Path | str, **settings: Any) -> list[Pair]:
    """Return a dataset's pairs, or raise one CaptionTrainError that lists everything wrong with it.

    Args:
        dataset_dir: the folder of the dataset, or what names shards.
        settings: keyword arguments of `inspect_table`.
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
    pairs, problems, notes = _inspect_shards(dataset_dir, caption_extensions, split, read_here)
    print_line(*notes)
    return list(pairs), problems


def _inspect_shards(
    dataset_dir: Path | str, extensions: Sequence[str], split: str | None, work: Work
) -> tuple[Pairs, list[str], list[str]]:
    place = complete_url(dataset_dir)
    shards = find_shards([place], "--dataset_dir")
    matches = [_SPLIT_NAME.match(shard.name) for shard in shards]
    are_told = len({match[1] if match else None for match in matches}) > 1
    names = [
        SPLITS.get({"valid": "val"}.get(match[1], match[1])) if match and are_told else "train"
        for match in matches
    ]
    found = work(
        ShardPart(shard, extensions, name or "train") for shard, name in zip(shards, names, strict=True)
    )
    pairs = join_found(found)
    problems = [line for part in found for line in part.problems]
    notes = [line for part in found for line in part.notes]
    wanted = pairs if split is None else pairs.keep(pairs.table.split[pairs.rows] == CODES.index(split))
    if not wanted:
        said = f"{len(shards)} shards without a caption" if not pairs else f"no pairs of the split {split!r}"
        raise UsageError(summarize(f"{escape_unprintable(place)}: nothing to read: {said}", problems))
    return wanted, problems, notes


@dataclass
class ShardPart:
    """One shard of a dataset.

    Attributes:
        shard: the shard.
        extensions: endings of caption files, the preferred one first.
        split: which one its pairs belong to.
    """

    shard: Shard
    extensions: Sequence[str]
    split: str

    def read(self) -> PartFound:
        """Return the pairs, in the order in which a folder of the shard's files would be read."""
        try:
            reader, made = _open(self.shard, self.extensions)
            table = _read_tar(self.shard, reader, made) if isinstance(reader, TarReader) else None
            if table is None:
                pairs, table = _collect(self.shard, reader)
                found = Pairs.of(replace(pair, split=self.split) for pair in pairs).table
                stamps = [stamp_file(str(pair.image)) or (0, 0, 0, 0) for pair in pairs]
                found.size[:] = [stamp[0] for stamp in stamps]
                return PartFound(found, stamps, table.problems, table.notes)
        except (ShardError, OSError) as error:
            return PartFound(PairTable.join([]), [], [str(error)])
        held = reader.container
        names, offsets, sizes, captions, sources = zip(*table.rows, strict=True) if table.rows else [()] * 5
        pairs = PairTable.of(
            *(Place(reader.name, held), names, captions, sources),
            offset=offsets,
            size=sizes,
            split=[CODES.index(self.split)] * len(names),
        )
        stamps = [
            (size, held.mtime_ns, held.ctime_ns, inode_inside(held, offset))
            for offset, size in zip(offsets, sizes, strict=True)
        ]
        return PartFound(pairs, stamps, table.problems, table.notes)


def _read_tar(shard: Shard, reader: TarReader, made: Table | None) -> Table:
    """Return what is in a tar, from what was kept of it or by walking it; `made` is known already."""
    kept = KeptTable(reader.container, [reader.name, *reader.extensions])
    if made is not None:
        kept.write(made, is_own=True)
        return made
    table = kept.read()
    if table is None:
        pairs, table = _collect(shard, reader)
        table.rows = [(p.image.inner, *p.image.span, p.caption, p.source) for p in pairs]
        kept.write(table)
    return table


def _collect(shard: Shard, reader: ShardReader) -> tuple[list[Pair], Table]:
    """Read a shard to its end; return its pairs, and what else was found."""
    table = Table()
    found: dict[str, Pair] = {}
    for record in reader.records():
        if problem := record.problem or record.captions[0].problem:
            table.problems.append(problem)
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


def _open(shard: Shard, extensions: Sequence[str]) -> tuple[ShardReader, Table | None]:
    """Return a reader whose images can be read one by one, in any order, later.

    And what is in it, where it is a copy that was made now of rows with which nothing is wrong.
    """
    path = keep_remote(shard) if shard.is_remote else None
    reader = open_shard(shard, path, extensions)
    if not isinstance(reader, ParquetReader) or not reader.holds_bytes:
        return reader, None
    rows: list[tuple[str, int, int, str, str]] = []
    are_plain = [False]

    def note(record: Record, name: str, offset: int, size: int) -> None:
        are_plain[0] &= bool(size) and not record.captions[0].problem and _is_plain(record.caption)
        if record.caption is not None:
            rows.append((name, offset, size, record.caption, f"{shard.name}/{record.key}"))

    def write(file: IO[bytes]) -> None:
        are_plain[0] = True
        write_samples(file, _complete(reader), note=note)

    copy = keep_copy(shard, ".tar", write, facts=str(reader.caption_columns[0]))
    return TarReader(copy, shard.place, (".txt",)), Table(rows) if are_plain[0] else None


def _is_plain(caption: str | None) -> bool:
    """Tell whether a caption is surely read from its file as it was written."""
    return caption is None or (len(caption) < MAX_CAPTION_BYTES // 4 and not caption.startswith("\ufeff"))


def _complete(reader: ParquetReader) -> Iterator[Record]:
    """Yield all rows, so that what is wrong with one is found again in the copy."""
    for record in reader.records():
        if record.image is None:
            record.image = PackedFile(reader.name, record.key, content=b"")
        if record.captions[0].problem:
            record.captions[0].text = record.load_fields()[reader.caption_columns[0]]
        yield record
