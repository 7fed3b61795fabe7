"""The processes of one training run: they start from the same facts, fail together, speak with one voice."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from caption_train.checkpoint import describe_latest
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.model_card import TrainingRecord

LISTED = 10
"""Differences that are named: a dataset may have thousands."""


def say(accelerator: Accelerator, line: str) -> None:
    """Print a line to stderr, once for all processes."""
    if accelerator.is_main_process:
        print(line, file=sys.stderr, flush=True)


@contextmanager
def fail_together(accelerator: Accelerator) -> Iterator[None]:
    """Wait for all processes at the end of a block; where it failed in any of them, it fails in all.

    The main process raises the first failure, the others leave silently with its exit code.
    """
    failure = None
    try:
        yield
    except CaptionTrainError as error:
        failure = error
    failures = gather_object([failure and (str(failure), failure.exit_code)])
    if accelerator.num_processes == 1 and failure is not None:
        raise failure
    for rank, found in enumerate(failures):
        if found is not None:
            words, exit_code = found
            error = CaptionTrainError(words if rank == 0 else f"process {rank}: {words}")
            error.exit_code = exit_code
            raise error if accelerator.is_main_process else SystemExit(exit_code)


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
def speak_as_one(accelerator: Accelerator) -> Iterator[None]:
    """Let a failure that all processes have at once be told by the main process only."""
    try:
        yield
    except CaptionTrainError as error:
        if accelerator.is_main_process:
            raise
        raise SystemExit(error.exit_code) from error


def list_facts(record: TrainingRecord, checkpoint: Path | None) -> dict[str, Any]:
    """Return what must be the same in every process, beside its flags: machines may differ in these."""
    return {
        **{f"dataset's {name}": value for name, value in record.dataset.items()},
        **record.versions,
        "the checkpoint to go on from": checkpoint and checkpoint.name,
    }


def check_agreement(accelerator: Accelerator, facts: Mapping[str, Any]) -> None:
    """Raise UsageError where the processes start from different facts, naming them."""
    everyone = gather_object([dict(facts)])
    with fail_together(accelerator):
        differences = [
            f"{name} is {theirs.get(name)!r} in process {rank}, {everyone[0].get(name)!r} in process 0"
            for rank, theirs in enumerate(everyone)
            for name in everyone[0] | theirs
            if theirs.get(name) != everyone[0].get(name)
        ]
        if differences:
            more = f"; and {len(differences) - LISTED} more" if len(differences) > LISTED else ""
            raise UsageError(f"the processes of this run disagree: {'; '.join(differences[:LISTED])}{more}")
