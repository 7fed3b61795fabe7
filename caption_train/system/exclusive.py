"""Publishes files where somebody else may write at the same time, and never destroys what they wrote.

Standard library only. A check before a rename is not enough: a file may come in between. So a file is
published by a link or a rename that fails where the name exists, and replaced by an exchange of two names,
after which what was replaced can still be looked at and put back.
"""

import ctypes
import errno
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

from caption_train.system.files import fcntl, finish_temporary, mode_of, open_temporary

NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EMLINK)
"""What file systems without hard links answer: FAT, some network and cloud drives."""
_NOT_OFFERED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV, errno.EPERM)
_NO_REPLACE, _EXCHANGE = 1, 2


@dataclass(frozen=True)
class Signature:
    """What tells one state of a file from the next: whoever writes it changes one of these."""

    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> "Signature | None":
        """Return the signature of what stands at `path`, None where nothing does; no link is followed."""
        try:
            status = path.lstat()
        except FileNotFoundError:
            return None
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)


Content = bytes | Callable[[IO[bytes]], object]
"""What a file is to hold, or what writes it: a file may be larger than memory."""


def create_atomically(path: Path, content: Content) -> bool:
    """Write a file where there is none of that name, all of it or nothing.

    Returns:
        False, and nothing is changed, where the name exists, be it a link to nothing; whenever it came.
    """
    with open_temporary(path) as (file, temporary):
        _fill(file, content)
        finish_temporary(file, temporary, mode_of(path))
        try:
            move_to_free_name(temporary, path, content)
        except FileExistsError:
            return False
    return True


def replace_unchanged(path: Path, content: Content, was: Signature) -> bool:
    """Replace a file that is still what it was; False, and nothing is changed, where somebody has written it.

    A file that is gone is written anew.

    Args:
        path: the file; a link is not followed.
        content: the new bytes.
        was: what `Signature.of` said when it was decided to replace the file.
    """
    with open_temporary(path) as (file, temporary):
        _fill(file, content)
        finish_temporary(file, temporary, mode_of(path))
        if Signature.of(path) not in (was, None):
            return False
        try:
            if not _rename(temporary, path, _EXCHANGE):
                temporary.replace(path)
                return True
        except FileNotFoundError:
            return create_atomically(path, content)
        # Now the temporary name holds what was replaced: somebody may have written it at the last moment.
        if Signature.of(temporary) == was:
            return True
        _put_back(temporary, path, content)
    return False


def remove_unchanged(path: Path, was: Signature) -> bool:
    """Delete a file that is still what it was; False, and it stays, where somebody has written it.

    Args:
        path: the file; a link is not followed. One that is gone already counts as deleted.
        was: what `Signature.of` said when it was decided to delete the file.
    """
    with open_temporary(path) as (_, temporary):
        if Signature.of(path) not in (was, None):
            return False
        try:
            path.replace(temporary)
        except FileNotFoundError:
            return True
        # Moved away first: what somebody wrote at the last moment can be looked at, and put back.
        if Signature.of(temporary) == was:
            return True
        move_to_free_name(temporary, path, temporary.read_bytes())
    return False


def _fill(file: IO[bytes], content: Content) -> None:
    if isinstance(content, bytes):
        file.write(content)
    else:
        content(file)


def _put_back(temporary: Path, path: Path, content: Content) -> None:
    try:
        _rename(temporary, path, _EXCHANGE)
    except FileNotFoundError:
        move_to_free_name(temporary, path, content)


def move_to_free_name(temporary: Path, path: Path, content: Content) -> None:
    """Give a finished file its name; FileExistsError where there is one of that name."""
    if fcntl is None:
        temporary.rename(path)  # which fails on Windows where the name exists
        return
    try:
        path.hardlink_to(temporary)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if _rename(temporary, path, _NO_REPLACE):
            return
        if isinstance(content, bytes):
            _create_in_place(path, content, mode_of(path))
        else:
            # Too large for one call: the name is taken first, and a kill between the two leaves it empty.
            _create_in_place(path, b"", mode_of(path))
            temporary.replace(path)


def _create_in_place(path: Path, content: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        # In one call: a kill then leaves the whole or, between the calls, an empty file.
        if os.write(descriptor, content) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(descriptor)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _rename(source: Path, target: Path, flags: int) -> bool:
    """Rename without replacing, or exchange two names; False where the system or file system cannot."""
    call = _find_renameat2()
    if call is None:
        return False
    number = call(os.fsencode(source), os.fsencode(target), flags)
    if number in _NOT_OFFERED:
        return False
    if number:
        raise OSError(number, os.strerror(number), str(source), None, str(target))
    return True


_NUMBERS = {"x86_64": 316, "aarch64": 276, "riscv64": 276, "loongarch64": 276, "ppc64le": 357, "s390x": 347}
"""Of the system call renameat2, which older C libraries have no function for."""


@cache
def _find_renameat2() -> Callable[[bytes, bytes, int], int] | None:
    """Return a function that returns 0 or an error's number; None outside of Linux."""
    number = _NUMBERS.get(platform.machine())
    if sys.platform != "linux" or number is None:
        return None
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long
    current_folder = ctypes.c_int(-100)

    def rename(source: bytes, target: bytes, flags: int) -> int:
        done = syscall(
            ctypes.c_long(number),
            current_folder,
            ctypes.c_char_p(source),
            current_folder,
            ctypes.c_char_p(target),
            ctypes.c_uint(flags),
        )
        return ctypes.get_errno() if done else 0

    return rename
