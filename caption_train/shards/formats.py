"""Writes the records of a shard in another format: a tar, or rows of JSON Lines or Parquet without images."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import IO, Any

from caption_train.data.formats import IMAGE_SUFFIXES, name_ending
from caption_train.errors import CaptionTrainError
from caption_train.packed import open_regular
from caption_train.shards.members import BLOCK
from caption_train.shards.records import Held, Merged, NewCaption, Record, ShardReader

FORMATS = {"webdataset": ".tar", "parquet": ".parquet", "jsonl": ".jsonl"}
"""`--output_format` → suffix of a shard."""
_ROWS_AT_ONCE = 10_000
_MAGIC = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"GI": ".gif", b"BM": ".bmp", b"RI": ".webp", b"II": ".tif"}
_MAGIC |= {b"MM": ".tif"}


def write_shard(
    reader: ShardReader, target: IO[bytes], captions: Iterator[NewCaption], output_format: str, extension: str
) -> None:
    """Write what a shard of the output holds.

    Args:
        reader: of the input.
        target: the file to write, open in binary.
        captions: in the order of the records.
        output_format: a key of FORMATS.
        extension: of caption files.

    Raises:
        ShardError: the input cannot be read any more.
        OSError: nothing can be written.
    """
    if is_copied(reader, output_format):
        reader.write(target, captions, extension)
    elif output_format == "webdataset":
        endings = [name_ending(name, extension) for name in reader.columns]
        write_samples(target, _caption_records(reader, captions), endings)
    elif output_format == "jsonl":
        for row in _make_rows(reader, captions):
            target.write(_dump(row))
    else:
        _write_parquet(target, _make_rows(reader, captions), reader.columns)


def is_copied(reader: ShardReader, output_format: str) -> bool:
    """Tell whether a shard is written as what it is, so that all else in it stays."""
    suffix = FORMATS[output_format]
    return reader.path.suffix.lower() == suffix or reader.name.lower().endswith(suffix)


def _dump(row: Mapping[str, Any]) -> bytes:
    """Return a row as a line; what is not UTF-8 in a name is escaped, as `os.fsdecode` reads it."""
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(row) + "\n").encode()


def write_samples(
    file: IO[bytes],
    records: Iterator[Record],
    endings: Sequence[str] = (".txt",),
    note: Callable[[Record, str, int, int], None] = lambda *_: None,
) -> None:
    """Write records as a WebDataset tar: for each its image and those captions that it has.

    Args:
        file: where to write.
        records: with their images; those that cannot be read are left out.
        endings: of the files of its captions.
        note: called with each record that is written, and name, offset and size of its image.
    """
    written = 0
    for record in records:
        try:
            with open_regular(record.image) as image:
                content = image.read()
        except (OSError, ValueError):
            continue
        suffix = os.path.splitext(record.image)[1].lower()  # noqa: PTH122 - of a million images
        if suffix not in IMAGE_SUFFIXES:
            suffix = next((s for magic, s in _MAGIC.items() if content.startswith(magic)), ".png")
        member = make_member(record.key + suffix, content)
        padded = -(-len(content) // BLOCK) * BLOCK
        note(record, record.key + suffix, written + len(member) - padded, len(content))
        for held, ending in zip(record.captions, endings, strict=True):
            if held.text is not None:
                member += make_member(record.key + ending, f"{held.text}\n".encode())
        file.write(member)
        written += len(member)
    file.write(bytes(2 * BLOCK + -(written + 2 * BLOCK) % tarfile.RECORDSIZE))


def make_member(name: str, content: bytes) -> bytes:
    """Return header and content of a file in a tar, padded, as tarfile writes them in its PAX format."""
    size = b"%011o" % len(content)
    if len(name) > 100 or not name.isascii() or len(size) > 11:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        header = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    else:
        # tarfile takes ten times as long for a header in which only name, size and their sum differ.
        start, end, total = _blank_header()
        told = name.encode()
        total += sum(told) + sum(size)
        header = told.ljust(100, b"\0") + start + size + end % total
    return b"".join((header, content, bytes(-len(content) % BLOCK)))


@cache
def _blank_header() -> tuple[bytes, bytes, int]:
    """Return what stands between name and size in a header, what comes after, and the sum of its bytes."""
    blank = bytearray(tarfile.TarInfo("").tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
    blank[124:135] = bytes(11)
    blank[148:156] = b" " * 8
    end = bytes(blank[135:148]) + b"%06o\0 " + bytes(blank[156:])
    return bytes(blank[100:124]), end, sum(blank)


def _caption_records(reader: ShardReader, captions: Iterator[NewCaption]) -> Iterator[Record]:
    merged = Merged(captions, len(reader.names))
    for record in reader.records():
        for place, new in merged.take(record.index).items():
            record.captions[place] = Held(new.text)
        if record.image is not None:
            yield record


def _make_rows(reader: ShardReader, captions: Iterator[NewCaption]) -> Iterator[dict[str, Any]]:
    """Yield a row for each record that has a caption, new or old."""
    merged = Merged(captions, len(reader.names))
    for record in reader.records():
        new = merged.take(record.index)
        texts = [new[place].text if place in new else held.text for place, held in enumerate(record.captions)]
        captions_of = {n: text for n, text in zip(reader.columns, texts, strict=False) if text is not None}
        if not captions_of:
            continue
        row: dict[str, Any] = {"key": record.key, "file_name": record.file_name} | captions_of
        for place, caption in new.items():
            if reader.names[place] == "text":
                more = {"answer": caption.answer, "remarks": list(caption.remarks)}
                row |= {name: value for name, value in more.items() if value}
        yield row


def _write_parquet(target: IO[bytes], rows: Iterator[dict[str, Any]], names: Sequence[str]) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise CaptionTrainError(
            "--output_format parquet needs pyarrow: pip install pyarrow, or give jsonl"
        ) from error
    schema = pyarrow.schema([(name, pyarrow.string()) for name in ("key", "file_name", *names)])
    with parquet.ParquetWriter(target, schema) as writer:
        part: list[dict[str, Any]] = []
        for row in rows:
            part.append({name: row.get(name) for name in schema.names})
            if len(part) == _ROWS_AT_ONCE:
                writer.write_table(pyarrow.Table.from_pylist(part, schema))
                part = []
        writer.write_table(pyarrow.Table.from_pylist(part, schema))
