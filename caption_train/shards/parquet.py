"""Reads and writes Parquet files with an image a row, as datasets on the Hugging Face hub have them.

An image is a column of bytes, of `{bytes, path}`, or of paths to files of this machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from caption_train.data.caption_sources import IMAGE_COLUMNS
from caption_train.data.formats import CAPTION_SUFFIXES, MAX_CAPTION_BYTES, TEXT_COLUMNS
from caption_train.data.text import join_lines, refuse_odd_characters
from caption_train.errors import CaptionTrainError, is_out_of_memory
from caption_train.packed import Container, PackedFile
from caption_train.shards.records import (
    ONE_CAPTION,
    Held,
    Merged,
    NewCaption,
    Record,
    ShardError,
    ShardReader,
)
from caption_train.system.console import escape_unprintable
from caption_train.system.damage import describe_error

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

BYTES_COLUMNS = ("image", "img", "images", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "content")
_ROWS_AT_ONCE = 64
_ROWS_WRITTEN_AT_ONCE = 256


class ParquetReader(ShardReader):
    """Reads a Parquet file; see ShardReader.

    Attributes:
        image_column: the column of images.
        caption_columns: those of captions; None for one that is not there.
        holds_bytes: whether images are in the file, and not only their paths.
    """

    def __init__(
        self,
        path: Path,
        name: str | None = None,
        caption_extensions: Sequence[str] = (),
        names: Sequence[str] = ONE_CAPTION,
    ) -> None:
        columns = [extension.strip(".") for extension in caption_extensions]
        columns = [column for column in columns if f".{column}" not in CAPTION_SUFFIXES]
        super().__init__(path, name, columns or TEXT_COLUMNS, names)
        self._container: Container | None = None
        with self._explained(), self._open() as file:
            schema = file.schema_arrow
        with self._explained():
            self._container = Container.of(path)
        found = find_image_column(schema)
        if found is None:
            raise ShardError(
                f"{escape_unprintable(self.name)}: no column of images; there are "
                f"{', '.join(map(escape_unprintable, schema.names[:12])) or 'none'}"
            )
        self.image_column = found
        self.holds_bytes = "binary" in str(schema.field(found).type)
        wanted = [self.extensions if name == "text" else [name] for name in self.columns]
        self.caption_columns = [_find_text_column(schema, columns) for columns in wanted]
        targets = [found or columns[0] for found, columns in zip(self.caption_columns, wanted, strict=True)]
        self._targets = targets[: len(names)]

    def check_target(self) -> None:
        """Raise ShardError where new captions have no column, or not each its own."""
        double = next((name for name in self._targets if self._targets.count(name) > 1), None)
        if double is not None:
            raise ShardError(
                f"{escape_unprintable(self.name)}: two captions of an image would be in its column "
                f"{escape_unprintable(double)}: give them other names in --prompts"
            )
        with self._explained(), self._open() as file:
            there = set(file.schema_arrow.names)
        for column, target in zip(self.caption_columns, self._targets, strict=False):
            if target == self.image_column or (column is None and target in there):
                shown = escape_unprintable(target)
                raise ShardError(
                    f"{escape_unprintable(self.name)}: its column {shown} holds no captions: give "
                    "them another name in --prompts or --caption_extension"
                )

    @property
    def rows(self) -> int:
        """How many rows there are."""
        with self._explained(), self._open() as file:
            return file.metadata.num_rows

    def records(self) -> Iterator[Record]:
        """Yield the rows; ShardError where the file is damaged."""
        self.notes = type(self.notes)()
        number = 0
        with self._explained(), self._open() as file:
            columns = self._list_columns(file.schema_arrow)
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns, use_threads=False):
                for row in batch.to_pylist():
                    yield self._read_row(number, row)
                    number += 1

    def write(self, target: IO[bytes], captions: Iterator[NewCaption], extension: str) -> None:
        """Write the rows with the columns of captions; those that are there, or else new ones."""
        import pyarrow
        from pyarrow import parquet

        merged, number = Merged(captions, len(self.names)), 0
        with self._explained(), self._open() as file:
            schema = file.schema_arrow
            for column in self._targets:
                schema = schema if column in schema.names else _add_column(schema, column)
            with parquet.ParquetWriter(target, schema, compression=_find_codecs(file)) as writer:
                for batch in file.iter_batches(_ROWS_WRITTEN_AT_ONCE, use_threads=False):
                    new = [merged.take(number + row) for row in range(len(batch))]
                    number += len(batch)
                    arrays = list(batch.columns)
                    for place, column in enumerate(self._targets):
                        index = schema.get_field_index(column)
                        was = arrays[index].to_pylist() if index < len(arrays) else [None] * len(batch)
                        texts = [
                            found[place].text if place in found else old
                            for found, old in zip(new, was, strict=True)
                        ]
                        arrays[index : index + 1] = [pyarrow.array(texts, schema.field(index).type)]
                    writer.write_batch(pyarrow.RecordBatch.from_arrays(arrays, schema=schema))

    def _list_columns(self, schema: pyarrow.Schema) -> list[str]:
        """Return the columns to read: the images, and what is small."""
        from pyarrow import types

        kinds = (types.is_string, types.is_large_string, types.is_primitive)
        small = [f.name for f in schema if f.name == "tags" or any(is_of(f.type) for is_of in kinds)]
        return list(dict.fromkeys([self.image_column, *filter(None, self.caption_columns), *small]))

    def _read_row(self, number: int, row: Mapping[str, Any]) -> Record:
        fields = {name: value for name, value in row.items() if name != self.image_column}
        texts = [row[column] if column else None for column in self.caption_columns]
        captions = [self._read_caption(number, text) for text in texts]
        record = Record(number, f"{number:09}", None, None, captions, lambda: fields)
        try:
            record.image = self._find_image(number, row[self.image_column])
        except ValueError as error:
            record.problem = f"{self.name_member(f'row {number}')}: {error}"
        return record

    def _read_caption(self, number: int, value: Any) -> Held:
        try:
            return Held(_check_caption(value))
        except ValueError as error:
            return Held(problem=f"{self.name_member(f'row {number}')}: {error}")

    def _find_image(self, number: int, value: Any) -> Path:
        if isinstance(value, list):
            if len(value) != 1:
                raise ValueError(f"{len(value)} images, not one")
            value = value[0]
        path = None
        if isinstance(value, dict):
            path, value = value.get("path"), value.get("bytes")
            value = path if value is None else value
        if isinstance(value, bytes):
            name = path.rpartition("/")[2] if isinstance(path, str) else ""
            return PackedFile(self.name, name or f"row {number}", content=value)
        if not isinstance(value, str) or not value:
            raise ValueError("no image")
        return self._find_file(value)

    def _find_file(self, value: str) -> Path:
        parts = urlsplit(value)
        if parts.scheme == "file":
            return Path(unquote(parts.path))
        if "://" in value:
            raise ValueError(
                f"{escape_unprintable(value)[:100]} is not on this machine: fetch the images first, "
                "with img2dataset"
            )
        if "\0" in value:
            raise ValueError("no file's name")
        return self.path.parent / value

    def _open(self) -> ParquetFile:
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise ShardError(
                f"{escape_unprintable(self.name)}: reading Parquet needs pyarrow: pip install pyarrow"
            ) from error
        if not self.path.is_file():
            raise ShardError(f"{escape_unprintable(self.name)}: not a regular file")
        if self._container is not None and Container.of(self.path) != self._container:
            # Rows are known by their numbers, which may be others' by now.
            raise ShardError(f"{escape_unprintable(self.name)}: has changed while it was read")
        # Mapped: a page of images, which may be as large as a row group, need not be copied.
        return parquet.ParquetFile(self.path, memory_map=True, pre_buffer=False)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what pyarrow raises about the file into a ShardError."""
        try:
            yield
        except CaptionTrainError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise ShardError(f"{escape_unprintable(self.name)}: {describe_error(error)}") from error


