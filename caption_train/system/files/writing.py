"""Writes files so that a reader never sees half of one, and what is written survives a crash."""

import errno
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from caption_train.system.files.names import behind_link, list_names
from caption_train.system.files.reading import open_own

try:
    import fcntl
except ImportError:  # Windows, where an open file can be neither renamed nor deleted
    fcntl = None

TEMPORARY = ".caption-train.tmp"

_IS_TEMPORARY = re.compile(rf"\..*\.[a-z0-9_]{{8}}{re.escape(TEMPORARY)}", re.DOTALL)

_ABANDONED_SECONDS = 3600
"""Age of a temporary file that counts as abandoned where the file system cannot say whether it is in use."""

_PIECE = 1 << 20


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


def clear_temporary(folder: Path, names: Iterable[str] | None = None) -> None:
    """Delete what writes that were cut short have left in `folder`, and no file that is being written.

    names: what is in the folder, where it was listed already.
    """
    with suppress(OSError):
        for name in list_names(folder) if names is None else names:
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
