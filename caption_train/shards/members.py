"""Finds the members of a tar, and where their bytes are.

The headers of plain members are parsed here, all others by tarfile: a shard has thousands, and for a
plain one tarfile takes several times as long.
"""

from __future__ import annotations

import io
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

from caption_train.system.console import escape_unprintable

BLOCK = 512
_MOST_EXTENSION_BYTES = 1 << 20
"""Of a header that only says more of the next one, such as a long name."""


@dataclass(slots=True)
class Member:
    """A member of a tar.

    Attributes:
        name: its name.
        start, end: of its headers and its padded content; the next one starts at the end.
        data, size: of its content.
        is_file: whether it is a regular file.
        header: the last block of its headers.
    """

    name: str
    start: int
    end: int
    data: int
    size: int
    is_file: bool
    header: bytes = field(repr=False)


class DamagedTar(ValueError):
    """A tar that is cut or damaged; the message says where."""


def walk_tar(file: IO[bytes]) -> Iterator[Member]:
    """Yield the members of a tar in order, reading their headers only.

    Args:
        file: the tar, a file of this machine.

    Raises:
        DamagedTar: it is cut or damaged; the members before that were yielded.
    """
    total, offset = os.fstat(file.fileno()).st_size, 0
    slow = _SlowHeaders(file)
    while True:
        block = read_at(file, offset, BLOCK)
        plain = _parse_plain(block)
        if plain:
            name, size = plain
            data, is_file = offset + BLOCK, True
            end = data + -(-size // BLOCK) * BLOCK
        elif (info := slow.read(offset, block, total)) is not None:
            name, size, data, is_file, end = info.name, info.size, info.offset_data, info.isreg(), slow.end
            is_file = is_file and not info.issparse()
            block = read_at(file, data - BLOCK, BLOCK)
        else:
            return
        if data + size > total or end < data:
            raise DamagedTar(f"cut off inside of {escape_unprintable(name)}, after {total:,} bytes")
        # Only the padding of the last member may be missing.
        yield Member(name, offset, min(end, total), data, size, is_file, block)
        offset = end


def read_at(file: IO[bytes], offset: int, size: int) -> bytes:
    """Return bytes of a file, as os.pread does where the system has it."""
    file.seek(offset)
    return file.read(size)


def _parse_plain(block: bytes) -> tuple[str, int] | None:
    """Return name and size of a plain file from its header; None for what tarfile should look at."""
    if len(block) < BLOCK or block[156] not in b"0\0":
        return None
    try:
        size = int(block[124:136].rstrip(b" \0"), 8)
        told = int(block[148:156].rstrip(b" \0"), 8)
        name = block[:100].split(b"\0", 1)[0].decode()
    except ValueError:
        return None
    if told != _sum_bytes(block) - sum(block[148:156]) + 256 or not name or name[-1] == "/":
        return None
    if block[345]:
        return None  # The start of a long name, or what GNU tar keeps there.
    return name, size


def _sum_bytes(block: bytes) -> int:
    """Return the sum of a block's bytes: the low half of Adler-32, which is one more, of 256 bytes a time."""
    return (zlib.adler32(block[:256]) & 0xFFFF) + (zlib.adler32(block[256:]) & 0xFFFF) - 2


class _SlowHeaders:
    """Reads headers with tarfile, which knows all that were ever written."""

    def __init__(self, file: IO[bytes]) -> None:
        # An empty tar, so that it reads nothing by itself.
        self._tar = tarfile.TarFile(fileobj=io.BytesIO(bytes(2 * BLOCK)))
        self._tar.encoding, self._tar.errors = "utf-8", "surrogateescape"
        self._file = file
        self.end = 0

    def read(self, offset: int, block: bytes, total: int) -> tarfile.TarInfo | None:
        """Return the member at an offset, None at the end of the tar; `end` is where the next one starts."""
        if not block or not block.strip(b"\0"):
            if len(block) == BLOCK:
                return None
            raise DamagedTar(f"ends without the mark of its end: perhaps it is cut off after {total:,} bytes")
        if len(block) < BLOCK:
            raise DamagedTar(f"cut off after {total:,} bytes")
        if chr(block[156]) in "LKxgX" and _read_size(block) > _MOST_EXTENSION_BYTES:
            raise DamagedTar(f"damaged at byte {offset:,}: a header of {_read_size(block):,} bytes")
        self._file.seek(offset)
        self._tar.fileobj = self._file
        try:
            info = tarfile.TarInfo.fromtarfile(self._tar)
        # On damaged headers it raises errors of many types.
        except Exception as error:
            raise DamagedTar(f"damaged at byte {offset:,}: {escape_unprintable(error)[:100]}") from error
        self.end = self._tar.offset
        if info.size < 0 or self.end <= offset or info.offset_data < offset:
            raise DamagedTar(f"damaged at byte {offset:,}: a size that cannot be")
        return info


def _read_size(block: bytes) -> int:
    try:
        return int(block[124:136].rstrip(b" \0") or b"0", 8)
    except ValueError:
        return _MOST_EXTENSION_BYTES + 1  # Numbers this large are written in another way.
