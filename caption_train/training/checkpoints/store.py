"""Writes checkpoints completely or not at all, copies the finished one to output_dir, deletes old ones.

    output_dir/
    ├── epoch-0002-loss-1.2345/        a checkpoint; --name goes before epoch-… or step-…
    │   ├── adapter_config.json        the LoRA in PEFT's format;
    │   ├── adapter_model.safetensors      with --train_method full: config.json, model.safetensors, …
    │   ├── processor_config.json      processor and tokenizer
    │   ├── tokenizer.json, tokenizer_config.json
    │   ├── README.md                  the model card
    │   ├── training.json              base model, prompt, options: what captioning must know
    │   ├── state/                     what resuming needs besides the weights
    │   │   ├── optimizer.pt, lr_scheduler.pt, random.pt, scaler.pt (fp16 only)
    │   │   └── progress.json          step, run id, counters, best result
    │   └── manifest.json              SHA-256 of every file above, to find damage
    ├── last → epoch-0002-loss-1.2345  symbolic links, or files with that name where there are none
    ├── best → …                       only with validation
    ├── adapter_model.safetensors, …   the finished LoRA: a copy of the checkpoint without state and manifest
    └── log.jsonl, summary.json, training_curve.png

A checkpoint is written to a folder `.partial-…`, flushed to the disk and then renamed. So a folder with its
final name is always complete.
"""

import errno
import json
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from caption_train.adapters.record import TRAINING_FILE
from caption_train.errors import CaptionTrainError, find_os_error
from caption_train.system.files import (
    apply_umask,
    clear_temporary,
    copy_atomically,
    find_free_name,
    hash_file,
    read_json_object,
    sync,
    sync_folder,
    write_atomically,
)
from caption_train.training.checkpoints.find import (
    MANIFEST,
    PARTIAL,
    checkpoints_of_run,
    describe_latest,
    point,
)

METHOD_FILES = {
    "lora": ("adapter_config.json", "adapter_model.safetensors"),
    "full": ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
}
"""`--train_method` → patterns of files that only this method writes."""


def write_checkpoint(output_dir: Path, name: str, write: Callable[[Path], None], *pointers: str) -> Path:
    """Write a checkpoint to a temporary folder, flush it to the disk, rename it, and point to it.

    Args:
        output_dir: the folder of the checkpoints.
        name: the folder name of the new one; a number is added if there is such a folder.
        write: fills the temporary folder that it is given.
        pointers: names that shall point to the new checkpoint, "last" and "best".

    Returns:
        The folder of the checkpoint.

    Raises:
        CaptionTrainError: the disk is full or cannot be written; names the last good checkpoint.
    """
    partial = output_dir / f"{PARTIAL}{name}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        apply_umask(partial)
        _write_manifest(partial)
        sync_folder(partial)
        # A complete checkpoint is never replaced.
        final = find_free_name(output_dir / name)
        partial.rename(final)
        # Without this, a power cut could undo the rename.
        sync(output_dir)
        for pointer in pointers:
            point(output_dir, pointer, final)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        cause = find_os_error(error)
        if cause is None:
            raise
        raise CaptionTrainError(_explain(output_dir, name, cause)) from error
    return final


def publish(checkpoint: Path, output_dir: Path) -> None:
    """Copy the files of a checkpoint, without its training state, to `output_dir`; each file completely.

    Files that an earlier run with the other `--train_method` published are deleted, because transformers
    would load its LoRA onto this model. training.json is copied last: an interrupted copy is finished by the
    next.
    """
    with explain_failure(output_dir, "the finished LoRA"):
        files = [file for file in checkpoint.iterdir() if file.is_file() and file.name != MANIFEST]
        for file in sorted(files, key=lambda file: (file.name == TRAINING_FILE, file.name)):
            if file.name == TRAINING_FILE:
                _delete_other_method(file, output_dir)
            copy_atomically(file, output_dir / file.name)


def _delete_other_method(training_file: Path, output_dir: Path) -> None:
    was, now = (_read_train_method(path) for path in (output_dir / TRAINING_FILE, training_file))
    if was != now:
        kept = {file.name for file in training_file.parent.iterdir()}
        for path in (p for pattern in METHOD_FILES.get(was, ()) for p in output_dir.glob(pattern)):
            if path.name not in kept:
                path.unlink()


def _read_train_method(training_file: Path) -> str | None:
    try:
        return read_json_object(training_file)["options"]["train_method"]
    except (OSError, CaptionTrainError, KeyError, TypeError):
        return None


def clear_partial(output_dir: Path) -> None:
    """Delete what an interrupted save or deletion left. Call it only while no other run writes here."""
    for path in output_dir.glob(f"{PARTIAL}*"):
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)
    clear_temporary(output_dir)


def prune(output_dir: Path, run_id: str, keep: int, protected: Collection[Path] = ()) -> None:
    """Delete all but the newest checkpoints of a run.

    Args:
        output_dir: the folder of the checkpoints.
        run_id: the run; checkpoints of other runs are never deleted.
        keep: how many to keep.
        protected: checkpoints that are kept in any case.
    """
    for old in checkpoints_of_run(output_dir, run_id)[keep:]:
        if old not in protected:
            # Renamed first, because an interrupted deletion would leave a damaged checkpoint.
            with suppress(OSError):
                shutil.rmtree(old.rename(old.with_name(f"{PARTIAL}{old.name}")), ignore_errors=True)


def _write_manifest(folder: Path) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    sums = {p.relative_to(folder).as_posix(): hash_file(p) for p in files}
    write_atomically(folder / MANIFEST, json.dumps(sums, indent=1) + "\n")


@contextmanager
def explain_failure(output_dir: Path, name: str) -> Iterator[None]:
    """Turn an error of writing a file into one line that names the last good checkpoint."""
    try:
        yield
    except OSError as error:
        raise CaptionTrainError(_explain(output_dir, name, error)) from error


def _explain(output_dir: Path, name: str, error: OSError) -> str:
    reasons = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
    reason = reasons.get(error.errno, error.strerror or str(error))
    return f"--output_dir {output_dir}: could not save {name}: {reason}; {describe_latest(output_dir)}"
