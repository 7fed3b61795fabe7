"""Decides which images to caption, with which model and prompt, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from caption_train.adapters.record import Base, name_served, read_adapter, read_request, resolve_base
from caption_train.captioning.caption_file import CaptionFile
from caption_train.captioning.drawings import Drawings
from caption_train.captioning.existing import Existing
from caption_train.captioning.inputs import find_inputs
from caption_train.captioning.outputs import Outputs, Sink
from caption_train.captioning.sidecars import Sidecars
from caption_train.config.captioning import CaptionOptions
from caption_train.data.formats import describe_unread
from caption_train.errors import UsageError
from caption_train.families.base import Family, Generated


@dataclass(frozen=True)
class CaptionPlan:
    """What a captioning run works on.

    Attributes:
        images: all images that were asked for, in order.
        pending: those of them that are captioned now.
        missing: one line per image that is not there.
        base: the model and its prompt.
        unread: a line for each image format in the folders that is not read.
    """

    images: Sequence[Path]
    pending: Sequence[Path]
    missing: Sequence[str]
    base: Base
    unread: Sequence[str] = ()


def open_outputs(options: CaptionOptions, family: Family, rank: int = 0) -> Outputs:
    """Return what one process writes captions to.

    Args:
        options: the options of the run.
        family: draws the answers for `--visualize`.
        rank: the rank of this process.

    Raises:
        UsageError: the family has no answers that can be drawn.
    """
    sinks: list[Sink] = []
    existing = Existing.from_options(options)
    if options.save_captions:
        sinks.append(Sidecars(options.caption_extension, existing=existing, rank=rank))
    if options.output:
        sinks.append(CaptionFile(options.output, rank, existing=existing))
    if options.visualize:
        if not family.draws_answers:
            raise UsageError(f"--visualize: {family.title} gives no boxes to draw")
        sinks.append(Drawings(options.visualize, family.draw_answer))
    return Outputs(sinks, adds=existing.adds)


def make_plan(options: CaptionOptions, family: Family, outputs: Outputs) -> CaptionPlan:
    """Find images and model; raise UsageError if something cannot work."""
    inputs = find_inputs(options.images, recursive=options.recursive)
    adapter = read_adapter(options.peft_model) if options.peft_model else None
    prompt, settings = read_request(options, family)
    if options.endpoint:
        base = name_served(family, options.model, prompt, settings, adapter)
    else:
        base = resolve_base(family, options.base_model, options.revision, prompt, adapter, settings=settings)
    pending = outputs.find_pending(inputs.images)
    return CaptionPlan(inputs.images, pending, inputs.missing, base, describe_unread(inputs.unread))


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
