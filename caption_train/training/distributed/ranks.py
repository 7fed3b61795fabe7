"""Keeps the processes of a run together: the same facts at the start, errors on all ranks, printed once."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from caption_train.errors import CaptionTrainError, ProcessError, UsageError

LISTED = 10
"""How many differences are named at most, because a dataset may have thousands."""


@contextmanager
def raise_on_all_ranks(accelerator: Accelerator) -> Iterator[None]:
    """Wait for all processes at the end of the `with` block; if it failed in any of them, fail in all.

    The main process raises the first failure. The others exit with the same code and print nothing.
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
def report_once(accelerator: Accelerator) -> Iterator[None]:
    """Let only the main process report an error that all processes have at the same time."""
    try:
        yield
    except ProcessError:
        raise
    except CaptionTrainError as error:
        if accelerator.is_main_process:
            raise
        raise SystemExit(error.exit_code) from error


def check_same_on_all_ranks(accelerator: Accelerator, facts: Mapping[str, Any]) -> None:
    """Compare facts between processes.

    Args:
        accelerator: connects the processes.
        facts: name → value, which must be equal on all ranks.

    Raises:
        UsageError: names the facts that differ.
    """
    everyone = gather_object([dict(facts)])
    with raise_on_all_ranks(accelerator):
        differences = [
            f"{name} is {theirs.get(name)!r} in process {rank}, {everyone[0].get(name)!r} in process 0"
            for rank, theirs in enumerate(everyone)
            for name in everyone[0] | theirs
            if theirs.get(name) != everyone[0].get(name)
        ]
        if differences:
            more = f"; and {len(differences) - LISTED} more" if len(differences) > LISTED else ""
            raise UsageError(f"the processes of this run disagree: {'; '.join(differences[:LISTED])}{more}")
