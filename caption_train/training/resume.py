"""Finds the checkpoint to resume from, checks that it is the same run, and restores the run."""

import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from caption_train.adapters.record import TRAINING_FILE, TrainingRecord
from caption_train.config.training import TrainOptions
from caption_train.config.values import read_part_rates
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.system.console import print_once
from caption_train.system.files import follow_pointer, read_json_object
from caption_train.training.checkpoints.find import (
    BEST,
    LAST,
    MANIFEST,
    STATE,
    count_saves,
    find_damage,
    find_latest,
    find_step,
    forget,
    is_checkpoint,
    list_checkpoints,
    point,
)
from caption_train.training.checkpoints.progress import Progress
from caption_train.training.checkpoints.state import read_state
from caption_train.training.checkpoints.store import explain_failure, write_checkpoint
from caption_train.training.distributed.ranks import raise_on_all_ranks
from caption_train.training.monitor.log import bring_log_back
from caption_train.training.run.run import TrainingRun

MAY_CHANGE = {
    *("model_id", "prompt", "task", "preset"),  # what they come to is in FACTS
    *("dataset_dir", "add_dataset", "dataset_weights", "caption_extension", "follow_symlinks"),
    *("validation_dir", "output_dir", "metrics"),
    *("epochs", "num_workers", "worker_timeout", "rank_timeout", "device", "name", "log_with"),
    *("cache_converted", "plan", "memory_budget"),
    *("resume", "resume_anyway", "keep_last", "max_bad_steps", "on_bad_data", "auto_batch_size"),
    *("save_every_n_epochs", "save_every_n_steps", "sample_every_n_epochs", "sample_every_n_steps"),
    *("eval_every_n_epochs", "eval_every_n_steps", "early_stopping_patience", "load_best_at_end"),
}
"""Options that a resumed run may change and still be the same run; data is compared by its content."""

FACTS = ("family", "revision", "prompt")

FIXED = {
    *("family", "--train_method", "--train_parts", "--target_modules", "--rank", "--dora"),
    *("--optimizer_name", "--optimizer_rank", "--accumulation_compression", "--accumulation_rank"),
    "the parts of --part_learning_rates",
}
"""Settings that decide which weights and optimizer state exist; with others, the saved ones do not fit."""


def find_resume_point(options: TrainOptions) -> tuple[Path | None, list[str]]:
    """Find the checkpoint that `--resume` names.

    Returns:
        The checkpoint, or None to start a new run; and lines to print, which name damaged checkpoints.

    Raises:
        UsageError: `--resume PATH` is not a checkpoint.
        CaptionTrainError: it is damaged.
    """
    if options.resume is None:
        found = list_checkpoints(options.output_dir)
        return None, [
            f"--output_dir {options.output_dir}: {path.name} of an earlier run is there, and stays; "
            "this run starts anew (--resume auto goes on from there)"
            for path in found[:1]
        ]
    if options.resume == "auto":
        checkpoint, passed = find_latest(options.output_dir)
        none = "all are damaged" if passed else "no checkpoint yet"
        lines = [*passed, f"{checkpoint or none + '; starting anew'}"]
        return checkpoint, [f"--resume auto: {line}" for line in lines]
    checkpoint = follow_pointer(Path(options.resume))
    if not checkpoint.is_dir():
        raise UsageError(f"--resume {options.resume}: there is no folder {checkpoint}")
    if not is_checkpoint(checkpoint):
        within = ", ".join(path.name for path in list_checkpoints(checkpoint))
        hint = f"; the checkpoints in it are {within}" if within else " to go on from"
        raise UsageError(f"--resume {options.resume}: has no training state{hint}")
    if damage := find_damage(checkpoint):
        raise CaptionTrainError(f"--resume {options.resume}: {damage}; try --resume auto")
    return checkpoint, []


