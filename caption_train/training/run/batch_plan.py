"""Which samples each process trains on at each step, computed from the seed."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from torch.utils.data import Sampler

Key = tuple[int, int]
"""(epoch, index): a sample's augmentation depends on these and the seed only, so any worker can resume it."""


@dataclass
class BatchPlan(Sampler):
    """Which samples each process reads at every optimizer step: a function of the seed, nothing else.

    An epoch is a permutation of the dataset, cut into effective batches of batch_size × accumulation_steps ×
    num_processes samples. Every sample is read once an epoch by one process, whatever their number; a process
    with nothing left to read in a short last batch gets an empty micro-batch.
    """

    num_samples: int
    batch_size: int = 1
    accumulation_steps: int = 1
    num_processes: int = 1
    process_index: int = 0
    epochs: int = 1
    seed: int = 0
    first_step: int = 0

    @property
    def effective_batch_size(self) -> int:
        """Samples behind one optimizer step."""
        return self.batch_size * self.accumulation_steps * self.num_processes

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        return math.ceil(self.num_samples / self.effective_batch_size)

    @property
    def total_steps(self) -> int:
        """Optimizer steps in the whole run."""
        return self.steps_per_epoch * self.epochs

    def epoch_of(self, step: int) -> int:
        """Return the epoch, from 1, that the 0-based optimizer step belongs to."""
        return step // self.steps_per_epoch + 1

    def micro_batches(self, step: int) -> list[list[Key]]:
        """Return what this process reads for the 0-based optimizer step: as many lists on every process."""
        epoch = self.epoch_of(step)
        start = (step % self.steps_per_epoch) * self.effective_batch_size
        chosen = self._order(epoch)[start : start + self.effective_batch_size]
        width = self.batch_size * self.num_processes
        mine = self.process_index * self.batch_size
        rounds = [chosen[i : i + width] for i in range(0, len(chosen), width)]
        return [[(epoch, index) for index in r[mine : mine + self.batch_size]] for r in rounds]

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self.first_step, self.total_steps):
            yield from self.micro_batches(step)

    def __len__(self) -> int:
        per_epoch = math.ceil(self.num_samples / (self.batch_size * self.num_processes))
        epochs, steps = divmod(self.first_step, self.steps_per_epoch)
        return (self.epochs - epochs) * per_epoch - steps * self.accumulation_steps

    def _order(self, epoch: int) -> list[int]:
        if getattr(self, "_epoch", None) != epoch:
            self._epoch, self._permutation = epoch, list(range(self.num_samples))
            random.Random(f"{self.seed} {epoch}").shuffle(self._permutation)
        return self._permutation


def is_due(every: int | None, count: int) -> bool:
    """Return whether something done every so often (never, if None) is due at this count."""
    return every is not None and count % every == 0
