"""Writes files so that a reader never sees half of one; reads files that anybody may have written.

Standard library only.
"""

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import IO, Any

from caption_train.errors import CaptionTrainError
from caption_train.packed import open_regular

try:
    import fcntl
except ImportError:  # Windows, where an open file can be neither renamed nor deleted
    fcntl = None

TEMPORARY = ".caption-train.tmp"
_IS_TEMPORARY = re.compile(rf"\..*\.[a-z0-9_]{{8}}{re.escape(TEMPORARY)}", re.DOTALL)
_ABANDONED_SECONDS = 3600
"""Age of a temporary file that counts as abandoned where the file system cannot say whether it is in use."""


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


_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)


@contextmanager
def open_temporary(path: Path, mode: str = "wb", encoding: str | None = None) -> Iterator[tuple[IO, Path]]:
    """Open a temporary file beside `path`, to be renamed to it; yield it and its path, remove what is left.

    As long as it is open, `clear_temporary` in other processes leaves it alone.
    """
    # Shortened, because a file name may have 255 bytes, and a character up to four.
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:50]}.", suffix=TEMPORARY, dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, mode, encoding=encoding, newline=None if "b" in mode else "") as file:
            if fcntl is not None:
                # Where there are no record locks, its age tells.
                with suppress(OSError):
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file, temporary
    finally:
        temporary.unlink(missing_ok=True)


def finish_temporary(file: IO, temporary: Path, mode: int, *, is_synced: bool = True) -> None:
    """Flush a temporary file to the disk and give it its permissions, so that it can be renamed.

    is_synced: whether to wait for the disk, so that what the name shows survives a crash of the machine.
    """
    file.flush()
    if is_synced:
        os.fsync(file.fileno())
    temporary.chmod(mode)
    if fcntl is None:
        file.close()


@contextmanager
def open_atomically(
    path: Path | str, mode: str = "w", encoding: str | None = "utf-8", *, follow_link: bool = False
) -> Iterator[IO]:
    """Open a temporary file beside `path`; on success sync it and rename it over `path`, else remove it.

    The rename is atomic because both names are in one folder. An existing file's permissions are kept.

    Args:
        path: what is replaced. A link itself is replaced, not the file that it leads to.
        mode, encoding: as `open` takes them.
        follow_link: where `path` is a link to a file, replace that file: people link their own captions.
    """
    path = behind_link(path) if follow_link else Path(path)
    with open_temporary(path, mode, None if "b" in mode else encoding) as (file, temporary):
        yield file
        finish_temporary(file, temporary, mode_of(path))
        temporary.replace(path)


def write_atomically(path: Path | str, content: str | bytes, *, follow_link: bool = False) -> None:
    """Write text (UTF-8, newlines as given) or bytes to `path`, all of it or nothing; see open_atomically."""
    with open_atomically(path, "wb", follow_link=follow_link) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def copy_atomically(source: Path | str, path: Path | str) -> None:
    """Copy a file to `path`, completely or not at all, in pieces, because a model may be large."""
    with Path(source).open("rb") as content, open_atomically(path, "wb") as file:
        shutil.copyfileobj(content, file, _PIECE)


def behind_link(path: Path | str) -> Path:
    """Return the regular file that a link leads to; the path itself where it is no link, or leads to none."""
    path = Path(path)
    return path.resolve() if path.is_symlink() and path.is_file() else path


def follow_pointer(path: Path) -> Path:
    """Return the folder that `path` is or points to, resolved; `path` itself if it points to none."""
    try:
        if path.is_file() and path.stat().st_size < 1000:
            path = path.with_name(path.read_text(encoding="utf-8"))
        return path.resolve()
    # RuntimeError: a loop of links.
    except (OSError, ValueError, RuntimeError):
        return path


def clear_temporary(folder: Path, names: Iterable[str] | None = None) -> None:
    """Delete what writes that were cut short have left in `folder`, and no file that is being written.

    names: what is in the folder, where it was listed already.
    """
    with suppress(OSError):
        for name in _list_names(folder) if names is None else names:
            path = folder / name if name[0] == "." and _IS_TEMPORARY.fullmatch(name) else None
            if path and path.is_file() and not path.is_symlink():
                with suppress(OSError):
                    if not _is_being_written(path):
                        path.unlink()