def resume_run(run: TrainingRun, checkpoint: Path) -> None:
    """Restore a prepared run from a checkpoint; random states are restored later, when the loop starts."""
    options, accelerator, plan = run.options, run.accelerator, run.plan
    for line in check_same_model(checkpoint, run.record, options.resume_anyway):
        print_once(accelerator, line)
    run.progress = progress = Progress.read(checkpoint / STATE)
    plan.first_step = progress.global_step
    if plan.total_steps < plan.first_step:
        raise UsageError(
            f"--epochs {options.epochs} ends at step {plan.total_steps}, {checkpoint} is at step "
            f"{plan.first_step}"
        )
    saved = read_record(checkpoint)["options"]
    changed = [name for name in SCHEDULE if saved.get(name) != getattr(options, name)]
    if progress.total_steps != plan.total_steps and "epochs" not in changed:
        changed.append("dataset_dir")
    run.random_states, was = read_state(
        checkpoint,
        accelerator,
        run.optimizer,
        run.lr_scheduler,
        keep_schedule=bool(changed),
        global_step=progress.global_step,
    )
    if changed:
        names = ", ".join(f"--{name} {saved.get(name)} → {getattr(options, name)}" for name in changed)
        print_once(
            accelerator,
            f"--resume: {names}: training goes on from step {plan.first_step} to {plan.total_steps} (it was "
            f"{progress.total_steps}), the learning rate along the new schedule: "
            f"{run.lr_scheduler.get_last_lr()[0]:.3g} where the old one stood at {was:.3g}",
        )
    patience = options.early_stopping_patience
    progress.stopped_early = patience is not None and progress.evaluations_since_best >= patience
    if progress.stopped_early:
        print_once(
            accelerator,
            f"--early_stopping_patience {patience}: the run had stopped at step {plan.first_step}",
        )
    _restore_pointers(run, checkpoint)


SCHEDULE = (
    *("epochs", "learning_rate", "part_learning_rates", "scheduler", "warmup_steps", "weight_decay"),
    "lora_plus_ratio",
)
"""Settings that determine the optimizer's rates, together with the number of steps."""


def _restore_pointers(run: TrainingRun, checkpoint: Path) -> None:
    """Point `last` and `best` to what they were at this checkpoint, copied from another folder if needed."""
    accelerator, progress, output_dir = run.accelerator, run.progress, run.options.output_dir
    best = None
    with raise_on_all_ranks(accelerator):
        if accelerator.is_main_process:
            here = _copy_to_output_dir(checkpoint, output_dir, is_newest=True)
            with explain_failure(output_dir, "what the run is resumed from"):
                bring_log_back(output_dir, progress.run_id, checkpoint.parent)
                point(output_dir, LAST, here)
                if progress.best_step is not None:
                    found = find_step(checkpoint.parent, progress.run_id, progress.best_step)
                    best = here if progress.best_step == progress.global_step else found
                if best is None:
                    forget(output_dir, BEST)
                else:
                    best = _copy_to_output_dir(best, output_dir)
                    point(output_dir, BEST, best)
    if progress.best_step is not None and gather_object([best])[0] is None:
        step = progress.best_step
        print_once(
            accelerator,
            f"--resume: the best checkpoint, of step {step}, is gone; the next validation is the new best",
        )
        progress.best_step = progress.best_value = None


def _copy_to_output_dir(checkpoint: Path, output_dir: Path, *, is_newest: bool = False) -> Path:
    """Return a checkpoint in `output_dir` under its own name: this one or a copy of it.

    is_newest: whether `--resume auto` must find it, even if this run is killed before it saves.
    """
    is_pointer = checkpoint.name in (LAST, BEST)
    if checkpoint.parent.resolve() == output_dir.resolve() and not is_pointer:
        here = output_dir / checkpoint.name
        if not is_newest or find_latest(output_dir)[0] == here:
            return here
    name = f"step-{Progress.read(checkpoint / STATE).global_step:06d}" if is_pointer else checkpoint.name

    def copy(folder: Path) -> None:
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
        progress = Progress.read(folder / STATE)
        progress.saves = count_saves(output_dir) + 1 if is_newest else 0
        progress.write(folder / STATE)

    return write_checkpoint(output_dir, name, copy)


