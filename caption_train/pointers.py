"""`last` and `best`: names in an output folder that stand for one of its checkpoints."""

import errno
from pathlib import Path

from caption_train.files import find_free_name, write_atomically

LAST, BEST = "last", "best"
PARTIAL = ".partial-"
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What file systems without symbolic links answer: FAT, some network and cloud drives."""


def point(output_dir: Path, pointer: str, checkpoint: Path) -> None:
    """Make `output_dir/pointer` a link to a checkpoint beside it, or, where none can be, a file naming it."""
    temporary = output_dir / f"{PARTIAL}{pointer}"
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(checkpoint.name, target_is_directory=True)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        write_atomically(temporary, checkpoint.name)
    target = output_dir / pointer
    if target.is_dir() and not target.is_symlink():
        # A copy that followed links has left a checkpoint of this name.
        target.rename(find_free_name(target))
    temporary.replace(target)


def follow(path: Path) -> Path:
    """Return the folder that `path` is or points at, resolved; the path itself where it points at none."""
    try:
        if path.is_file() and path.stat().st_size < 1000:
            path = path.with_name(path.read_text(encoding="utf-8"))
        return path.resolve()
    # RuntimeError: links that lead round in a loop.
    except (OSError, ValueError, RuntimeError):
        return path
