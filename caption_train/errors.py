"""The two ways a command ends badly. Each message is one line that names the flag or file and what to do."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class CaptionTrainError(Exception):
    """The command could not do its work (exit code 1)."""

    exit_code = 1


class UsageError(CaptionTrainError):
    """The command was asked for something it cannot do: a flag, a path or a combination (exit code 2)."""

    exit_code = 2


@contextmanager
def naming_model(flag: str) -> Iterator[None]:
    """Call the model by the flag it has here; families name the training scripts', --model_id."""
    try:
        yield
    except CaptionTrainError as error:
        raise type(error)(str(error).replace("--model_id", flag, 1)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Tell a want of memory from other errors; torch's CPU allocator has no exception type of its own."""
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
    # oneDNN, which says no more than that when its scratch memory cannot be had.
    *("could not create a primitive", "could not create a memory"),
)
"""What torch's allocators, oneDNN, cuBLAS, cuDNN and the system say."""
