"""Decides which images to caption, with which model and prompt, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from caption_train.adapters.record import Base, name_served, read_adapter, read_request, resolve_base
from caption_train.captioning.drawings import Drawings
from caption_train.captioning.inputs import find_inputs
from caption_train.captioning.outputs import Outputs
from caption_train.config.captioning import CaptionOptions
from caption_train.errors import UsageError
from caption_train.families.base import Family


@dataclass(frozen=True)
class CaptionPlan:
    """What a captioning run works on.

    Attributes:
        images: all images that were asked for, in order.
        pending: those of them that are captioned now.
        missing: one line per image that is not there.
        base: the model and its prompt.
    """

    images: Sequence[Path]
    pending: Sequence[Path]
    missing: Sequence[str]
    base: Base


def make_plan(options: CaptionOptions, family: Family, outputs: Outputs) -> CaptionPlan:
    """Find images and model; raise UsageError if something cannot work."""
    inputs = find_inputs(options.images, recursive=options.recursive)
    if options.visualize:
        if not family.draws_answers:
            raise UsageError(f"--visualize: {family.title} gives no boxes to draw")
        # Made only to check that no drawing would replace an image.
        Drawings(options.visualize, inputs.images)
    adapter = read_adapter(options.peft_model) if options.peft_model else None
    prompt, settings = read_request(options, family)
    if options.endpoint:
        base = name_served(family, options.model, prompt, settings, adapter)
        return CaptionPlan(inputs.images, outputs.find_pending(inputs.images), inputs.missing, base)
    base = resolve_base(family, options.base_model, options.revision, prompt, adapter, settings=settings)
    return CaptionPlan(inputs.images, outputs.find_pending(inputs.images), inputs.missing, base)
