"""Several processes on one job, as torchrun and `accelerate launch` start them. No torch for a single one."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

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
                distributed.destroy_process_group()


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
