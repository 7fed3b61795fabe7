"""Reads and writes WebDataset tars: members that share their name up to the first dot are one sample.

https://github.com/webdataset/webdataset#the-webdataset-format
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from caption_train.data.formats import (
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    MAX_CAPTION_BYTES,
    TEXT_COLUMNS,
    UNREAD_SUFFIXES,
    advise_unread,
    name_ending,
    with_dot,
)
from caption_train.data.text import decode_caption, join_lines, refuse_odd_characters
from caption_train.packed import Container, PackedFile, open_regular
from caption_train.shards.members import BLOCK, DamagedTar, Member, read_at, walk_tar
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
from caption_train.system.files import parse_json

_MOST_JSON_BYTES = 16 << 20
_COPY_BYTES = 1 << 20


@dataclass
class Sample:
    """Members with one key, and the records that they make: mostly one, none without an image."""

    members: list[Member]
    records: list[Record] = field(default_factory=list)
    caption_of: dict[tuple[int, int], Member] = field(default_factory=dict)
    """(record's number, place among its captions) → the caption's file."""
    image_of: dict[int, Member] = field(default_factory=dict)


def find_key(name: str) -> tuple[str, str]:
    """Return the key of a member and what comes after it, split at the first dot of the file's name.

    >>> find_key("a.b/000017.seg.png"), find_key("README")
    (('a.b/000017', '.seg.png'), ('README', ''))
    """
    start = name.rfind("/") + 1
    dot = name.find(".", start)
    return (name, "") if dot < 0 else (name[:dot], name[dot:])


class TarReader(ShardReader):
    """Reads a WebDataset tar; see ShardReader. container: the file as it was when it was opened."""

    def __init__(
        self,
        path: Path,
        name: str | None = None,
        caption_extensions: Sequence[str] = (),
        names: Sequence[str] = ONE_CAPTION,
    ) -> None:
        super().__init__(path, name, [with_dot(e) for e in caption_extensions or CAPTION_SUFFIXES], names)
        self._endings = [[name_ending(name, e) for e in self.extensions] for name in self.columns]
        self._count = 0
        self._keys: set[str] = set()
        try:
            self.container = Container.of(path)
        except OSError as error:
            raise self._explain(error) from error

    def records(self) -> Iterator[Record]:
        """Yield the images of the tar."""
        for sample in self.samples():
            yield from sample.records

    def samples(self) -> Iterator[Sample]:
        """Yield the samples, every member in one of them.

        Raises:
            ShardError: the file cannot be read, or has changed since it was opened.
        """
        self._count, self._keys, self.notes = 0, set(), type(self.notes)()
        members: list[Member] = []
        key = ""
        with self._open() as file:
            try:
                for member in walk_tar(file):
                    own = find_key(member.name)[0] if member.is_file else ""
                    if members and (own != key or not own):
                        yield self._make_sample(file, key, members)
                        members = []
                    key = own
                    members.append(member)
            except DamagedTar as error:
                self.notes.problems.append(f"{escape_unprintable(self.name)}: {error}")
            except OSError as error:
                raise self._explain(error) from error
            if members:
                yield self._make_sample(file, key, members)

    def _open(self) -> IO[bytes]:
        try:
            file = open_regular(self.path)
        except (OSError, ValueError) as error:
            raise self._explain(error) from error
        if Container.of(self.path, file.fileno()) != self.container:
            file.close()
            raise ShardError(f"{escape_unprintable(self.name)}: has changed since this run began")
        return file

    def _explain(self, error: Exception) -> ShardError:
        reason = getattr(error, "strerror", None) or error
        return ShardError(f"{escape_unprintable(self.name)}: {reason}")

    def _make_sample(self, file: IO[bytes], key: str, members: list[Member]) -> Sample:
        sample = Sample(members)
        is_hidden = key.rpartition("/")[2] in ("", ".")
        if not key or is_hidden or not members[0].is_file:
            return sample
        by_name: dict[str, Member] = {}
        for member in members:
            if member.name in by_name:
                self.notes.note_double(member.name)
            by_name.setdefault(member.name, member)
        self._note_key(key)
        images: dict[str, Member] = {}
        for name, member in by_name.items():
            stem, dot, suffix = name.rpartition(".")
            if f"{dot}{suffix}".lower() in IMAGE_SUFFIXES and stem not in images:
                images[stem] = member
        for stem, member in images.items():
            self._add_record(sample, file, stem, member, by_name, key if len(images) == 1 else stem)
        if not images:
            self._note_no_image(sample, key, by_name)
        return sample

    def _note_key(self, key: str) -> None:
        if key in self._keys:
            self.notes.note_double(key)
        self._keys.add(key)

    def _note_no_image(self, sample: Sample, key: str, by_name: Mapping[str, Member]) -> None:
        for name in by_name:
            suffix = name[name.rfind(".") :].lower()
            if suffix in UNREAD_SUFFIXES:
                line = f"{self.name_member(name)}: {suffix} files are not read: {advise_unread(suffix)}"
                sample.records.append(Record(self._count, key, None, problem=line))
                self._count += 1
                return
        self.notes.note_without_image(key)

    def _add_record(
        self,
        sample: Sample,
        file: IO[bytes],
        stem: str,
        image: Member,
        by_name: Mapping[str, Member],
        key: str,
    ) -> None:
        place = PackedFile(self.name, image.name, self.container, image.data, image.size)
        record = Record(self._count, stem, place)
        self._count += 1
        record.load_fields = lambda: _read_fields(
            file, by_name.get(f"{stem}.json") or by_name.get(f"{key}.json")
        )
        bases = (image.name, stem, key)
        record.captions = []
        for place, endings in enumerate(self._endings):
            names = (base + ending for ending in endings for base in bases)
            found = next((by_name[name] for name in names if name in by_name), None)
            record.captions.append(Held() if found is None else self._read_caption(file, found))
            if found is not None:
                sample.caption_of[record.index, place] = found
        sample.image_of[record.index] = image
        sample.records.append(record)

    def _read_caption(self, file: IO[bytes], member: Member) -> Held:
        try:
            if member.size > MAX_CAPTION_BYTES:
                raise ValueError(f"{member.size / 1e6:,.1f} MB, longer than any caption (limit 1 MB)")
            return Held(decode_caption(_read(file, member)) or None)
        except ValueError as error:
            return Held(problem=f"{self.name_member(member.name)}: {error}")

    def write(self, target: IO[bytes], captions: Iterator[NewCaption], extension: str) -> None:
        """Write the tar with new captions: what is no new caption stays, byte for byte."""
        merged = Merged(captions, len(self.names))
        with self._open() as source:
            for sample in self.samples():
                self._write_sample(source, target, sample, merged, extension)
            target.write(bytes(2 * BLOCK))
            target.write(bytes(-target.tell() % tarfile.RECORDSIZE))

    def _write_sample(
        self, source: IO[bytes], target: IO[bytes], sample: Sample, merged: Merged, extension: str
    ) -> None:
        texts = {
            (record.index, place): caption.text
            for record in sample.records
            for place, caption in merged.take(record.index).items()
        }
        replaced = {id(sample.caption_of[which]): which for which in texts if which in sample.caption_of}
        for member in sample.members:
            which = replaced.get(id(member))
            if which is None:
                _copy(source, target, member)
            else:
                target.write(_make_member(member.name, texts[which], member.header))
        keys = {record.index: record.key for record in sample.records}
        for (index, place), text in texts.items():
            if (index, place) not in sample.caption_of:
                name = keys[index] + name_ending(self.names[place], extension)
                target.write(_make_member(name, text, sample.image_of[index].header))


def _read_fields(file: IO[bytes], member: Member | None) -> Mapping[str, Any]:
    """Return what the JSON of a sample says; nothing where it cannot be read."""
    if member is None or member.size > _MOST_JSON_BYTES or file.closed:
        return {}
    try:
        fields = parse_json(_read(file, member))
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def find_caption(fields: Mapping[str, Any]) -> str | None:
    """Return the caption among other fields of a record; None if there is none.

    Raises:
        ValueError: it has characters that no caption has.
    """
    text = next((fields[name] for name in TEXT_COLUMNS if isinstance(fields.get(name), str)), "")
    refuse_odd_characters(text)
    return join_lines(text) or None


def _read(file: IO[bytes], member: Member) -> bytes:
    return read_at(file, member.data, member.size)


def _copy(source: IO[bytes], copy: IO[bytes], member: Member) -> None:
    source.seek(member.start)
    left = member.end - member.start
    while left and (piece := source.read(min(left, _COPY_BYTES))):
        copy.write(piece)
        left -= len(piece)
    copy.write(bytes(-(member.end - member.data) % BLOCK))


def _make_member(name: str, text: str, like: bytes) -> bytes:
    """Return header and content of a caption file; who made it and when is taken from another header."""
    content = f"{text}\n".encode()
    info = tarfile.TarInfo(name)
    try:
        other = tarfile.TarInfo.frombuf(like, "utf-8", "surrogateescape")
        info.mtime, info.mode = int(other.mtime), other.mode
        info.uid, info.gid, info.uname, info.gname = other.uid, other.gid, other.uname, other.gname
    except tarfile.HeaderError:
        pass
    info.size = len(content)
    header = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    return header + content + bytes(-len(content) % BLOCK)