def read_record(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint says of the run that saved it."""
    name = f"--resume {checkpoint}: {TRAINING_FILE}"
    types = {"options": dict, "versions": dict, "trainable_parameters": int, "dataset": dict}
    try:
        record = read_json_object(checkpoint / TRAINING_FILE, types, name=name)
    except OSError as error:
        raise CaptionTrainError(f"{name} cannot be read: {error.strerror}") from error
    if missing := [member for member in types if record.get(member) is None]:
        raise CaptionTrainError(f"{name} has no {missing[0]}")
    return record


def adopt_batch_size(options: TrainOptions, checkpoint: Path) -> TrainOptions:
    """Return the options with the batch size that `--auto_batch_size` found when the run was started."""
    saved = read_record(checkpoint)["options"]
    found = tuple(saved.get(name) for name in ("batch_size", "gradient_accumulation_steps"))
    if not all(type(value) is int for value in found):
        raise CaptionTrainError(f"--resume {checkpoint}: {TRAINING_FILE} does not say the batch size")
    # With another effective batch size it is another run, which `check_same_run` refuses.
    if math.prod(found) != options.batch_size * options.gradient_accumulation_steps:
        return options
    return replace(options, batch_size=found[0], gradient_accumulation_steps=found[1])


def check_same_run(checkpoint: Path, record: TrainingRecord, anyway: bool) -> list[str]:
    """Check that a checkpoint was saved with the same base, data and settings.

    Args:
        checkpoint: the checkpoint to resume from.
        record: of this run.
        anyway: whether differences are allowed (`--resume_anyway`), if the weights still fit.

    Returns:
        Lines to print, about differences that are allowed.

    Raises:
        UsageError: names the differences that are not allowed.
    """
    saved, lines = read_record(checkpoint), []
    for name in sorted(record.versions.keys() | saved["versions"].keys()):
        was, now = saved["versions"].get(name), record.versions.get(name)
        if was != now:
            lines.append(f"--resume: {name} was {was}, is {now}; numbers may differ")
    differences = list_differences(saved, record)
    if anyway and (fixed := [line for name, line in differences.items() if name in FIXED]):
        raise UsageError(
            f"--resume {checkpoint}: what was saved does not fit, --resume_anyway or not: {'; '.join(fixed)}"
        )
    return lines + _refuse(checkpoint, list(differences.values()), anyway)


def check_same_model(checkpoint: Path, record: TrainingRecord, anyway: bool) -> list[str]:
    """Check, once the model is loaded, that the base is the same and as many parameters are trained.

    Args, return value and errors are those of `check_same_run`.
    """
    saved = read_record(checkpoint)
    was, now = saved["trainable_parameters"], record.trainable_parameters
    differences = [] if was == now else [f"{was:,} parameters were trained, now it is {now:,}"]
    was, now = saved.get("base_commit"), record.base_commit
    # A fully trained model is resumed from its checkpoint alone, without the base.
    if was and now and was != now and record.options["train_method"] == "lora":
        differences.append(f"the commit of {record.base_model} was {was}, is {now}: add --revision {was}")
    return _refuse(checkpoint, differences, anyway)


def list_differences(saved: dict[str, Any], record: TrainingRecord) -> dict[str, str]:
    """Return name → what differs between a saved record and this run's; flags that only one has pass."""
    # A base in a folder is compared by its content, not by its path.
    by_content = bool(saved.get("base_fingerprint") and record.base_fingerprint)
    was, now = _list_facts(saved, by_content), _list_facts(vars(record), by_content)
    if record.revision is not None and record.revision == saved.get("base_commit"):
        was["revision"] = was["--revision"] = record.revision
    return {
        name: f"{name} was {was[name]!r}, is {value!r}"
        for name, value in now.items()
        if name in was and was[name] != value
    }


def _list_facts(record: Mapping[str, Any], by_content: bool) -> dict[str, Any]:
    base = {"base_model's content": "base_fingerprint"} if by_content else {"base_model": "base_model"}
    facts = {shown: record.get(name) for shown, name in ({name: name for name in FACTS} | base).items()}
    facts |= {f"dataset's {name}": value for name, value in (record.get("dataset") or {}).items()}
    facts |= {f"--{name}": v for name, v in record["options"].items() if name not in MAY_CHANGE}
    rates = read_part_rates(record["options"].get("part_learning_rates"))
    facts |= {"the parts of --part_learning_rates": list(rates)}
    # A setting in effect counts, whether it was given or is the checkpoint's own.
    return facts | {f"--{name}": value for name, value in (record.get("settings") or {}).items()}


def _refuse(checkpoint: Path, differences: list[str], anyway: bool) -> list[str]:
    if differences and not anyway:
        raise UsageError(
            f"--resume {checkpoint}: not the run that was saved: {'; '.join(differences)} "
            "(--resume_anyway goes on all the same)"
        )
    return [f"--resume_anyway: {difference}" for difference in differences]
