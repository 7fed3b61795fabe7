"""Keeps between runs which image files were found sound, with their digests, so that each is decoded once.

A file is known by its real path, size, times of change and inode, as git knows it. What is kept is only ever
a short cut: whatever is wrong with the index, images are decoded as if there were none.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import PIL

from caption_train.data.columns.parts import Stamp, stamp_file
from caption_train.data.columns.table import PairTable
from caption_train.data.images import ImageError, check_images, inspect_image
from caption_train.packed import PackedFile
from caption_train.system.files import cache_folder

if TYPE_CHECKING:
    import sqlite3

T = TypeVar("T")
Row = tuple[bytes, int, bytes]
"""A row of the database: key, day of its last use, value."""
FORMAT = 1
"""Goes up when `inspect_image` finds other things in the same file: nothing kept before is used then."""
MAX_ROWS = 4_000_000
"""Of about 80 bytes each on the disk."""
UNUSED_DAYS = 180
_RACY_NS = 2_000_000_000
"""File systems keep times in steps of up to two seconds: a file may change twice within one."""
_VALUE = struct.Struct(">32sQ8s")
_DAYS_BETWEEN_MARKS = 7
"""How stale the day may be on which a row was last used: few runs need to write."""
_KEYS_AT_ONCE = 500
_BATCH_ROWS, _BATCH_SECONDS = 1000, 5.0
_TABLE = "CREATE TABLE IF NOT EXISTS images (key BLOB PRIMARY KEY, day INTEGER, value BLOB) WITHOUT ROWID"


def inspect_images(
    images: Sequence[Path], *, show_progress: bool = True, index: ImageIndex | None = None
) -> list[tuple[str, int] | ImageError]:
    """Return what `inspect_image` says of each image, decoding those that the index does not know.

    Args:
        images: the files.
        show_progress: draw a bar, where a terminal shows it.
        index: where results are kept; that of this user if not given.

    Returns:
        For each image its SHA-256 and how many pixels it has, or why it cannot be used.
    """
    with index or ImageIndex(index_path()) as index:
        found: dict[Path, Any] = dict(index.find(images))
        unknown = [image for image in dict.fromkeys(images) if image not in found]
        if unknown:
            results = check_images(unknown, show_progress=show_progress, inspect=index.inspect)
            found.update(zip(unknown, results, strict=True))
        return [found[image] for image in images]


def index_path() -> Path:
    """Return where this user's index is."""
    return cache_folder("images") / "index.sqlite"


