"""Guards the reading of files that anybody may have written: whatever is wrong with one is a line."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from caption_train.errors import CaptionTrainError, is_dead_worker, is_out_of_memory
from caption_train.system.console import escape_unprintable
from caption_train.system.files import MAX_BYTES, parse_json, read_regular_file

READ_WHOLE = (".json", ".txt", ".jinja", ".model")
MODEL_FILES = (*READ_WHOLE, ".safetensors", ".bin", ".pt")
"""Suffixes of the files that libraries read in the folder of a model or an adapter."""


@contextmanager
def explaining_damage(what: str, describe: Callable[[BaseException], str] | None = None) -> Iterator[None]:
    """Turn whatever a library raises about a file's content into one CaptionTrainError.

    Libraries raise errors of all types for damaged files, KeyError and AttributeError too. So only calls that
    load something belong into the `with` block: an error in our own code would look like damage as well. It
    stays the cause of the new error.

    Args:
        what: what the message begins with: the flag and the file.
        describe: returns the words for an error, instead of `describe_error`.
    """
    try:
        yield
    except CaptionTrainError:
        raise
    except BaseException as error:
        # The tokenizers library panics on some files, which is no Exception.
        is_damage = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if not is_damage or is_out_of_memory(error) or is_dead_worker(error):
            raise
        raise CaptionTrainError(f"{what}: {(describe or describe_error)(error)}") from error


def describe_error(error: BaseException) -> str:
    """Return the first line of a library's error, with the error's type where the words alone say nothing."""
    line = next((line for line in str(error).splitlines() if line.strip()), "").strip()
    shown = escape_unprintable(line)[:300]
    if (
        not shown
        or not isinstance(error, OSError | ValueError | RuntimeError)
        or isinstance(error, UnicodeError)
    ):
        return f"{type(error).__name__} {shown}".strip()
    return shown


def find_damage(folder: Path | str) -> str | None:
    """Return which file in the folder of a model is cut or damaged, and how; None if none seems to be.

    It is meant for after an error: libraries often say what is wrong, but not in which file.
    """
    try:
        paths = sorted(Path(folder).iterdir())
    except OSError:
        return None
    for path in paths:
        try:
            if path.suffix == ".json":
                parse_json(read_regular_file(path))
            elif path.suffix == ".safetensors":
                _check_length(path)
        except (OSError, ValueError) as error:
            return f"{escape_unprintable(path.name)}: {getattr(error, 'strerror', None) or error}"
    return None


def _check_length(path: Path) -> None:
    """Raise ValueError unless a safetensors file is as long as the table at its start says."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = int.from_bytes(file.read(8), "little")
        if size < 8 or head > min(size - 8, MAX_BYTES):
            raise ValueError("damaged, or cut within its table of contents: copy or download it anew")
        table = parse_json(file.read(head))
    tensors = table.values() if isinstance(table, dict) else ()
    places = [entry.get("data_offsets") for entry in tensors if isinstance(entry, dict)]
    ends = [place[1] for place in places if isinstance(place, list) and len(place) == 2]
    wanted = 8 + head + max((end for end in ends if isinstance(end, int)), default=0)
    if size < wanted:
        raise ValueError(f"cut after {size:,} of {wanted:,} bytes: copy or download it anew")


def refuse_odd_files(folder: Path | str, what: str) -> None:
    """Raise CaptionTrainError if something in the folder of a model could be waited for or read for ever.

    Args:
        folder: the folder; what does not exist is passed over.
        what: what the message begins with: the flag and the folder.
    """
    try:
        paths = [path for path in sorted(Path(folder).iterdir()) if path.suffix in MODEL_FILES]
    except OSError:
        return
    for path in paths:
        name = escape_unprintable(path.name)
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise CaptionTrainError(f"{what}: {name} cannot be read: {error.strerror}") from error
        if not stat.S_ISREG(status.st_mode):
            raise CaptionTrainError(f"{what}: {name} is not a regular file")
        if path.suffix in READ_WHOLE and status.st_size > MAX_BYTES:
            raise CaptionTrainError(
                f"{what}: {name} has {status.st_size / 1e6:,.0f} MB, too much for such a file"
            )
