"""What runs on the nodes of a Ray cluster: tasks that decode and encode images, actors with the model."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from caption_train.adapters.record import Base
from caption_train.captioning.prompts import Task
from caption_train.config.captioning import CaptionOptions
from caption_train.families import get_family
from caption_train.packed import PackedFile


@dataclass(frozen=True)
class RayWork:
    """What tasks and actors need to know; it is sent to them.

    Attributes:
        family: its name.
        base: the base and its prompt.
        options: the flags; paths in them are absolute.
    """

    family: str
    base: Base
    options: CaptionOptions


class CaptionActor:
    """Holds the model, in a process of its own."""

    def __init__(self, work: RayWork) -> None:
        self._work, self._family = work, get_family(work.family)
        self._loaded: tuple[Any, ...] | None = None
        self._size: Any = None

    def load(self) -> None:
        """Load the model, if this process has not done so. Not in the constructor: what it raises is lost."""
        if self._loaded is not None:
            return
        from caption_train.captioning.batches.size import BatchSize
        from caption_train.captioning.generate import load_captioner, make_generation
        from caption_train.system.devices import choose_device

        work = self._work
        device = choose_device(work.options.device)
        model, processor = load_captioner(self._family, work.base, work.options, device)
        generation = make_generation(work.options, work.base.prompt)
        self._loaded = self._family, model, processor, generation
        self._size = BatchSize(work.options.batch_size, device)

    def caption(self, encoded: bytes) -> list[Any]:
        """Caption what `encode` made; return the results without their images.

        Raises:
            CaptionTrainError: nothing can be captioned.
        """
        self.load()
        tasks, batch = pickle.loads(encoded)
        whole = self._work.options.batch_size
        results = self._try_whole(batch) if self._size.now == whole else None
        if results is None:
            self._size.now = min(self._size.now, max(whole // 2, 1))
            results = self._caption_parts(tasks)
        # Images of Parquet files would carry their bytes back.
        return [replace(result, image=Path()) for result in results]

    def _try_whole(self, batch: dict[str, Any]) -> list[Any] | None:
        """Return the results; None where memory does not suffice."""
        from caption_train.captioning.batches.size import OutOfMemoryError
        from caption_train.captioning.generate import CaptionRun

        try:
            run = CaptionRun(*self._loaded, 0, 0, keeping=None, graphs=None)
            return run.caption_batch(batch, self._size.now)
        except OutOfMemoryError:
            if self._size.now == 1:
                raise
            return None

    def _caption_parts(self, tasks: Sequence[Task]) -> list[Any]:
        from caption_train.captioning.batches.size import free_memory
        from caption_train.captioning.generate import caption_images

        *loaded, generation = self._loaded
        free_memory(loaded[1].device)
        images, prompts = [task.image for task in tasks], [task.prompt for task in tasks]
        return list(caption_images(*loaded, images, generation, batch_size=self._size, prompts=prompts))


def encode(tasks: Sequence[Task], shared: Sequence[Any]) -> bytes:
    """Open and encode the images of a batch.

    Args:
        tasks: what is asked of the images.
        shared: a reference to the work and its processor. In a list: Ray would fetch a bare one every time.
    """
    from caption_train.captioning.batches.encoding import Encode, ImageFiles

    work, processor = _fetch(shared[0])
    files = ImageFiles([task.image for task in tasks], [task.prompt for task in tasks])
    encode_items = Encode(get_family(work.family), processor, work.base.prompt)
    return pickle.dumps((tasks, encode_items([files[index] for index in range(len(files))])))


@lru_cache(maxsize=1)
def _fetch(reference: Any) -> tuple[RayWork, Any]:
    """Return an object of the cluster, which this process keeps."""
    import ray

    return ray.get(reference)


def load_processor(work: RayWork) -> tuple[Any, list[str]]:
    """Return the processor and what it says of its inputs; shows early whether nodes can load the model."""
    family, base = get_family(work.family), work.base
    _, processor = family.load(base.model_id, revision=base.revision)
    family.set_up(processor, base.model_id, base.settings, [base.prompt])
    return processor, family.describe_inputs(processor)


def detach(task: Task) -> Task:
    """Return a task whose image is found from any folder, and on other machines as far as that can be."""
    if not isinstance(task.image, PackedFile):
        return replace(task, image=task.image.absolute())
    try:
        return replace(task, image=task.image.detach())
    except (OSError, ValueError):
        # Who opens it says why.
        return task
