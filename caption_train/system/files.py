"""Writes files so that a reader never sees half of one. Standard library only."""

import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

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


def hash_file(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
