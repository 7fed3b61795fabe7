"""Prints a run's resolved settings at its start, and its result at its end."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from accelerate import Accelerator
from rich.table import Table

from caption_train.adapters.model_card import name_flag
from caption_train.adapters.record import TrainingRecord
from caption_train.config.compatibility import SHARDED
from caption_train.config.training import TrainOptions
from caption_train.system.console import GIB, count_things, print_line, print_rich
from caption_train.training.distributed.fsdp import parallelism
from caption_train.training.run.batch_plan import BatchPlan


def print_settings(
    options: TrainOptions, record: TrainingRecord, plan: BatchPlan, accelerator: Accelerator
) -> None:
    """Print settings that are not defaults and where they came from, the defaults, and what follows."""
    table = Table("setting", "value", "from", box=None, title="settings", title_justify="left")
    defaults = []
    for f in fields(options):
        if "help" not in f.metadata:
            continue
        value = getattr(options, f.name)
        shown = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        if f.name in options.sources:
            table.add_row(f.name, shown, options.sources[f.name])
        elif value not in (None, False, [], ""):
            defaults.append(f"{f.name} {shown}")
    print_rich(table)
    print_rich("defaults: " + " · ".join(defaults), style="dim")
    way = SHARDED.get(parallelism(accelerator))
    sharded = f", sharded by {way}" if way else ""
    share = record.trainable_parameters / record.total_parameters
    batch = " × ".join(
        [
            count_things(plan.batch_size, "image"),
            count_things(plan.accumulation_steps, "micro-batch", "micro-batches"),
            count_things(plan.num_processes, "process", "processes"),
        ]
    )
    print_rich(
        f"{record.trainable_parameters:,} of {record.total_parameters:,} parameters are trained "
        f"({share:.2%})\n"
        f"{count_things(record.dataset['pairs'], 'image/caption pair')}, effective batch size "
        f"{plan.effective_batch_size} ({batch}), {count_things(plan.total_steps, 'step')} in "
        f"{count_things(plan.epochs, 'epoch')}\n"
        f"on {accelerator.device}{sharded}, mixed precision {accelerator.mixed_precision}, "
        f"prompt {record.prompt or 'none'}"
    )


def print_summary(summary: Mapping[str, Any], options: TrainOptions, start: Sequence[str]) -> None:
    """Print how the run ended, and the command that captions with the result; start: what begins it."""
    loss = "" if summary["loss"] is None else f"last loss {summary['loss']:.4f}, "
    print_line(
        f"{count_things(summary['global_step'], 'step')} in {summary['wall_seconds']:,.1f} s, "
        f"{summary['images_per_second']:.1f} images/s, {loss}"
        f"peak memory {summary['peak_memory_bytes'] / GIB:.2f} GiB"
    )
    if summary["best_step"] is not None:
        name = options.metric_for_best
        base = summary.get(f"base_{name}")
        before = "" if base is None else f" ({base:.4f} before training)"
        best = summary[f"best_{name}"]
        print_line(f"best validation {name} {best:.4f}, at step {summary['best_step']}{before}")
    if summary["skipped_steps"]:
        print_line(f"{summary['skipped_steps']} steps were skipped: loss or gradient was not finite")
    for reason in summary["skipped_files"]:
        print_line(f"skipped {reason}")
    folder = options.output_dir
    command = shlex.join([*start, name_flag(options.train_method), str(folder), "--images", "FOLDER"])
    print_line(f"saved to {folder}; caption with:\n  {command}")
