"""The state of a run beside its weights, so that a resumed run is the uninterrupted one to the bit."""

import json
import random
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from caption_train.checkpoint import STATE
from caption_train.errors import CaptionTrainError
from caption_train.files import write_atomically

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
    lr_scheduler.load_state_dict(load("lr_scheduler.pt"))
    if accelerator.scaler is not None and (state / "scaler.pt").exists():
        accelerator.scaler.load_state_dict(load("scaler.pt"))
    restore_random_state(accelerator, random_states)
