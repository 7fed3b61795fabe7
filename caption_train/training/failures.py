"""Explains in one line what ended a run: out of memory, or a lost process."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from caption_train.config.compatibility import check
from caption_train.config.training import TrainOptions
from caption_train.errors import CaptionTrainError, is_out_of_memory
from caption_train.system.damage import explaining_damage
from caption_train.training.checkpoints.find import describe_latest
from caption_train.training.distributed.fsdp import parallelism
from caption_train.training.memory.savers import find_savers


@contextmanager
def explain_lost_process(output_dir: Path, rank_timeout: int) -> Iterator[None]:
    """Turn the error that torch raises when another process is gone into one line."""
    try:
        yield
    except RuntimeError as error:
        # gloo has no error type of its own, but its messages begin with the path of its source file.
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        raise CaptionTrainError(
            "another process of this run has ended, or has not answered for --rank_timeout "
            f"{rank_timeout} seconds; " + describe_latest(output_dir)
        ) from error


@contextmanager
def explain_out_of_memory(options: TrainOptions, accelerator: Accelerator) -> Iterator[None]:
    """Turn an out-of-memory error into one line with what was tried and the flags that help."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise CaptionTrainError(advise_savers(options, accelerator, [options.batch_size])) from error


@contextmanager
def explain_first_step(accelerator: Accelerator) -> Iterator[None]:
    """Turn what a model raises for a batch that its own processor made into one line: the two do not fit.

    Of several processes, it may be that another has ended, which `explain_lost_process` says.
    """
    whole = "--model_id: the model cannot read what its processor makes of an image and a prompt"
    with explaining_damage(whole) if accelerator.num_processes == 1 else nullcontext():
        yield


def advise_savers(options: TrainOptions, accelerator: Accelerator, tried: Sequence[int]) -> str:
    """Return a message for a run that is out of memory, with the memory savers that it could still use.

    Args:
        options: the options of the run.
        accelerator: the accelerator.
        tried: the batch sizes that did not fit.
    """
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
