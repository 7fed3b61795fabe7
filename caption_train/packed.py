"""A file inside a larger file, such as an image in a tar: a path that knows where its bytes are."""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

MAX_PACKED_BYTES = 1 << 30
"""The largest file inside of another that is read: an image has some megabytes."""


@dataclass(frozen=True, slots=True)
class Container:
    """A file that holds others, as it was when its table was read.

    Attributes:
        path: the file.
        size, mtime_ns, ctime_ns, inode: what changes when somebody writes it.
    """

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path | str, descriptor: int | None = None) -> Container:
        """Return what a file is now; OSError where it is not there.

        Args:
            path: the file.
            descriptor: the open file, if it is open.
        """
        status = Path(path).stat() if descriptor is None else os.fstat(descriptor)
        return cls(str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes of the file.

        Args:
            offset: of the first byte.
            size: how many.

        Raises:
            OSError: it cannot be read, or has changed since its table was read.
        """
        descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            if Container.of(self.path, descriptor) != self:
                raise OSError(errno.ESTALE, "has changed since this run began", self.path)
            os.lseek(descriptor, offset, os.SEEK_SET)
            pieces = []
            while size and (piece := os.read(descriptor, size)):
                pieces.append(piece)
                size -= len(piece)
            return b"".join(pieces)
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class PackedStatus:
    """What `PackedFile.stat` returns: the times of the container, the size and place of the file in it."""

    st_size: int
    st_mtime_ns: int
    st_ctime_ns: int
    st_ino: int
    st_mode: int = stat.S_IFREG | 0o444


class PackedFile(type(Path())):
    """The path of a file inside a container: `shards/00000.tar/a.jpg`.

    It can be compared, sorted, printed and pickled as other paths can. `open`, `read_bytes` and `stat` speak
    of the file inside; no other call finds a file there.

    Args:
        folder: the container, as a person names it.
        name: the name of the file in it. What would lead out of the container is dropped from the path.
        container: where the bytes are; None if `content` is given.
        offset, size: of the bytes in the container.
        content: the bytes themselves.
    """

    __slots__ = ("_container", "_content", "_folder", "_offset", "_size")

    def __new__(
        cls,
        folder: Path | str,
        name: str,
        container: Container | None = None,
        offset: int = 0,
        size: int = 0,
        content: bytes | None = None,
    ) -> PackedFile:
        if sys.version_info >= (3, 12):
            return super().__new__(cls)
        return super().__new__(cls, folder, _tame(name))._set(folder, container, offset, size, content)

    if sys.version_info >= (3, 12):

        def __init__(
            self,
            folder: Path | str,
            name: str,
            container: Container | None = None,
            offset: int = 0,
            size: int = 0,
            content: bytes | None = None,
        ) -> None:
            super().__init__(folder, _tame(name))
            self._set(folder, container, offset, size, content)

        def with_segments(self, *segments: Any) -> Path:
            """Return a plain path: what is made from this one is no file in the container."""
            return Path(*segments)

    else:

        @classmethod
        def _from_parsed_parts(cls, drive: str, root: str, parts: list[str]) -> Path:
            return type(Path())._from_parsed_parts(drive, root, parts)

    def _set(
        self, folder: Path | str, container: Container | None, offset: int, size: int, content: bytes | None
    ) -> PackedFile:
        self._folder, self._container, self._offset, self._content = folder, container, offset, content
        self._size = size if content is None else len(content)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedFile, (
            self._folder,
            self.inner,
            self._container,
            self._offset,
            self._size,
            self._content,
        )

    @property
    def folder(self) -> str:
        """The container, as a person names it."""
        return str(self._folder)

    @property
    def container(self) -> Container | None:
        """The file that holds its bytes; None where they are in memory."""
        return self._container

    @property
    def span(self) -> tuple[int, int]:
        """Where its bytes are in the container: offset and size."""
        return self._offset, self._size

    @property
    def inner(self) -> str:
        """Its path in the container."""
        shown, folder = str(self), str(self._folder)
        if not shown.startswith(f"{folder}/"):
            folder = str(Path(folder))  # Such as s3://, of which a path keeps one slash.
        return shown[len(folder) + 1 :]

    @property
    def unpacked(self) -> str:
        """The path that the file would have in a folder of the container's name: `shards/00000/a.jpg`."""
        return f"{os.path.splitext(self._folder)[0]}{os.sep}{self.inner}"  # noqa: PTH122 - of a million pairs

    def detach(self) -> PackedFile:
        """Return the same file for a process elsewhere, which has another working directory.

        Its name stays. Where the container is a copy that only this machine has, it holds its bytes.

        Raises:
            OSError: these bytes cannot be read.
            ValueError: they are more than any image has.
        """
        held = self._container
        if held is None:
            return self
        if Path(held.path) != Path(self._folder):
            return PackedFile(self._folder, self.inner, content=self.read_bytes())
        held = replace(held, path=os.path.abspath(held.path))  # noqa: PTH100 - what is a link stays one
        return PackedFile(self._folder, self.inner, held, self._offset, self._size)

    def stat(self, *, follow_symlinks: bool = True) -> Any:
        """Return size and times; of a file whose bytes are in memory, all times are 0."""
        held = self._container
        if held is None:
            return PackedStatus(self._size, 0, 0, 0)
        return PackedStatus(self._size, held.mtime_ns, held.ctime_ns, inode_inside(held, self._offset))

    def read_bytes(self) -> bytes:
        """Return the bytes of the file.

        Raises:
            OSError: the container cannot be read, or has changed since its table was read.
            ValueError: the file is larger than any image.
        """
        if self._size > MAX_PACKED_BYTES:
            raise ValueError(f"{self._size / 1e6:,.0f} MB, more than any image has")
        if self._content is not None:
            return self._content
        if self._container is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return self._container.read(self._offset, self._size)

    def open(self, mode: str = "rb", *arguments: Any, **keywords: Any) -> IO[bytes]:
        """Open the file to read its bytes."""
        if mode != "rb":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        return io.BytesIO(self.read_bytes())


def inode_inside(container: Container, offset: int) -> int:
    """Return a number that tells a file in a container from others in it, as an inode does on a disk."""
    return container.inode ^ (offset << 20)


def open_regular(path: Path | str) -> IO[bytes]:
    """Open a regular file to read its bytes, be it a file of its own or inside a container.

    Raises:
        ValueError: it is a folder, a pipe or a device.
        OSError: it cannot be read.
    """
    if isinstance(path, PackedFile):
        return path.open()
    # Non-blocking, because opening a named pipe would otherwise wait for a writer for ever.
    file = open(path, "rb", opener=_open_without_blocking)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError("not a regular file")
    return file


def _open_without_blocking(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _tame(name: str) -> str:
    """Return a member's name as a path inside the container: `/etc/a.jpg` and `../a.jpg` would lead out."""
    parts = [part for part in name.replace("\0", "").split("/") if part not in ("", ".", "..")]
    return "/".join(parts) or "_"
