"""Several processes on one job, as torchrun and `accelerate launch` start them. No torch for a single one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

from caption_train.errors import CaptionTrainError

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long a process waits for the others. They share no step, so a slow one may be hours behind."""


@dataclass(frozen=True)
class Processes:
    """This process among its peers: `rank` 0 … `count` - 1, `local_rank` on its machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """True in the one process that speaks and writes what is common."""
        return self.rank == 0

    def share(self, make: Callable[[], T]) -> T:
        """Call `make` in the main process and return its result, or end with its error, in every process."""
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
        # One process says what is wrong; the others end with the same exit code.
        raise box[1] if self.is_main else SystemExit(box[1].exit_code)

    def gather(self, value: T) -> list[T]:
        """Wait for all processes and return the value of each, by rank."""
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
        """Leave the group. A process that ends inside it can be aborted by its threads at exit."""
        if self.count > 1:
            from torch import distributed

            if distributed.is_initialized():
                keep_groups()
                distributed.destroy_process_group()


_kept: list[Any] = []


def keep_groups() -> None:
    """Hold on to this process's groups until it ends; call it before they are left.

    Freeing a gloo group waits for its threads with Python's lock in hand, which one of them may be waiting
    for to free what it has just gathered: a run of two processes that was done hung there.
    """
    from torch.distributed import distributed_c10d, is_initialized

    if is_initialized():
        _kept.extend(distributed_c10d._world.pg_map)


def is_one_of_several() -> bool:
    """Tell whether a launcher has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def end_at_once(code: int) -> NoReturn:
    """End this process without freeing anything, its groups above all."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def join_processes() -> Processes:
    """Join the group that the environment names (RANK, WORLD_SIZE, …), or be the only process.

    The group talks over gloo on any device: it exchanges lists of names, never tensors.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        return Processes()
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=PATIENCE)
    return Processes(distributed.get_rank(), count, int(os.environ.get("LOCAL_RANK", 0)))
