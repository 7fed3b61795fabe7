"""Holds how far a run has come, as its checkpoints record it."""

import json
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from caption_train.errors import CaptionTrainError
from caption_train.system.files import read_json_object, write_atomically

PROGRESS_FILE = "progress.json"
_TYPES = {
    **dict.fromkeys(("saves", "total_steps", "global_step", "bad_steps", "skipped_steps", "images"), int),
    **dict.fromkeys(("peak_memory_bytes", "best_step", "evaluations_since_best"), int),
    **dict.fromkeys(
        ("seconds", "wall_seconds", "last_loss", "loss_mean", "loss_variance", "best_value"), int | float
    ),
    **dict.fromkeys(("skipped_files", "evaluation", "base_evaluation"), dict),
    **{"run_id": str, "stopped_early": bool},
}


def make_run_id() -> str:
    """Return a new run's id, which sorts after those of earlier runs."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"


def _check_counts(values: dict[str, Any], path: Path) -> None:
    """Raise CaptionTrainError for a missing or impossible count; null is a result that is not there."""
    optional = {"last_loss", "loss_mean", "best_value", "best_step"}
    for name, value in values.items():
        is_count = _TYPES.get(name) is int
        if (value is None and name in _TYPES.keys() - optional) or (
            is_count and not 0 <= (value or 0) < 2**62
        ):
            raise CaptionTrainError(f"--resume: {path}: {name} cannot be {str(value)[:40]}")


@dataclass
class Progress:
    """Everything that a run has counted and found so far.

    Attributes:
        run_id: stays the same when the run is resumed.
        saves: how many checkpoints were saved in the output folder.
        total_steps: planned optimizer steps when it was last saved.
        global_step: optimizer steps taken.
        bad_steps: consecutive steps not taken because loss or gradient was not finite.
        skipped_steps: all steps not taken.
        images: images trained on, each time counted.
        seconds: time of the training steps, over all resumes.
        wall_seconds: the same with validation and saving.
        peak_memory_bytes: the highest of all processes and resumes.
        skipped_files: path → why it was skipped.
        last_loss: of the last step.
        loss_mean: running mean, from which spikes are found.
        loss_variance: running variance.
        evaluation: result of the last validation.
        base_evaluation: result of the validation before the first step.
        best_value: the best validation result so far.
        best_step: the step of that result.
        evaluations_since_best: validations without a better result, for early stopping.
        stopped_early: whether early stopping ended the run.
    """

    run_id: str = field(default_factory=make_run_id)
    saves: int = 0
    total_steps: int = 0
    global_step: int = 0
    bad_steps: int = 0
    skipped_steps: int = 0
    images: int = 0
    seconds: float = 0.0
    wall_seconds: float = 0.0
    peak_memory_bytes: int = 0
    skipped_files: dict[str, str] = field(default_factory=dict)
    last_loss: float | None = None
    loss_mean: float | None = None
    loss_variance: float = 0.0
    evaluation: dict[str, float] = field(default_factory=dict)
    base_evaluation: dict[str, float] = field(default_factory=dict)
    best_value: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    stopped_early: bool = False

    def note_errors(self, errors: Iterable[str]) -> list[str]:
        """Record files left out of a batch, by the path at the start of each error; return the new errors."""
        new = []
        for error in errors:
            path = error.partition(": ")[0]
            if path not in self.skipped_files:
                self.skipped_files[path] = error
                new.append(error)
        return new

    def write(self, folder: Path) -> None:
        """Write to `folder`/progress.json."""
        write_atomically(folder / PROGRESS_FILE, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Progress":
        """Read what `write` wrote. A field that an older version did not write has its default."""
        path = folder / PROGRESS_FILE
        try:
            values = read_json_object(path, _TYPES, name=f"--resume: {path}")
            _check_counts(values, path)
        except OSError as error:
            raise CaptionTrainError(f"--resume: {path} cannot be read: {error.strerror}") from error
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
