"""Reads files that anybody may have written: regular ones, of a size that was expected. No torch."""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import IO, Any

from caption_train.errors import CaptionTrainError
from caption_train.packed import open_regular

_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)

_READ_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)

MAX_BYTES = 256 << 20
"""The largest file that is read whole: an index or a tokenizer has some tens of megabytes at most."""


def open_own(path: Path | str, flags: int = os.O_RDONLY, mode: int = 0o666) -> int:
    """Open a file that is ours by its name: a lock, a journal, a log. No link is followed out of its folder.

    Args:
        path: the file; with O_CREAT in `flags` it need not exist.
        flags: of os.open.
        mode: permissions of a new file, less the umask.

    Returns:
        A file descriptor.

    Raises:
        OSError: it cannot be opened, or is a link, a folder, a pipe or a device; `strerror` says which.
    """
    # Without blocking, since a named pipe would wait for its other end for ever.
    flags |= _NO_FOLLOW | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        if not _NO_FOLLOW and Path(path).is_symlink():
            raise OSError(errno.ELOOP, "", str(path))
        descriptor = os.open(path, flags, mode)
    except OSError as error:
        # FreeBSD says EMLINK. A pipe nobody reads is ENXIO.
        said = {errno.ELOOP: "is a link", errno.EMLINK: "is a link", errno.ENXIO: "is no regular file"}
        if error.errno not in said:
            raise
        raise OSError(error.errno, said[error.errno], str(path)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    return descriptor


class TooLarge(ValueError):
    """A file is larger than what is read of it."""


def read_regular_file(path: Path | str, limit: int = MAX_BYTES, *, is_own: bool = False) -> bytes:
    """Return what a file holds.

    Args:
        path: the file.
        limit: the most bytes it may have.
        is_own: it is ours by its name, so no link is followed; see open_own.

    Raises:
        ValueError: it is a folder, a pipe or a device, which might never end, or has more than `limit` bytes.
        OSError: it cannot be read.
    """
    descriptor, size = _open_regular_file(path, limit, is_own)
    try:
        # Without a file object, which costs more than reading a caption does.
        wanted = min(limit, size + 1)
        content = os.read(descriptor, wanted)
        if len(content) == size:
            return content
        pieces, left = [content], wanted - len(content)
        while left and (piece := os.read(descriptor, left)):
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)
    finally:
        os.close(descriptor)


def opening_regular_file(path: Path | str, limit: int | None = None, *, is_own: bool = False) -> IO[bytes]:
    """Open a file that may be larger than memory; arguments and errors as of `read_regular_file`."""
    return open(_open_regular_file(path, limit, is_own)[0], "rb")  # noqa: PTH123


def _open_regular_file(path: Path | str, limit: int | None, is_own: bool) -> tuple[int, int]:
    """Return a file's descriptor and its size."""
    # Opened without blocking, since a named pipe would wait for a writer for ever.
    descriptor = open_own(path) if is_own else os.open(path, _READ_FLAGS)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if limit is not None and status.st_size > limit:
            raise TooLarge(
                f"{status.st_size / 1e6:,.1f} MB, more than the {limit / 1e6:,.0f} MB that are read"
            )
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, status.st_size


def hash_file(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal; OSError if it is no regular file."""
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error), str(path)) from None


def read_text_lines(file: IO[bytes], path: Path | str, encoding: str = "utf-8") -> Iterator[str]:
    r"""Yield the lines of an open file as text; only \n ends one.

    Raises:
        UnicodeDecodeError: with the position in the whole file, as long as memory has room for that.
    """
    for number, line in enumerate(file):
        try:
            yield line.decode(encoding if not number else encoding.removesuffix("-sig"))
        except UnicodeDecodeError:
            read_regular_file(path).decode(encoding)
            raise


def parse_json(text: str | bytes) -> Any:
    """Return the value that JSON text says; ValueError, of one line, for whatever is wrong with it."""
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        return json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (position {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON: {error}") from None
    except RecursionError:
        raise ValueError("broken JSON: nested too deeply") from None
    except ValueError as error:  # a whole number of thousands of digits
        raise ValueError(f"broken JSON: {str(error).partition(';')[0]}") from None


def read_json_object(
    path: Path | str,
    types: Mapping[str, type | UnionType] | None = None,
    *,
    name: str = "",
    limit: int = MAX_BYTES,
) -> dict[str, Any]:
    """Return the JSON object in a file: the one way in which this toolkit reads one.

    Args:
        path: a regular file; a missing one is an error.
        types: what a member must be, if it is there and not null.
        name: what messages begin with, the path if not given.
        limit: the largest size that is read, in bytes.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such file.
        CaptionTrainError: anything else that is wrong, in one line.
    """
    name = name or str(path)
    try:
        content = parse_json(read_regular_file(path, limit))
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise CaptionTrainError(f"{name}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CaptionTrainError(f"{name}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CaptionTrainError(f"{name}: holds no JSON object")
    for member, wanted in (types or {}).items():
        value = content.get(member)
        # True and False are whole numbers to Python.
        is_bool_for_number = isinstance(value, bool) and wanted is not bool
        if value is not None and (not isinstance(value, wanted) or is_bool_for_number):
            shown = json.dumps(value, default=str)[:40]
            raise CaptionTrainError(f"{name}: {member} is {shown}, not {_TYPE_NAMES[wanted]}")
    return content


_TYPE_NAMES = {
    **{str: "text", dict: "an object", bool: "true or false"},
    **{int: "a whole number", int | float: "a number"},
}
