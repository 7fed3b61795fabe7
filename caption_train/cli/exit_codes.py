"""Turns exceptions into one line on stderr and an exit code."""

import errno
import io
import os
import sys
import traceback
from collections.abc import Callable

from caption_train.errors import CaptionTrainError, find_os_error, is_out_of_memory
from caption_train.system.console import quiet_libraries
from caption_train.system.launcher import program_name
from caption_train.system.processes import end_at_once, is_one_of_several

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
PLACE_ERRORS = (
    *(errno.EACCES, errno.EPERM, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.ENOTEMPTY, errno.EBUSY, errno.EMFILE, errno.ENFILE, errno.ESTALE),
)
"""Errors of the disk, and of what stands there, for files whose errors are not explained elsewhere."""


def run(work: Callable[[], int], advise: Callable[[], str] = str) -> int:
    """Do the work, return its exit code; errors that a user can cause become one line, never a traceback.

    Args:
        work: what to do; returns the exit code.
        advise: returns which flags of this command need less memory, for when there is too little.
    """
    if not is_one_of_several():
        return _run(work, advise)
    try:
        code = _run(work, advise)
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        traceback.print_exc()
        code = 1
    end_at_once(code)


def _run(work: Callable[[], int], advise: Callable[[], str]) -> int:
    quiet_libraries()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Captions may contain characters that the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = _explain(work, advise)
    except BaseException:
        _flush()
        raise
    return code if _flush() else code or 1


def _flush() -> bool:
    """Write what was printed, while errors can still be dealt with; False if nobody reads it any more.

    Output to come goes to /dev/null then, or Python would raise when it ends.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
        return True
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False


def _explain(work: Callable[[], int], advise: Callable[[], str]) -> int:
    try:
        return work()
    except CaptionTrainError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # The program that read our output has ended.
        return 1
    except Exception as error:
        if is_out_of_memory(error):
            reason = next(iter(str(error).splitlines()), "")
            return _fail(f"out of memory: {reason} {advise()}".strip(), 1)
        # safetensors has the system's errors in its own.
        is_systems = isinstance(error, OSError) or type(error).__name__ == "SafetensorError"
        cause = find_os_error(error) if is_systems else None
        if cause is None or cause.errno not in DISK_ERRORS + PLACE_ERRORS:
            raise
        kind = "written" if cause.errno in DISK_ERRORS else "used"
        return _fail(f"{cause.filename or 'a file'}: cannot be {kind}: {cause.strerror}", 1)


def advise_savers() -> str:
    """Return which flags let a training run need less memory."""
    from caption_train.training.memory.savers import SAVERS

    *flags, last = [saver.flags for saver in SAVERS if saver.advised]
    return (
        "Use less with --batch_size 1 (and --gradient_accumulation_steps to make up for it), "
        f"{', '.join(flags)} or {last}."
    )


def _fail(message: str, exit_code: int) -> int:
    # Errors of all processes are printed by rank 0 only, so another rank's line is about that rank.
    rank = os.environ.get("RANK", "0")
    speaker = program_name() if rank == "0" else f"{program_name()}: process {rank}"
    for line in message.splitlines():
        print(f"{speaker}: {line}", file=sys.stderr)
    return exit_code
