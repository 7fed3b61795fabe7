"""Saves and restores a run's state beside its weights, so that a resumed run equals an uninterrupted one."""

import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from caption_train.errors import UsageError
from caption_train.system.damage import explaining_damage
from caption_train.training.checkpoints.find import STATE
from caption_train.training.checkpoints.progress import Progress
from caption_train.training.distributed.fsdp import scatter_state


def capture_random_state(accelerator: Accelerator) -> list[dict[str, Any]]:
    """Return the random states of all processes, in rank order, in types that `weights_only` accepts."""
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
    """Restore the random state of this process."""
    with explaining_damage("--resume: state/random.pt is damaged"):
        _restore_random_state(accelerator, states[accelerator.process_index])


def _restore_random_state(accelerator: Accelerator, state: dict[str, Any]) -> None:
    random.setstate((3, tuple(state["python"]), state["python_gauss"]))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], accelerator.device)


def write_state(
    checkpoint: Path,
    progress: Progress,
    optimizer_state: dict[str, Any],
    lr_scheduler: LRScheduler,
    scaler: Any,
    random_states: list[dict[str, Any]],
) -> None:
    """Write everything but the weights into `checkpoint/state`.

    Args:
        checkpoint: the folder of the checkpoint.
        progress: how far the run has come.
        optimizer_state: the optimizer's state_dict, not sharded.
        lr_scheduler: the learning-rate schedule.
        scaler: fp16's gradient scaler, or None.
        random_states: of all processes, from `capture_random_state`.
    """
    folder = checkpoint / STATE
    folder.mkdir()
    # Types that `torch.load(weights_only=True)` accepts, so that a checkpoint can run no code.
    contents = {"optimizer": optimizer_state, "lr_scheduler": lr_scheduler.state_dict()}
    if scaler is not None:
        contents["scaler"] = scaler.state_dict()
    for name, content in (contents | {"random": random_states}).items():
        # Python's file says why a write failed, for example a full disk; torch's own writer does not.
        with (folder / f"{name}.pt").open("wb") as file:
            torch.save(content, file)
    progress.write(folder)


def read_state(
    checkpoint: Path,
    accelerator: Accelerator,
    optimizer: Optimizer,
    lr_scheduler: LRScheduler,
    *,
    keep_schedule: bool,
    global_step: int,
) -> tuple[list[dict[str, Any]], float]:
    """Restore optimizer, schedule and scaler from `checkpoint/state`.

    Args:
        checkpoint: the folder of the checkpoint.
        accelerator: the accelerator of this run.
        optimizer: the optimizer to restore.
        lr_scheduler: the schedule to restore.
        keep_schedule: keep this run's learning rates and schedule, and only advance it to the saved step.
        global_step: optimizer steps that the run has taken, as its progress says.

    Returns:
        The random states, to be restored after everything that may draw random numbers, and the saved
        learning rate.

    Raises:
        UsageError: another number of processes saved the checkpoint.
        CaptionTrainError: its optimizer does not fit this run.
    """

    def load(name: str, kind: type = dict) -> Any:
        path = checkpoint / STATE / f"{name}.pt"
        with explaining_damage(f"--resume {path}: is damaged, so it cannot go on from here"):
            content = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(content, kind):
                raise ValueError(f"holds a {type(content).__name__}, not a {kind.__name__}")
            return content

    random_states = load("random", list)
    if len(random_states) != accelerator.num_processes:
        raise UsageError(
            f"--resume {checkpoint}: saved by {len(random_states)} processes, this run has "
            f"{accelerator.num_processes}; launch as many as before"
        )
    fresh = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    saved, schedule = load("optimizer"), load("lr_scheduler")
    with explaining_damage(f"--resume {checkpoint}: its optimizer does not fit this run"):
        optimizer.load_state_dict(scatter_state(optimizer, saved))
        _check_moments(optimizer)
    with explaining_damage(f"--resume {checkpoint}: its learning-rate schedule does not fit this run"):
        was, steps = float(schedule["_last_lr"][0]), _count_steps(schedule, global_step)
    if keep_schedule:
        for group, settings in zip(optimizer.param_groups, fresh, strict=True):
            group.update(settings)
        _catch_up(lr_scheduler, steps)
    else:
        lr_scheduler.load_state_dict(schedule)
    if accelerator.scaler is not None and (checkpoint / STATE / "scaler.pt").exists():
        accelerator.scaler.load_state_dict(load("scaler"))
    return random_states, was


def _count_steps(schedule: dict[str, Any], global_step: int) -> range:
    steps = range(schedule["last_epoch"])
    # More steps would be left than the schedule has, which fails at the end of the run.
    if len(steps) > global_step:
        raise ValueError(f"it stands at step {len(steps)}, the run at step {global_step}")
    return steps


def _check_moments(optimizer: Optimizer) -> None:
    """Raise ValueError if AdamW's moments are not shaped like their parameters; its step would fail."""
    for p, values in getattr(optimizer, "optimizer", optimizer).state.items():
        # Flora's exp_avg, which has no exp_avg_sq beside it, is compressed.
        for name in ("exp_avg", "exp_avg_sq") if "exp_avg_sq" in values else ():
            if getattr(values.get(name), "shape", None) != p.shape:
                raise ValueError(f"{name} of a parameter {list(p.shape)} has another shape")


def _catch_up(lr_scheduler: LRScheduler, steps: range) -> None:
    with warnings.catch_warnings():
        # torch warns of scheduler steps without optimizer steps, which are intended here.
        warnings.simplefilter("ignore")
        for _ in steps:
            lr_scheduler.step()
