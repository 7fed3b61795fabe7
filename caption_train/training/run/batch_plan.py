"""Decides which samples each process trains on at each step, computed from the seed alone."""

import math
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch.utils.data import Sampler

Key = tuple[int, int]
"""(epoch, index) of a sample. Augmentation depends on these and the seed alone, so any worker can redo it."""


@dataclass
class BatchPlan(Sampler):
    """Which samples each process reads at every optimizer step.

    Each epoch is a permutation of the dataset, cut into effective batches of batch_size × accumulation_steps
    × num_processes samples. One process reads each sample once per epoch. In a short last batch, a process
    without samples gets an empty micro-batch.

    >>> plan = BatchPlan(num_samples=5, batch_size=1, accumulation_steps=2, num_processes=2)
    >>> plan.steps_per_epoch, plan.micro_batches(0), plan.micro_batches(1)
    (2, [[(1, 0)], [(1, 2)]], [[(1, 1)]])
    >>> other = BatchPlan(num_samples=5, batch_size=1, accumulation_steps=2, num_processes=2, process_index=1)
    >>> other.micro_batches(0), other.micro_batches(1)
    ([[(1, 3)], [(1, 4)]], [[]])

    Attributes:
        num_samples: size of the dataset.
        batch_size: samples per process and micro-batch.
        accumulation_steps: micro-batches per optimizer step.
        num_processes: how many processes train together.
        process_index: the rank of this process.
        epochs: how often each sample is read.
        seed: determines the permutations.
        first_step: the optimizer step to start from, 0 unless the run is resumed.
        lengths: of each sample, to make batches of samples of about one length; None makes them at random.
    """

    num_samples: int
    batch_size: int = 1
    accumulation_steps: int = 1
    num_processes: int = 1
    process_index: int = 0
    epochs: int = 1
    seed: int = 0
    first_step: int = 0
    lengths: Sequence[int] | None = field(default=None, repr=False, compare=False)
    _orders: dict[int, array] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def effective_batch_size(self) -> int:
        """Samples in one optimizer step."""
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
        """Return the keys that this process reads at a 0-based step; every process gets as many lists."""
        epoch = self.epoch_of(step)
        start = (step % self.steps_per_epoch) * self.effective_batch_size
        chosen = self._order(epoch)[start : start + self.effective_batch_size]
        width = self.batch_size * self.num_processes
        mine = self.process_index * self.batch_size
        # A round holds one micro-batch of every process, side by side.
        rounds = [chosen[i : i + width] for i in range(0, len(chosen), width)]
        return [[(epoch, index) for index in r[mine : mine + self.batch_size]] for r in rounds]

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self.first_step, self.total_steps):
            yield from self.micro_batches(step)

    def __len__(self) -> int:
        per_epoch = math.ceil(self.num_samples / (self.batch_size * self.num_processes))
        epochs, steps = divmod(self.first_step, self.steps_per_epoch)
        return (self.epochs - epochs) * per_epoch - steps * self.accumulation_steps

    def measure_padding(self, lengths: Sequence[int]) -> float:
        """Return how much of the first epoch's micro-batches is padding, as a part of 1.

        Args:
            lengths: of each sample.
        """
        order, used, padded = self._order(1), 0, 0
        for start in range(0, len(order), self.effective_batch_size):
            batch = order[start : start + self.effective_batch_size]
            for first in range(0, len(batch), self.batch_size):
                found = [lengths[index] for index in batch[first : first + self.batch_size]]
                used += sum(found)
                padded += max(found) * len(found)
        return 1 - used / max(padded, 1)

    def _order(self, epoch: int) -> array:
        if epoch not in self._orders:
            permutation = list(range(self.num_samples))
            # Every process makes the same permutation, so none has to be sent.
            rng = random.Random(f"{self.seed} {epoch}")
            rng.shuffle(permutation)
            if self.lengths is not None:
                permutation = group_by_length(permutation, self.lengths, self.effective_batch_size, rng)
            # Two, because the loader reads ahead into the next epoch while the loop is still in this one.
            while len(self._orders) > 1:
                del self._orders[min(self._orders)]
            # A quarter of a list's memory, and nothing for forked workers to copy.
            self._orders[epoch] = array("Q", permutation)
        return self._orders[epoch]


SORTED_TOGETHER = 50
"""Effective batches that are sorted together: more save little more padding, and mix an epoch less."""


def group_by_length(
    order: Sequence[int], lengths: Sequence[int], batch_size: int, rng: random.Random
) -> list[int]:
    """Return a permutation whose batches hold samples of about one length, the batches in random order.

    A short batch stays the last one. Only the effective batch size counts, not how it is cut into
    micro-batches and processes.

    Args:
        order: a random permutation.
        lengths: of each sample.
        batch_size: samples in an optimizer step.
        rng: shuffles the batches.
    """
    whole = len(order) // batch_size * batch_size
    pieces = range(0, whole, SORTED_TOGETHER * batch_size)
    kept = [order[start : min(start + SORTED_TOGETHER * batch_size, whole)] for start in pieces]
    ordered = [index for piece in kept for index in sorted(piece, key=lengths.__getitem__)]
    batches = [ordered[start : start + batch_size] for start in range(0, whole, batch_size)]
    rng.shuffle(batches)
    return [index for batch in batches for index in batch] + list(order[whole:])


def is_due(every: int | None, count: int) -> bool:
    """Return whether something done every `every` steps or epochs (None: never) is due at this count."""
    return every is not None and count % every == 0
