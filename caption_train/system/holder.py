"""Who holds a lock file, and whether that process lives. Standard library only, but for psutil."""

import os
import socket
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from caption_train.system.files import fcntl, open_own, parse_json

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
