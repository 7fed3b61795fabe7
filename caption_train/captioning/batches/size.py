"""Says how many images are captioned at once, with `--batch_size auto` as many as memory has room for.

torch is imported only where it is asked for memory.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from caption_train.errors import CaptionTrainError, is_out_of_memory
from caption_train.system.console import print_line
from caption_train.system.memory import available_memory, peak_memory, start_peak
from caption_train.system.processes import find_rank
from caption_train.system.workers import choose_workers

if TYPE_CHECKING:
    import torch
    from PIL import Image

FIRST = 4
"""Images of the first batches with auto."""
MOST_AT_ONCE = 64
MOST_ON_DEVICE = {"cuda": MOST_AT_ONCE, "cpu": 16}
"""The more images, the more a kill loses."""
SHARE = {"cuda": 0.75, "cpu": 0.4}
"""Of the free memory, what a batch may take as far as the one before tells. Later captions may be longer, and
a CPU's memory that is too small ends the process, not the batch."""


IN_STREAMS = 1.0
"""Megapixels of an image that comes in a stream, about: those in shards are small."""


@dataclass
class BatchSize:
    """How many images are captioned at once, for several calls of `caption_images` after each other.

    Attributes:
        asked: the value of `--batch_size`.
        device: where the model runs.
        now: images of the next batch. Halved when memory does not suffice; with auto it doubles as long as
            there is room for twice of what a batch took.
        most: what it grows to.
        said: the lines that were printed.
        rank: the number of this process among several.
    """

    asked: int | Literal["auto"]
    device: torch.device
    now: int = field(init=False)
    most: int = field(init=False)
    said: set[str] = field(default_factory=set)
    rank: int | None = field(default_factory=find_rank)
    _held: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.now = FIRST if self.is_auto else self.asked
        self.most = MOST_ON_DEVICE.get(self.device.type, FIRST) if self.is_auto else self.asked

    @classmethod
    def of(cls, asked: BatchSize | int | Literal["auto"], device: torch.device) -> BatchSize:
        """Return a batch size as it is, or that of a flag's value."""
        return asked if isinstance(asked, BatchSize) else cls(asked, device)

    @property
    def is_auto(self) -> bool:
        """Whether it goes by memory."""
        return self.asked == "auto"

    @contextmanager
    def measuring(self, rows: int) -> Iterator[None]:
        """Caption `rows` images within; the next batches may be larger by what that took."""
        # Batches made ahead, before it grew, are smaller and say nothing.
        if not self.is_auto or self.now >= self.most or rows < self.now:
            yield
            return
        if self.device.type == "cuda" or self._held is None:
            self._held = start_peak(self.device)
        yield
        self._grow(peak_memory(self.device) - self._held)

    def halve(self) -> str:
        """Make batches smaller, of which one did not fit; return the line that says so.

        Each process has its own memory and says it for itself.
        """
        self.now, before = self.now // 2, self.now
        self.most = self.now
        who = "" if self.rank is None else f"process {self.rank}: "
        return f"{who}out of memory with --batch_size {before}: going on with {self.now}"

    def limit(self, most: int) -> None:
        """Let batches grow to `most` images only."""
        while self.now < self.most > most:
            self.most //= 2

    def say(self, line: str) -> None:
        """Print a line once, and where several processes would say the same, by the first of them."""
        if line not in self.said:
            if not self.rank:
                print_line(line)
            self.said.add(line)

    def choose_workers(self, images: Sequence[Path | Image.Image] | None) -> int:
        """Return what `--num_workers auto` means, and print it once.

        images: what is captioned; None for a stream, of which nobody asks for the size of each image.
        """
        from caption_train.data.images import estimate_megapixels

        megapixels = IN_STREAMS if images is None else estimate_megapixels(images)
        count = choose_workers(self.device, megapixels, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self.say(f"--num_workers auto: {count}")
        return count

    def _grow(self, taken: int) -> None:
        """Double it if a batch that takes twice as much fits."""
        sharing = 1 if self.device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        room = available_memory(self.device) * SHARE[self.device.type] / sharing
        if 2 * taken <= room:
            self.now *= 2
        else:
            self.most = self.now
        if self.now >= self.most:
            self.say(f"--batch_size auto: {self.now}")


class GrowingBatches:
    """The numbers of `count` images in batches, each as large as `size` says when it is asked for."""

    def __init__(self, count: int, size: BatchSize) -> None:
        self._count, self._size = count, size

    def __iter__(self) -> Iterator[list[int]]:
        start = 0
        while start < self._count:
            end = min(start + self._size.now, self._count)
            yield list(range(start, end))
            start = end


class OutOfMemoryError(CaptionTrainError):
    """Memory does not suffice, which a smaller batch may mend."""


def free_memory(device: torch.device) -> None:
    """Give back what the tensors of a batch that did not fit still hold."""
    gc.collect()
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()


@contextmanager
def out_of_memory_explained(device: torch.device, batch_size: int | Literal["auto"]) -> Iterator[None]:
    """Turn an out-of-memory error into one line that names the flags that help."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        lower = "--beams" if batch_size in (1, "auto") else "--batch_size, --beams"
        raise OutOfMemoryError(
            f"out of memory on {device} with --batch_size {batch_size}: lower {lower} or "
            "--max_token_length, or try --dtype bfloat16"
        ) from error
