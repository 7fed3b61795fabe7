"""Native copies of legacy checkpoints, kept so that the next load has nothing to convert."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from caption_train.errors import CaptionTrainError
from caption_train.families.florence_files import Checkpoint
from caption_train.families.florence_legacy import load_legacy

FORMAT = 1
"""Raised when a conversion gives other files than before, so that older copies are not used."""


def use_native_copy(checkpoint: Checkpoint) -> Checkpoint:
    """Return the native copy of a legacy checkpoint, in its own precision; make it if there is none.

    It is found by the names, sizes and times of the checkpoint's files: other files make another copy.
    """
    folder = cache_folder() / _key(checkpoint)
    if not folder.is_dir():
        _write_copy(checkpoint, folder)
    return Checkpoint(checkpoint.model_id, folder, tuple(sorted(folder.glob("*.safetensors"))))


def cache_folder() -> Path:
    """Return where copies are kept: in $XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "caption-train" / "florence"


def _key(checkpoint: Checkpoint) -> str:
    files = [path for path in checkpoint.folder.iterdir() if path.suffix in (".json", ".txt")]
    stats = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted({*files, *checkpoint.weights})
    ]
    digest = hashlib.sha256(json.dumps([FORMAT, stats]).encode()).hexdigest()
    return f"{Path(checkpoint.model_id).name}-{digest[:16]}"


def _write_copy(checkpoint: Checkpoint, folder: Path) -> None:
    """Fill a temporary folder beside `folder` and rename it; another process may have been faster."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
        try:
            model, processor = load_legacy(checkpoint, dtype=checkpoint.dtype)
            model.save_pretrained(partial)
            processor.save_pretrained(partial)
            if not folder.is_dir():
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise CaptionTrainError(f"--cache_converted: {folder} cannot be written: {error}") from error
