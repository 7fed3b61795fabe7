"""Lets several processes share one job, as torchrun and `accelerate launch` start them.

A single process needs no torch for this.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

from caption_train.errors import CaptionTrainError, UsageError

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long a process waits for others. They meet at the start, at the end and, where images in folders are
captioned, at each piece of the plan (32,768 captions): a slow one may be hours behind."""

OTHER_FILES = 512
"""What a process opens beside: libraries, devices, images, pipes to its workers."""


@dataclass(frozen=True)
class Processes:
    """This process among all: `rank` 0 … `count` - 1, and `local_rank` on its machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that prints and writes for all."""
        return self.rank == 0

    def share(self, make: Callable[[], T]) -> T:
        """Call `make` in the main process; return its result, or end with its error, in every process."""
        if self.count == 1:
            return make()
        from torch.distributed import broadcast_object_list

        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = make()
            except CaptionTrainError as error:
                box[1] = error
        broadcast_object_list(box)
        if box[1] is None:
            return box[0]
        # The main process reports the error; the others end with the same exit code.
        raise box[1] if self.is_main else SystemExit(box[1].exit_code)

    def gather(self, value: T) -> list[T]:
        """Wait for all processes and return the value of each, in rank order."""
        if self.count == 1:
            return [value]
        from torch.distributed import all_gather_object

        values: list[Any] = [None] * self.count
        try:
            all_gather_object(values, value)
        except RuntimeError as error:
            raise CaptionTrainError(f"process {self.rank} lost another process: {error}") from error
        return values

    def leave(self) -> None:
        """Leave the group. A process that ends inside of it can be aborted by the group's threads at exit."""
        if self.count > 1:
            from torch import distributed

            if distributed.is_initialized():
                keep_groups()
                distributed.destroy_process_group()


_kept: list[Any] = []


def keep_groups() -> None:
    """Keep references to this process's groups until it ends. Call it before they are destroyed.

    Freeing a gloo group waits for its threads while holding Python's global lock, but a thread may need that
    lock to free what it has gathered. A finished run of two processes hung like this.
    """
    from torch.distributed import distributed_c10d, is_initialized

    if is_initialized():
        _kept.extend(distributed_c10d._world.pg_map)


def is_one_of_several() -> bool:
    """Tell whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def find_rank() -> int | None:
    """Return the number of this process where a launcher started several; None where it is alone."""
    return int(os.environ.get("RANK", 0)) if is_one_of_several() else None


def refuse_several_processes(command: str) -> None:
    """Raise UsageError where a launcher started a command as several processes that can only be one."""
    if is_one_of_several():
        raise UsageError(f"{command} runs as one process: start it without torchrun or accelerate launch")


def allow_open_files(count: int) -> None:
    """Let this process hold `count` more files open, as far as the system lets it."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def end_at_once(code: int) -> NoReturn:
    """End this process without freeing anything, because freeing its groups can hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def join_processes() -> Processes:
    """Join the group that the environment describes (RANK, WORLD_SIZE, …), or be the only process.

    The group uses gloo on any device, because it exchanges lists of names, never tensors.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        return Processes()
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=PATIENCE)
    return Processes(distributed.get_rank(), count, int(os.environ.get("LOCAL_RANK", 0)))