class ImageIndex:
    """What was found in image files, in an SQLite file that all runs of a user share; a context manager.

    Several processes may use it at once, and each may be killed: what is kept is written every few seconds.
    A damaged file is made anew, and each row has a check sum. Where the folder cannot be written to, the disk
    is full or the file system has no locks, nothing is kept. Images that cannot be used are not kept either:
    the reason may go away without a change of the file.

    Args:
        path: the SQLite file; its folder is made if need be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._today = int(time.time() // 86_400)
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None
        # Thousands of images lie in the same few folders.
        self._find_folder = cache(_find_folder)
        self._new: list[Row] = []
        self._used: list[bytes] = []
        self._written = time.monotonic()
        self._has_grown = False

    def __enter__(self) -> ImageIndex:
        self._database = _open(self.path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._write()
            self._prune()
            self._close()

    def find(self, images: Sequence[Path]) -> dict[Path, tuple[str, int]]:
        """Return image → SHA-256 and pixels, of the images that are known as they are now."""
        if self._database is None:
            return {}
        keyed = []
        for image in images:
            with suppress(ValueError):  # A name that cannot be encoded.
                if stamp := _look(image):
                    keyed.append((image, self._make_key(str(image), stamp)))
        return self._select_known(keyed)

    def find_rows(self, table: PairTable, stamps: Sequence[Stamp]) -> None:
        """Put digests and pixels of the images that are known into a table.

        Args:
            table: the table.
            stamps: what each of its images is now.
        """
        if self._database is None:
            return
        rows = []
        names = table.image_names(np.arange(len(table)))
        for row, (name, stamp) in enumerate(zip(names, stamps, strict=True)):
            with suppress(ValueError):  # A name that cannot be encoded.
                rows.append((row, self._make_key(name, stamp)))
        known = self._select_known(rows)
        if known:
            where = np.fromiter(known, np.int64, len(known))
            digests = bytes.fromhex("".join(digest for digest, _ in known.values()))
            table.digest[where] = np.frombuffer(digests, np.uint8).reshape(-1, 32)
            table.pixels[where] = [pixels for _, pixels in known.values()]

    def _select_known(self, keyed: Sequence[tuple[T, bytes]]) -> dict[T, tuple[str, int]]:
        """Return what is known of things, each with its key."""
        things_of: dict[bytes, list[T]] = {}
        for thing, key in keyed:
            things_of.setdefault(key, []).append(thing)
        found: dict[T, tuple[str, int]] = {}
        try:
            for key, day, value in _select(self._database, sorted(things_of)):
                known = _unpack(key, value)
                if known and day < self._today - _DAYS_BETWEEN_MARKS:
                    self._used.append(key)
                if known:
                    found.update(dict.fromkeys(things_of[key], known))
        # A damaged page shows when it is read, as any of these.
        except _errors() as error:
            self._give_up(error)
        return found

    def take_used(self) -> list[bytes]:
        """Return which rows were found that no run had used for days, for another process to `note_used`."""
        used, self._used = self._used, []
        return used

    def note_used(self, keys: Sequence[bytes]) -> None:
        """Have rows marked as used today."""
        self._used += keys

    def inspect(self, image: Path) -> tuple[str, int]:
        """Return what `inspect_image` does, or raise it, and keep it; threads may call this."""
        found, row = self.examine(image)
        if row:
            self.keep([row])
        return found

    def examine(self, image: Path | str) -> tuple[tuple[str, int], Row | None]:
        """Return what `inspect_image` does, or raise it, and what another process can `keep` of it."""
        before, now = _look(image), time.time_ns()
        found = inspect_image(image)
        # A file that was changed meanwhile, or as short a time ago that it could look the same once changed.
        if before and max(before[1:3]) + _RACY_NS < now and before == _look(image):
            with suppress(ValueError):  # A name that cannot be encoded.
                key = self._make_key(str(image), before)
                return found, (key, self._today, _pack(key, found))
        return found, None

    def keep(self, rows: Sequence[Row]) -> None:
        """Keep what `examine` returned; it is written every few seconds."""
        with self._lock:
            self._new += rows
            overdue = time.monotonic() - self._written > _BATCH_SECONDS
            if overdue or len(self._new) >= _BATCH_ROWS:
                self._write()

    def _make_key(self, image: str, stamp: Stamp) -> bytes:
        """Return a hash of all that tells an image file from others."""
        folder, _, name = image.rpartition(os.sep)
        real, start = self._find_folder(folder or _root_of(image))
        told = f"{_decoders()} {stamp} {real}/{name}"
        return start + hashlib.blake2b(told.encode("utf-8", "surrogateescape"), digest_size=12).digest()

    def _write(self) -> None:
        """Write what is new in one transaction."""
        new, used = self._new, self._used
        self._new, self._used, self._written = [], [], time.monotonic()
        if self._database is None or not (new or used):
            return
        try:
            with self._database as database:
                database.executemany("INSERT OR REPLACE INTO images VALUES (?, ?, ?)", sorted(new))
                database.executemany(
                    "UPDATE images SET day = ? WHERE key = ?", [(self._today, key) for key in used]
                )
            self._has_grown = self._has_grown or bool(new)
        except _errors() as error:
            self._give_up(error)

    def _prune(self) -> None:
        """Drop rows that were not used for long, and the oldest of more than MAX_ROWS."""
        if self._database is None or not self._has_grown:
            return
        try:
            with self._database as database:
                database.execute("DELETE FROM images WHERE day < ?", (self._today - UNUSED_DAYS,))
                (count,) = database.execute("SELECT count(*) FROM images").fetchone()
                if count > MAX_ROWS:
                    database.execute(
                        "DELETE FROM images WHERE key IN (SELECT key FROM images ORDER BY day LIMIT ?)",
                        (count - MAX_ROWS,),
                    )
        except _errors() as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Use the index no more in this run; remove a damaged one, so that the next run makes it anew."""
        self._close()
        if _is_damage(error):
            _remove(self.path)

    def _close(self) -> None:
        if self._database is not None:
            with suppress(*_errors()):
                self._database.close()
            self._database = None