def find_image_column(schema: pyarrow.Schema) -> str | None:
    """Return the name of the column of images: bytes if there are any, else paths; None without any."""
    from pyarrow import types

    def holds(kind: Any, *checks: Any) -> bool:
        if types.is_list(kind) or types.is_large_list(kind):
            kind = kind.value_type
        return any(check(kind) for check in checks)

    def is_image_struct(kind: Any) -> bool:
        return types.is_struct(kind) and kind.get_field_index("bytes") >= 0

    structs = [field.name for field in schema if holds(field.type, is_image_struct)]
    binary = [field.name for field in schema if holds(field.type, types.is_binary, types.is_large_binary)]
    named = [name for name in binary if name.lower() in BYTES_COLUMNS]
    named.sort(key=lambda name: BYTES_COLUMNS.index(name.lower()))
    strings = {
        f.name.lower(): f.name for f in schema if holds(f.type, types.is_string, types.is_large_string)
    }
    paths = [strings[name] for name in (*IMAGE_COLUMNS, "image_url", "url") if name in strings]
    return next(iter([*structs, *named, *(binary if len(binary) == 1 else []), *paths]), None)


def _find_text_column(schema: pyarrow.Schema, names: Sequence[str]) -> str | None:
    from pyarrow import types

    texts = {
        f.name.lower(): f.name for f in schema if types.is_string(f.type) or types.is_large_string(f.type)
    }
    return next((texts[name.lower()] for name in names if name.lower() in texts), None)


def _add_column(schema: pyarrow.Schema, column: str) -> pyarrow.Schema:
    """Return the schema with one more column of text."""
    import pyarrow

    metadata = dict(schema.metadata or {})
    # What datasets says of the columns has to name all of them, or it refuses to load them.
    try:
        said = json.loads(metadata[b"huggingface"])
        said["info"]["features"][column] = {"dtype": "string", "_type": "Value"}
        metadata[b"huggingface"] = json.dumps(said).encode()
    except (KeyError, TypeError, ValueError):
        pass
    return schema.append(pyarrow.field(column, pyarrow.string())).with_metadata(metadata)


def _check_caption(text: Any) -> str | None:
    if text is None:
        return None
    if len(text) > MAX_CAPTION_BYTES:
        raise ValueError(f"{len(text):,} characters, longer than any caption (limit 1 MB)")
    refuse_odd_characters(text)
    return join_lines(text) or None


def _find_codecs(file: ParquetFile) -> dict[str, str] | str:
    """Return how each column is compressed, so that the copy is as large as the file."""
    if not file.metadata.num_row_groups:
        return "snappy"
    group = file.metadata.row_group(0)
    columns = [group.column(index) for index in range(group.num_columns)]
    codecs = {c.path_in_schema: c.compression.lower() for c in columns}
    return {name: "none" if codec == "uncompressed" else codec for name, codec in codecs.items()}
