"""Lets only one run at a time write to an output folder or an output file."""

import json
import os
import socket
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

from caption_train.errors import CaptionTrainError
from caption_train.system.files import parse_json

try:
    import fcntl
except ImportError:  # Windows has no such locks, so nothing is locked there
    fcntl = None

LOCK_FILE = ".lock"


BEAT_SECONDS = 20.0
SILENCE_SECONDS = 120.0
"""A holder touches its file every BEAT_SECONDS. On another host, a file this old counts as stale."""


class OutputLock:
    """A lock file with the holder's process id and host, and the system's record lock on it.

    The system releases the record lock when its process ends in any way, and forked workers do not inherit
    it. So a file without a record lock is stale. Another host may share the folder but not the record locks,
    for example when a preempted job is restarted there. For such a host, the file's age decides.

    Args:
        output_dir: the folder of the lock file.
        name: the name of the lock file.
        output: the flag and value to name in messages.
    """

    def __init__(self, output_dir: Path, name: str = LOCK_FILE, output: str | None = None) -> None:
        self.path = output_dir / name
        self.output = output or f"--output_dir {output_dir}"
        self.file = None
        self.made_folder = False
        self.released = Event()

    def acquire(self) -> str | None:
        """Make the folder and take the lock.

        Returns:
            A line about a stale lock that was taken over, or None.

        Raises:
            CaptionTrainError: another run holds the lock; names it.
        """
        self.made_folder = not self.path.parent.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            return None
        while self.file is None:
            file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
            locked = _lock(file)
            if locked is False:
                raise CaptionTrainError(self._refusal(_read_soon(file)))
            # The last holder may have deleted the file after it was opened here and before it was locked.
            if self.path.exists() and os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                self.file = file
        holder = _read(self.file)
        if self._is_alive(holder, locked):
            self.file.close()
            self.file = None
            raise CaptionTrainError(self._refusal(holder))
        self._sign()
        return f"{self.path}: left behind by {_name(holder)}; taken over" if holder else None

    def release(self) -> None:
        """Release the lock, so that another run can take it."""
        if self.file is not None:
            self.released.set()
            self.path.unlink(missing_ok=True)
            self.file.close()
            self.file = None

    def _is_alive(self, holder: dict, locked: bool | None) -> bool:
        if holder.get("host", socket.gethostname()) != socket.gethostname():
            return self._silence() < SILENCE_SECONDS
        # Without record locks, check whether the process in the file is running.
        return bool(holder) and locked is None and _is_running(holder["pid"])

    def _silence(self) -> float:
        """Return how many seconds ago the lock file was last touched, by the clock of the file system."""
        with tempfile.NamedTemporaryFile(dir=self.path.parent, prefix=LOCK_FILE) as now:
            return os.fstat(now.fileno()).st_mtime - os.fstat(self.file.fileno()).st_mtime

    def _sign(self) -> None:
        words = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
        try:
            self.file.truncate(0)
            self.file.seek(0)
            self.file.write(words)
        except OSError:
            self.release()
            raise
        Thread(target=self._beat, args=(self.file.fileno(),), daemon=True).start()

    def _beat(self, descriptor: int) -> None:
        while not self.released.wait(BEAT_SECONDS):
            with suppress(OSError):
                os.utime(descriptor)

    def abandon(self) -> None:
        """Undo `acquire` for a run that did not start: remove the lock, and the folder if this made it."""
        self.release()
        if self.made_folder:
            with suppress(OSError):
                self.path.parent.rmdir()

    def _refusal(self, holder: dict) -> str:
        return (
            f"{self.output}: another run, {_name(holder)}, is writing there; choose "
            f"another {'folder' if self.path.name == LOCK_FILE else 'file'} (or delete {self.path} if that "
            "run is gone)"
        )


def _name(holder: dict) -> str:
    return f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'an unknown host')}"


def _lock(file) -> bool | None:
    """Return whether the record lock was taken; None on a file system without record locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def _is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return process_id != os.getpid()


def _read_soon(file) -> dict:
    """Return what the lock file says; wait a moment if its new holder has not written it yet."""
    for _ in range(20):
        if holder := _read(file):
            return holder
        time.sleep(0.05)
    return {}


def _read(file) -> dict:
    file.seek(0)
    try:
        found = parse_json(file.read())
    except ValueError:
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("pid"), int) else {}