def _look(image: Path | str) -> Stamp | None:
    """Return what tells a file from others and from itself once changed; None if it cannot be looked at."""
    if not isinstance(image, PackedFile):
        return stamp_file(str(image))
    status = image.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _find_folder(folder: str) -> tuple[str, bytes]:
    """Return the real path of a folder, and what the keys of its images begin with.

    So they stand side by side in the database, which reads and writes a page for many images at once.
    """
    real = os.path.realpath(folder)
    return real, hashlib.blake2b(real.encode("utf-8", "surrogateescape"), digest_size=4).digest()


def _root_of(image: str) -> str:
    return os.sep if image.startswith(os.sep) else ""


def _open(path: Path) -> sqlite3.Connection | None:
    """Return the database, made anew where it is damaged, or None where there can be none."""
    try:
        import sqlite3
    except ImportError:  # Python can be built without it.
        return None
    for is_last in (False, True):
        database = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # What is ours by its name is a regular file in its folder, and no link out of it.
            if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
                return None
            # Used by one thread at a time, under a lock. Writing a batch takes a few milliseconds.
            database = sqlite3.connect(path, timeout=10, check_same_thread=False)
            # Not synced: after a crash of the machine a damaged file is noticed, and made anew.
            database.execute("PRAGMA synchronous = OFF")
            database.execute(_TABLE)
            return database
        except _errors() as error:
            if database is not None:
                database.close()
            if is_last or not _is_damage(error):
                return None
            _remove(path)
    return None


def _select(database: sqlite3.Connection, keys: list[bytes]) -> Iterator[tuple[bytes, int, bytes]]:
    """Yield the rows of keys, in one transaction: over a network, each would cost a lock."""
    database.execute("BEGIN")
    try:
        for start in range(0, len(keys), _KEYS_AT_ONCE):
            asked = keys[start : start + _KEYS_AT_ONCE]
            marks = ", ".join("?" * len(asked))
            yield from database.execute(
                f"SELECT key, day, value FROM images WHERE key IN ({marks})", asked
            ).fetchall()
    finally:
        database.rollback()


@cache
def _errors() -> tuple[type[Exception], ...]:
    try:
        import sqlite3
    except ImportError:
        return (OSError,)
    # ValueError and TypeError: a value of another type than was written.
    return (sqlite3.Error, OSError, ValueError, TypeError, OverflowError)


def _is_damage(error: Exception) -> bool:
    """Return whether the file holds what nobody wrote: not a lock, a full disk or missing permissions."""
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:
        return not isinstance(error, OSError)
    # The low byte is the kind of error: ERROR (no such column), CORRUPT, NOTADB.
    return code & 0xFF in (1, 11, 26)


def _remove(path: Path) -> None:
    for name in (path, path.with_name(f"{path.name}-journal")):
        with suppress(OSError):
            name.unlink()


@cache
def _decoders() -> str:
    """Return the versions of all that decides whether an image can be decoded."""
    versions = [str(FORMAT), PIL.__version__]
    with suppress(metadata.PackageNotFoundError):
        versions.append(metadata.version("pillow-heif"))
    return " ".join(versions)


def _pack(key: bytes, found: tuple[str, int]) -> bytes:
    digest, pixels = bytes.fromhex(found[0]), found[1]
    return _VALUE.pack(digest, pixels, _sum(key, digest, pixels))


def _unpack(key: bytes, value: bytes) -> tuple[str, int] | None:
    """Return what a row says; None where it is not what was written."""
    try:
        digest, pixels, check = _VALUE.unpack(value)
    except (struct.error, TypeError):
        return None
    return (digest.hex(), pixels) if check == _sum(key, digest, pixels) else None


def _sum(key: bytes, digest: bytes, pixels: int) -> bytes:
    return hashlib.blake2b(b"%b %b %d" % (key, digest, pixels), digest_size=8).digest()
