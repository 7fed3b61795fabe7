"""Which checkpoint a run goes on from, and whether it is still the same run."""

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from caption_train.agreement import say
from caption_train.checkpoint import STATE, find_damage, find_latest
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.model_card import TRAINING_FILE, TrainingRecord
from caption_train.options import TrainOptions

MAY_CHANGE = {
    *("dataset_dir", "validation_dir", "output_dir", "epochs", "num_workers", "device", "name", "log_with"),
    *("resume", "resume_anyway", "keep_last", "max_bad_steps", "on_bad_data", "auto_batch_size"),
    *("save_every_n_epochs", "save_every_n_steps", "sample_every_n_epochs", "sample_every_n_steps"),
    *("eval_every_n_epochs", "eval_every_n_steps", "early_stopping_patience", "load_best_at_end"),
}
"""Options that a resumed run may change and still be the run it was; the data is known by its content."""

FACTS = ("family", "base_model", "revision", "prompt", "dataset")


def find_resume_point(options: TrainOptions, accelerator: Accelerator) -> Path | None:
    """Return the checkpoint that `--resume` means, or None to start anew. Damaged ones are named."""
    if options.resume is None:
        return None
    if options.resume == "auto":
        checkpoint, passed = find_latest(options.output_dir)
        for line in passed:
            say(accelerator, f"--resume auto: {line}")
        say(accelerator, f"--resume auto: {checkpoint or 'no checkpoint yet; starting anew'}")
        return checkpoint
    checkpoint = Path(options.resume).resolve()
    if not (checkpoint / STATE).is_dir():
        raise UsageError(f"--resume {options.resume}: no checkpoint to resume from")
    if damage := find_damage(checkpoint):
        raise CaptionTrainError(f"--resume {options.resume}: {damage}; try --resume auto")
    return checkpoint


def read_record(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint says of the run that saved it."""
    try:
        return json.loads((checkpoint / TRAINING_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CaptionTrainError(f"--resume {checkpoint}: {TRAINING_FILE} cannot be read: {error}") from error


def adopt_batch_size(options: TrainOptions, checkpoint: Path) -> None:
    """Go on with the batch that `--auto_batch_size` found when the run started."""
    saved = read_record(checkpoint)["options"]
    options.batch_size = saved["batch_size"]
    options.gradient_accumulation_steps = saved["gradient_accumulation_steps"]


def check_same_run(checkpoint: Path, record: TrainingRecord, accelerator: Accelerator, anyway: bool) -> None:
    """Refuse to resume with another base, data or settings, naming each; other versions are only said."""
    saved = read_record(checkpoint)
    for name in sorted(record.versions.keys() | saved["versions"].keys()):
        was, now = saved["versions"].get(name), record.versions.get(name)
        if was != now:
            say(accelerator, f"--resume: {name} was {was}, is {now}; numbers may differ")
    _refuse(checkpoint, list_differences(saved, record), accelerator, anyway)


def check_same_size(checkpoint: Path, record: TrainingRecord, accelerator: Accelerator, anyway: bool) -> None:
    """Refuse to resume when another number of parameters would be trained."""
    was, now = read_record(checkpoint)["trainable_parameters"], record.trainable_parameters
    differences = [] if was == now else [f"{was:,} parameters were trained, now it is {now:,}"]
    _refuse(checkpoint, differences, accelerator, anyway)


def list_differences(saved: dict[str, Any], record: TrainingRecord) -> list[str]:
    """Return what differs between a saved record and this run's, by name. Flags new to either pass."""
    now = {name: getattr(record, name) for name in FACTS}
    now |= {f"dataset's {name}": value for name, value in now.pop("dataset").items()}
    was = {name: saved.get(name) for name in FACTS}
    was |= {f"dataset's {name}": value for name, value in (was.pop("dataset") or {}).items()}
    now |= {f"--{name}": value for name, value in record.options.items() if name not in MAY_CHANGE}
    was |= {f"--{name}": value for name, value in saved["options"].items() if name not in MAY_CHANGE}
    return [
        f"{name} was {was[name]!r}, is {value!r}"
        for name, value in now.items()
        if name in was and was[name] != value
    ]


def _refuse(checkpoint: Path, differences: list[str], accelerator: Accelerator, anyway: bool) -> None:
    if differences and not anyway:
        raise UsageError(
            f"--resume {checkpoint}: not the run that was saved: {'; '.join(differences)} "
            "(--resume_anyway goes on all the same)"
        )
    for difference in differences:
        say(accelerator, f"--resume_anyway: {difference}")
