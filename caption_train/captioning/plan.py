"""Decides which images to caption, with which model and prompt, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from caption_train.adapters.record import Base, name_served, read_adapter, read_request, resolve_base
from caption_train.captioning.inputs import find_inputs
from caption_train.captioning.outputs import KeyedOutputs, Outputs, Sink
from caption_train.captioning.prompts import Prompts, Task, read_named_prompts
from caption_train.captioning.sinks.caption_file import CaptionFile
from caption_train.captioning.sinks.drawings import Drawings
from caption_train.captioning.sinks.existing import Existing
from caption_train.captioning.sinks.sidecars import Sidecars
from caption_train.config.captioning import CaptionOptions
from caption_train.data.formats import describe_unread
from caption_train.errors import CaptionTrainError, UsageError
from caption_train.families.base import Family, Generated


@dataclass(frozen=True)
class CaptionPlan:
    """What a captioning run works on.

    Attributes:
        images: all images that were asked for, in order.
        tasks: the captions that are made now, those of an image one after the other.
        missing: one line per image that is not there, or cannot be asked about.
        base: the model and its prompt.
        unread: a line for each image format in the folders that is not read.
        left: how many images `--limit` leaves for another run.
        kept: how many images have all their captions already.
        lines: what to say of the prompts.
    """

    images: Sequence[Path]
    tasks: Sequence[Task]
    missing: Sequence[str]
    base: Base
    unread: Sequence[str] = ()
    left: int = 0
    kept: int = 0
    lines: Sequence[str] = ()

    @property
    def pending(self) -> list[Path]:
        """The images that are captioned now."""
        return list(dict.fromkeys(task.image for task in self.tasks))


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
            key: _open_outputs(
                options, rank, extension if key == "text" else f".{key}{extension}", key, locks=key == keys[0]
            )
            for key in keys
        }
    )


def _open_outputs(
    options: CaptionOptions, rank: int, extension: str, column: str = "text", *, locks: bool = True
) -> Outputs:
    sinks: list[Sink] = []
    existing = Existing.from_options(options)
    if options.save_captions:
        sinks.append(Sidecars(extension, existing=existing, rank=rank, locks=locks))
    if options.output:
        sinks.append(CaptionFile(options.output, rank, existing=existing, column=column, locks=locks))
    return Outputs(sinks, adds=existing.adds)


def make_plan(options: CaptionOptions, family: Family, outputs: KeyedOutputs) -> CaptionPlan:
    """Find images, model and prompts; raise UsageError if something cannot work."""
    inputs = find_inputs(options.images, recursive=options.recursive)
    adapter = read_adapter(options.peft_model) if options.peft_model else None
    prompt, settings = read_request(options, family)
    if options.endpoint:
        base = name_served(family, options.model, prompt, settings, adapter)
    else:
        base = resolve_base(family, options.base_model, options.revision, prompt, adapter, settings=settings)
    prompts = Prompts(options, family, base.prompt)
    pending = outputs.find_pending(inputs.images)
    images = list(dict.fromkeys(image for image, _ in pending))
    chosen = set(images[: options.limit])
    tasks, missing = [], list(inputs.missing)
    for image, key in pending:
        if image in chosen:
            try:
                tasks.append(prompts.find(image, key))
            except CaptionTrainError as error:
                missing.append(str(error))
    left, kept = len(images) - len(chosen), len(inputs.images) - len(images)
    unread = describe_unread(inputs.unread)
    return CaptionPlan(inputs.images, tasks, missing, base, unread, left, kept, prompts.describe())


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
