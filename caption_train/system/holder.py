"""Who holds a lock file, whether that process lives, and how it shows that. Needs psutil only."""

import os
import socket
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any
from weakref import WeakSet

from caption_train.system.files import fcntl, open_own, parse_json

BEAT_SECONDS = 10.0
_MOST_BYTES = 4096


@dataclass(frozen=True)
class Holder:
    """What a lock file says of who made it, and when it was last touched.

    content: all of it, which differs between any two runs. process_id, host: None for what is none of ours.
    is_locked: whether a process holds the record lock, None where the file system or the system has none.
    """

    content: bytes
    touched_ns: int
    is_locked: bool | None
    process_id: int | None = None
    host: str | None = None

    @classmethod
    def read(cls, path: Path) -> "Holder":
        """Read a lock file. Not this process's own: closing it again would end the record lock.

        Raises:
            OSError: there is none, it cannot be read, or is no regular file.
        """
        descriptor = open_own(path)
        try:
            locked = try_lock(descriptor, exclusive=False)
            content = os.read(descriptor, _MOST_BYTES)
            touched = os.fstat(descriptor).st_mtime_ns
        finally:
            os.close(descriptor)
        holder = cls(content, touched, None if locked is None else not locked)
        with suppress(ValueError):
            found = parse_json(content)
            # True is a whole number to Python.
            if isinstance(found, dict) and type(found.get("pid")) is int:
                return replace(holder, process_id=found["pid"], host=str(found.get("host") or "") or None)
        return holder

    def is_surely_dead(self) -> bool:
        """Tell whether this host alone knows that the holder has ended, without watching the file."""
        if self.is_locked or self.host != socket.gethostname():
            return False
        return self.is_locked is False or not is_running(self.process_id)

    def __str__(self) -> str:
        return f"process {self.process_id or 'unknown'} on {self.host or 'an unknown host'}"


def try_lock(descriptor: int, *, exclusive: bool) -> bool | None:
    """Return whether the record lock was taken, None on a file system or system that has none."""
    if fcntl is None:  # Windows, where the holder's process is asked for
        return None
    try:
        fcntl.lockf(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def is_running(process_id: int) -> bool:
    import psutil

    try:
        return psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return False
    except psutil.Error:
        return True


class Beats:
    """The locks that this process holds, and one thread that touches their files."""

    def __init__(self) -> None:
        self._locks: WeakSet[Any] = WeakSet()
        self._process_id = os.getpid()
        self._guard, self._wake = Lock(), Event()
        self._thread: Thread | None = None

    def hold(self, path: Path) -> bool:
        """Tell whether this process holds the lock at a path, which the system would not refuse it."""
        self._forget_parent()
        with suppress(OSError):
            there = path.lstat()
            return any(os.path.samestat(os.fstat(lock.descriptor), there) for lock in list(self._locks))
        return False

    def let_go(self) -> None:
        """Wait until the thread, which holds every lock while it touches them, has let go of them."""
        self._forget_parent()
        with self._guard:
            pass

    def add(self, lock: Any) -> None:
        self._forget_parent()
        with self._guard:
            self._locks.add(lock)
            self._wake.set()
            if self._thread is None:
                self._thread = Thread(target=self._run, name="locks", daemon=True)
                self._thread.start()

    def remove(self, lock: Any) -> None:
        with self._guard:
            self._locks.discard(lock)
            self._wake.set()

    def _forget_parent(self) -> None:
        if self._process_id != os.getpid():
            self.__init__()

    def _touch_all(self) -> None:
        # A method of its own, whose variables end with it: this thread keeps no lock alive while it waits.
        for lock in list(self._locks):
            lock.touch()

    def _run(self) -> None:
        while True:
            self._wake.wait(BEAT_SECONDS)
            self._wake.clear()
            with self._guard:
                self._touch_all()
                if not self._locks:
                    self._thread = None
                    return


beats = Beats()