def _is_being_written(temporary: Path) -> bool:
    if fcntl is None:
        return False
    descriptor = open_own(temporary)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:
        return time.time() - os.fstat(descriptor).st_mtime < _ABANDONED_SECONDS
    finally:
        os.close(descriptor)
    return False


def _list_names(folder: Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            yield entry.name


def find_matching(folder: Path, start: str | tuple[str, ...], pattern: re.Pattern) -> list[Path]:
    """Return the files in a folder, of millions perhaps, whose whole name a pattern matches, sorted.

    start: what their names begin with.
    """
    names = (name for name in _list_names(folder) if name.startswith(start))
    return [folder / name for name in sorted(filter(pattern.fullmatch, names))]


def find_free_name(path: Path) -> Path:
    """Return `path`, with a number appended if it exists."""
    names = itertools.chain([path], (path.with_name(f"{path.name}-{count}") for count in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))


_PIECE = 1 << 20

MAX_BYTES = 256 << 20
"""The largest file that is read whole: an index or a tokenizer has some tens of megabytes at most."""


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


_READ_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


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


def cache_folder(name: str) -> Path:
    """Return where things of one kind are kept between runs: in $XDG_CACHE_HOME, or in ~/.cache.

    Raises:
        CaptionTrainError: there is neither, as for a user in a container that has no entry in /etc/passwd.
    """
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise CaptionTrainError(
            f"there is no home folder to keep {name} in: set XDG_CACHE_HOME to a folder"
        ) from error
    return root / "caption-train" / name


@dataclass(frozen=True, order=True)
class Kept:
    """A file that can be made again.

    Attributes:
        used: when it was last used, in nanoseconds: whoever reads one sets its time of modification.
        size: in bytes.
        path: the file.
    """

    used: int
    size: int
    path: Path


def list_kept(folder: Path, suffix: str) -> Iterator[Kept]:
    """Yield the regular files of a folder whose names end with `suffix`; none if it cannot be read."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(suffix):
                with suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        yield Kept(status.st_mtime_ns, status.st_size, Path(entry.path))


def remove_least_used(
    files: Iterable[Kept], most_bytes: int, keep: Callable[[Path], bool] = lambda path: False
) -> int:
    """Remove the files that were not used for the longest time, until all have `most_bytes` together.

    Args:
        files: as `list_kept` finds them.
        most_bytes: how many bytes they may have.
        keep: whether a file must stay.

    Returns:
        How many bytes were removed.
    """
    found = sorted(files)
    excess, removed = sum(file.size for file in found) - most_bytes, 0
    for file in found:
        if removed >= excess:
            break
        if not keep(file.path):
            with suppress(OSError):
                file.path.unlink()
                removed += file.size
    return removed


def hash_file(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal; OSError if it is no regular file."""
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error), str(path)) from None


def sync_folder(folder: Path) -> None:
    """Flush every file below `folder`, and the folders themselves, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk, as far as the system can.

    Windows cannot open a folder, and flushes only what is open for writing.
    """
    is_folder = path.is_dir()
    if is_folder and fcntl is None:
        return
    descriptor = os.open(path, os.O_RDONLY if fcntl is not None else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder, and do not need to.
        if not (is_folder and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def mode_of(path: Path) -> int:
    """Return the permissions of a file that is there, or those that a new one gets."""
    if path.is_file() and not path.is_symlink():
        return path.stat().st_mode & 0o7777
    return 0o666 & ~_umask()


def apply_umask(folder: Path) -> None:
    """Give a folder, and all in it, the permissions that new ones get: safetensors makes its files 0600."""
    umask = _umask()
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _umask() -> int:
    # The umask can only be read by setting it. Two threads at once would leave the one's value for good, and
    # what a third creates meanwhile must not be open to all.
    with _UMASK:
        umask = os.umask(0o077)
        os.umask(umask)
    return umask


_UMASK = threading.Lock()
