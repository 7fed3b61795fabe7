"""Captions images that come one after the other, without knowing how many there are."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

from torch.utils.data import Dataset, Sampler

from caption_train.captioning.encoding import ImageFiles
from caption_train.captioning.generate import CaptionRun, OutOfMemoryError, free_memory
from caption_train.captioning.plan import CaptionResult, Unreadable
from caption_train.captioning.prompts import Task
from caption_train.system.signals import not_limited


def caption_stream(
    run: CaptionRun, tasks: Iterable[Task], batch_size: int
) -> Iterator[CaptionResult | Unreadable]:
    """Caption images, in the batches that `caption_images` would make of a list of them.

    Args:
        run: the model and its settings.
        tasks: images and what they are asked; read a few batches ahead of the results.
        batch_size: images per batch; halved when memory does not suffice.

    Yields:
        A result for each image, in order, as soon as its batch is done.

    Raises:
        CaptionTrainError: as `caption_images`.
    """
    left = iter(tasks)
    waiting: deque[Task] = deque()
    while True:
        # What has no result yet comes first, then what was left of that the last time.
        left = chain(list(waiting), left)
        waiting.clear()
        batches = _Batches(left, batch_size, waiting)
        loader = run.load_batches(
            _TaskImages(), batch_size, run.num_workers, run.generation.prompt, batch_sampler=batches
        )
        try:
            for result in run.caption(loader, batch_size):
                waiting.popleft()
                yield result
        except OutOfMemoryError:
            if batch_size == 1:
                raise
            batch_size //= 2
            line = f"out of memory with --batch_size {batch_size * 2}: going on with {batch_size}"
        else:
            return
        # Outside of the except block, where the traceback would keep the batch's tensors alive.
        if run.graphs:
            run.graphs.free()
        free_memory(run.model.device)
        print(line, file=sys.stderr)


class _Batches(Sampler):
    """Makes batches of what comes, and keeps what has no result yet in `waiting`."""

    def __init__(self, tasks: Iterator[Task], batch_size: int, waiting: deque[Task]) -> None:
        self._tasks, self._batch_size, self._waiting = tasks, batch_size, waiting

    def __iter__(self) -> Iterator[list[Task]]:
        while batch := self._take():
            self._waiting.extend(batch)
            yield batch

    def _take(self) -> list[Task]:
        # torch asks for what comes next while it waits for a worker. That may take long: a shard is fetched.
        with not_limited():
            return list(islice(self._tasks, self._batch_size))


class _TaskImages(Dataset):
    """Opens the images of tasks: workers are sent where an image is, and read it."""

    def __getitem__(self, task: Task) -> dict[str, Any]:
        return ImageFiles([task.image], [task.prompt])[0]
