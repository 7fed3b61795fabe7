"""Keeps native copies of legacy checkpoints on disk, so that the next load need not convert them."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from caption_train.errors import CaptionTrainError
from caption_train.families.florence.files import Checkpoint
from caption_train.families.florence.legacy.load import load_legacy
from caption_train.system.files import cache_folder

FORMAT = 2
"""To be raised whenever the conversion changes, so that older copies are not used."""


def use_native_copy(checkpoint: Checkpoint) -> Checkpoint:
    """Return the native copy of a legacy checkpoint, in its own precision; make the copy if there is none.

    A copy belongs to one folder and the state of its files. When one of them changes, the copy is replaced.
    """
    folder = cache_folder("florence") / f"{_place(checkpoint)}-{_state(checkpoint)}"
    if not folder.is_dir():
        _write_copy(checkpoint, folder)
        _remove_older(folder, _place(checkpoint))
    return Checkpoint(checkpoint.model_id, folder, tuple(sorted(folder.glob("*.safetensors"))))


def _place(checkpoint: Checkpoint) -> str:
    return f"{Path(checkpoint.model_id).name}-{_digest(str(checkpoint.folder.resolve()))}"


def _state(checkpoint: Checkpoint) -> str:
    """Return a digest of the files' names, sizes and times; ctime shows changes that keep size and mtime."""
    files = [path for path in checkpoint.folder.iterdir() if path.suffix in (".json", ".txt")]
    states = [(path.name, path.stat()) for path in sorted({*files, *checkpoint.weights})]
    return _digest(
        [FORMAT, *((name, state.st_size, state.st_mtime_ns, state.st_ctime_ns) for name, state in states)]
    )


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _write_copy(checkpoint: Checkpoint, folder: Path) -> None:
    """Fill a temporary folder beside `folder` and rename it. Another process may have done so first."""
    from safetensors import SafetensorError

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
        try:
            model, processor = load_legacy(checkpoint, dtype=checkpoint.dtype)
            model.save_pretrained(partial)
            processor.save_pretrained(partial)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if not folder.is_dir():
            raise CaptionTrainError(f"--cache_converted: {folder} cannot be written: {error}") from error


def _remove_older(folder: Path, place: str) -> None:
    """Remove copies of earlier states of the same folder; a process that reads one has its files open."""
    for other in folder.parent.iterdir():
        if other.name.startswith(f"{place}-") and other != folder:
            shutil.rmtree(other, ignore_errors=True)
