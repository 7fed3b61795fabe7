"""Decides which images to caption, with which model and prompt, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from caption_train.adapters.record import Base, name_served, read_adapter, read_request, resolve_base
from caption_train.captioning.inputs import Inputs
from caption_train.captioning.outputs import KeyedOutputs, Outputs, Sink
from caption_train.captioning.prompts import Prompts, Task, read_named_prompts
from caption_train.captioning.sinks.caption_file import CaptionFile
from caption_train.captioning.sinks.drawings import Drawings
from caption_train.captioning.sinks.existing import Existing
from caption_train.captioning.sinks.sidecars import Sidecars
from caption_train.captioning.storage.image_list import blocks_of
from caption_train.captioning.storage.names import FirstLines
from caption_train.captioning.storage.shard import Shard
from caption_train.config.captioning import CaptionOptions
from caption_train.data.formats import describe_unread, name_ending
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families.base import Family, Generated

CHUNK = 32_768
"""Captions that are made between two looks at what is left, for all processes together."""


@dataclass(frozen=True)
class CaptionPlan:
    """What a captioning run works on.

    Attributes:
        base: the model and its prompt.
        unread: a line for each image format in the folders that is not read.
        prompts: what is asked of the images.
        missing: one line per image that is not there.
    """

    base: Base
    unread: Sequence[str]
    prompts: Prompts
    missing: FirstLines


@dataclass(frozen=True)
class Chunk:
    """Captions to make now.

    Attributes:
        tasks: the captions, those of an image one after the other.
        is_last: whether no others follow.
        most: how many images may be captioned from here on, those of this chunk among them.
    """

    tasks: Sequence[Task]
    is_last: bool
    most: int

    def describe(self) -> str:
        """Return how many images are captioned, exactly or at most."""
        if self.is_last:
            return f"{len(dict.fromkeys(task.image for task in self.tasks)):,}"
        return f"up to {self.most:,}"


class Planner:
    """Finds what is left to caption, chunk by chunk, while the captions before it are made.

    Args:
        images: all images that were asked for, in order.
        outputs: says which captions are missing; opened.
        plan: what is asked of the images.
        limit: the most images to caption.
        size: captions in a chunk. A multiple of what all processes caption at once, so that their batches are
            those that one chunk of all captions would have.

    Attributes:
        missing: one line per image that is not there, or cannot be asked about.
        kept: how many images have all their captions already, of those that were looked at.
    """

    def __init__(
        self, images: Sequence[Path], outputs: KeyedOutputs, plan: CaptionPlan, limit: int | None, size: int
    ) -> None:
        self.missing, self.kept = plan.missing, 0
        self._images, self._looked = images, 0
        self._outputs, self._prompts = outputs, plan.prompts
        self._blocks = blocks_of(images)
        self._limit, self._chosen, self._size = limit, 0, size
        self._waiting: list[Task] = []
        self._left: int | None = None
        self._is_first = True

    def next_chunk(self) -> Chunk:
        """Return the next captions to make.

        Raises:
            UsageError: an image of the first chunk cannot get a caption; later ones are named in `missing`.
        """
        while len(self._waiting) <= self._size and self._left is None:
            block = next(self._blocks, None)
            if block is None:
                self._left = 0
            else:
                self._plan(block)
        tasks, self._waiting = self._waiting[: self._size], self._waiting[self._size :]
        self._is_first = False
        return Chunk(tasks, not self._waiting, self._count_ahead(len(tasks)))

    def _count_ahead(self, now: int) -> int:
        """Return how many images may be captioned from this chunk on, `now` captions of them at once."""
        waiting = dict.fromkeys(task.image for task in self._waiting)
        ahead = len(self._images) - self._looked
        if self._left is not None:
            ahead = 0
        elif self._limit is not None:
            ahead = min(ahead, self._limit - self._chosen)
        return now // len(self._prompts.keys) + len(waiting) + ahead

    def count_left(self) -> int:
        """Return how many images `--limit` leaves for another run; after the last chunk."""
        for block in self._blocks:
            self._left = (self._left or 0) + len(self._look(block)[1])
        return self._left or 0

    def _plan(self, block: Sequence[Path]) -> None:
        lacking, images = self._look(block)
        self._looked += len(block)
        room = len(images) if self._limit is None else self._limit - self._chosen
        chosen = set(images[:room])
        self._chosen += len(chosen)
        if self._limit is not None and self._chosen >= self._limit:
            self._left = len(images) - len(chosen)
        for image, key in lacking:
            if image in chosen:
                try:
                    self._waiting.append(self._prompts.find(image, key))
                except CaptionTrainError as error:
                    self.missing.append(str(error))

    def _look(self, block: Sequence[Path]) -> tuple[list[tuple[Path, str]], list[Path]]:
        """Return which captions these images lack, and which images that are; count those that lack none."""
        missing = self.missing.total
        lacking = self._find_lacking(block)
        images = list(dict.fromkeys(image for image, _ in lacking))
        self.kept += len(block) - len(images) - (self.missing.total - missing)
        return lacking, images

    def _find_lacking(self, block: Sequence[Path]) -> list[tuple[Path, str]]:
        try:
            return self._outputs.find_lacking(block)
        except UsageError as error:
            if self._is_first:
                raise
            if len(block) == 1:
                self.missing.append(str(error))
                return []
        return [found for image in block for found in self._find_lacking([image])]


def open_outputs(options: CaptionOptions, family: Family, rank: int = 0) -> Outputs:
    """Return what one process writes captions to.

    Args:
        options: the options of the run.
        family: draws the answers for `--visualize`.
        rank: the rank of this process.

    Raises:
        UsageError: the family has no answers that can be drawn.
    """
    outputs = _open_outputs(options, rank, options.caption_extension)
    if options.visualize:
        if not family.draws_answers:
            raise UsageError(f"--visualize: {family.title} gives no boxes to draw")
        outputs.sinks.append(Drawings(options.visualize, family.draw_answer))
    return outputs


def open_keyed_outputs(options: CaptionOptions, family: Family, rank: int = 0) -> KeyedOutputs:
    """Return what one process writes captions to, for every prompt; see `open_outputs`."""
    keys = list(read_named_prompts(options.prompts))
    if not keys:
        return KeyedOutputs({"": open_outputs(options, family, rank)})
    extension = "." + options.caption_extension.lstrip(".")
    # The first one locks file and folders for all.
    return KeyedOutputs(
        {
            key: _open_outputs(options, rank, name_ending(key, extension), key, locks=key == keys[0])
            for key in keys
        }
    )


def _open_outputs(
    options: CaptionOptions, rank: int, extension: str, column: str = "text", *, locks: bool = True
) -> Outputs:
    sinks: list[Sink] = []
    shard = Shard.parse(options.shard)
    existing = Existing.from_options(options)
    if options.save_captions:
        sinks.append(Sidecars(extension, existing=existing, rank=rank, locks=locks, shard=shard))
    if options.output:
        file = CaptionFile(options.output, rank, existing=existing, column=column, locks=locks, shard=shard)
        sinks.append(file)
    return Outputs(sinks, adds=existing.adds)


def make_plan(options: CaptionOptions, family: Family, inputs: Inputs) -> CaptionPlan:
    """Find model and prompts; raise UsageError if something cannot work."""
    base = find_base(options, family)
    prompts = Prompts(options, family, base.prompt)
    return CaptionPlan(base, describe_unread(inputs.unread), prompts, inputs.missing)


def find_base(options: CaptionOptions, family: Family) -> Base:
    """Return model and prompt of a run, be the model loaded here or served; UsageError if they cannot be."""
    adapter = read_adapter(options.peft_model) if options.peft_model else None
    prompt, settings = read_request(options, family)
    if options.endpoint:
        return name_served(family, options.model, prompt, settings, adapter)
    return resolve_base(family, options.base_model, options.revision, prompt, adapter, settings=settings)


@dataclass(frozen=True)
class CaptionResult:
    """A captioned image. size: its (width, height) in pixels, upright."""

    image: Path
    size: tuple[int, int]
    generated: Generated


@dataclass(frozen=True)
class Unreadable:
    """An image that could not be captioned. reason: one line that begins with its path."""

    image: Path
    reason: str
