"""Finds the checkpoints in an output folder and checks them; follows the names `last` and `best`."""

import errno
import math
import os
from pathlib import Path
from typing import Any

from caption_train.errors import CaptionTrainError
from caption_train.system.files import (
    find_free_name,
    follow_pointer,
    hash_file,
    read_json_object,
    write_atomically,
)
from caption_train.training.checkpoints.progress import PROGRESS_FILE

MANIFEST = "manifest.json"
STATE = "state"

LAST, BEST = "last", "best"
PARTIAL = ".partial-"
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""Errors of file systems that have no symbolic links: FAT, some network and cloud drives."""


def point(output_dir: Path, pointer: str, checkpoint: Path) -> None:
    """Make `output_dir/pointer` a link to a checkpoint beside it or, without links, a file that names it."""
    temporary = output_dir / f"{PARTIAL}{pointer}"
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(checkpoint.name, target_is_directory=True)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        write_atomically(temporary, checkpoint.name)
    _keep_real_folder(output_dir / pointer)
    temporary.replace(output_dir / pointer)


def forget(output_dir: Path, pointer: str) -> None:
    """Remove `output_dir/pointer`, which an earlier run has left; not what it points to."""
    _keep_real_folder(output_dir / pointer)
    (output_dir / pointer).unlink(missing_ok=True)


def _keep_real_folder(pointer: Path) -> None:
    # A copy of the output folder that followed links has made a real checkpoint of this name.
    if pointer.is_dir() and not pointer.is_symlink():
        pointer.rename(find_free_name(pointer))


def find_last_run(output_dir: Path) -> str | None:
    """Return the id of the run that `last` points to a checkpoint of, or None."""
    run_id = _read_progress(follow_pointer(output_dir / LAST)).get("run_id")
    return run_id if isinstance(run_id, str) else None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoints in `output_dir` of all runs, complete or damaged, newest first."""
    if not output_dir.is_dir():
        return []
    found = [p for p in output_dir.iterdir() if not p.is_symlink() and not p.name.startswith(PARTIAL)]
    return sorted(filter(is_checkpoint, found), key=lambda p: (_place(p), p.name), reverse=True)


def is_checkpoint(folder: Path) -> bool:
    """Tell whether a folder is a checkpoint. A damaged one may lack state or manifest, but not both."""
    try:
        return (folder / STATE).is_dir() or (folder / MANIFEST).is_file()
    except PermissionError:
        return folder.is_dir()


def find_damage(checkpoint: Path) -> str | None:
    """Return which file of a checkpoint is damaged or missing, or None if every file is as it was written."""
    try:
        sums = read_json_object(checkpoint / MANIFEST)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, CaptionTrainError):
        return f"{MANIFEST} cannot be read"
    if f"{STATE}/{PROGRESS_FILE}" not in sums:
        return f"{MANIFEST} is not as it was written"
    for name, wanted in sums.items():
        try:
            if hash_file(checkpoint / name) != wanted:
                return f"{name} is not as it was written"
        except (OSError, ValueError):
            return f"{name} is missing or cannot be read"
    return None


def find_latest(output_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the newest undamaged checkpoint, or None, and one line per damaged checkpoint that is newer."""
    passed, found = [], list_checkpoints(output_dir)
    last = follow_pointer(output_dir / LAST)
    if os.path.lexists(output_dir / LAST) and last.name not in {path.name for path in found}:
        passed.append(f"{output_dir / LAST}: leads to {last.name}, which is no checkpoint; passed over")
    for checkpoint in found:
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint, passed
        passed.append(f"{checkpoint}: {damage}; passed over")
    return None, passed


def describe_latest(output_dir: Path) -> str:
    """Return a phrase that names the last good checkpoint, for error messages."""
    checkpoint, _ = find_latest(output_dir)
    return f"the last good checkpoint is {checkpoint}" if checkpoint else "nothing was saved yet"


def find_step(output_dir: Path, run_id: str, step: int) -> Path | None:
    """Return the newest undamaged checkpoint that a run saved at a step, or None.

    Args:
        output_dir: the folder of the checkpoints.
        run_id: the run.
        step: optimizer steps taken.
    """
    found = [
        p for p in checkpoints_of_run(output_dir, run_id) if _read_progress(p).get("global_step") == step
    ]
    return next((path for path in found if find_damage(path) is None), None)


def count_saves(output_dir: Path) -> int:
    """Return how many checkpoints were ever saved in a folder, as the newest readable one records."""
    places = map(_place, list_checkpoints(output_dir))
    return int(max((place for place in places if math.isfinite(place)), default=0))


def checkpoints_of_run(output_dir: Path, run_id: str) -> list[Path]:
    """Return the checkpoints of one run, newest first."""
    return [p for p in list_checkpoints(output_dir) if _read_progress(p).get("run_id") == run_id]


def _place(checkpoint: Path) -> float:
    """Return the number of a checkpoint: the first one saved in its folder is 1."""
    try:
        return int(_read_progress(checkpoint)["saves"])
    except (ValueError, KeyError, TypeError, OverflowError):
        # A damaged checkpoint sorts first, so that it is looked at and reported.
        return math.inf


def _read_progress(checkpoint: Path) -> dict[str, Any]:
    try:
        return read_json_object(checkpoint / STATE / PROGRESS_FILE)
    except (OSError, CaptionTrainError):
        return {}
