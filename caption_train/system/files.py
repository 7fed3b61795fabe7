"""Writes files so that a reader never sees half of one; reads files that anybody may have written.

Standard library only.
"""

import errno
import hashlib
import itertools
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import IO, Any

from caption_train.errors import CaptionTrainError

TEMPORARY = ".tmp"


@contextmanager
def open_atomically(path: Path | str, mode: str = "w", encoding: str | None = "utf-8") -> Iterator[IO]:
    """Open a temporary file beside `path`; rename it to `path` if the `with` block ends without an error.

    The rename is atomic because both names are in one folder. The file is flushed to the disk first. An
    existing file's permissions are kept.

    Args:
        path: the file to write.
        mode: "w" or "wb".
        encoding: of text.
    """
    path = Path(path)
    # Resolved, because a rename would replace a symbolic link, not the file that it points to.
    path = path.resolve() if path.is_symlink() else path
    binary = "b" in mode
    # Shortened, because a file name may have 255 bytes, and a character up to four.
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:50]}.", suffix=TEMPORARY, dir=path.parent)
    try:
        with os.fdopen(
            handle, mode, encoding=None if binary else encoding, newline=None if binary else ""
        ) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(_mode_of(path))
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_atomically(path: Path | str, content: str | bytes) -> None:
    """Write text (as UTF-8, with its line ends unchanged) or bytes to `path`, completely or not at all."""
    with open_atomically(path, "wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def copy_atomically(source: Path | str, path: Path | str) -> None:
    """Copy a file to `path`, completely or not at all, in pieces, because a model may be large."""
    with Path(source).open("rb") as content, open_atomically(path, "wb") as file:
        shutil.copyfileobj(content, file, _PIECE)


def clear_temporary(folder: Path) -> None:
    """Delete the temporary files in `folder` that interrupted writes have left."""
    for path in folder.glob(f".*.{'?' * 8}{TEMPORARY}"):
        path.unlink(missing_ok=True)


def find_free_name(path: Path) -> Path:
    """Return `path`, with a number appended if it exists."""
    names = itertools.chain([path], (path.with_name(f"{path.name}-{count}") for count in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))


MAX_BYTES = 256 << 20
"""The largest file that is read whole: an index or a tokenizer has some tens of megabytes at most."""


class TooLarge(ValueError):
    """A file is larger than what is read of it."""


def read_regular_file(path: Path | str, limit: int = MAX_BYTES) -> bytes:
    """Return what a file holds.

    Raises:
        ValueError: it is a folder, a pipe or a device, which might never end, or has more than `limit` bytes.
        OSError: it cannot be read.
    """
    # Opened without blocking, since a named pipe would wait for a writer for ever.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > limit:
            raise TooLarge(
                f"{status.st_size / 1e6:,.1f} MB, more than the {limit / 1e6:,.0f} MB that are read"
            )
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(limit)
    finally:
        os.close(descriptor)


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

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such file.
        CaptionTrainError: anything else that is wrong, in one line.
    """
    name = name or str(path)
    try:
        content = parse_json(read_regular_file(path))
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


def hash_file(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal; OSError if it is no regular file."""
    with open(path, "rb", opener=_open_without_blocking) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_without_blocking(path: str, flags: int) -> int:
    # A named pipe would wait for a writer for ever.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def fingerprint_model(folder: Path | str) -> str | None:
    """Return a hash of the model in a folder, independent of the folder's path; None if it is no folder.

    Of large files, only the size and a megabyte at each end are hashed: other weights differ there too.
    """
    if not Path(folder).is_dir():
        return None
    found = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in (".safetensors", ".bin", ".json") and path.is_file():
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                found.update(f"{path.name} {size} ".encode() + file.read(_PIECE))
                file.seek(max(size - _PIECE, 0))
                found.update(file.read(_PIECE))
    return found.hexdigest()[:16]


_PIECE = 1 << 20


def find_commit(model_id: str, revision: str | None = None) -> str | None:
    """Return the commit of a model in the hub's cache, or None for a folder. Uses no network."""
    if Path(model_id).is_dir():
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model_id, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def _mode_of(path: Path) -> int:
    if path.exists():
        return path.stat().st_mode & 0o7777
    # The umask can only be read by setting it.
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask
