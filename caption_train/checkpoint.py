"""Checkpoints that are whole or not there: written beside their place, synced, renamed; damage is found."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from caption_train.errors import CaptionTrainError
from caption_train.files import hash_file, write_atomically

MANIFEST = "manifest.json"
STATE = "state"
PARTIAL = ".partial-"


def write_checkpoint(output_dir: Path, name: str, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a temporary folder, then sync it and rename it to `output_dir/name`; return that.

    A manifest of SHA-256 sums tells a damaged one later. Raises CaptionTrainError naming the last good
    checkpoint when the disk is full or may not be written.
    """
    partial = output_dir / f"{PARTIAL}{name}"
    final = output_dir / name
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        _write_manifest(partial)
        sync_folder(partial)
        _replace_folder(partial, final)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CaptionTrainError(_explain(output_dir, name, error)) from error
    return final


def publish(checkpoint: Path, output_dir: Path) -> None:
    """Copy a checkpoint's files (not its training state) to `output_dir`, each one atomically."""
    try:
        for file in sorted(checkpoint.iterdir()):
            if file.is_file() and file.name != MANIFEST:
                write_atomically(output_dir / file.name, file.read_bytes())
    except OSError as error:
        raise CaptionTrainError(_explain(output_dir, "the finished LoRA", error)) from error


def point(output_dir: Path, pointer: str, checkpoint: Path) -> None:
    """Make `output_dir/pointer` ("last", "best") a link to a checkpoint beside it."""
    temporary = output_dir / f"{PARTIAL}{pointer}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(checkpoint.name, target_is_directory=True)
    temporary.replace(output_dir / pointer)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoints in `output_dir`, whole or damaged, the one with the most steps first."""
    if not output_dir.is_dir():
        return []
    found = [p for p in output_dir.iterdir() if not p.is_symlink() and not p.name.startswith(PARTIAL)]
    found = [p for p in found if (p / STATE).is_dir()]
    return sorted(found, key=lambda p: (_steps(p), p.name), reverse=True)


def find_damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, by file, or None when every file is as it was written."""
    try:
        sums = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError):
        return f"{MANIFEST} cannot be read"
    for name, wanted in sums.items():
        try:
            if hash_file(checkpoint / name) != wanted:
                return f"{name} is not as it was written"
        except OSError:
            return f"{name} is missing or cannot be read"
    return None


def find_latest(output_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint, or None, and a line for every damaged one passed over."""
    passed = []
    for checkpoint in list_checkpoints(output_dir):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint, passed
        passed.append(f"{checkpoint}: {damage}; passed over")
    return None, passed


def prune(output_dir: Path, keep: int, protected: Collection[Path] = ()) -> None:
    """Delete all but the `keep` newest checkpoints; never one in `protected`, nor what is no checkpoint."""
    for old in list_checkpoints(output_dir)[keep:]:
        if old not in protected:
            shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Flush every file below `folder`, and the folders themselves, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_manifest(folder: Path) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    sums = {p.relative_to(folder).as_posix(): hash_file(p) for p in files}
    write_atomically(folder / MANIFEST, json.dumps(sums, indent=1) + "\n")


def _replace_folder(source: Path, target: Path) -> None:
    """Rename `source` to `target`. A folder in the way is renamed aside first: a rename cannot replace it."""
    aside = target.with_name(f"{PARTIAL}old-{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        target.rename(aside)
    source.rename(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    shutil.rmtree(aside, ignore_errors=True)


def _steps(checkpoint: Path) -> int:
    try:
        return int(json.loads((checkpoint / STATE / "progress.json").read_text())["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


def _explain(output_dir: Path, name: str, error: OSError) -> str:
    reasons = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
    reason = reasons.get(error.errno, error.strerror or str(error))
    good, _ = find_latest(output_dir)
    last = f"the last good checkpoint is {good}" if good else "there is no earlier checkpoint"
    return f"--output_dir {output_dir}: could not save {name}: {reason}; {last}"
