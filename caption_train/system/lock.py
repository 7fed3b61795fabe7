"""Lets only one run at a time write to an output folder or an output file.

filelock's SoftFileLease was weighed and left: it never takes over from a holder that is dead but not reaped
(a container without an init), from an empty file (a power cut), nor on file systems without RENAME_EXCHANGE
(NFS). The system's own record lock knows all of these.
"""

import gc
import hashlib
import json
import os
import secrets
import socket
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from caption_train.errors import CaptionTrainError
from caption_train.system.console import print_line
from caption_train.system.exclusive import move_to_free_name
from caption_train.system.files import TEMPORARY, mode_of, open_own
from caption_train.system.holder import Holder, beats, fcntl, is_running, try_lock

LOCK_FILE = ".lock"

SILENCE_SECONDS = 45.0
"""A holder touches its file every BEAT_SECONDS. On another host, one that does not for this long is dead."""
GRACE_SECONDS = 1.0
"""How long a file may stand there that its maker has not signed or locked yet."""


class OutputLock:
    """A lock file with the holder's process id and host, and the system's record lock on it.

    The system releases the record lock when its process ends in any way, and forked workers do not inherit
    it. So a file without a record lock is stale. Another host may share the folder but not the record locks,
    for example when a preempted job is restarted there. For such a host, the file is watched: a holder that
    lives touches it.

    Args:
        output_dir: the folder of the lock file.
        name: the name of the lock file.
        output: the flag and value to name in messages.
        instead: what to do while another run is writing, in messages.
    """

    def __init__(
        self,
        output_dir: Path,
        name: str = LOCK_FILE,
        output: str | None = None,
        *,
        instead: str = "choose another folder",
    ) -> None:
        self.instead = instead
        self.path = output_dir / name
        self.output = output or f"--output_dir {output_dir}"
        self.made_folder = False
        self.descriptor: int | None = None
        self._process_id = 0

    def acquire(self) -> str | None:
        """Make the folder and take the lock. The lock of a run on another host is watched first.

        Returns:
            A line about a stale lock that was taken over, or None.

        Raises:
            CaptionTrainError: another run holds the lock and is named; or the file there is no lock.
            OSError: nothing can be written there.
        """
        self.made_folder = not self.path.parent.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(3):
            if not beats.hold(self.path):
                break
            # A run of this process that was dropped unfinished holds nothing.
            beats.let_go()
            gc.collect()
        else:
            raise CaptionTrainError(self._refusal(f"process {os.getpid()} on {socket.gethostname()}"))
        left, holder = None, None
        while not self._create(instead_of=holder):
            left, holder = None, self._read()
            if holder is not None and not self._is_dead(holder):
                holder = None
            elif holder is not None and holder.host:
                left = f"{self.path}: left behind by {holder}; taken over"
        self._process_id = os.getpid()
        beats.add(self)
        return left

    def release(self) -> None:
        """Let the next run in."""
        if self.descriptor is None or self._process_id != os.getpid():
            return
        beats.remove(self)
        descriptor, self.descriptor = self.descriptor, None
        # By its inode: opening the file once more would end the record lock before the file is gone.
        with suppress(OSError):
            is_ours = os.path.samestat(os.fstat(descriptor), self.path.lstat())
            if fcntl is None:
                os.close(descriptor)  # Windows deletes no open file.
            if is_ours:
                self.path.unlink()
        with suppress(OSError):
            os.close(descriptor)

    def abandon(self) -> None:
        """Leave nothing behind of a run that did not start: no lock, and no empty folder that it made."""
        self.release()
        if self.made_folder:
            with suppress(OSError):
                self.path.parent.rmdir()

    def touch(self) -> None:
        """Show other hosts that this run lives."""
        with suppress(OSError, TypeError):
            os.utime(self.descriptor if os.utime in os.supports_fd else self.path)

    def _create(self, instead_of: Holder | None = None) -> bool:
        """Make the lock file, signed and locked already when it gets its name.

        Args:
            instead_of: a dead holder whose file it replaces.

        Returns:
            False if there is a lock file, or another one than the dead holder's.
        """
        who = {"pid": os.getpid(), "host": socket.gethostname(), "token": secrets.token_hex(8)}
        content = json.dumps(who).encode()
        descriptor, name = tempfile.mkstemp(TEMPORARY, f".{self.path.name[:50]}.", self.path.parent)
        temporary = Path(name)
        try:
            os.write(descriptor, content)
            try_lock(descriptor, exclusive=True)
            temporary.chmod(mode_of(self.path))
            if fcntl is None:
                os.close(descriptor)  # Windows renames no open file.
                descriptor = -1
            if instead_of is None:
                move_to_free_name(temporary, self.path, content)
            elif not self._replace(instead_of, temporary):
                return False
            if descriptor < 0 or not os.path.samestat(os.fstat(descriptor), self.path.lstat()):
                # Without links, and renames that replace nothing, it is another file.
                descriptor = _close_and_open(descriptor, self.path)
                try_lock(descriptor, exclusive=True)
        except (FileExistsError, FileNotFoundError):
            return False
        else:
            self.descriptor, descriptor = descriptor, -1
            return True
        finally:
            temporary.unlink(missing_ok=True)
            if descriptor >= 0:
                os.close(descriptor)

    def _replace(self, holder: Holder, temporary: Path) -> bool:
        """Rename a new lock file over a dead holder's; False if another run has been faster.

        Of all who found this holder dead, one at a time may do so, under a name that follows from what the
        holder wrote: a file that is checked and then removed may be another run's by then.
        """
        digest = hashlib.sha256(holder.content).hexdigest()[:8]
        guard = self.path.with_name(f".{self.path.name[:50]}.{digest}{TEMPORARY}")
        try:
            descriptor = self._open_guard(guard, holder)
            if descriptor is None:
                return False
            try:
                now = self._read()
                if now is None or now.content != holder.content:
                    return False
                temporary.replace(self.path)
            finally:
                # Windows deletes no open file, and a guard that is closed first is unlocked.
                if fcntl is None:
                    os.close(descriptor)
                guard.unlink(missing_ok=True)
                if fcntl is not None:
                    os.close(descriptor)
        except OSError as error:
            raise self._explain(error, f"left behind by {holder}, and cannot be taken over") from error
        return True

    def _open_guard(self, guard: Path, holder: Holder) -> int | None:
        """Return the guard's descriptor, None where another run has it.

        That of a run that was killed holding it is locked, not removed: by the time that a file is removed
        by its name, it may be another run's.
        """
        try:
            descriptor = open_own(guard, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            is_new = True
        except FileExistsError:
            try:
                descriptor = open_own(guard, os.O_RDWR)
            except FileNotFoundError:
                return None
            is_new = False
        is_locked = try_lock(descriptor, exclusive=True)
        if is_locked is None and not is_new and self._stays(holder, GRACE_SECONDS):
            guard.unlink(missing_ok=True)  # There are no locks, and its run was probably killed just here.
        with suppress(FileNotFoundError):
            is_there = os.path.samestat(os.fstat(descriptor), guard.lstat())
            if is_there and (is_locked or (is_locked is None and is_new)):
                return descriptor
        os.close(descriptor)
        return None

    def _read(self) -> Holder | None:
        """Return what the lock file says now, None where there is none."""
        try:
            return Holder.read(self.path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._explain(error, "where the lock of one run at a time goes") from error

    def _explain(self, error: OSError, what: str) -> CaptionTrainError:
        reason = f"{self.path}: {error.strerror or error}, {what}"
        return CaptionTrainError(f"{self.output}: {reason}; delete it if no run is at work there")

    def _is_dead(self, holder: Holder) -> bool:
        """Tell whether nobody holds the lock any more; False where it changed and is to be read again.

        Raises:
            CaptionTrainError: its holder lives.
        """
        if holder.is_locked:
            raise CaptionTrainError(self._refusal(holder))
        if holder.host is None:
            return self._stays(holder, GRACE_SECONDS)
        if holder.host != socket.gethostname():
            return self._watch(holder)
        if holder.process_id == os.getpid() or not is_running(holder.process_id):
            return True
        if holder.is_locked is None:
            raise CaptionTrainError(self._refusal(holder))
        # Another process has its number by now, or it is just about to take the record lock.
        return self._stays(holder, GRACE_SECONDS)

    def _watch(self, holder: Holder) -> bool:
        print_line(f"{self.path}: of {holder}; watching for {SILENCE_SECONDS:.0f} s whether that run lives")
        if self._stays(holder, SILENCE_SECONDS):
            return True
        now = self._read()
        if now is not None and now.content == holder.content:
            raise CaptionTrainError(self._refusal(now))
        return False

    def _stays(self, holder: Holder, seconds: float) -> bool:
        """Tell whether a lock file stays as it is for a time, by this process's clock and no other."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1 if seconds <= GRACE_SECONDS else 1.0))
            if self._read() != holder:
                return False
        return True

    def _refusal(self, holder: Holder | str) -> str:
        return (
            f"{self.output}: another run, {holder}, is writing there; {self.instead} "
            f"(or delete {self.path} if that run is gone)"
        )


def _close_and_open(descriptor: int, path: Path) -> int:
    opened = open_own(path, os.O_RDWR)
    if descriptor >= 0:
        os.close(descriptor)
    return opened
