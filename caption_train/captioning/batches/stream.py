"""Captions images that come one after the other, without knowing how many there are."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any, Literal

from torch.utils.data import Dataset, Sampler

from caption_train.captioning.batches.encoding import ImageFiles
from caption_train.captioning.batches.size import BatchSize, OutOfMemoryError
from caption_train.captioning.generate import CaptionRun
from caption_train.captioning.plan import CaptionResult, Unreadable
from caption_train.captioning.prompts import Task
from caption_train.system.signals import not_limited


def caption_stream(
    run: CaptionRun, tasks: Iterable[Task], batch_size: BatchSize | int | Literal["auto"]
) -> Iterator[CaptionResult | Unreadable]:
    """Caption images, in the batches that `caption_images` would make of a list of them.

    Args:
        run: the model and its settings.
        tasks: images and what they are asked; read a few batches ahead of the results.
        batch_size: as in `caption_images`.

    Yields:
        A result for each image, in order, as soon as its batch is done.

    Raises:
        CaptionTrainError: as `caption_images`.
    """
    size, left = BatchSize.of(batch_size, run.model.device), iter(tasks)
    waiting: deque[Task] = deque()
    while True:
        # What has no result yet comes first, then what was left of that the last time.
        left = chain(list(waiting), left)
        waiting.clear()
        batches = _Batches(left, size, waiting)
        loader = run.load_batches(
            _TaskImages(run.find_least_side()),
            size,
            run.num_workers,
            run.generation.prompt,
            batch_sampler=batches,
        )
        try:
            for result in run.caption(loader, size):
                waiting.popleft()
                yield result
        except OutOfMemoryError:
            if size.now == 1:
                raise
            line = size.halve()
        else:
            return
        run.make_room(line)


class _Batches(Sampler):
    """Makes batches of what comes, and keeps what has no result yet in `waiting`."""

    def __init__(self, tasks: Iterator[Task], size: BatchSize, waiting: deque[Task]) -> None:
        self._tasks, self._size, self._waiting = tasks, size, waiting

    def __iter__(self) -> Iterator[list[Task]]:
        while batch := self._take():
            self._waiting.extend(batch)
            yield batch

    def _take(self) -> list[Task]:
        # torch asks for what comes next while it waits for a worker. That may take long: a shard is fetched.
        with not_limited():
            return list(islice(self._tasks, self._size.now))


class _TaskImages(Dataset):
    """Opens the images of tasks, in the workers. at_least: as in ImageFiles."""

    def __init__(self, at_least: int | None) -> None:
        self._at_least = at_least

    def __getitem__(self, task: Task) -> dict[str, Any]:
        return ImageFiles([task.image], [task.prompt], at_least=self._at_least)[0]
