"""One run at a time in an output folder."""

import json
import os
import socket
from contextlib import suppress
from pathlib import Path

from caption_train.errors import CaptionTrainError

try:
    import fcntl
except ImportError:  # Windows has no such locks, and goes without
    fcntl = None

LOCK_FILE = ".lock"


class OutputLock:
    """A lock file with the holder's process id and host, held through the system's record lock.

    The system drops the record lock with its process, however that ends, and forked workers do not inherit
    it: a file that nobody holds is stale, unless it was written on another host, which may share the folder
    but not its locks.
    """

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / LOCK_FILE
        self.file = None
        self.made_folder = False

    def acquire(self) -> str | None:
        """Make the folder, take the lock; return a line about a stale one taken over, or None.

        Raises CaptionTrainError naming the run that holds it.
        """
        self.made_folder = not self.path.parent.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            return None
        while self.file is None:
            file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+", encoding="utf-8")
            if not _lock(file):
                raise CaptionTrainError(self._refusal(_read(file)))
            # Its last holder may have deleted it between the opening and the locking.
            if self.path.exists() and os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                self.file = file
        holder, host = _read(self.file), socket.gethostname()
        if holder.get("host", host) != host:
            raise CaptionTrainError(self._refusal(holder))
        self.file.seek(0)
        self.file.truncate()
        json.dump({"pid": os.getpid(), "host": host}, self.file)
        self.file.flush()
        return f"{self.path}: left behind by process {holder['pid']}; taken over" if holder else None

    def release(self) -> None:
        """Let the next run in."""
        if self.file is not None:
            self.path.unlink(missing_ok=True)
            self.file.close()
            self.file = None

    def abandon(self) -> None:
        """Leave nothing behind of a run that did not start: no lock, and no empty folder that it made."""
        self.release()
        if self.made_folder:
            with suppress(OSError):
                self.path.parent.rmdir()

    def _refusal(self, holder: dict) -> str:
        who = f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'an unknown host')}"
        return (
            f"--output_dir {self.path.parent}: another run, {who}, is writing there; choose another folder "
            f"(or delete {self.path} if that run is gone)"
        )


def _lock(file) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        # A file system without locks: the file's words are all there is to go by.
        return True
    return True


def _read(file) -> dict:
    file.seek(0)
    try:
        found = json.loads(file.read())
    except ValueError:
        return {}
    return found if isinstance(found, dict) and "pid" in found else {}
