"""Explains in one line what ended a run: memory, a lost process."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from caption_train.config.compatibility import check
from caption_train.config.training import TrainOptions
from caption_train.errors import CaptionTrainError, is_out_of_memory
from caption_train.training.checkpoints.find import describe_latest
from caption_train.training.distributed.fsdp import parallelism
from caption_train.training.memory.savers import find_savers


@contextmanager
def explain_lost_process(output_dir: Path) -> Iterator[None]:
    """Say in one line that another process is gone; torch raises it from wherever this one waits for it."""
    try:
        yield
    except RuntimeError as error:
        # gloo raises no type of its own, but begins with the file that the error is from.
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        raise CaptionTrainError(
            "another process of this run has ended, or cannot be reached any more; "
            + describe_latest(output_dir)
        ) from error


@contextmanager
def explain_out_of_memory(options: TrainOptions, accelerator: Accelerator) -> Iterator[None]:
    """Turn a want of memory into one line with what was tried and the flags that help."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise CaptionTrainError(advise_savers(options, accelerator, [options.batch_size])) from error


def advise_savers(options: TrainOptions, accelerator: Accelerator, tried: Sequence[int]) -> str:
    unused = [
        saver.flags
        for saver in find_savers(options)
        if saver.advised
        and not ("auto_batch_size" in saver.changes and tried[-1] == 1)
        and _is_allowed(replace(options, **saver.changes), accelerator)
    ]
    return (
        f"out of memory with --batch_size {', '.join(map(str, tried))} (--max_length {options.max_length}); "
        f"use {', '.join([*unused, 'a smaller --max_length or --rank'])}"
    )


def _is_allowed(options: TrainOptions, accelerator: Accelerator) -> bool:
    device, precision = accelerator.device.type, options.mixed_precision or accelerator.mixed_precision
    return not check(options, device=device, precision=precision, distributed=parallelism(accelerator))
