"""The state of a run beside its weights, so that a resumed run is the uninterrupted one to the bit."""

import json
import random
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from caption_train.checkpoint import STATE, find_damage, find_latest
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.files import write_atomically
from caption_train.model_card import TRAINING_FILE, TrainingRecord
from caption_train.options import TrainOptions

PROGRESS = "progress.json"


@dataclass
class Progress:
    """How far a run has come. `global_step` counts optimizer steps, `bad_steps` those in a row not taken."""

    global_step: int = 0
    bad_steps: int = 0
    skipped_steps: int = 0
    skipped_files: dict[str, str] = field(default_factory=dict)
    last_loss: float | None = None
    tracker_run: str | None = None

    def advance(self, loss: float) -> None:
        """Count an optimizer step."""
        self.global_step += 1
        self.last_loss = loss

    def note_errors(self, errors: Iterable[str]) -> None:
        """Remember files left out of a batch, each once, by the reason's first word: its path."""
        for error in errors:
            self.skipped_files.setdefault(error.partition(": ")[0], error)


MAY_CHANGE = {
    *("dataset_dir", "output_dir", "epochs", "num_workers", "device", "name", "log_with"),
    *("resume", "resume_anyway", "keep_last", "max_bad_steps"),
    *("save_every_n_epochs", "save_every_n_steps", "sample_every_n_epochs", "sample_every_n_steps"),
}
"""Options that a resumed run may change and still be the run it was; the data is known by its content."""


def find_resume_point(options: TrainOptions) -> Path | None:
    """Return the checkpoint that `--resume` means, or None to start anew. Damaged ones are named."""
    if options.resume is None:
        return None
    if options.resume == "auto":
        checkpoint, passed = find_latest(options.output_dir)
        for line in passed:
            print(f"--resume auto: {line}", file=sys.stderr)
        print(f"--resume auto: {checkpoint or 'no checkpoint yet; starting anew'}", file=sys.stderr)
        return checkpoint
    checkpoint = Path(options.resume).resolve()
    if not (checkpoint / STATE).is_dir():
        raise UsageError(f"--resume {options.resume}: no checkpoint to resume from")
    if damage := find_damage(checkpoint):
        raise CaptionTrainError(f"--resume {options.resume}: {damage}; try --resume auto")
    return checkpoint


def check_same_run(checkpoint: Path, record: TrainingRecord, anyway: bool) -> None:
    """Refuse to resume with another base, data or settings, naming each; other versions are only said."""
    try:
        saved = json.loads((checkpoint / TRAINING_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CaptionTrainError(f"--resume {checkpoint}: {TRAINING_FILE} cannot be read: {error}") from error
    for name in sorted(record.versions.keys() | saved["versions"].keys()):
        was, now = saved["versions"].get(name), record.versions.get(name)
        if was != now:
            print(f"--resume: {name} was {was}, is {now}; numbers may differ", file=sys.stderr)
    differences = [
        f"{name} was {saved[name]!r}, is {getattr(record, name)!r}"
        for name in ("family", "base_model", "revision", "prompt", "dataset", "trainable_parameters")
        if saved[name] != getattr(record, name)
    ] + [
        f"--{name} was {saved['options'].get(name)!r}, is {value!r}"
        for name, value in record.options.items()
        if name not in MAY_CHANGE and saved["options"].get(name) != value
    ]
    if differences and not anyway:
        raise UsageError(
            f"--resume {checkpoint}: not the run that was saved: {'; '.join(differences)} "
            "(--resume_anyway goes on all the same)"
        )
    for difference in differences:
        print(f"--resume_anyway: {difference}", file=sys.stderr)


def capture_random_state(accelerator: Accelerator) -> list[dict[str, Any]]:
    """Return every process's random numbers, in rank order, made of what `weights_only` loading takes."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "python": list(random.getstate()[1]),
        "python_gauss": random.getstate()[2],
        "numpy": [kind, keys.tolist(), int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
    }
    if accelerator.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    return gather_object([state])


def restore_random_state(accelerator: Accelerator, states: list[dict[str, Any]]) -> None:
    """Give this process the random numbers it had."""
    state = states[accelerator.process_index]
    random.setstate((3, tuple(state["python"]), state["python_gauss"]))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], accelerator.device)


def write_state(
    folder: Path,
    progress: Progress,
    optimizer: Optimizer,
    lr_scheduler: LRScheduler,
    scaler: Any,
    random_states: list[dict[str, Any]],
) -> None:
    """Write all but the weights into `folder/state`."""
    state = folder / STATE
    state.mkdir()
    torch.save(optimizer.state_dict(), state / "optimizer.pt")
    torch.save(lr_scheduler.state_dict(), state / "lr_scheduler.pt")
    torch.save(random_states, state / "random.pt")
    if scaler is not None:
        torch.save(scaler.state_dict(), state / "scaler.pt")
    write_atomically(state / PROGRESS, json.dumps(asdict(progress), indent=1) + "\n")


def read_progress(checkpoint: Path) -> Progress:
    """Return the progress saved in a checkpoint."""
    path = checkpoint / STATE / PROGRESS
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CaptionTrainError(f"--resume {checkpoint}: {path.name} cannot be read: {error}") from error
    return Progress(**{f.name: values[f.name] for f in fields(Progress) if f.name in values})


def read_state(
    checkpoint: Path,
    accelerator: Accelerator,
    optimizer: Optimizer,
    lr_scheduler: LRScheduler,
) -> None:
    """Restore optimizer, schedule, scaler and random numbers from `checkpoint/state`, on this process."""
    state = checkpoint / STATE

    def load(name: str) -> Any:
        return torch.load(state / name, map_location="cpu", weights_only=True)

    random_states = load("random.pt")
    if len(random_states) != accelerator.num_processes:
        raise CaptionTrainError(
            f"--resume {checkpoint}: saved by {len(random_states)} processes, this run has "
            f"{accelerator.num_processes}; launch as many as before"
        )
    optimizer.load_state_dict(load("optimizer.pt"))
    _restore_schedule(lr_scheduler, load("lr_scheduler.pt"))
    if accelerator.scaler is not None and (state / "scaler.pt").exists():
        accelerator.scaler.load_state_dict(load("scaler.pt"))
    restore_random_state(accelerator, random_states)


def _restore_schedule(lr_scheduler: LRScheduler, saved: dict[str, Any]) -> None:
    """Put the schedule where it stood. A run made longer follows the new, longer schedule from there."""
    was, now = saved.get("total_steps"), getattr(lr_scheduler, "total_steps", None)
    if was == now:
        lr_scheduler.load_state_dict(saved)
        return
    print(f"--epochs: the schedule now spans {now} steps instead of {was}", file=sys.stderr)
    for _ in range(saved["last_epoch"]):
        lr_scheduler.step()
