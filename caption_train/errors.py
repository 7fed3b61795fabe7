"""Defines the two errors that end a command. Each message is one line: the flag or file, and a remedy."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager


class CaptionTrainError(Exception):
    """The command could not finish (exit code 1)."""

    exit_code = 1


class UsageError(CaptionTrainError):
    """The command was asked for something impossible: a flag, a path or their combination (exit code 2)."""

    exit_code = 2


class ProcessError(CaptionTrainError):
    """One of several processes could not finish, and the others do not know: it reports this itself."""


@contextmanager
def naming_model(flag: str) -> Iterator[None]:
    """Change `--model_id` in messages to the flag that this command has for the model.

    Families name the model by the flag of the training scripts.
    """
    try:
        yield
    except CaptionTrainError as error:
        raise type(error)(str(error).replace("--model_id", flag, 1)) from error


def find_os_error(error: BaseException) -> OSError | None:
    """Return the system's error inside an error of torch or safetensors; each wraps it differently."""
    if isinstance(error, OSError):
        return error
    if number := re.search(r"os error (\d+)", str(error)):
        return OSError(int(number[1]), os.strerror(int(number[1])))
    return find_os_error(error.__context__) if error.__context__ else None


def is_dead_worker(error: BaseException) -> bool:
    """Tell whether an error says that a process that reads images died; torch raises it at any line."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means out of memory; torch's CPU allocator has no exception type of its own."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(
        word in str(error).lower() for word in _OUT_OF_MEMORY_WORDS
    )


_OUT_OF_MEMORY_WORDS = (
    *("can't allocate memory", "cannot allocate memory", "out of memory", "not enough memory"),
    *("unable to mmap", "unable to allocate", "std::bad_alloc", "alloc_failed"),
    # These are oneDNN's only words if it cannot allocate its working memory.
    *("could not create a primitive", "could not create a memory"),
)
"""Parts of the messages of torch's allocators, oneDNN, cuBLAS, cuDNN and the system."""
