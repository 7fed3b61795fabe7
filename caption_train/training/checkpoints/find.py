"""`last` and `best`: names in an output folder that stand for one of its checkpoints."""

import errno
import math
import os
from pathlib import Path
from typing import Any

from caption_train.errors import CaptionTrainError
from caption_train.system.files import find_free_name, hash_file, read_json_object, write_atomically
from caption_train.training.checkpoints.progress import PROGRESS_FILE

MANIFEST = "manifest.json"
STATE = "state"

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


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoints in `output_dir`, whole or damaged, of any run: the last saved first."""
    if not output_dir.is_dir():
        return []
    found = [p for p in output_dir.iterdir() if not p.is_symlink() and not p.name.startswith(PARTIAL)]
    return sorted(filter(is_checkpoint, found), key=lambda p: (_place(p), p.name), reverse=True)


def is_checkpoint(folder: Path) -> bool:
    """Tell whether a folder is a checkpoint, damaged perhaps: state or manifest may be lost, not both."""
    try:
        return (folder / STATE).is_dir() or (folder / MANIFEST).is_file()
    except PermissionError:
        return folder.is_dir()


def find_damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, by file, or None when every file is as it was written."""
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
    """Return the newest whole checkpoint, or None, and a line for every damaged one passed over."""
    passed, found = [], list_checkpoints(output_dir)
    last = follow(output_dir / LAST)
    if os.path.lexists(output_dir / LAST) and last.name not in {path.name for path in found}:
        passed.append(f"{output_dir / LAST}: leads to {last.name}, which is no checkpoint; passed over")
    for checkpoint in found:
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint, passed
        passed.append(f"{checkpoint}: {damage}; passed over")
    return None, passed


def describe_latest(output_dir: Path) -> str:
    """Say which checkpoint can be gone back to."""
    checkpoint, _ = find_latest(output_dir)
    return f"the last good checkpoint is {checkpoint}" if checkpoint else "nothing was saved yet"


def find_step(output_dir: Path, run_id: str, step: int) -> Path | None:
    """Return the whole checkpoint that a run saved last at a step, or None."""
    found = [
        p for p in checkpoints_of_run(output_dir, run_id) if _read_progress(p).get("global_step") == step
    ]
    return next((path for path in found if find_damage(path) is None), None)


def count_saves(output_dir: Path) -> int:
    """Return how many checkpoints were saved in a folder, by those that are there and can be read."""
    places = map(_place, list_checkpoints(output_dir))
    return int(max((place for place in places if math.isfinite(place)), default=0))


def checkpoints_of_run(output_dir: Path, run_id: str) -> list[Path]:
    return [p for p in list_checkpoints(output_dir) if _read_progress(p).get("run_id") == run_id]


def _place(checkpoint: Path) -> float:
    """Return which one of the saves in its folder a checkpoint was."""
    try:
        return int(_read_progress(checkpoint)["saves"])
    except (ValueError, KeyError, TypeError, OverflowError):
        # First in any list, so that it is looked at, found damaged, and named.
        return math.inf


def _read_progress(checkpoint: Path) -> dict[str, Any]:
    try:
        return read_json_object(checkpoint / STATE / PROGRESS_FILE)
    except (OSError, CaptionTrainError):
        return {}
